"""A run's report: plots as PNG files and one self-contained page (images embedded, nothing loaded from elsewhere).

    nsa-grpo report runs/quickstart

Reads metrics.jsonl, samples.jsonl, evals/*.json, config.yaml and provenance.json, whichever of them are there. Text of the model
is escaped. Leaves out the drawing (grpo/report_plots.py).
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from grpo.data_types import EvalReport, Metric
from grpo.eval_store import load_report
from grpo.log import CONFIG_FILE, METRICS_FILE, PROVENANCE_FILE, SAMPLES_FILE, read_lines
from grpo.report_plots import evaluated_step, write_plots

PAGE_FILE = "report.html"
PLOT_FOLDER = "plots"
EVAL_FOLDER = "evals"
_NUM_SAMPLES = 4
_MAX_TEXT = 4000


def write_report(run_dir: str | Path, *, notes: Sequence[str] = ()) -> Path:
    """Write `run_dir`/plots/*.png and `run_dir`/report.html from what the run has logged so far.

    Args:
        notes: sentences for the top of the page.

    Returns:
        The page's path.

    Raises:
        ValueError: the folder has neither metrics nor evaluations.
    """
    run_dir = Path(run_dir)
    rows = read_lines(run_dir / METRICS_FILE)
    reports = load_evaluations(run_dir)
    if not rows and not reports:
        raise ValueError(f"{run_dir} has nothing to report: neither {METRICS_FILE} nor {EVAL_FOLDER}/*.json")
    plots = write_plots(rows, reports, run_dir / PLOT_FOLDER)
    config = _read_yaml(run_dir / CONFIG_FILE)
    parts = [
        _headline(run_dir, config, rows, reports, notes),
        _figures(plots),
        _evaluation_table(reports),
        _samples(read_lines(run_dir / SAMPLES_FILE)),
        _settings(run_dir, config),
    ]
    page = run_dir / PAGE_FILE
    page.write_text(_PAGE.replace("@TITLE@", _text(_name(run_dir, config))).replace("@BODY@", "\n".join(parts)), encoding="utf-8")
    return page


def load_evaluations(run_dir: Path) -> list[EvalReport]:
    """The run's evaluation reports, by step and then by file name."""
    reports = [(evaluated_step(report := load_report(path)) or 0, path.name, report) for path in sorted((run_dir / EVAL_FOLDER).glob("*.json"))]
    return [report for _, _, report in sorted(reports, key=lambda entry: entry[:2])]


def _read_yaml(path: Path) -> dict[str, Any]:
    tree = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return tree if isinstance(tree, dict) else {}


def _name(run_dir: Path, config: dict[str, Any]) -> str:
    return str(config.get("name") or run_dir.name)


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _headline(run_dir: Path, config: dict[str, Any], rows: list[dict[str, Any]], reports: list[EvalReport], notes: Sequence[str]) -> str:
    tiles = []
    if reports:
        first, last = reports[0], reports[-1]
        for name in last.metrics:
            if name.startswith("avg@"):
                continue
            after, before = last.metrics[name], first.metrics.get(name)
            change = f"{before.value:.2f} → " if before is not None and len(reports) > 1 else ""
            tiles.append((name, f"{change}<b>{after.value:.2f}</b>", f"95 %: {after.low:.2f}–{after.high:.2f}"))
    steps = max((int(row.get("step", 0)) for row in rows), default=0)
    seconds = sum(float(row.get("step_time") or 0) for row in rows)
    if steps:
        tiles.append(("steps", f"<b>{steps}</b>", f"{seconds / 60:.1f} min of training" if seconds else ""))
    cells = "".join(f'<div class="tile"><span>{_text(label)}</span><p>{value}</p><small>{_text(note)}</small></div>' for label, value, note in tiles)
    extra = "".join(f"<p>{_text(note)}</p>" for note in notes)
    return f'<header><h1>{_text(_name(run_dir, config))}</h1>{extra}</header><section class="tiles">{cells}</section>'


def _figures(plots: list[tuple[str, Path]]) -> str:
    figures = []
    for caption, path in plots:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        figures.append(f'<figure><img alt="{_text(caption)}" src="data:image/png;base64,{data}"><figcaption>{_text(caption)}</figcaption></figure>')
    return f'<section class="figures">{"".join(figures)}</section>' if figures else ""


def _metric_cell(metric: Metric | None) -> str:
    return "<td></td>" if metric is None else f"<td>{metric.value:.3f} <small>{metric.low:.2f}–{metric.high:.2f}</small></td>"


def _evaluation_table(reports: list[EvalReport]) -> str:
    if not reports:
        return ""
    names = [name for name in dict.fromkeys(name for report in reports for name in report.metrics) if not name.startswith("avg@")]  # = pass@1
    extras = [("well_formed_share", "well formed", ".3f"), ("truncated_share", "truncated", ".3f"), ("mean_length", "tokens", ".1f")]
    head = "".join(f"<th>{_text(name)}</th>" for name in ["step", "data", "problems × samples", *names, *(label for _, label, _ in extras)])
    body = []
    for report in reports:
        step = evaluated_step(report)
        cells = [
            f"<td>{'' if step is None else step}</td>",
            f"<td>{_text(Path(report.dataset).name)}</td>",
            f"<td>{report.num_problems} × {report.samples_per_problem}</td>",
            *(_metric_cell(report.metrics.get(name)) for name in names),
            *(f"<td>{format(report.extras[key], form) if key in report.extras else ''}</td>" for key, _, form in extras),
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    note = "Small figures are 95 % intervals: clustered by problem, Wilson's for greedy decoding. maj@k counts ties by chance."
    return f'<section><h2>Evaluations</h2><div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div><p class="note">{note}</p></section>'


def _samples(rows: list[dict[str, Any]]) -> str:
    """The first samples of the first and of the last step that has some."""
    if not rows:
        return ""
    steps = sorted({int(row.get("step", 0)) for row in rows})
    cards = []
    for step in dict.fromkeys([steps[0], steps[-1]]):
        chosen = [row for row in rows if int(row.get("step", 0)) == step][:_NUM_SAMPLES]
        cards.append(f"<h3>Step {step}</h3>" + "".join(_sample(row) for row in chosen))
    return f"<section><h2>Sample completions</h2>{''.join(cards)}</section>"


def _sample(row: dict[str, Any]) -> str:
    reward = row.get("reward")
    facts = {"gold": row.get("answer"), "answer": row.get("extracted"), "reward": None if reward is None else f"{float(reward):.2f}"}
    if row.get("advantage") is not None:
        facts["advantage"] = f"{float(row['advantage']):+.2f}"
    badges = "".join(f"<span>{_text(key)} <b>{_text('none' if value is None else value)}</b></span>" for key, value in facts.items())
    completion = str(row.get("completion", ""))
    cut = completion if len(completion) <= _MAX_TEXT else completion[:_MAX_TEXT] + " […]"
    return f'<article><p>{_text(row.get("question", ""))}</p><pre>{_text(cut)}</pre><div class="facts">{badges}</div></article>'


def _settings(run_dir: Path, config: dict[str, Any]) -> str:
    blocks = []
    if config:
        blocks.append(("Settings", yaml.safe_dump(config, sort_keys=False, allow_unicode=True)))
    provenance = run_dir / PROVENANCE_FILE
    if provenance.is_file():
        blocks.append(("Versions and code", json.dumps(json.loads(provenance.read_text(encoding="utf-8")), indent=2)))
    return "".join(f"<details><summary>{_text(title)}</summary><pre>{_text(text)}</pre></details>" for title, text in blocks)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@ · nsa-grpo</title>
<style>
:root { color-scheme: light; --ink: #1f2933; --muted: #66727f; --line: #e3e7eb; --blue: #2563a8; --back: #f6f7f9; }
body { margin: 0 auto; max-width: 1120px; padding: 32px 24px 64px; color: var(--ink); background: var(--back);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { margin: 0; font-size: 30px; letter-spacing: -.01em; }
h2 { margin: 40px 0 12px; font-size: 21px; }
h3 { margin: 20px 0 8px; font-size: 16px; color: var(--muted); }
header p { margin: 6px 0 0; color: var(--muted); }
.tile, figure, article, details, .wide { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin: 24px 0; }
.tile { padding: 12px 16px; }
.tile span, .tile small { color: var(--muted); font-size: 13px; }
.tile p { margin: 2px 0; font-size: 20px; }
.tile b { color: var(--blue); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 12px; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--muted); font-size: 13.5px; padding: 4px 6px 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14.5px; }
th, td { text-align: right; padding: 8px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; }
tr:last-child td { border-bottom: 0; }
td small { color: var(--muted); }
.note { color: var(--muted); font-size: 13.5px; }
article { padding: 12px 16px; margin: 0 0 10px; }
article p { margin: 0 0 6px; }
pre { margin: 0; padding: 10px 12px; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--back);
  border-radius: 6px; font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 8px; color: var(--muted); font-size: 13.5px; }
.facts b { color: var(--ink); }
details { padding: 12px 16px; margin-top: 16px; }
summary { cursor: pointer; font-weight: 600; }
details pre { margin-top: 10px; }
</style></head>
<body>
@BODY@
</body></html>
"""
