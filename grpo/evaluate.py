"""Evaluation of a policy: sampled and greedy completions, scored and summed up as an EvalReport.

    prompts → engine (samples, greedy) → scorer → votes of equal value in one class → metrics.py → EvalReport, JSONL

Works on an engine and scorer that exist already: the trainer's, or those of `nsa-grpo eval` (grpo/eval_run.py). Leaves out
the statistics themselves (grpo/metrics.py), files (grpo/eval_store.py) and plots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from grpo.config import EvaluationSection
from grpo.data_types import EvalReport, Group, Metric, Prompt, Score
from grpo.eval_store import GREEDY, CompletionStore, EvalSample, fingerprint, finished_report, plain, row_of
from grpo.metrics import clustered_interval, maj_at_k, pass_at_k, wilson
from grpo.rollout.engine import Engine, Sampling

Cluster = Callable[[Sequence[str]], Sequence[int]]
"""Answers → one class number each, equal for answers of equal value; negative for an answer that says nothing."""


class GroupScorer(Protocol):
    """What `evaluate` needs of grpo.scoring.Scorer."""

    def score(self, groups: Iterable[Group]) -> Iterator[tuple[Group, tuple[Score, ...]]]: ...


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
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
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
        resume: go on with what `jsonl_path` has; a complete evaluation is only read. identity: what else the completions
            depend on (weights, template, rewards), kept in the report's settings and compared when resuming.

    Raises:
        ValueError: no prompts, a prompt id twice, a scorer without `reward`, or `resume` with other settings.
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
    request = {name: value for name, value in asdict(sampled).items() if name not in ("group_size", "record_selection")}
    what = {"samples": section.samples, "greedy": section.greedy, "prefilled": prefilled, "reward": reward, "data": fingerprint(prompts)}
    settings = plain({**request, **what, **(identity or {})})
    done = finished_report(jsonl_path, settings) if resume and jsonl_path is not None else None
    if done is not None and all(f"pass@{k}" in done.metrics for k in section.k):
        return done
    start = time.perf_counter()
    with CompletionStore(jsonl_path, settings, num_samples=section.samples, resume=resume) as store:
        samples = store.sampled | dict(_scored(engine, scorer, _missing(prompts, store.sampled), sampled, reward, prefilled, store, greedy=False))
        new = [*samples.values()][len(store.sampled) :]
        greedy_samples: dict[str, list[EvalSample]] = {}
        if section.greedy:
            greedy_samples = store.greedy | dict(
                _scored(engine, scorer, _missing(prompts, store.greedy), greedy, reward, prefilled, store, greedy=True)
            )
            new += [*greedy_samples.values()][len(store.greedy) :]
    problems = [samples[prompt.prompt_id] for prompt in prompts]
    metrics, curves = _metrics(problems, greedy_samples, section, cluster or _math_cluster)
    report = EvalReport(
        dataset=dataset,
        checkpoint=checkpoint,
        num_problems=len(prompts),
        samples_per_problem=section.samples,
        metrics=metrics,
        extras=_extras(problems, new, step, time.perf_counter() - start),
        completions_path=None if jsonl_path is None else str(jsonl_path),
        settings=settings,
        curves=curves,
    )
    store.finish(report)
    return report


def _missing(prompts: Sequence[Prompt], done: Mapping[str, Any]) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.prompt_id not in done]


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
    store: CompletionStore,
    *,
    greedy: bool,
) -> Iterator[tuple[str, list[EvalSample]]]:
    """Generate, score and write down; yields (prompt id, its samples) as the groups come."""
    from rewards.format import is_well_formed

    if not prompts:
        return
    for group, scores in scorer.score(engine.generate(prompts, sampling)):
        samples, rows = [], []
        for number, (completion, score) in enumerate(zip(group.completions, scores, strict=True)):
            if reward not in score.parts:
                raise ValueError(f"evaluation counts the reward {reward!r} as correctness, but the scorer only has {', '.join(score.parts)}")
            value = score.parts[reward]
            sample = EvalSample(
                correct=value is not None and value >= 1,
                answer=score.answer,
                well_formed=is_well_formed(completion.text, prefilled=prefilled),
                truncated=completion.finish_reason == "length",
                num_tokens=len(completion.token_ids),
                unscored=value is None or reward in score.timed_out,
            )
            samples.append(sample)
            name = GREEDY if greedy else number
            rows.append(row_of(group.prompt, name, sample, text=completion.text, finish_reason=completion.finish_reason, scores=score.parts))
        store.write(rows)
        yield group.prompt.prompt_id, samples


def _votes(samples: Sequence[EvalSample], cluster: Cluster) -> list[str | int | None]:
    """One class label per sample: "correct", the number of a class of wrong answers, or None."""
    wrong = [index for index, sample in enumerate(samples) if sample.answer is not None and not sample.correct]
    votes: list[str | int | None] = ["correct" if sample.correct else None for sample in samples]
    if wrong:
        for index, number in zip(wrong, cluster([str(samples[index].answer) for index in wrong]), strict=True):
            votes[index] = None if number < 0 else number
    return votes


def _metrics(
    problems: Sequence[Sequence[EvalSample]], greedy: Mapping[str, list[EvalSample]], section: EvaluationSection, cluster: Cluster
) -> tuple[dict[str, Metric], dict[str, dict[int, Metric]]]:
    """(metrics of the report, pass@K and maj@K over K)."""
    counts = [sum(sample.correct for sample in samples) for samples in problems]
    ladder = sorted({*(2**power for power in range(section.samples.bit_length()) if 2**power <= section.samples), *section.k})
    curves = {"pass": {k: clustered_interval([pass_at_k(section.samples, count, k) for count in counts]) for k in ladder}}
    if section.samples > 1:
        votes = [_votes(samples, cluster) for samples in problems]
        curves["maj"] = {k: clustered_interval([maj_at_k(vote, "correct", k) for vote in votes]) for k in ladder}
    metrics = {f"pass@{k}": curves["pass"][k] for k in section.k}
    metrics |= {f"maj@{k}": curves["maj"][k] for k in section.k if k > 1}
    metrics[f"avg@{section.samples}"] = clustered_interval([count / section.samples for count in counts])
    if greedy:
        metrics["greedy"] = wilson(sum(samples[0].correct for samples in greedy.values()), len(greedy))
    return metrics, curves


def _extras(samples: list[list[EvalSample]], new: list[list[EvalSample]], step: int | None, seconds: float) -> dict[str, float]:
    """`new` are the groups that were made in these `seconds`."""
    flat = [sample for group in samples for sample in group]
    extras = {
        "well_formed_share": sum(sample.well_formed for sample in flat) / len(flat),
        "truncated_share": sum(sample.truncated for sample in flat) / len(flat),
        "unscored_share": sum(sample.unscored for sample in flat) / len(flat),
        "mean_length": sum(sample.num_tokens for sample in flat) / len(flat),
        "seconds": seconds,
        "tokens_per_second": sum(sample.num_tokens for group in new for sample in group) / max(seconds, 1e-9),
    }
    if step is not None:
        extras["step"] = float(step)
    return extras


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
