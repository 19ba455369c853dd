"""Optional packages: math-verify in the pool, py3langid, reasoning-gym (a stand-in where it is not installed); clear errors."""

import importlib.util
import sys
import types
from typing import Any

import pytest

from grpo.data import load_rows
from rewards import gym
from rewards.base import Sample
from rewards.language import language_share
from rewards.pool import FunctionSpec, WorkerPool
from rewards.registry import load

ENGLISH = "We add the two numbers and divide the sum by four to get the answer. Then we check that it is a whole number below ten."
GERMAN = "Wir addieren die beiden Zahlen und teilen die Summe durch vier. Dann prüfen wir, ob das Ergebnis eine ganze Zahl unter zehn ist."


@pytest.mark.parametrize(
    ("name", "arguments", "extra"),
    [("math_verify", {}, "math-verify"), ("reasoning_gym", {}, "reasoning-gym"), ("language", {"detector": "py3langid"}, "language")],
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    name: str, arguments: dict[str, str], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name if name != "language" else "py3langid", None)
    with pytest.raises(ValueError, match=rf"needs a package that is not installed: pip install -e '\.\[{extra}\]'"):
        load(name, arguments)


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")
def test_math_verify_runs_in_the_pool_and_its_hangs_are_killed() -> None:
    answers = [r"\frac{1}{2}", "0.5", "0.4", "9^{9^{9^9}}", "<think> 0.5 </think>", r"$\frac{2}{4}$"]
    completions = [answer if "think" in answer else f"<think> a </think> <answer> {answer} </answer>" for answer in answers]
    with WorkerPool([FunctionSpec(name="math_verify")], workers=1, deadline_s=3.0) as pool:
        rows = pool.submit([Sample(prompt="", completion=completion, answer=r"\frac{1}{2}") for completion in completions]).result(timeout=120)
    assert [row[0].value for row in rows[:3]] == [1.0, 1.0, 0.0]
    assert rows[3][0].value != 1.0  # refused, out of memory or killed, whichever comes first
    assert [row[0].value for row in rows[4:]] == [0.0, 1.0]


@pytest.mark.skipif(importlib.util.find_spec("py3langid") is None, reason="needs py3langid")
def test_a_detector_tells_languages_of_one_script_apart() -> None:
    assert language_share(f"<think>{GERMAN}</think>", language="en") == 1.0
    assert language_share(f"<think>{GERMAN}</think>", language="en", detector="py3langid") == 0.0
    assert language_share(f"<think>{ENGLISH}</think>", language="en", detector="py3langid") == 1.0
    assert 0.3 < language_share(f"<think>{ENGLISH} {GERMAN}</think>", language="en", detector="py3langid") < 0.7
    assert language_share("<think>Also 12.</think>", language="en", detector="py3langid") == 1.0


def test_an_unknown_detector_is_refused() -> None:
    with pytest.raises(ValueError, match="neither script nor py3langid"):
        language_share(ENGLISH, detector="tarot")  # type: ignore[arg-type]


class ProceduralDataset:
    """The package's base class as far as the adapter sees it."""

    answer = "7"

    def __init__(self, size: int = 2, seed: int = 0) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": f"q{index}?", "answer": self.answer, "metadata": {"numbers": [1, 2, 4], "target": 7}}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return 0.9


class Partial(ProceduralDataset):
    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        if not answer.isdecimal():
            raise ValueError(answer)
        return 1.0 if int(answer) % 2 else 0.5


class Evaluating(ProceduralDataset):
    executed = False

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return self._judge(answer)

    def _judge(self, answer: str) -> float:
        return float(eval(answer) == 7)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"chain_sum": ProceduralDataset, "odd": Partial, "expression": Evaluating, "countdown": Evaluating}
    module, factory = types.ModuleType("reasoning_gym"), types.ModuleType("reasoning_gym.factory")
    module.__spec__ = importlib.util.spec_from_loader("reasoning_gym", loader=None)
    factory.DATASETS = known  # type: ignore[attr-defined]
    module.create_dataset = lambda task, **settings: known[task](**settings)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    for cached in (gym._dataset, gym._entry, gym.judge):
        cached.cache_clear()


def score(task: str, answer: str) -> float | None:
    completion = f"<think> 7 </think> <answer> {answer} </answer>"
    return gym.reasoning_gym(completion=completion, gym_task=task, gym_config="{}", gym_index=0).value


@pytest.mark.usefixtures("package")
def test_gym_tasks_are_judged_without_evaluating_text() -> None:
    assert [gym.judge(task, "{}") for task in ("chain_sum", "odd", "expression", "countdown")] == ["text", "package", "text", "countdown"]
    assert [score("chain_sum", answer) for answer in ("7", "7.0", "8", "the sum of 3 and 4")] == [1.0, 1.0, 0.0, 0.0]
    assert [score("odd", answer) for answer in ("7", "9", "8", "x")] == [1.0, 1.0, 0.0, 0.0]  # partial credit is none
    assert [score("expression", answer) for answer in ("7", "3 + 4", "__import__('os').getpid() and 7")] == [1.0, 0.0, 0.0]
    assert [score("countdown", answer) for answer in ("1 + 2 + 4", "4 + 2 + 1 = 7", "7", "4 + 4 - 1")] == [1.0, 1.0, 0.0, 0.0]
    assert gym.reasoning_gym(completion="7").value is None


@pytest.mark.usefixtures("package")
def test_gym_rows_name_their_entry_and_faults_are_one_line() -> None:
    rows = load_rows("reasoning-gym:chain_sum?size=3&seed=5")
    assert [(row.question, row.answer, row.meta["gym_index"]) for row in rows] == [(f"q{index}?", "7", index) for index in range(3)]
    assert rows[0].meta["gym_task"] == "chain_sum"
    assert rows[0].meta["gym_config"] == '{"seed": 5, "size": 3}'
    assert len(load_rows("reasoning-gym:odd", limit=1)) == 1
    with pytest.raises(ValueError, match="no task 'chain_sun'; near it: chain_sum"):
        load_rows("reasoning-gym:chain_sun")
    with pytest.raises(ValueError, match="unexpected keyword argument 'sise'"):
        load_rows("reasoning-gym:odd?sise=3")


def test_gym_data_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"reasoning-gym is not installed: pip install -e '\.\[reasoning-gym\]'"):
        load_rows("reasoning-gym:chain_sum")


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs reasoning-gym")
def test_every_task_of_the_real_package_accepts_its_own_answer() -> None:
    from reasoning_gym.factory import DATASETS

    for task in sorted(set(DATASETS) - {"composite"}):
        entry = gym._entry(task, '{"seed": 1, "size": 1}', 0)
        assert gym.is_right(task, '{"seed": 1, "size": 1}', 0, str(entry["answer"])), task
        assert not gym.is_right(task, '{"seed": 1, "size": 1}', 0, "no idea, 3"), task
