"""Loading reward functions: names, files, modules, signatures, and every fault as one line."""

import importlib.util
import sys
from pathlib import Path

import pytest

from rewards.base import Sample
from rewards.registry import BUILTIN, EXTRAS, REQUIRED, load, names

SAMPLE = Sample(prompt="p", completion="<think>a</think><answer>4</answer>", answer="4", columns={"level": 3, "data_source": "mine"})


def write(folder: Path, text: str) -> str:
    path = folder / "rewards.py"  # a user may call the file like our package
    path.write_text(text)
    return str(path)


def test_every_builtin_name_loads() -> None:
    assert {"accuracy", "format", "tag_count", "language", "length", "repetition"} <= set(names())
    for name in BUILTIN:
        if name in EXTRAS and importlib.util.find_spec(EXTRAS[name][0]) is None:
            continue
        assert load(name, dict.fromkeys(REQUIRED.get(name, ()), 8)).style == "own"


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_a_builtin_without_an_argument_it_needs_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"reward {name} needs .*max_tokens"):
        load(name)


def test_the_three_signatures(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "def trl(prompts, completions, level, **columns): return [float(l) for l in level]\n"
        "def verl(data_source, solution_str, ground_truth, extra_info=None): return {'score': float(data_source == 'mine'), 'pred': 4}\n"
        "def own(prompt, completion, answer, **meta): return meta['level']\n"
        "def narrow(completion): return True\n"
        "async def later(prompts, completions, **columns): return [None for _ in prompts]\n"
        "async def later_own(completion, answer): return 0.25\n",
    )
    trl = load(f"{path}:trl")
    assert trl.style == "trl"
    assert [outcome.value for outcome in trl.many([SAMPLE, SAMPLE])] == [3.0, 3.0]
    verl = load(f"{path}:verl").one(SAMPLE)
    assert (verl.value, verl.answer) == (1.0, "4")
    assert load(f"{path}:own").one(SAMPLE).value == 3.0
    assert load(f"{path}:narrow").one(SAMPLE).value == 1.0
    assert [outcome.value for outcome in load(f"{path}:later").many([SAMPLE])] == [None]
    assert load(f"{path}:later_own").one(SAMPLE).value == 0.25


def test_a_file_named_like_our_package_does_not_shadow_it(tmp_path: Path) -> None:
    load(write(tmp_path, "def f(completion): return 1\n") + ":f")
    assert "rewards.registry" in sys.modules
    assert not hasattr(sys.modules["rewards"], "f")


def test_arguments_and_context_reach_the_function(tmp_path: Path) -> None:
    path = write(tmp_path, "def f(completion, bonus=0.0, prefilled=False): return bonus + prefilled\n")
    assert load(f"{path}:f", {"bonus": 2.0}, {"prefilled": True}).one(SAMPLE).value == 3.0
    with pytest.raises(ValueError, match=r"unknown argument bonsu; it takes bonus, completion, prefilled"):
        load(f"{path}:f", {"bonsu": 2.0})


def test_package_module_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_reward_module.py").write_text("def f(completion): return 0.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load("my_reward_module:f").one(SAMPLE).value == 0.5


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (None, "acuracy", "unknown reward 'acuracy'; did you mean accuracy"),
        (None, "nowhere.py:f", "no file nowhere.py"),
        (None, "no_such_module_here:f", "no_such_module_here cannot be imported: ModuleNotFoundError"),
        ("def reward(completion): return 1\n", "FILE:rewrad", "no function rewrad in .*; did you mean reward"),
        ("def reward(completion:\n", "FILE:reward", "cannot be loaded: line 1: SyntaxError"),
        ("import missing_thing\n", "FILE:reward", "cannot be loaded: ModuleNotFoundError"),
        ("raise SystemExit('stop')\n", "FILE:reward", "cannot be loaded: SystemExit"),
        ("reward = 3\n", "FILE:reward", "reward in .* is not callable"),
        ("def reward(text): return 1\n", "FILE:reward", r"parameters \(text\) fit none of"),
    ],
)
def test_a_fault_in_loading_is_one_clear_line(tmp_path: Path, source: str | None, name: str, message: str) -> None:
    if source is not None:
        name = name.replace("FILE", write(tmp_path, source))
    with pytest.raises(ValueError, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "fault", "detail"),
    [
        ("return float('nan')", "value", "nan"),
        ("return float('inf')", "value", "inf"),
        ("return 'high'", "value", "could not convert"),
        ("return {'points': 1}", "value", "no 'score'"),
        ("raise RuntimeError('boo')", "raised", "RuntimeError: boo"),
    ],
)
def test_bad_results_travel_as_values(tmp_path: Path, body: str, fault: str, detail: str) -> None:
    outcome = load(write(tmp_path, f"def f(completion):\n    {body}\n") + ":f").one(SAMPLE)
    assert (outcome.value, outcome.fault) == (None, fault)
    assert detail in outcome.detail


def test_a_list_of_the_wrong_length_or_no_list_is_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path, "def short(completions): return [1.0]\ndef none(completions): return None\n")
    assert [outcome.fault for outcome in load(f"{path}:short").many([SAMPLE, SAMPLE])] == ["value", "value"]
    assert "returned 1 values for 2" in load(f"{path}:short").many([SAMPLE, SAMPLE])[0].detail
    assert [outcome.fault for outcome in load(f"{path}:none").many([SAMPLE])] == ["value"]
