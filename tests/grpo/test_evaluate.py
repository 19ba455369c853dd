"""Evaluation with an engine and a scorer of canned answers: metrics, votes by value, JSONL, reports, prompt settings."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from grpo.config import EvaluationSection, PromptSection
from grpo.data_types import Completion, Group, Metric, Prompt, Score
from grpo.eval_run import eval_config
from grpo.eval_store import EvalSample, load_report, save_report
from grpo.evaluate import _votes, evaluate, metric_text, report_table
from grpo.metrics import maj_at_k
from grpo.prompt_settings import load_prompt_settings, save_prompt_settings
from grpo.rollout.engine import Sampling


class CannedEngine:
    """Gives each prompt's sampled answers in turn, and the first one for greedy decoding."""

    def __init__(self, answers: dict[str, list[str]]) -> None:
        self.answers = answers
        self.requests: list[Sampling] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        self.requests.append(sampling)
        for prompt in reversed(prompts):  # not in the prompts' order
            texts = self.answers[prompt.prompt_id][: sampling.group_size]
            yield Group(prompt=prompt, completions=tuple(_completion(text) for text in texts))


class ExactScorer:
    """Accuracy by string equality with the gold answer; an answer of "?" cannot be scored."""

    def score(self, groups: Iterable[Group]) -> Iterator[tuple[Group, tuple[Score, ...]]]:
        for group in groups:
            yield group, tuple(self._one(completion.text, group.prompt.answer) for completion in group.completions)

    def _one(self, text: str, gold: str) -> Score:
        answer = text.split("<answer> ")[1].split(" </answer>")[0] if "<answer>" in text else None
        value = None if answer == "?" else float(answer == gold)
        return Score(value=value, parts={"accuracy": value}, answer=answer)


def _completion(answer: str) -> Completion:
    text = answer if answer == "cut" else f" <think> so </think> <answer> {answer} </answer>"
    finish = "length" if answer == "cut" else "stop"
    return Completion(token_ids=(1, 2, 3), logprobs=(0.0, 0.0, 0.0), text=text, finish_reason=finish, policy_version=0)


def _prompt(number: int, answer: str) -> Prompt:
    return Prompt(prompt_id=f"p{number}", token_ids=(5,), question=f"q{number}", answer=answer, text="")


ANSWERS = {"p0": ["4", "4", "5", "4"], "p1": ["1", "2", "cut", "2"], "p2": ["9", "?", "8", "9"]}
PROMPTS = [_prompt(0, "4"), _prompt(1, "1"), _prompt(2, "9")]


def _evaluate(**changes: object):
    section = EvaluationSection(samples=4, k=(1, 2, 4), seed=7)
    arguments: dict = {"section": section, "max_tokens": 16, "dataset": "sums", "checkpoint": "c", **changes}
    return evaluate(CannedEngine(ANSWERS), ExactScorer(), PROMPTS, **arguments)  # type: ignore[arg-type]


def test_metrics_equal_hand_counts() -> None:
    report = _evaluate(step=3)
    metrics = {name: metric.value for name, metric in report.metrics.items()}
    assert metrics["pass@1"] == metrics["avg@4"] == pytest.approx((3 / 4 + 1 / 4 + 2 / 4) / 3)
    assert metrics["pass@4"] == 1.0
    assert metrics["pass@2"] == pytest.approx((1 + 1 / 2 + 5 / 6) / 3)
    # p0: three of four; p1: "1" against two "2" (a cut sample has no vote); p2: two of four, the others differ
    assert metrics["maj@4"] == pytest.approx((1 + 0 + 1) / 3)
    assert metrics["greedy"] == 1.0
    assert report.metrics["greedy"].low < 1.0
    assert "maj@1" not in report.metrics
    assert report.extras["truncated_share"] == report.extras["unscored_share"] == pytest.approx(1 / 12)
    assert report.extras["well_formed_share"] == pytest.approx(11 / 12)
    assert report.extras["mean_length"] == 3.0
    assert report.extras["step"] == 3.0


def test_sampling_follows_the_section_and_greedy_is_a_request_of_its_own() -> None:
    engine = CannedEngine(ANSWERS)
    section = EvaluationSection(samples=4, k=(4,), seed=7, temperature=0.6, top_p=0.9, max_tokens=9)
    evaluate(engine, ExactScorer(), PROMPTS, section=section, max_tokens=16, stop=("</answer>",))  # type: ignore[arg-type]
    sampled, greedy = engine.requests
    assert (sampled.temperature, sampled.top_p, sampled.group_size, sampled.seed, sampled.max_tokens, sampled.stop) == (
        0.6,
        0.9,
        4,
        7,
        9,
        ("</answer>",),
    )
    assert (greedy.temperature, greedy.group_size, greedy.max_tokens) == (0.0, 1, 9)


def test_every_completion_is_written_with_its_scores_and_the_report_can_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "evals" / "step-000003.jsonl"
    report = _evaluate(jsonl_path=path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 3 * 4 + 3
    assert {row["sample"] for row in rows} == {0, 1, 2, 3, "greedy"}
    cut = next(row for row in rows if row["finish_reason"] == "length")
    assert (cut["prompt_id"], cut["answer"], cut["scores"], cut["well_formed"]) == ("p1", None, {"accuracy": 0.0}, False)
    assert load_report(path.with_suffix(".json")) == report
    assert report.completions_path == str(path)


def test_bad_requests_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one problem"):
        evaluate(CannedEngine({}), ExactScorer(), [], section=EvaluationSection(), max_tokens=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'elegance' as correctness, but the scorer only has accuracy"):
        _evaluate(reward="elegance")
    with pytest.raises(ValueError, match="occurs twice"):
        evaluate(CannedEngine(ANSWERS), ExactScorer(), [PROMPTS[0]] * 2, section=EvaluationSection(), max_tokens=4)  # type: ignore[arg-type]
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json is not an evaluation report"):
        load_report(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("votes", "gold", "expected"),
    [
        (["1/2", "0.5", "2", "2"], r"\frac12", 0.5),
        (["1/2", "0.5", r"\frac{1}{2}", "2", "2"], "0.5", 1.0),
        (["x=3", "3", "4", "4"], "3", 0.5),
        (["(1,2)", "(1, 2)", "(2,1)", "(2,1)", r"\left(1,2\right)"], "(1,2)", 1.0),
        (["50\\%", "0.5", r"\frac{1}{2}", "50", "50"], "50\\%", 1.0),
    ],
)
def test_votes_of_equal_value_form_one_class(votes: list[str], gold: str, expected: float) -> None:
    from rewards.math_equal import equivalent
    from rewards.voting import cluster

    samples = [_sample(vote, correct=equivalent(gold, vote)) for vote in votes]
    assert maj_at_k(_votes(samples, cluster), "correct", len(votes)) == expected
    if gold == r"\frac12":  # wrong answers of equal value stand together too
        assert len(set(_votes([_sample(vote, correct=False) for vote in votes], cluster))) == 2


def test_an_answer_that_says_nothing_has_no_vote() -> None:
    samples = [_sample(None, correct=False), _sample("  ", correct=False), _sample("7", correct=False)]
    assert _votes(samples, lambda texts: [-1 if not text.strip() else 0 for text in texts]) == [None, None, 0]


def _sample(answer: str | None, *, correct: bool) -> EvalSample:
    return EvalSample(correct=correct, answer=answer, well_formed=True, truncated=False, num_tokens=1, unscored=False)


def test_table_shows_every_report(tmp_path: Path) -> None:
    report = _evaluate()
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(report_table([report, report], labels=["before", "after"]))
    text = console.export_text()
    assert "before" in text
    assert "after" in text
    assert metric_text(report.metrics["pass@1"]) in text
    assert metric_text(Metric(value=0.5, low=0.25, high=0.75)) == "0.500 [0.25, 0.75]"
    save_report(report, tmp_path / "r.json")
    assert load_report(tmp_path / "r.json") == report


def test_prompt_settings_travel_with_the_checkpoint(tmp_path: Path) -> None:
    assert load_prompt_settings(tmp_path) is None
    section = PromptSection(template="none", prefill_think=True)
    save_prompt_settings(tmp_path, section)
    assert load_prompt_settings(tmp_path) == section
    template = tmp_path / "mine.txt"
    template.write_text("Q: {question}\nA:\n")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_prompt_settings(checkpoint, PromptSection(template=str(template)))
    template.unlink()
    loaded = load_prompt_settings(checkpoint)
    assert loaded is not None
    assert Path(loaded.template).read_text() == "Q: {question}\nA:\n"
    (checkpoint / "nsa_grpo_prompt.json").write_text("{")
    with pytest.raises(ValueError, match=r"nsa_grpo_prompt\.json is not JSON"):
        load_prompt_settings(checkpoint)


def test_eval_verb_uses_the_saved_prompt_unless_overridden(tmp_path: Path) -> None:
    save_prompt_settings(tmp_path, PromptSection(template="none"))
    config = eval_config(str(tmp_path), "problems.jsonl", ["data.eval_limit=5", "evaluation.max_tokens=33"])
    assert (config.prompt.template, config.data.train, config.data.split, config.data.limit) == ("none", "problems.jsonl", "test", 5)
    assert config.rollout.max_tokens == 33
    assert eval_config(str(tmp_path), "problems.jsonl", ["prompt.template=r1_zero"]).prompt.template == "r1_zero"


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_curves_run_over_powers_of_two_and_agree_with_the_metrics() -> None:
    report = _evaluate()
    assert sorted(report.curves["pass"]) == sorted(report.curves["maj"]) == [1, 2, 4]
    assert report.curves["pass"][2] == report.metrics["pass@2"]
    assert report.curves["maj"][4] == report.metrics["maj@4"]
    assert report.curves["maj"][1].value == pytest.approx(report.metrics["pass@1"].value)


def test_settings_are_recorded() -> None:
    settings = _evaluate(stop=("</answer>",), identity={"prompt": "r1_zero"}).settings
    assert {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": 16,
        "seed": 7,
        "samples": 4,
        "stop": ["</answer>"],
    }.items() <= settings.items()
    assert settings["prompt"] == "r1_zero"


class Interrupted(CannedEngine):
    """Dies after some groups."""

    def __init__(self, groups: int) -> None:
        super().__init__(ANSWERS)
        self.left = groups

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        for group in super().generate(prompts, sampling):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield group


@pytest.mark.parametrize("groups", [0, 2, 3, 5])
def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path: Path, groups: int) -> None:
    section = EvaluationSection(samples=4, k=(1, 4), seed=7)
    whole, path = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    arguments: dict = {"section": section, "max_tokens": 16, "dataset": "sums", "checkpoint": "c", "resume": True}
    expected = evaluate(CannedEngine(ANSWERS), ExactScorer(), PROMPTS, jsonl_path=whole, **arguments)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted(groups), ExactScorer(), PROMPTS, jsonl_path=path, **arguments)  # type: ignore[arg-type]
    assert not path.with_suffix(".json").exists()
    lines = path.read_text().split("\n")
    path.write_text("\n".join(lines[:-2]) + '\n{"prompt_id": "p')  # the last line was being written, its group is not complete
    engine = CannedEngine(ANSWERS)
    report = evaluate(engine, ExactScorer(), PROMPTS, jsonl_path=path, **arguments)  # type: ignore[arg-type]
    assert (report.metrics, report.curves) == (expected.metrics, expected.curves)
    assert sorted(map(str, _rows(path))) == sorted(map(str, _rows(whole)))
    assert not path.with_suffix(".partial.json").exists()
    again = CannedEngine(ANSWERS)
    assert evaluate(again, ExactScorer(), PROMPTS, jsonl_path=path, **arguments) == report  # type: ignore[arg-type]
    assert not again.requests  # complete: only read


def test_other_k_need_no_new_completions(tmp_path: Path) -> None:
    arguments: dict = {"jsonl_path": tmp_path / "e.jsonl", "resume": True}
    _evaluate(**arguments)
    engine = CannedEngine(ANSWERS)
    section = EvaluationSection(samples=4, k=(3,), seed=7)
    report = evaluate(engine, ExactScorer(), PROMPTS, section=section, max_tokens=16, **arguments)  # type: ignore[arg-type]
    assert "pass@3" in report.metrics
    assert not engine.requests


@pytest.mark.parametrize(
    ("change", "said"), [({"max_tokens": 17}, "max_tokens: 16 then, 17 now"), ({"identity": {"weights": "b"}}, "weights: None then, 'b' now")]
)
def test_an_evaluation_with_other_settings_is_not_continued(tmp_path: Path, change: dict, said: str) -> None:
    path = tmp_path / "e.jsonl"
    _evaluate(jsonl_path=path, resume=True)
    before = path.read_text()
    with pytest.raises(ValueError, match=said):
        _evaluate(jsonl_path=path, resume=True, **change)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="other settings"):
        _evaluate(jsonl_path=path, resume=True)
    assert path.read_text() == before


def test_the_figure_shows_both_curves_of_every_checkpoint(tmp_path: Path) -> None:
    from grpo.report_plots import write_curves

    path = write_curves([_evaluate(), _evaluate(checkpoint="d")], tmp_path / "figures" / "maj-pass.png", title="sums")
    assert path.stat().st_size > 10_000


def test_eval_verb_takes_several_checkpoints_and_datasets(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from grpo.cli import main

    data, other = tmp_path / "sums.jsonl", tmp_path / "other.jsonl"
    data.write_text("".join(json.dumps({"question": f"What is {a} + 2 =", "answer": str(a + 2)}) + "\n" for a in range(3)))
    other.write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")
    command = ["eval", str(tiny_model), str(tiny_model), "--data", str(data), "--data", str(other), "--output", str(tmp_path / "out")]
    command += ["prompt.template=none", "evaluation.samples=2", "evaluation.k=[1,2]", "evaluation.max_tokens=4", "model.device=cpu"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.count("pass@2") == 2
    names = {path.name for path in (tmp_path / "out").iterdir()}
    stem = tiny_model.name
    assert {f"{number:02d}-{stem}-{dataset}.{kind}" for number in (0, 1) for dataset in (data.stem, "other") for kind in ("json", "jsonl")} <= names
    assert {f"maj-pass-{data.stem}.png", "maj-pass-other.png"} <= names
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.jsonl")}
    assert main(command) == 0  # everything is there already
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.jsonl")}
    assert main([*command, "evaluation.temperature=0.5"]) == 2
    assert "other settings (temperature: 1.0 then, 0.5 now)" in " ".join(capsys.readouterr().err.split())
