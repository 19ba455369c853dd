"""The whole job on a tiny model, offline, in minutes on two CPU cores: base model → SFT → GRPO → evaluation → report.

    python -m grpo.quickstart --seed 1 train.steps=20          (or: make quickstart)

    generated sums ─▶ base/ (untrained NSA model, tokenizer) ─▶ sft/ (think/answer form, part of the sums)
                   ─▶ grpo/ (Ray actors, R1-Zero template, held-out evaluation before and after) ─▶ grpo/report.html

`--twin` trains the same model with one branch instead of three: `window` cannot reach the numbers in the prompt, `full`
sees everything. Settings stand in configs/quickstart.yaml and configs/quickstart_sft.yaml; leaves out anything that
`nsa-grpo train` does not do itself.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from grpo.config import RunConfig, SftConfig, load_config
from grpo.processes import family
from grpo.quickstart_task import build_tokenizer, make_problems, write_rows
from grpo.seeding import fold
from nsa.config import NSAConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NUM_DIGITS = 2
NUM_TRAIN, NUM_SFT, NUM_HELD_OUT = 4096, 4096, 128
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,  # about 1/sqrt(hidden_size): with 0.02 the warm-up takes several times as long
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    "compress_block_size": 8,
    "compress_stride": 4,
    "select_block_size": 8,
    "num_selected_blocks": 4,
    "window_size": 8,
}
TWINS = {
    "none": {},
    "window": {"gate": "fixed", "fixed_gates": [0.0, 0.0, 1.0]},
    "full": {"gate": "fixed", "fixed_gates": [0.0, 1.0, 0.0], "num_selected_blocks": 32},  # n·l' = the whole context
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the quickstart; returns the exit code."""
    parser = argparse.ArgumentParser(prog="nsa-grpo quickstart", description="SFT and GRPO on a tiny NSA model, in minutes on two CPU cores.")
    parser.add_argument("--out", type=Path, help="folder for everything (default: runs/quickstart, or the next free runs/quickstart-N)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--twin", choices=sorted(TWINS), default="none", help="train a twin with one attention branch, for comparison")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of configs/quickstart.yaml; sft.key=value for the warm-up")
    args = parser.parse_args(arguments)
    out = args.out or _free_folder(Path("runs/quickstart"))
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty; give a new folder")
    run(out, seed=args.seed, twin=args.twin, overrides=args.overrides)
    return 0


def run(out: Path, *, seed: int = 0, twin: str = "none", overrides: Sequence[str] = ()) -> Path:
    """All stages; returns the report page.

    Args:
        out: an empty or new folder.
        twin: a key of TWINS.
        overrides: `key=value` for configs/quickstart.yaml, `sft.key=value` for configs/quickstart_sft.yaml.
    """
    from transformers.utils import logging as transformers_logging

    from grpo.report import write_report
    from grpo.sft import run_sft
    from grpo.trainer import train

    transformers_logging.disable_progress_bar()  # bars for loading half a million numbers
    sft_config, config = configurations(out, seed=seed, overrides=overrides)
    console = Console()
    clock = {"start": time.monotonic()}
    with PeakMemory() as memory:
        console.print(f"[bold]1/4[/] base model and data in {out}")
        parameters = make_base(out, seed=seed, twin=twin)
        clock["base"] = time.monotonic()
        console.print("[bold]2/4[/] SFT warm-up")
        run_sft(sft_config)
        clock["SFT"] = time.monotonic()
        console.print("[bold]3/4[/] GRPO, with an evaluation before and after")
        run_dir = train(config)
        clock["GRPO and evaluations"] = time.monotonic()
        console.print("[bold]4/4[/] report")
        minutes = (time.monotonic() - clock["start"]) / 60
        kind = "NSA model" if twin == "none" else f"twin with {twin} attention"
        note = f"A tiny {kind} ({parameters / 1e6:.2f} M parameters) learns {NUM_DIGITS}-digit sums: {minutes:.1f} minutes, seed {seed}."
        page = write_report(run_dir, notes=[note])
        clock["report"] = time.monotonic()
    _summary(console, run_dir, page, clock, memory.peak_mb)
    return page


def configurations(out: Path, *, seed: int = 0, overrides: Sequence[str] = ()) -> tuple[SftConfig, RunConfig]:
    """The two stages' settings: the YAML files, with this run's paths and seeds, then the overrides.

    Raises:
        ConfigError: an override that does not fit.
        ValueError: the YAML files are not there (the package was installed without its checkout).
    """
    for name in ("quickstart.yaml", "quickstart_sft.yaml"):
        if not (CONFIGS / name).is_file():
            raise ValueError(f"no {CONFIGS / name}: the quickstart runs from a checkout (git clone, then pip install -e .)")
    for_sft = [f"model.path={out}/base", f"data.train={out}/data/sft.jsonl", f"log.run_dir={out}/sft", f"seed={fold(seed, 'sft') % 2**31}"]
    for_grpo = [
        f"model.path={out}/sft/checkpoints/final",
        f"data.train={out}/data/train.jsonl",
        f"data.eval={out}/data/held_out.jsonl",
        f"log.run_dir={out}/grpo",
        f"train.seed={seed}",
    ]
    for override in overrides:
        if override.startswith("sft."):
            for_sft.append(override.removeprefix("sft."))
        else:
            for_grpo.append(override)
    return load_config(SftConfig, CONFIGS / "quickstart_sft.yaml", for_sft), load_config(RunConfig, CONFIGS / "quickstart.yaml", for_grpo)


def make_base(out: Path, *, seed: int, twin: str = "none") -> int:
    """Write `out`/base (random weights, tokenizer) and `out`/data; returns the number of parameters."""
    from nsa.model import NSAForCausalLM

    tokenizer = build_tokenizer()
    settings = {**MODEL, **TWINS[twin]}
    torch.manual_seed(fold(seed, "base"))
    model = NSAForCausalLM(
        NSAConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **settings)  # type: ignore[arg-type]
    )
    (out / "data").mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    train = {"num_digits": NUM_DIGITS, "held_out": False}
    write_rows(out / "data" / "sft.jsonl", make_problems(NUM_SFT, seed=fold(seed, "sft"), guesses=True, **train), completions=True)
    write_rows(out / "data" / "train.jsonl", make_problems(NUM_TRAIN, seed=fold(seed, "grpo"), **train))
    held_out = make_problems(NUM_HELD_OUT, seed=0, num_digits=NUM_DIGITS, held_out=True)  # the same for every seed
    write_rows(out / "data" / "held_out.jsonl", held_out)
    return sum(parameter.numel() for parameter in model.parameters())


class PeakMemory:
    """Samples the memory of this process and all below it (PSS: shared pages are counted once) every second.

    `peak_mb` stays None where /proc does not tell (not Linux)."""

    def __init__(self, every_s: float = 1.0) -> None:
        self.peak_mb: float | None = None
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            sizes = [size for pid in family([os.getpid()]) if (size := pss_mb(pid)) is not None]
            if sizes:
                self.peak_mb = max(self.peak_mb or 0.0, sum(sizes))


def pss_mb(pid: int) -> float | None:
    """Proportional set size of a process in MB; None where it is gone or the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), None)


def _free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, … that does not exist yet."""
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def _summary(console: Console, run_dir: Path, page: Path, clock: dict[str, float], peak_mb: float | None) -> None:
    from grpo.evaluate import metric_text, report_table
    from grpo.report import PLOT_FOLDER, load_evaluations

    reports = load_evaluations(run_dir)
    if len(reports) > 1:
        first, last = reports[0], reports[-1]
        console.print(report_table([first, last], title="held-out problems", labels=["after SFT", "after GRPO"]))
        for name in ("pass@1", "pass@8", "maj@8", "greedy"):
            if name in first.metrics and name in last.metrics:
                console.print(f"{name:>7}  {metric_text(first.metrics[name])} → {metric_text(last.metrics[name])}", highlight=False, markup=False)
    moments = list(clock.items())
    phases = ", ".join(f"{name} {end - begin:.0f} s" for (_, begin), (name, end) in itertools.pairwise(moments))
    memory = "" if peak_mb is None else f"; peak memory of all processes {peak_mb / 1024:.2f} GiB"
    console.print(f"{(moments[-1][1] - moments[0][1]) / 60:.1f} minutes ({phases}){memory}", highlight=False)
    for label, path in (
        ("report", page),
        ("plots", run_dir / PLOT_FOLDER),
        ("model", run_dir / "checkpoints" / "final"),
        ("completions of the evaluations", run_dir / "evals"),
        ("metrics", run_dir / "metrics.jsonl"),
    ):
        console.print(f"{label}: {path}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    from grpo.cli import main as cli

    sys.exit(cli(["quickstart", *sys.argv[1:]]))
