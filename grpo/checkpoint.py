"""Checkpoints of a run: written whole or not at all, checked before they are believed, pruned by age and by metric.

    run_dir/checkpoints/step-000010/     model files (Hugging Face layout), tokenizer, optimizer.pt, trainer_state.json
                                         and checkpoint.json: step, metric, size and CRC-32 of every other file
    run_dir/checkpoints/final, best      relative symbolic links to the last and to the best one (no second copy)

A checkpoint is written under a hidden temporary name, flushed to disk, and renamed; whoever finds `step-*` finds a
complete one, unless a file was cut afterwards, which the manifest shows. What the files hold is the caller's affair
(`write`). `RunLock` keeps two processes out of one run folder. Leaves out remote storage.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grpo import processes
from grpo.errors import RunFailed

MANIFEST = "checkpoint.json"
_STEP_NAME = re.compile(r"step-(\d{6,})")


class CheckpointError(RunFailed):
    """A checkpoint could not be written or read; the message says what is still intact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    metric: float | None


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: where they lie (made if missing; leftovers of interrupted writes are removed).
        keep_last: how many of the newest are kept.
        keep_best: also keep the one with the highest metric.
    """

    def __init__(self, folder: Path, *, keep_last: int = 2, keep_best: bool = True) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be >= 1, got {keep_last}")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, write: Callable[[Path], None], metric: float | None = None) -> Path:
        """Write the checkpoint of `step` and prune the others; `write` fills the folder it is given.

        Raises:
            CheckpointError: `write`, the disk or the rename failed; no earlier checkpoint was touched.
        """
        final = self.folder / f"step-{step:06d}"
        temporary = self.folder / f".tmp-{final.name}-{os.getpid()}"
        try:
            temporary.mkdir()
            write(temporary)
            _write_manifest(temporary, step=step, metric=metric)
            for path in [*temporary.rglob("*"), temporary]:
                _flush(path)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            _flush(self.folder)
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"the checkpoint of step {step} could not be written: {_cause(error)}; {self._intact()}") from error
        self._prune()
        return final

    def complete(self) -> tuple[list[Checkpoint], list[str]]:
        """All complete checkpoints, oldest first, and one line for each that is damaged (sizes and CRCs are checked)."""
        good: list[Checkpoint] = []
        faults: list[str] = []
        for path in self._step_folders():
            try:
                good.append(read_checkpoint(path))
            except CheckpointError as error:
                faults.append(str(error))
        return good, faults

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        for path in reversed(self._step_folders()):
            if not _fault(path):
                return path
        return None

    def best(self) -> Path | None:
        """The checkpoint with the highest metric, the newer one where two are equal; None where none has a metric."""
        return self._rated()[1]

    def best_metric(self) -> float | None:
        """The metric of `best`."""
        return self._rated()[0]

    def _rated(self) -> tuple[float, Path] | tuple[None, None]:
        rated = [(metric, path) for path in self._step_folders() if (metric := _manifest_of(path).get("metric")) is not None]
        return max(rated, default=(None, None))

    def link(self, name: str, target: Path) -> None:
        """Point the symbolic link `folder/name` at one of the checkpoints."""
        fresh = self.folder / f".link-{name}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target.name, target_is_directory=True)
        fresh.replace(self.folder / name)

    def _step_folders(self) -> list[Path]:
        found = [path for path in self.folder.iterdir() if _STEP_NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def _prune(self) -> None:
        folders = self._step_folders()
        kept = set(folders[-self.keep_last :])
        best = self.best() if self.keep_best else None
        if best is not None:
            kept.add(best)
            self.link("best", best)
        for path in folders:
            if path not in kept:
                shutil.rmtree(path)

    def _intact(self) -> str:
        intact = self.latest()
        return f"the last complete checkpoint is {intact}" if intact else "there is no earlier complete checkpoint"


def read_checkpoint(path: Path) -> Checkpoint:
    """Check a checkpoint folder against its manifest.

    Raises:
        CheckpointError: no manifest, or a file is missing, short or altered; the message names it.
    """
    fault = _fault(path)
    if fault:
        raise CheckpointError(f"{path} is not a complete checkpoint: {fault}")
    manifest = _manifest_of(path)
    return Checkpoint(path=path, step=int(manifest["step"]), metric=manifest["metric"])


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    manifest = _manifest_of(path)
    if not manifest:
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size} of {expected['size']} bytes"
        if _crc32(file) != expected["crc32"]:
            return f"{name} does not match its checksum"
    return None


def _manifest_of(path: Path) -> dict:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and {"step", "metric", "files"} <= manifest.keys() else {}


def _write_manifest(folder: Path, *, step: int, metric: float | None) -> None:
    files = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "crc32": _crc32(file)} for file in sorted(folder.rglob("*")) if file.is_file()
    }
    text = json.dumps({"step": step, "metric": metric, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _crc32(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    return str(error) or type(error).__name__


class RunLock:
    """A file in the run folder that names the process using it. A lock whose process is gone is taken over.

    Raises:
        CheckpointError: another living process (or one on another host) holds it.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = Path(run_dir) / ".lock"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": processes.start_ticks(os.getpid())}
        for _ in range(2):
            try:
                with self.path.open("x", encoding="utf-8") as stream:
                    json.dump(mine, stream)
                return
            except FileExistsError:
                holder = _lock_holder(self.path)
                if holder and (holder["host"] != mine["host"] or processes.start_ticks(holder["pid"]) == holder["started"]):
                    break
                self.path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{self.path.parent} is in use by process {holder['pid']} on {holder['host']}; stop that run, or delete {self.path} if it is gone"
        )

    def release(self) -> None:
        """Give the folder free; harmless when called twice."""
        holder = _lock_holder(self.path)
        if holder and holder["pid"] == os.getpid():
            self.path.unlink(missing_ok=True)


def _lock_holder(path: Path) -> dict:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) and {"host", "pid", "started"} <= holder.keys() else {}
