"""The completions of an evaluation on disk, and going on with one that was interrupted.

    NAME.jsonl          every completion, one line, as groups are finished
    NAME.partial.json   the settings, while the evaluation is not complete
    NAME.json           the report, at the end; it holds the settings too

A group is kept if all its lines are there and the settings are the same. A token's draw depends on seed, prompt and sample
alone, so an evaluation in two parts is the evaluation in one. Leaves out sampling and the numbers (grpo/evaluate.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from grpo.data_types import EvalReport, Metric, Prompt

GREEDY = "greedy"
"""The sample number of a greedy completion in the JSONL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSample:
    """What stays in memory of one completion."""

    correct: bool
    answer: str | None
    well_formed: bool
    truncated: bool
    num_tokens: int
    unscored: bool


class CompletionStore:
    """Where completions go; `path` None keeps nothing. Use it as a context manager.

    Args:
        settings: everything the completions depend on, as plain JSON values. num_samples: lines of a complete group.
        resume: go on with what is there; otherwise it is overwritten.

    Raises:
        ValueError: `resume`, and what is there was made with other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], *, num_samples: int, resume: bool) -> None:
        self.path = path
        self._settings = plain(settings)
        self._file: TextIO | None = None
        self.sampled: dict[str, list[EvalSample]] = {}
        """Complete groups of an earlier part, by prompt id."""
        self.greedy: dict[str, list[EvalSample]] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._earlier(path, num_samples) if resume and path.exists() else []
        partial = path.with_suffix(".partial.json")
        partial.write_text(json.dumps({"settings": self._settings}, indent=2) + "\n", encoding="utf-8")
        kept = path.with_suffix(".jsonl.tmp")
        kept.write_text("".join(lines), encoding="utf-8")
        kept.replace(path)
        path.with_suffix(".json").unlink(missing_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def _earlier(self, path: Path, num_samples: int) -> list[str]:
        """The lines of complete groups; fills `sampled` and `greedy`."""
        partial = path.with_suffix(".partial.json")
        finished = path.with_suffix(".json")  # complete, but asked for other k
        source = partial if partial.is_file() else finished if finished.is_file() else None
        saved = None if source is None else json.loads(source.read_text(encoding="utf-8")).get("settings")
        check_settings(path, saved, self._settings)
        groups: dict[tuple[str, bool], list[tuple[str, EvalSample]]] = {}
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                row = json.loads(line)
                greedy = row["sample"] == GREEDY
                groups.setdefault((row["prompt_id"], greedy), []).append((line + "\n", _sample(row)))
            except (ValueError, KeyError, TypeError):
                continue  # the line that was being written
        kept = {key: rows for key, rows in groups.items() if len(rows) == (1 if key[1] else num_samples)}
        for (prompt_id, greedy), rows in kept.items():
            (self.greedy if greedy else self.sampled)[prompt_id] = [sample for _, sample in rows]
        return [line for rows in kept.values() for line, _ in rows]

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """One finished group."""
        if self._file is not None:
            self._file.write("".join(json.dumps(row) + "\n" for row in rows))
            self._file.flush()

    def finish(self, report: EvalReport) -> None:
        """Write the report beside the completions."""
        if self.path is not None:
            save_report(report, self.path.with_suffix(".json"))
            self.path.with_suffix(".partial.json").unlink(missing_ok=True)

    def __enter__(self) -> CompletionStore:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def check_settings(path: Path, saved: Any, wanted: Mapping[str, Any]) -> None:
    """Raises ValueError unless an earlier evaluation at `path` had the settings that are wanted now."""
    wanted = plain(wanted)
    if saved == wanted:
        return
    found = saved if isinstance(saved, dict) else {}
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    first = changed[0] if changed else "settings"
    raise ValueError(
        f"{path} holds an evaluation with other settings ({', '.join(changed) or 'more of them'}: {found.get(first)!r} then, "
        f"{wanted.get(first)!r} now); give another --output, or delete it"
    )


def finished_report(path: Path, settings: Mapping[str, Any]) -> EvalReport | None:
    """The report of an evaluation at `path` that is complete; None where there is none.

    Raises:
        ValueError: it was made with other settings, or is no report.
    """
    place = path.with_suffix(".json")
    if not place.is_file():
        return None
    report = load_report(place)
    check_settings(path, report.settings, settings)
    return report


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A short hash of ids, texts and answers."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.prompt_id}\0{prompt.text}\0{prompt.answer}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def row_of(
    prompt: Prompt, number: int | str, sample: EvalSample, *, text: str, finish_reason: str, scores: Mapping[str, float | None]
) -> dict[str, Any]:
    """One line of the JSONL."""
    return {
        "prompt_id": prompt.prompt_id,
        "sample": number,
        "question": prompt.question,
        "gold": prompt.answer,
        "text": text,
        "answer": sample.answer,
        "correct": sample.correct,
        "scores": dict(scores),
        "well_formed": sample.well_formed,
        "finish_reason": finish_reason,
        "num_tokens": sample.num_tokens,
        "unscored": sample.unscored,
    }


def _sample(row: Mapping[str, Any]) -> EvalSample:
    return EvalSample(
        correct=row["correct"],
        answer=row["answer"],
        well_formed=row["well_formed"],
        truncated=row["finish_reason"] == "length",
        num_tokens=row["num_tokens"],
        unscored=row["unscored"],
    )


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they come back from JSON."""
    return json.loads(json.dumps(dict(settings)))


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
        curves = {
            name: {int(k): Metric(**metric) for k, metric in points.items()} for name, points in fields.pop("curves", {}).items()
        }  # JSON keys are text
        return EvalReport(metrics=metrics, curves=curves, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not an evaluation report: {error}") from error
