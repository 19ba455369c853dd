"""Evaluation of a checkpoint: sampled and greedy completions, scored and summed up as an EvalReport.

    nsa-grpo eval runs/gsm8k/checkpoints/final --data test.jsonl evaluation.samples=16 evaluation.k=[1,8,16]

    prompts → engine (samples, greedy) → scorer → votes of equal value in one class → metrics.py → EvalReport, JSONL

`evaluate` works on an engine and scorer that exist already (the trainer's); `run_eval` loads checkpoints for the CLI.
Leaves out the statistics themselves (grpo/metrics.py) and plots (grpo/report.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.table import Table

from grpo.config import EvaluationSection, RunConfig, apply_overrides, build_config
from grpo.data_types import EvalReport, Group, Metric, Prompt, Score
from grpo.metrics import clustered_interval, maj_at_k, pass_at_k, wilson
from grpo.prompt_settings import load_prompt_settings
from grpo.rollout.engine import Engine, Sampling

Cluster = Callable[[Sequence[str]], Sequence[int]]
"""Answers → one class number each, equal for answers of equal value; negative for an answer that says nothing."""

GREEDY = -1
"""The sample number of greedy completions in the JSONL."""


class GroupScorer(Protocol):
    """What `evaluate` needs of grpo.scoring.Scorer."""

    def score(self, groups: Iterable[Group]) -> Iterator[tuple[Group, tuple[Score, ...]]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """What stays in memory of one completion."""

    correct: bool
    answer: str | None
    well_formed: bool
    truncated: bool
    num_tokens: int
    unscored: bool


def evaluate(
    engine: Engine,
    scorer: GroupScorer,
    prompts: Sequence[Prompt],
    *,
    section: EvaluationSection,
    max_tokens: int,
    stop: tuple[str, ...] = (),
    prefilled: bool = False,
    dataset: str = "",
    checkpoint: str = "",
    step: int | None = None,
    jsonl_path: Path | None = None,
    reward: str = "accuracy",
    seed: int | None = None,
    cluster: Cluster | None = None,
) -> EvalReport:
    """Sample every prompt `section.samples` times (and once greedily) and report pass@k, maj@k, avg@n and greedy accuracy.

    A completion is correct if its score's part `reward` is >= 1; one whose scoring failed counts as wrong and in
    `extras["unscored_share"]`. Votes of maj@k are the extracted answers, correct ones in one class and the others
    clustered by mathematical equality; no answer, no vote; ties count by chance (`uniform`).

    Args:
        max_tokens: length limit, unless section.max_tokens sets one.
        prefilled: the prompts end with `<think>`.
        jsonl_path: every completion goes there, one line each, and the report beside it as .json.
        seed: sampling seed; None: section.seed.
        cluster: groups wrong answers of equal value; None: `rewards.voting.cluster`.

    Raises:
        ValueError: no prompts, a prompt id twice, or a scorer without `reward`.
    """
    if not prompts:
        raise ValueError(f"evaluation needs at least one problem, got none{f' from {dataset}' if dataset else ''}")
    if len({prompt.prompt_id for prompt in prompts}) != len(prompts):
        raise ValueError("evaluation prompts must have different prompt_ids; one occurs twice")
    seed = section.seed if seed is None else seed
    limit = section.max_tokens or max_tokens
    sampled = Sampling(
        temperature=section.temperature, top_p=section.top_p, top_k=section.top_k, max_tokens=limit, stop=stop, seed=seed, group_size=section.samples
    )
    greedy = Sampling(temperature=0.0, max_tokens=limit, stop=stop, seed=seed)
    start = time.perf_counter()
    if jsonl_path is not None:
        jsonl_path.parent.mkdir(parents=True, exist_ok=True)
    file = jsonl_path.open("w", encoding="utf-8") if jsonl_path is not None else None
    try:
        samples = dict(_scored(engine, scorer, prompts, sampled, reward, prefilled, file, first_sample=0))
        greedy_samples = dict(_scored(engine, scorer, prompts, greedy, reward, prefilled, file, first_sample=GREEDY)) if section.greedy else {}
    finally:
        if file is not None:
            file.close()
    report = EvalReport(
        dataset=dataset,
        checkpoint=checkpoint,
        num_problems=len(prompts),
        samples_per_problem=section.samples,
        metrics=_metrics([samples[prompt.prompt_id] for prompt in prompts], greedy_samples, section, cluster or _math_cluster),
        extras=_extras([*samples.values()], [*greedy_samples.values()], step, time.perf_counter() - start),
        completions_path=None if jsonl_path is None else str(jsonl_path),
    )
    if jsonl_path is not None:
        save_report(report, jsonl_path.with_suffix(".json"))
    return report


def _math_cluster(answers: Sequence[str]) -> Sequence[int]:
    from rewards.voting import cluster

    return cluster(answers)


def _scored(
    engine: Engine,
    scorer: GroupScorer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    reward: str,
    prefilled: bool,
    file: TextIO | None,
    *,
    first_sample: int,
) -> Iterator[tuple[str, list[_Sample]]]:
    """Generate, score and write down; yields (prompt id, its samples) as the groups come."""
    from rewards.format import is_well_formed

    for group, scores in scorer.score(engine.generate(prompts, sampling)):
        samples = []
        for number, (completion, score) in enumerate(zip(group.completions, scores, strict=True), start=first_sample):
            if reward not in score.parts:
                raise ValueError(f"evaluation counts the reward {reward!r} as correctness, but the scorer only has {', '.join(score.parts)}")
            value = score.parts[reward]
            sample = _Sample(
                correct=value is not None and value >= 1,
                answer=score.answer,
                well_formed=is_well_formed(completion.text, prefilled=prefilled),
                truncated=completion.finish_reason == "length",
                num_tokens=len(completion.token_ids),
                unscored=value is None or reward in score.timed_out,
            )
            samples.append(sample)
            if file is not None:
                row = {
                    "prompt_id": group.prompt.prompt_id,
                    "sample": "greedy" if first_sample == GREEDY else number,
                    "question": group.prompt.question,
                    "gold": group.prompt.answer,
                    "text": completion.text,
                    "answer": score.answer,
                    "correct": sample.correct,
                    "scores": dict(score.parts),
                    "well_formed": sample.well_formed,
                    "finish_reason": completion.finish_reason,
                    "num_tokens": sample.num_tokens,
                }
                file.write(json.dumps(row) + "\n")
        if file is not None:
            file.flush()
        yield group.prompt.prompt_id, samples


def _votes(samples: Sequence[_Sample], cluster: Cluster) -> list[str | int | None]:
    """One class label per sample: "correct", the number of a class of wrong answers, or None."""
    wrong = [index for index, sample in enumerate(samples) if sample.answer is not None and not sample.correct]
    votes: list[str | int | None] = ["correct" if sample.correct else None for sample in samples]
    if wrong:
        for index, number in zip(wrong, cluster([str(samples[index].answer) for index in wrong]), strict=True):
            votes[index] = None if number < 0 else number
    return votes


def _metrics(
    problems: Sequence[Sequence[_Sample]], greedy: dict[str, list[_Sample]], section: EvaluationSection, cluster: Cluster
) -> dict[str, Metric]:
    counts = [sum(sample.correct for sample in samples) for samples in problems]
    metrics = {}
    for k in section.k:
        metrics[f"pass@{k}"] = clustered_interval([pass_at_k(section.samples, count, k) for count in counts])
    voting = [k for k in section.k if k > 1]
    if voting:
        votes = [_votes(samples, cluster) for samples in problems]
        for k in voting:
            metrics[f"maj@{k}"] = clustered_interval([maj_at_k(vote, "correct", k) for vote in votes])
    metrics[f"avg@{section.samples}"] = clustered_interval([count / section.samples for count in counts])
    if greedy:
        metrics["greedy"] = wilson(sum(samples[0].correct for samples in greedy.values()), len(greedy))
    return metrics


def _extras(samples: list[list[_Sample]], greedy: list[list[_Sample]], step: int | None, seconds: float) -> dict[str, float]:
    flat = [sample for group in samples for sample in group]
    every = flat + [sample for group in greedy for sample in group]
    extras = {
        "well_formed_share": sum(sample.well_formed for sample in flat) / len(flat),
        "truncated_share": sum(sample.truncated for sample in flat) / len(flat),
        "unscored_share": sum(sample.unscored for sample in flat) / len(flat),
        "mean_length": sum(sample.num_tokens for sample in flat) / len(flat),
        "seconds": seconds,
        "tokens_per_second": sum(sample.num_tokens for sample in every) / max(seconds, 1e-9),
    }
    if step is not None:
        extras["step"] = float(step)
    return extras


def save_report(report: EvalReport, path: Path) -> None:
    """Write a report as JSON."""
    path.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")


def load_report(path: Path) -> EvalReport:
    """Read what `save_report` wrote.

    Raises:
        ValueError: not such a file.
    """
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        metrics = {name: Metric(**metric) for name, metric in fields.pop("metrics").items()}
        return EvalReport(metrics=metrics, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not an evaluation report: {error}") from error


def run_eval(checkpoints: Sequence[str], *, data: str, overrides: Sequence[str] = (), output: str | Path | None = None) -> list[EvalReport]:
    """Evaluate checkpoints on the same problems and print a table: the `eval` verb.

    A checkpoint is asked with the prompt settings saved beside it, unless `overrides` (keys of a run's configuration)
    say otherwise. With `output`, every completion and each report are written to that folder.

    Raises:
        ValueError, FileNotFoundError: no such checkpoint or data, unusable settings.
    """
    from rich.console import Console

    console = Console()
    configs = [_eval_config(checkpoint, data, overrides) for checkpoint in checkpoints]
    reports = []
    for number, (checkpoint, config) in enumerate(zip(checkpoints, configs)):
        name = checkpoint.rstrip("/")
        jsonl_path = None if output is None else Path(output) / f"{number:02d}-{Path(name).name}.jsonl"
        with console.status(f"evaluating {name} ({number + 1} of {len(configs)})"):
            reports.append(evaluate_checkpoint(config, dataset=data, checkpoint=name, jsonl_path=jsonl_path))
    console.print(report_table(reports, title=data))
    if output is not None:
        console.print(f"reports and completions: {output}", markup=False, highlight=False)
    return reports


def _eval_config(checkpoint: str, data: str, overrides: Sequence[str]) -> RunConfig:
    """The run configuration whose training problems are those to evaluate on."""
    saved = load_prompt_settings(checkpoint)
    tree: dict[str, Any] = {"name": "eval", "model": {"path": checkpoint}, "data": {"train": data}}
    if saved is not None:
        tree["prompt"] = saved.model_dump(mode="json")
    config = build_config(RunConfig, apply_overrides(tree, overrides))
    section = config.data.model_copy(update={"split": config.data.eval_split, "limit": config.data.eval_limit, "eval": None})
    max_tokens = config.evaluation.max_tokens or config.rollout.max_tokens
    return config.model_copy(update={"data": section, "rollout": config.rollout.model_copy(update={"max_tokens": max_tokens})})


def evaluate_checkpoint(config: RunConfig, *, dataset: str, checkpoint: str, jsonl_path: Path | None = None) -> EvalReport:
    """Load `config.model.path` into an engine of this process and evaluate it on the problems of `config.data.train`."""
    from grpo.problems import load_problems
    from grpo.runtime import build_engine
    from grpo.scoring import Scorer

    problems = load_problems(config)
    names = [spec.name for spec in config.rewards.functions]
    scorer = Scorer(config.rewards, prefilled=config.prompt.prefill_think)
    try:
        engine = build_engine(config)
        try:
            return evaluate(
                engine,
                scorer,
                problems.train,
                section=config.evaluation,
                max_tokens=config.rollout.max_tokens,
                stop=config.rollout.stop,
                prefilled=config.prompt.prefill_think,
                dataset=dataset,
                checkpoint=checkpoint,
                jsonl_path=jsonl_path,
                reward="accuracy" if "accuracy" in names else names[0],
            )
        finally:
            engine.close()
    finally:
        scorer.close()


def metric_text(metric: Metric) -> str:
    """`0.731 [0.68, 0.78]`."""
    return f"{metric.value:.3f} [{metric.low:.2f}, {metric.high:.2f}]"


def report_table(reports: Sequence[EvalReport], *, title: str = "", labels: Sequence[str] | None = None) -> Table:
    """A rich table: one row per metric, one column per report."""
    table = Table(title=title or None, caption="value [95 % interval, clustered by problem; greedy: Wilson]")
    table.add_column("")
    for report, label in zip(reports, labels or [report.checkpoint for report in reports], strict=True):
        table.add_column(f"{label}\n{report.num_problems} problems × {report.samples_per_problem}", justify="right", overflow="fold")
    for name in dict.fromkeys(name for report in reports for name in report.metrics):
        table.add_row(name, *(metric_text(report.metrics[name]) if name in report.metrics else "" for report in reports))
    for name in ("well_formed_share", "truncated_share", "unscored_share", "mean_length", "tokens_per_second"):
        form = ".3f" if name.endswith("share") else ".0f"
        table.add_row(name.replace("_", " "), *(format(report.extras[name], form) if name in report.extras else "" for report in reports))
    return table
