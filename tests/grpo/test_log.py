"""What a run writes down: lines, resume, provenance, wandb."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from rich.console import Console

from grpo.config import LogSection, RunConfig, build_config
from grpo.log import RunLogger, git_state, prepare_run_dir, provenance, read_lines, resolve_run_dir, summary_line
from grpo.wandb_log import WandbLog, key_is_set

METRICS = {
    "reward": 0.5,
    "completions/mean_length": 45.2,
    "kl": 0.0,
    "entropy": 1.25,
    "tokens_per_second": 812.0,
    "step_time": 1.5,
    "time/rollout": 0.9,
}
SAMPLE = {
    "prompt_id": "0",
    "question": "1+1?",
    "completion": "<think>[b]x</think> <answer>2</answer>",
    "answer": "2",
    "extracted": "2",
    "reward": 1.1,
}


def make_config(run_dir: Path) -> RunConfig:
    return build_config(RunConfig, {"name": "tiny", "model": {"path": "m"}, "data": {"train": "d"}, "log": {"run_dir": str(run_dir)}})


def quiet(width: int = 200) -> Console:
    return Console(file=io.StringIO(), width=width)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_lines_are_on_disk_when_log_returns(tmp_path: Path) -> None:
    with RunLogger(tmp_path, LogSection(), console=quiet()) as log:
        log.log(1, METRICS)
        log.samples(1, [SAMPLE])
        assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, **METRICS}]
        assert read_lines(tmp_path / "samples.jsonl") == [{"step": 1, **SAMPLE}]


def test_numbers_that_are_not_finite_become_null_and_text_is_escaped(tmp_path: Path) -> None:
    with RunLogger(tmp_path, LogSection(), console=quiet()) as log:
        log.log(1, {"loss": float("nan"), "kl": float("inf"), "reward": 1})
        log.samples(1, [{"completion": "a\u2028b\nc \ud800"}])
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "kl": None, "reward": 1.0}]
    assert (tmp_path / "samples.jsonl").read_text(encoding="ascii").count("\n") == 1


def test_resume_takes_later_steps_and_a_cut_off_line_out(tmp_path: Path) -> None:
    with RunLogger(tmp_path, LogSection(), console=quiet()) as log:
        for step in range(5):
            log.log(step, {"reward": step})
            log.samples(step, [{"completion": str(step)}])
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "rewa')
    with RunLogger(tmp_path, LogSection(), resume_step=2, console=quiet()) as log:
        log.log(3, {"reward": 30.0})
    assert [(row["step"], row["reward"]) for row in read_lines(tmp_path / "metrics.jsonl")] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    assert [row["step"] for row in read_lines(tmp_path / "samples.jsonl")] == [0, 1, 2]


def test_one_plain_line_a_step_where_there_is_no_terminal(tmp_path: Path) -> None:
    console = quiet()
    with RunLogger(tmp_path, LogSection(), total_steps=10, console=console) as log:
        log.log(1, METRICS)
        log.samples(1, [SAMPLE])
        log.log(1, {"eval/pass@1": 0.25, "eval/pass@1/low": 0.2, "eval/greedy": 0.5})
    assert shown(console).split("\n")[:-1] == [
        "step 1/10 · reward 0.500 · length 45 · kl 0 · entropy 1.250 · tok/s 812 · 1.5 s (rollout 0.90)",
        "step 1/10 · eval/pass@1 0.250 · eval/greedy 0.500",
    ]


def test_no_output_without_progress(tmp_path: Path) -> None:
    console = quiet()
    with RunLogger(tmp_path, LogSection(progress=False), console=console) as log:
        log.log(1, METRICS)
    assert shown(console) == ""


def test_terminal_display_shows_numbers_and_samples(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    with RunLogger(tmp_path, LogSection(samples_per_step=1), name="tiny", total_steps=10, console=console) as log:
        log.log(3, METRICS)
        log.samples(3, [SAMPLE, {**SAMPLE, "question": "never shown"}])
        log.message("a line [red]as it is[/red]")
    text = shown(console)
    assert "reward 0.500" in text
    assert "3/10" in text
    assert "<think>[b]x" in text
    assert "a line [red]as it is[/red]" in text
    assert "never shown" not in text


def test_missing_metrics_are_left_out_of_the_line() -> None:
    assert summary_line(2, None, {"reward": None}) == "step 2"
    assert summary_line(2, None, {"loss": 0.123456}) == "step 2 · loss 0.1235"


def test_run_folder_holds_config_versions_and_git_state(tmp_path: Path) -> None:
    config = make_config(tmp_path / "runs" / "{name}")
    run_dir = prepare_run_dir(config, config.log, config.name)
    assert run_dir == tmp_path / "runs" / "tiny"
    assert build_config(RunConfig, yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))) == config
    saved = json.loads((run_dir / "provenance.json").read_text(encoding="utf-8"))
    assert saved["versions"]["torch"] == provenance()["versions"]["torch"]
    assert set(saved["git"]) == {"commit", "dirty"}


def test_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    run_dir = prepare_run_dir(config, config.log, config.name)
    assert prepare_run_dir(config, config.log, config.name) == run_dir, "nothing was logged yet"
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="already holds a run: continue it with `nsa-grpo resume"):
        prepare_run_dir(config, config.log, config.name)


def test_time_makes_run_folders_unique() -> None:
    assert "{" not in str(resolve_run_dir(LogSection(run_dir="runs/{name}-{time}"), "x"))


def test_git_state_outside_a_checkout(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"commit": None, "dirty": None}


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.mark.usefixtures("no_key")
def test_key_is_found_in_environment_and_netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not key_is_set()
    (tmp_path / "netrc").write_text("machine wandb.example.org\n  login user\n  password secret\n", encoding="utf-8")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not key_is_set()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert key_is_set()
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert key_is_set()


@pytest.mark.usefixtures("no_key")
def test_wandb_without_a_key_writes_an_offline_run(tmp_path: Path) -> None:
    warnings: list[str] = []
    log = WandbLog(tmp_path, project="p", name="n", config={"a": 1}, warn=warnings.append)
    assert log.mode == "offline"
    log.log(1, {"reward": 0.5, "kl": None})
    log.table(1, ["question", "reward"], [["1+1?", 1.0]])
    log.close()
    assert warnings == []
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert any(file.stat().st_size > 0 for file in folder.glob("*.wandb"))


@pytest.mark.usefixtures("no_key")
def test_failing_wandb_gives_one_warning_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("no disk\nno service")

    monkeypatch.setattr(wandb, "init", broken)
    console = quiet()
    with RunLogger(tmp_path, LogSection(wandb=True), console=console) as log:
        log.log(1, METRICS)
        log.samples(1, [SAMPLE])
    assert shown(console).count("wandb") == 1
    assert "switched off (RuntimeError: no disk no service)" in shown(console)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.usefixtures("no_key")
def test_unreachable_wandb_falls_back_to_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def init(*, mode: str, **_: Any) -> Any:
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no network")

    monkeypatch.setenv("WANDB_API_KEY", "x")
    monkeypatch.setattr(wandb, "init", init)
    warnings: list[str] = []
    assert WandbLog(tmp_path, project="p", name="n", config={}, warn=warnings.append).mode == "offline"
    assert modes == ["online", "offline"]
    assert len(warnings) == 1
