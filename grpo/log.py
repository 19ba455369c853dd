"""What a run writes down and shows: metrics.jsonl, samples.jsonl, provenance, the progress display, and wandb where asked for.

Metrics carry TRL's names (`reward`, `completions/mean_length`, `kl`, `entropy`, …); phases are `time/<phase>` in seconds.
Every line is on disk when `log` returns. Leaves out plots (grpo/report.py) and wandb itself (grpo/wandb_log.py).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import yaml
from pydantic import BaseModel
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from grpo.config import LogSection

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
CONFIG_FILE = "config.yaml"
PROVENANCE_FILE = "provenance.json"

SAMPLE_COLUMNS = ("prompt_id", "question", "completion", "answer", "extracted", "reward", "advantage")
"""Columns of a sample row that the tables show; rows may carry more (parts, finish_reason, num_tokens, …)."""

# (metric, label, format) of the one-line summary and of the display's second row
_HEADLINE = (
    ("reward", "reward", ".3f"),
    ("completions/mean_length", "length", ".0f"),
    ("kl", "kl", ".2g"),
    ("entropy", "entropy", ".3f"),
    ("tokens_per_second", "tok/s", ".0f"),
)
_EVALUATION = re.compile(r"eval/(?:(?:pass|maj|avg)@\d+|greedy)")
_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "datasets", "sympy", "ray", "wandb", "vllm", "numpy", "safetensors")


def resolve_run_dir(section: LogSection, name: str) -> Path:
    """`log.run_dir` with {name} and {time} filled in."""
    return Path(section.run_dir.replace("{name}", name).replace("{time}", time.strftime("%Y%m%d-%H%M%S"))).expanduser()


def prepare_run_dir(config: BaseModel, section: LogSection, name: str) -> Path:
    """Make the folder of a new run and save config.yaml and provenance.json in it.

    Raises:
        ValueError: the folder already holds a run.
    """
    run_dir = resolve_run_dir(section, name)
    metrics = run_dir / METRICS_FILE
    if metrics.is_file() and metrics.stat().st_size > 0:
        raise ValueError(
            f"{run_dir} already holds a run: continue it with `nsa-grpo resume {run_dir}`, "
            "or give log.run_dir another name ({time} in it makes it unique)"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / CONFIG_FILE).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), encoding="utf-8")
    (run_dir / PROVENANCE_FILE).write_text(json.dumps(provenance(), indent=2) + "\n", encoding="utf-8")
    return run_dir


def provenance() -> dict[str, Any]:
    """Versions and the git state of the code that runs (commit None where it is not a checkout)."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": {name: package_version(name) for name in ("nsa-grpo", *_PACKAGES)},
        "git": git_state(Path(__file__).resolve().parent),
    }


def package_version(name: str) -> str | None:
    """Version of an installed distribution, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any]:
    """{"commit": hash or None, "dirty": bool or None} of the checkout that `folder` lies in."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain") if commit else None
    return {"commit": commit, "dirty": None if status is None else bool(status)}


class RunLogger:
    """Writes a run's lines and shows its progress; use as a context manager, or call `close`.

    `resume_step` is the step of the checkpoint that the run goes on from: lines of later steps (and a line cut off by a
    crash) are removed. None keeps whatever is there and appends.
    """

    def __init__(
        self,
        run_dir: str | Path,
        section: LogSection,
        *,
        name: str = "run",
        total_steps: int | None = None,
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
        console: Console | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._section = section
        self._console = console or Console()
        self._files: dict[str, TextIO] = {}
        for file_name in (METRICS_FILE, SAMPLES_FILE):
            path = self.run_dir / file_name
            _mend(path, resume_step)
            self._files[file_name] = path.open("a", encoding="utf-8")
        self._display = _Display(self._console, name, total_steps, resume_step or 0) if section.progress and self._console.is_terminal else None
        self._total_steps = total_steps
        self._wandb = None
        if section.wandb:
            from grpo.wandb_log import WandbLog

            self._wandb = WandbLog(self.run_dir, project=section.wandb_project, name=name, config=config or {}, warn=self.message)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line {"step": step, **metrics} and show it. Numbers that are not finite are written as null."""
        clean = {key: _finite(value) for key, value in metrics.items()}
        self._write(METRICS_FILE, {"step": step, **clean})
        if self._display is not None:
            self._display.update(step, clean)
        elif self._section.progress:
            self.message(summary_line(step, self._total_steps, clean))
        if self._wandb is not None:
            self._wandb.log(step, clean)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append sample completions, one line each with the step, and show the first `log.samples_per_step` of them."""
        for row in rows:
            self._write(SAMPLES_FILE, {"step": step, **row})
        shown = rows[: self._section.samples_per_step]
        if self._display is not None and shown:
            self._display.show_samples(step, shown)
        if self._wandb is not None and shown:
            self._wandb.table(step, SAMPLE_COLUMNS, [[_cell(row.get(column)) for column in SAMPLE_COLUMNS] for row in shown])

    def message(self, text: str) -> None:
        """One line to people, above the progress display."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Close files, display and wandb. Safe to call twice."""
        for file in self._files.values():
            file.close()
        if self._display is not None:
            self._display.close()
        if self._wandb is not None:
            self._wandb.close()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _write(self, file_name: str, record: Mapping[str, Any]) -> None:
        file = self._files[file_name]
        file.write(json.dumps(record, ensure_ascii=True, default=str) + "\n")
        file.flush()


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics.jsonl or samples.jsonl; [] where there is no file. A cut-off last line is left out."""
    path = Path(path)
    return list(_whole_lines(path.read_text(encoding="utf-8"))) if path.is_file() else []


def summary_line(step: int, total_steps: int | None, metrics: Mapping[str, float | None]) -> str:
    """`step 3/100 · reward 0.412 · length 45 · … · 1.8 s (rollout 0.9, update 0.8)`."""
    parts = [f"step {step}" + (f"/{total_steps}" if total_steps else "")]
    parts += [f"{label} {format(value, form)}" for key, label, form in _HEADLINE if (value := metrics.get(key)) is not None]
    if "reward" not in metrics and (loss := metrics.get("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    parts += [f"{key} {value:.3f}" for key, value in metrics.items() if value is not None and _EVALUATION.fullmatch(key)]
    seconds = metrics.get("step_time")
    phases = ", ".join(f"{name} {value:.2f}" for name, value in _phases(metrics))
    if seconds is not None or phases:
        parts.append(" ".join(([f"{seconds:.1f} s"] if seconds is not None else []) + ([f"({phases})"] if phases else [])))
    return " · ".join(parts)


def samples_table(title: str, rows: Iterable[Mapping[str, Any]], *, width: int = 600) -> Table:
    """A rich table of sample completions; long texts are cut in the middle to `width` characters."""
    table = Table(title=title, show_lines=True, expand=True)
    for column, ratio in (("question", 3), ("completion", 6), ("answer", 1), ("reward", 1)):
        table.add_column(column, ratio=ratio, overflow="fold")
    for row in rows:
        reward = row.get("reward")
        cells = [_cut(str(row.get("question", "")), width), _cut(str(row.get("completion", "")), width), str(row.get("answer", ""))]
        table.add_row(*(Text(cell) for cell in [*cells, "none" if reward is None else f"{float(reward):.2f}"]))
    return table


class _Display:
    """A live block at the terminal's foot: bar, headline numbers with time per phase, and the last sample table."""

    def __init__(self, console: Console, name: str, total_steps: int | None, first_step: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task(name, total=total_steps, completed=first_step)
        self._line = Text("")
        self._samples: Table | Text = Text("")
        self._live = Live(self._render(), console=console, refresh_per_second=4, transient=False)
        self._live.start()

    def _render(self) -> Group:
        return Group(self._progress, self._line, self._samples)  # a low terminal cuts the samples first

    def update(self, step: int, metrics: Mapping[str, float | None]) -> None:
        line = summary_line(step, None, metrics)
        if "reward" in metrics or "loss" in metrics:
            self._progress.update(self._task, completed=step)
            self._line = Text(line, overflow="fold")
            self._live.update(self._render())
        else:  # an evaluation: it stays on the screen
            self._progress.console.print(line, markup=False, highlight=False)

    def show_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._samples = samples_table(f"samples of step {step}", rows, width=300)
        self._live.update(self._render())

    def close(self) -> None:
        self._live.stop()


def _phases(metrics: Mapping[str, float | None]) -> list[tuple[str, float]]:
    return [(key.removeprefix("time/"), value) for key, value in metrics.items() if key.startswith("time/") and value is not None]


def _finite(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float) or value is None else str(value)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"


def _whole_lines(text: str) -> Iterable[dict[str, Any]]:
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def _mend(path: Path, resume_step: int | None) -> None:
    """Take out what a crash cut off and, with `resume_step`, the lines of later steps; the file is replaced whole."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    kept = [record for record in _whole_lines(text) if resume_step is None or int(record.get("step", 0)) <= resume_step]
    mended = "".join(json.dumps(record, ensure_ascii=True) + "\n" for record in kept)
    if mended != text:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(mended, encoding="utf-8")
        temporary.replace(path)
