"""A resumed run continues bit for bit, from the newest complete checkpoint, in the same folder."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from grpo.checkpoint import CheckpointError
from grpo.log import read_lines
from grpo.trainer import Trainer, train

FAST_CHANGING = ("time/", "step_time", "tokens_per_second", "rollout/tokens_per_second", "eval/seconds", "eval/tokens_per_second")


def losses(run_dir: Path) -> list[dict]:
    """Every logged number but clocks."""
    return [{key: value for key, value in line.items() if not key.startswith(FAST_CHANGING)} for line in read_lines(run_dir / "metrics.jsonl")]


def weights(run_dir: Path) -> dict:
    return load_file(run_dir / "checkpoints" / "final" / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    assert all((weights(one)[name] == tensor).all() for name, tensor in weights(other).items())
    assert [row["completion"] for row in read_lines(one / "samples.jsonl")] == [row["completion"] for row in read_lines(other / "samples.jsonl")]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Make the rollout of `step` raise."""
    rollout = Trainer._rollout

    def interrupted(self, number):
        if number == step:
            self._stream.next(3)  # what was drawn for the lost step must not count
            raise error
        return rollout(self, number)

    monkeypatch.setattr(Trainer, "_rollout", interrupted)


@pytest.mark.parametrize(
    "overrides",
    [
        ("algorithm.kl_coefficient=0.05", "algorithm.reference_refresh_steps=1", "optimizer.schedule=linear", "optimizer.warmup_steps=2"),
        ("rollout.dynamic_sampling=true", "algorithm.kl_coefficient=0.05", "algorithm.inner_epochs=2", "optimizer.schedule=cosine"),
    ],
)
def test_a_run_interrupted_and_resumed_equals_an_uninterrupted_one_bit_for_bit(tiny_config_of, tmp_path, monkeypatch, overrides):
    whole = train(tiny_config_of(*overrides, f"log.run_dir={tmp_path}/whole"))
    config = tiny_config_of(*overrides, f"log.run_dir={tmp_path}/parts")
    with monkeypatch.context() as patch:
        stop_at(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert (tmp_path / "parts" / "checkpoints" / "step-000002").is_dir()
    assert not (tmp_path / "parts" / ".lock").exists()
    assert_same_run(whole, train(config, resume_from=tmp_path / "parts"))


def test_lines_after_the_checkpoint_are_replaced_when_the_run_died_without_saving(tiny_config_of, tmp_path, monkeypatch):
    whole = train(tiny_config_of(f"log.run_dir={tmp_path}/whole", "train.save_every=2"))
    config = tiny_config_of(f"log.run_dir={tmp_path}/parts", "train.save_every=2")
    with monkeypatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt())
        patch.setattr(Trainer, "_rescue", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert [line["step"] for line in losses(tmp_path / "parts")] == [1, 2, 3]
    assert_same_run(whole, train(config, resume_from=tmp_path / "parts"))


def test_resume_goes_past_a_damaged_checkpoint_and_can_be_given_more_steps(tiny_config_of, tmp_path, capsys):
    config = tiny_config_of("train.steps=2", "train.save_every=1")
    run_dir = train(config)
    (run_dir / "checkpoints" / "step-000002" / "model.safetensors").write_bytes(b"half")
    train(tiny_config_of("train.steps=3", "train.save_every=1"), resume_from=run_dir)
    shown = capsys.readouterr().out
    assert "step-000002 is not a complete checkpoint: model.safetensors has 4 of" in shown
    assert "going on after step 1" in shown
    assert [line["step"] for line in losses(run_dir)] == [1, 2, 3]
    for path in (run_dir / "checkpoints").glob("step-*/optimizer.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint: .*optimizer\.pt is missing"):
        train(config, resume_from=run_dir)


def test_resume_without_a_checkpoint_starts_over_and_other_data_is_refused(tiny_config_of, tmp_path):
    config = tiny_config_of("train.steps=1")
    run_dir = train(config)
    first = losses(run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    train(config, resume_from=run_dir)
    assert losses(run_dir) == first
    with pytest.raises(ValueError, match="cannot resume: the training data"):
        train(tiny_config_of("train.steps=2", "data.limit=5"), resume_from=run_dir)
