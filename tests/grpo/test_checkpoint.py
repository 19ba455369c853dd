"""CheckpointStore and RunLock: whole or not at all, checked, pruned, and one process a folder."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.checkpoint import CheckpointError, CheckpointStore, RunLock, read_checkpoint


def write(text: str = "weights"):
    def fill(folder: Path) -> None:
        (folder / "model.safetensors").write_text(text * 100)
        (folder / "sub").mkdir()
        (folder / "sub" / "more.json").write_text("{}")

    return fill


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir() if path.name.startswith("step-"))


def test_save_makes_a_complete_checkpoint_and_leaves_no_temporary_files(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    path = store.save(10, write(), metric=0.5)
    assert path == store.latest() == tmp_path / "checkpoints" / "step-000010"
    found = read_checkpoint(path)
    assert (found.step, found.metric) == (10, 0.5)
    assert (path / "sub" / "more.json").read_text() == "{}"
    assert [entry.name for entry in store.folder.iterdir() if entry.name.startswith(".")] == []


def test_keep_last_and_keep_best(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2, keep_best=True)
    for step, metric in ((1, 0.1), (2, 0.9), (3, 0.3), (4, None), (5, 0.4)):
        store.save(step, write(), metric=metric)
    assert names(store) == ["step-000002", "step-000004", "step-000005"]
    assert store.best() == tmp_path / "step-000002" == (tmp_path / "best").resolve()
    assert store.best_metric() == 0.9
    plain = CheckpointStore(tmp_path, keep_last=1, keep_best=False)
    plain.save(6, write())
    assert names(plain) == ["step-000006"]


def test_saving_a_step_again_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, write("old"))
    path = store.save(1, write("new"))
    assert (path / "model.safetensors").read_text() == "new" * 100
    assert read_checkpoint(path).step == 1


@pytest.mark.parametrize("files_before_it_is_full", [0, 1, 2])
def test_a_full_disk_leaves_the_last_checkpoint_intact_and_names_it(tmp_path, files_before_it_is_full):
    store = CheckpointStore(tmp_path, keep_last=1)
    good = store.save(1, write())

    def full(folder: Path) -> None:
        for number in range(files_before_it_is_full):
            (folder / f"part-{number}").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "optimizer.pt"))

    with pytest.raises(CheckpointError) as caught:
        store.save(2, full)
    message = str(caught.value)
    assert "\n" not in message
    assert "checkpoint of step 2" in message
    assert "No space left on device" in message
    assert str(good) in message
    assert read_checkpoint(good).step == 1
    assert names(store) == ["step-000001"]
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("call", ["write_text", "fsync", "rename"])
def test_a_fault_at_any_point_of_saving_is_one_clear_line(tmp_path, monkeypatch, call):
    store = CheckpointStore(tmp_path, keep_last=1)
    good = store.save(1, write())

    def fail(*_arguments, **_named):
        raise OSError(errno.ENOSPC, "No space left on device")

    filled = []

    def fill(folder: Path) -> None:
        write()(folder)
        filled.append(folder)
        if call == "fsync":
            monkeypatch.setattr("os.fsync", fail)
        else:
            monkeypatch.setattr(Path, call, fail)

    with pytest.raises(CheckpointError, match=f"No space left on device.*{good.name}"):
        store.save(2, fill)
    monkeypatch.undo()
    assert read_checkpoint(good).step == 1
    assert store.latest() == good


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: (path / "model.safetensors").write_text("weig"), "model.safetensors has 4 of 700 bytes"),
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda path: (path / "model.safetensors").write_text("Weights" * 100), "model.safetensors does not match its checksum"),
        (lambda path: (path / "checkpoint.json").write_text('{"step": 2'), "checkpoint.json is missing or unreadable"),
    ],
)
def test_a_checkpoint_cut_in_half_is_named_and_the_older_one_is_offered(tmp_path, damage, what):
    store = CheckpointStore(tmp_path)
    older = store.save(1, write())
    damage(store.save(2, write()))
    good, faults = store.complete()
    assert [found.path for found in good] == [older]
    assert len(faults) == 1
    assert what in faults[0]
    assert store.latest() == older
    with pytest.raises(CheckpointError, match="step-000002 is not a complete checkpoint"):
        read_checkpoint(tmp_path / "step-000002")


def test_leftovers_of_an_interrupted_write_are_removed(tmp_path):
    (tmp_path / ".tmp-step-000003-77").mkdir()
    store = CheckpointStore(tmp_path)
    assert store.latest() is None
    assert not list(tmp_path.iterdir())


def test_a_link_points_inside_the_folder_and_can_be_moved(tmp_path):
    store = CheckpointStore(tmp_path / "a")
    store.link("final", store.save(1, write()))
    store.link("final", store.save(2, write()))
    (tmp_path / "a").rename(tmp_path / "b")
    assert (tmp_path / "b" / "final").resolve() == tmp_path / "b" / "step-000002"


def test_two_runs_cannot_share_a_folder_and_a_stale_lock_is_taken_over(tmp_path):
    lock = RunLock(tmp_path)
    with pytest.raises(CheckpointError, match="is in use by process"):
        RunLock(tmp_path)
    lock.release()
    lock.release()
    other = subprocess.run([sys.executable, "-c", f"from grpo.checkpoint import RunLock; RunLock({str(tmp_path)!r})"], check=True)
    assert other.returncode == 0
    assert (tmp_path / ".lock").exists()
    RunLock(tmp_path).release()
    assert not (tmp_path / ".lock").exists()


def test_a_lock_of_a_reused_pid_or_in_pieces_is_stale_and_one_of_another_host_is_not(tmp_path):
    lock = RunLock(tmp_path)
    holder = json.loads(lock.path.read_text())
    lock.path.write_text(json.dumps(holder | {"started": holder["started"] - 1}))
    RunLock(tmp_path)
    lock.path.write_text("{")
    RunLock(tmp_path)
    lock.path.write_text(json.dumps(holder | {"host": "elsewhere"}))
    with pytest.raises(CheckpointError, match="on elsewhere; stop that run, or delete"):
        RunLock(tmp_path)
