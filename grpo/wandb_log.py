"""The one place that talks to wandb: offline unless a key is set, and never a reason for a run to fail.

The first fault of any kind prints one warning line and switches wandb off; metrics.jsonl has everything anyway.
"""

from __future__ import annotations

import netrc
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

FINISH_DEADLINE_S = 60.0
"""How long the end of a run waits for wandb's upload."""


class WandbLog:
    """A wandb run whose files lie in `run_dir`/wandb. The run's id is kept there too, so a resumed run goes on with it.

    Mode: WANDB_MODE where it is set, else online with a key (WANDB_API_KEY or `wandb login`), else offline.
    """

    def __init__(self, run_dir: Path, *, project: str, name: str, config: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._run: Any = None
        self.mode = "off"
        try:
            self._start(run_dir, project, name, dict(config))
        except Exception as error:  # noqa: BLE001 (whatever wandb does must not end a training run)
            self._give_up("could not start", error)

    def _start(self, run_dir: Path, project: str, name: str, config: dict[str, Any]) -> None:
        import wandb

        id_file = run_dir / "wandb" / "run_id.txt"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        mode = os.environ.get("WANDB_MODE") or ("online" if key_is_set() else "offline")
        run_id = id_file.read_text(encoding="utf-8")
        arguments: dict[str, Any] = {"project": project, "name": name, "dir": str(run_dir), "config": config, "id": run_id}
        settings = wandb.Settings(silent=True, init_timeout=30, console="off")
        try:
            self._run = wandb.init(**arguments, mode=mode, settings=settings, resume="allow" if mode == "online" else None)  # type: ignore[arg-type]
        except (wandb.Error, OSError) as error:
            if mode == "offline":
                raise
            self._warn(f"wandb: not reachable, logging offline ({_one_line(error)})")
            mode = "offline"
            self._run = wandb.init(**arguments, mode=mode, settings=settings)
        self.mode = mode

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Send one step's numbers; the step is also the `train/step` axis, as a resumed run cannot rewind wandb's own."""
        if self._run is None:
            return
        try:
            self._run.log({"train/step": step, **{name: value for name, value in metrics.items() if value is not None}})
        except Exception as error:  # noqa: BLE001 (as above)
            self._give_up("could not log", error)

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send the step's sample completions as a table named `completions`."""
        if self._run is None:
            return
        try:
            import wandb

            self._run.log({"train/step": step, "completions": wandb.Table(columns=list(columns), data=[list(row) for row in rows])})
        except Exception as error:  # noqa: BLE001 (as above)
            self._give_up("could not log the sample table", error)

    def close(self) -> None:
        """Finish the run; waits at most FINISH_DEADLINE_S for the upload."""
        run, self._run = self._run, None
        if run is None:
            return

        def finish() -> None:
            try:
                run.finish()
            except Exception as error:  # noqa: BLE001 (as above)
                self._warn(f"wandb: could not finish cleanly ({_one_line(error)})")

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(FINISH_DEADLINE_S)
        if thread.is_alive():
            self._warn(f"wandb: upload still running after {FINISH_DEADLINE_S:.0f} s, left behind; `wandb sync` sends the rest")

    def _give_up(self, what: str, error: Exception) -> None:
        self._run, self.mode = None, "off"
        self._warn(f"wandb: {what}, switched off ({_one_line(error)})")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def key_is_set() -> bool:
    """Whether wandb finds a key: WANDB_API_KEY, or what `wandb login` wrote into the netrc file for the server in use."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return host is not None and netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
