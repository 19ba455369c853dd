"""The task file for lm-eval: the prompt is ours, and a completion without its stop string is scored as a whole one."""

import importlib.util
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "scripts" / "lm_eval"


def task():
    spec = importlib.util.spec_from_file_location("r1_zero_task", FOLDER / "r1_zero.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prompt_and_scores() -> None:
    module, doc = task(), {"question": "What is 1/4 + 1/4?", "answer": r"\frac{1}{2}"}
    assert module.prompt(doc).endswith("User: What is 1/4 + 1/4?. Assistant:")
    assert module.score(doc, ["<think> a </think> <answer> 0.5 "]) == {"accuracy": 1.0, "well_formed": 1.0}
    assert module.score(doc, ["<think> a </think> <answer> 0.4 "]) == {"accuracy": 0.0, "well_formed": 1.0}
    assert module.score(doc, ["<think> 0.5"]) == {"accuracy": 0.0, "well_formed": 0.0}


def test_the_task_file_names_functions_that_are_there() -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    fields = yaml.load((FOLDER / "r1_zero.yaml").read_text(), Loader=Loader)
    names = [fields[key].removeprefix("r1_zero.") for key in ("doc_to_text", "process_results")]
    assert all(callable(getattr(task(), name)) for name in names)
    assert {metric["metric"] for metric in fields["metric_list"]} == set(task().score({"answer": "1"}, [""]))
    with pytest.raises(KeyError):
        task().prompt({})
