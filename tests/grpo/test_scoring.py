"""Scorer: parts and weights, streaming, columns, failures, and the check before a run."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo.config import RewardSpec, RewardsSection
from grpo.data_types import Completion, Group, Prompt
from grpo.scoring import Scorer


def group(*texts: str, answer: str = "4", number: int = 0, **meta: object) -> Group:
    prompt = Prompt(prompt_id=f"p{number}", token_ids=(1, 2), question="2+2?", answer=answer, text="User: 2+2? Assistant:", meta=dict(meta))
    completions = tuple(
        Completion(token_ids=(5,) * (index + 1), logprobs=(-1.0,) * (index + 1), text=text, finish_reason="stop", policy_version=0)
        for index, text in enumerate(texts)
    )
    return Group(prompt=prompt, completions=completions)


GOOD = "<think> a </think> <answer> 4 </answer>"
WRONG = "<think> a </think> <answer> 5 </answer>"
SLOPPY = "<answer> 4 </answer>"


def test_parts_are_unweighted_and_the_value_is_their_weighted_sum() -> None:
    with Scorer(RewardsSection(), prefilled=False) as scorer:
        ((returned, scores),) = scorer.score([group(GOOD, WRONG, SLOPPY, "")])
    assert returned.prompt.prompt_id == "p0"
    assert [score.parts for score in scores] == [
        {"accuracy": 1.0, "format": 1.0},
        {"accuracy": 0.0, "format": 1.0},
        {"accuracy": 1.0, "format": 0.0},
        {"accuracy": 0.0, "format": 0.0},
    ]
    assert [score.value for score in scores] == pytest.approx([1.1, 0.1, 1.0, 0.0])
    assert [score.answer for score in scores] == ["4", "5", "4", None]


def test_prefilled_prompts_are_scored_as_such() -> None:
    with Scorer(RewardsSection(), prefilled=True) as scorer:
        ((_, scores),) = scorer.score([group("a </think> <answer> 4 </answer>", GOOD, "it is 4")])
        assert [score.parts["format"] for score in scores] == [1.0, 0.0, 0.0]
        assert [score.parts["accuracy"] for score in scores] == [1.0, 1.0, 0.0]
        assert scorer.answers(["a </think> <answer> 4 </answer>", "it is 4"]) == ["4", None]


def test_groups_stream_in_order_while_more_are_sampled() -> None:
    events: list[str] = []

    def engine() -> Iterator[Group]:
        for number in range(4):
            events.append(f"sampled {number}")
            yield group(GOOD, number=number)
            time.sleep(0.3)

    with Scorer(RewardsSection(), prefilled=False) as scorer:
        for scored, _ in scorer.score(engine()):
            events.append(f"scored {scored.prompt.prompt_id[1:]}")
    assert [event for event in events if event.startswith("scored")] == [f"scored {number}" for number in range(4)]
    assert events.index("scored 0") < events.index("sampled 3")


def test_columns_reach_custom_functions_in_each_signature(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def trl(prompts, completions, completion_ids, answer, question, level, **columns):\n"
        "    assert question == ['2+2?'] * 2 and answer == ['4'] * 2 and [len(ids) for ids in completion_ids] == columns['num_tokens'] == [1, 2]\n"
        "    return [float(value) for value in level]\n"
        "def verl(data_source, solution_str, ground_truth, extra_info=None): return float(extra_info['level'] == 3 and ground_truth == '4')\n"
        "async def own(prompt, completion, answer, **meta): return meta['num_tokens'] + meta['level']\n"
    )
    specs = tuple(RewardSpec(name=f"{tmp_path / 'mine.py'}:{name}") for name in ("trl", "verl", "own"))
    with Scorer(RewardsSection(functions=specs), prefilled=False) as scorer:
        ((_, scores),) = scorer.score([group(GOOD, WRONG, level=3, extra=object())])
    assert [tuple(score.parts.values()) for score in scores] == [(3.0, 1.0, 4.0), (3.0, 1.0, 5.0)]


def test_failures_get_the_configured_value_and_are_counted(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "def f(completion):\n"
        "    if 'hang' in completion: time.sleep(100)\n"
        "    if 'raise' in completion: raise ValueError('boo')\n"
        "    return 1.0\n"
    )
    name = f"{tmp_path / 'mine.py'}:f"
    section = RewardsSection(functions=(RewardSpec(name=name),), deadline_s=0.4, failure_value=-1.0)
    with Scorer(section, prefilled=False, save_dir=tmp_path / "saved") as scorer:
        ((_, scores),) = scorer.score([group("ok", "hang", "raise")])
        assert [score.value for score in scores] == [1.0, -1.0, -1.0]
        assert [score.timed_out for score in scores] == [(), (name,), ()]
        assert scorer.metrics() == {"rewards/timeouts": 1.0, "rewards/failures": 1.0, "rewards/left_out": 0.0}
        assert scorer.metrics() == {"rewards/timeouts": 0.0, "rewards/failures": 0.0, "rewards/left_out": 0.0}
    assert len(list((tmp_path / "saved").iterdir())) == 1


def test_an_unreadable_gold_leaves_the_sample_out() -> None:
    with Scorer(RewardsSection(), prefilled=False) as scorer:
        ((_, scores),) = scorer.score([group(GOOD, answer="4?5")])
        assert scores[0].value is None
        assert scorer.metrics()["rewards/left_out"] == 1.0


def test_check_calls_every_reward_on_a_gold_answer(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(prompts, completions, **columns): raise KeyError('columns')\n")
    specs = (RewardSpec(name="accuracy"), RewardSpec(name="format"), RewardSpec(name=f"{tmp_path / 'mine.py'}:f"))
    for prefilled in (False, True):
        with Scorer(RewardsSection(functions=specs), prefilled=prefilled) as scorer:
            results = scorer.check([group(GOOD).prompt])
        assert [(result.value, result.fault) for result in results] == [(1.0, None), (1.0, None), (None, "raised: KeyError: 'columns'")]


def test_a_reward_that_cannot_be_loaded_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="unknown reward 'acuracy'; did you mean accuracy"):
        Scorer(RewardsSection(functions=(RewardSpec(name="acuracy"),)), prefilled=False)
