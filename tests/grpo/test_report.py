"""The report of a made-up run: plots, a self-contained page, escaped model text."""

import json
import math
from pathlib import Path

import pytest

from grpo.data_types import EvalReport, Metric
from grpo.eval_store import save_report
from grpo.report import load_evaluations, write_report
from grpo.report_plots import running_mean, series


def _report(step: int, value: float) -> EvalReport:
    metric = Metric(value=value, low=max(0.0, value - 0.1), high=min(1.0, value + 0.1))
    extras = {"step": float(step), "well_formed_share": 0.95, "truncated_share": 0.01, "mean_length": 36.0}
    metrics = {"pass@1": metric, "maj@8": metric, "greedy": metric}
    return EvalReport(dataset="held.jsonl", checkpoint=f"step-{step}", num_problems=16, samples_per_problem=8, metrics=metrics, extras=extras)


def _make_run(run_dir: Path, steps: int = 20) -> None:
    (run_dir / "evals").mkdir(parents=True)
    with (run_dir / "metrics.jsonl").open("w") as metrics, (run_dir / "samples.jsonl").open("w") as samples:
        for step in range(1, steps + 1):
            row = {
                "step": step,
                "reward": 0.5,
                "rewards/accuracy/mean": 0.4,
                "rewards/format/mean": 0.9,
                "completions/mean_length": 30.0,
                "completions/min_length": 20,
                "completions/max_length": 40,
                "entropy": 0.2,
                "kl": 0.0 if step == 1 else 1e-3,
                "mismatch/mean": None,
                "step_time": 2.0,
                "time/rollout": 1.0,
                "time/update": 1.0,
            }
            metrics.write(json.dumps(row) + "\n")
            samples.write(json.dumps({"step": step, "question": "2 < 3?", "completion": "<think> <b>hm</b> </think>", "reward": None}) + "\n")
    for step, value in ((steps, 0.9), (0, 0.3)):
        save_report(_report(step, value), run_dir / "evals" / f"step-{step:06d}.json")
    (run_dir / "config.yaml").write_text("name: <quick>\nmodel:\n  path: here\n")


def test_report_writes_plots_and_one_self_contained_page(tmp_path: Path) -> None:
    _make_run(tmp_path)
    page = write_report(tmp_path, notes=["a & b"])
    text = page.read_text()
    names = {path.name for path in (tmp_path / "plots").glob("*.png")}
    assert names == {"reward.png", "evaluation.png", "length.png", "entropy.png", "divergence.png", "time.png"}
    assert text.count("data:image/png;base64,") == 6
    assert "http" not in text.split("<body>")[1].split("<details>")[0]
    assert "src=" not in text.replace('src="data:image/png;base64,', "")
    assert "0.30 → <b>0.90</b>" in text
    assert "a &amp; b" in text


def test_text_of_model_and_config_is_escaped(tmp_path: Path) -> None:
    _make_run(tmp_path)
    text = write_report(tmp_path).read_text()
    assert "<b>hm</b>" not in text
    assert "&lt;think&gt; &lt;b&gt;hm&lt;/b&gt; &lt;/think&gt;" in text
    assert "<quick>" not in text
    assert "&lt;quick&gt;" in text


def test_report_of_a_run_with_one_line_and_no_evaluations(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "kl": 0.0}\n{"step": 2, "rew')
    text = write_report(tmp_path).read_text()
    assert "Evaluations" not in text
    assert (tmp_path / "plots" / "reward.png").is_file()
    assert not (tmp_path / "plots" / "time.png").exists()


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(tmp_path)


def test_evaluations_come_in_the_order_of_steps(tmp_path: Path) -> None:
    _make_run(tmp_path, steps=5)
    assert [report.extras["step"] for report in load_evaluations(tmp_path)] == [0.0, 5.0]


def test_series_leaves_gaps_out_and_running_mean_narrows_at_the_ends() -> None:
    rows = [{"step": 1, "x": 1.0}, {"step": 2, "x": None}, {"step": 3}, {"step": 4, "x": 2}]
    assert series(rows, "x") == ([1, 4], [1.0, 2.0])
    means = running_mean([0.0, 3.0, 6.0, 9.0], 3)
    assert all(math.isclose(a, b) for a, b in zip(means, [1.5, 3.0, 6.0, 7.5]))
