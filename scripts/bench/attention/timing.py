"""How the kernel bench measures: CUDA events around single calls, graph replays with a cold L2, peak memory, and the table of it all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from scripts.bench.attention.workload import DTYPE

DIRECTIONS = ("forward", "backward", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One timed call: milliseconds, FLOPs and bytes it has to do at least, and its peak memory in GB beyond inputs and output.

    `name` begins with who runs (`nsa`, `dense FA2`, `peer fla`, a branch) and contains the direction.
    """

    layout: str
    length: int
    name: str
    ms: float
    flops: float = 0.0
    bytes: float = 0.0
    peak_gb: float | None = None

    @property
    def direction(self) -> str:
        return next((word for word in DIRECTIONS if word in self.name), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What this machine reaches: bf16 GEMM FLOP/s and copied bytes/s."""

    flops: float
    bytes: float

    def floor_ms(self, row: Row) -> float:
        return 1e3 * max(row.flops / self.flops, row.bytes / self.bytes)


def time_ms(call: Callable[[int], object], *, repeats: int, warmup: int = 3) -> float:
    """Median milliseconds of `call(i)`, i counting the calls."""
    for index in range(warmup):
        call(index)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for index, (begin, end) in enumerate(events):
        begin.record()
        call(index)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def graph_ms(step: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of a captured step, replayed after the L2 cache was overwritten."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    events = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def peak_gb(call: Callable[[], Tensor | None]) -> float:
    """GB (10⁹ bytes) that a call takes at its peak beyond what is there before and beyond the tensor that it returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    own = kept.numel() * kept.element_size() if isinstance(kept, Tensor) else 0
    return (torch.cuda.max_memory_allocated() - before - own) / 1e9


def measure_rates() -> Rates:
    """GEMM of 8192³ in bf16 and a copy of 1 GiB."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    gemm = time_ms(lambda _: left @ right, repeats=20)
    copy = time_ms(lambda _: target.copy_(source), repeats=20)
    return Rates(flops=2 * 8192**3 / gemm * 1e3, bytes=2 * 2**30 / copy * 1e3)


def best_dense(row: Row, rows: Sequence[Row]) -> float | None:
    """Milliseconds of the fastest dense kernel in the same layout, length, direction and batch."""
    rivals = [
        r.ms for r in rows if (r.layout, r.length, r.direction) == (row.layout, row.length, row.direction) and r.name.startswith("dense")
        and r.name.partition("batch")[2] == row.name.partition("batch")[2]
    ]  # fmt: skip
    return min(rivals, default=None)


def render(rows: Sequence[Row], rates: Rates) -> Table:
    """One table: every row beside its floor and the best dense time of its layout, length and direction."""
    table = Table(
        title=f"{torch.cuda.get_device_name()}, torch {torch.__version__}, GEMM {rates.flops / 1e12:.0f} TFLOP/s, copy {rates.bytes / 1e12:.2f} TB/s"
    )
    for column in ("layout", "T", "call", "ms", "best dense / this", "TFLOP/s", "GB/s", "of floor", "peak GB"):
        table.add_column(column, justify="left" if column in ("layout", "call") else "right")
    for row in rows:
        dense = best_dense(row, rows) if row.name.startswith(("nsa", "decode", "peer")) else None
        floor = rates.floor_ms(row)
        table.add_row(
            row.layout, str(row.length), row.name, f"{row.ms:.3f}", f"{dense / row.ms:.2f}×" if dense else "",
            f"{row.flops / row.ms / 1e9:.0f}" if row.flops else "", f"{row.bytes / row.ms / 1e6:.0f}" if row.bytes else "",
            f"{floor / row.ms:.0%}" if floor else "", "" if row.peak_gb is None else f"{row.peak_gb:.2f}",
        )  # fmt: skip
    return table
