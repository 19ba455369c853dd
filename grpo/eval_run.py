"""`nsa-grpo eval`: checkpoints × datasets → tables, JSONL, reports and the Maj@K / Pass@K figure.

    nsa-grpo eval runs/gsm8k/checkpoints/final --data test.jsonl evaluation.samples=16 evaluation.k=[1,8,16] --output evals/final

Each checkpoint is loaded once, and asked with the prompt settings saved beside it. With --output an evaluation that was
interrupted goes on where it was, and a complete one is only read. Leaves out how one evaluation is made (grpo/evaluate.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from grpo.config import RunConfig, apply_overrides, build_config
from grpo.data_types import EvalReport
from grpo.evaluate import evaluate, report_table
from grpo.prompt_settings import load_prompt_settings


def run_eval(checkpoints: Sequence[str], *, data: Sequence[str], overrides: Sequence[str] = (), output: str | Path | None = None) -> list[EvalReport]:
    """Evaluate every checkpoint on every dataset and print one table per dataset. Returns reports, checkpoint by checkpoint.

    Raises:
        ValueError, FileNotFoundError: no such checkpoint or data, unusable settings, or `output` holds another evaluation.
    """
    console = Console()
    configs = [[eval_config(checkpoint, dataset, overrides) for dataset in data] for checkpoint in checkpoints]
    reports: dict[str, list[EvalReport]] = {dataset: [] for dataset in data}
    for number, (checkpoint, of_checkpoint) in enumerate(zip(checkpoints, configs)):
        name = checkpoint.rstrip("/")
        paths = [None if output is None else Path(output) / f"{_file_name(number, name, dataset, data)}.jsonl" for dataset in data]
        with console.status(f"evaluating {name} ({number + 1} of {len(configs)})"):
            for dataset, report in zip(data, _evaluate_checkpoint(of_checkpoint, data, name, paths)):
                reports[dataset].append(report)
    for dataset in data:
        console.print(report_table(reports[dataset], title=dataset))
    if output is not None:
        figures = _figures(reports, Path(output))
        console.print(f"reports and completions: {output}", markup=False, highlight=False)
        for figure in figures:
            console.print(f"figure: {figure}", markup=False, highlight=False)
    return [reports[dataset][number] for number in range(len(checkpoints)) for dataset in data]


def _file_name(number: int, checkpoint: str, dataset: str, data: Sequence[str]) -> str:
    name = f"{number:02d}-{Path(checkpoint).name}"
    return name if len(data) == 1 else f"{name}-{_short(dataset, data)}"


def _short(dataset: str, data: Sequence[str]) -> str:
    """A name for files: the dataset's last part, with its place where two share it."""
    names = ["".join(char if char.isalnum() or char in "-_" else "_" for char in Path(other).name.split(".")[0]) for other in data]
    place = list(data).index(dataset)
    return names[place] if names.count(names[place]) == 1 else f"{names[place]}-{place}"


def _figures(reports: dict[str, list[EvalReport]], folder: Path) -> list[Path]:
    """The Maj@K / Pass@K figure of each dataset that was sampled more than once."""
    from grpo.report_plots import write_curves

    written = []
    for dataset, of_dataset in reports.items():
        if any(len(report.curves.get("maj", ())) > 1 for report in of_dataset):
            suffix = "" if len(reports) == 1 else f"-{_short(dataset, list(reports))}"
            written.append(write_curves(of_dataset, folder / f"maj-pass{suffix}.png", title=dataset))
    return written


def eval_config(checkpoint: str, data: str, overrides: Sequence[str]) -> RunConfig:
    """The run configuration whose training problems are those to evaluate on."""
    saved = load_prompt_settings(checkpoint)
    tree: dict[str, Any] = {"name": "eval", "model": {"path": checkpoint}, "data": {"train": data}}
    if saved is not None:
        tree["prompt"] = saved.model_dump(mode="json")
    config = build_config(RunConfig, apply_overrides(tree, overrides))
    section = config.data.model_copy(update={"split": config.data.eval_split, "limit": config.data.eval_limit, "eval": None})
    max_tokens = config.evaluation.max_tokens or config.rollout.max_tokens
    return config.model_copy(update={"data": section, "rollout": config.rollout.model_copy(update={"max_tokens": max_tokens})})


def _evaluate_checkpoint(configs: Sequence[RunConfig], data: Sequence[str], checkpoint: str, paths: Sequence[Path | None]) -> list[EvalReport]:
    """Load the checkpoint into an engine of this process and evaluate it on the problems of each configuration."""
    from grpo.problems import load_problems
    from grpo.runtime import build_engine
    from grpo.scoring import Scorer

    config = configs[0]
    problems = [load_problems(each).train for each in configs]
    names = [spec.name for spec in config.rewards.functions]
    identity = {
        "checkpoint": checkpoint,
        "weights": _weights(config.model.path),
        "dtype": config.model.dtype,
        "prompt": config.prompt.model_dump(mode="json"),
        "rewards": config.rewards.model_dump(mode="json", include={"functions", "failure_value"}),
    }
    with Scorer(config.rewards, prefilled=config.prompt.prefill_think) as scorer:
        engine = build_engine(config)
        try:
            return [
                evaluate(
                    engine,
                    scorer,
                    prompts,
                    section=config.evaluation,
                    max_tokens=config.rollout.max_tokens,
                    stop=config.rollout.stop,
                    prefilled=config.prompt.prefill_think,
                    dataset=dataset,
                    checkpoint=checkpoint,
                    jsonl_path=path,
                    reward="accuracy" if "accuracy" in names else names[0],
                    resume=path is not None,
                    identity=identity,
                )
                for prompts, dataset, path in zip(problems, data, paths)
            ]
        finally:
            engine.close()


def _weights(path: str) -> str:
    """A short hash of the weight files' sizes and times, "" for a hub name: another checkpoint under the same name is seen."""
    files = sorted(Path(path).expanduser().glob("*.safetensors"))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16] if facts else ""
