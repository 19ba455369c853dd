"""Check, then time the sparse-attention kernels beside dense attention, in one run on one GPU.

    python scripts/bench/kernels.py                                      # layouts a and b, 8k to 64k, everything
    python scripts/bench/kernels.py --layouts smollm2 --lengths 1024,8192 --parts forward,backward
    python scripts/bench/kernels.py --parts decode --batches 1,32 --output scripts/bench/RESULTS.md

Layouts (query heads / KV heads / head dim): a 64/4/128, b 32/8/128, smollm2 9/3/64; the paper's l 32, d 16, l' 64, n 16, w 512.
Dense: PyTorch's SDPA with the flash and the cuDNN backend, whichever runs. Times are CUDA events around single calls, the
median of `--repeats` after a warm-up; decode steps are CUDA graphs replayed after the L2 cache was
overwritten. The floor of a row is the larger of its FLOPs at the GEMM rate and its bytes at the copy rate measured here.
Selection: `random` blocks (worst locality) or the kernels' own choice on keys that drift slowly along the sequence.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Python puts this folder first on its path, where kernels.py would pass for the package `kernels` that transformers looks for.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nsa.attention import BranchKV, CompressorWeights, LayerCache, Phi, nsa_attention, nsa_decode
from nsa.blocks import num_compressed
from nsa.config import SparsityConfig
from nsa.kernels.banded import Band, banded_backward, banded_forward
from nsa.kernels.compress import compress
from nsa.kernels.gating import gate_backward
from nsa.kernels.inverse import invert_selection
from nsa.kernels.scoring import choose_blocks
from nsa.kernels.selected import selected_backward, selected_forward
from nsa.kernels.tiles import KernelPlan
from nsa.testing import clear_choices, make_inputs, relative_rms, same_blocks

LAYOUTS = {"a": (64, 4, 128), "b": (32, 8, 128), "smollm2": (9, 3, 64)}
PARTS = ("forward", "backward", "branches", "decode", "dense")
CONFIG = SparsityConfig()
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One timed call: milliseconds, the floor's milliseconds, TFLOP/s or GB/s, and peak memory beyond its inputs."""

    layout: str
    length: int
    name: str
    ms: float
    flops: float = 0.0
    bytes: float = 0.0
    peak_gb: float | None = None


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


def measure_rates() -> Rates:
    """GEMM of 8192³ in bf16 and a copy of 1 GiB."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    gemm = time_ms(lambda _: left @ right, repeats=20)
    copy = time_ms(lambda _: target.copy_(source), repeats=20)
    return Rates(flops=2 * 8192**3 / gemm * 1e3, bytes=2 * 2**30 / copy * 1e3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Inputs of one layout and length: `q` `[T, Hq, D]` and so on, requiring gradients."""

    q: Tensor
    kv: BranchKV
    gates: Tensor
    phi: Phi
    selection: Tensor | None
    d_out: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        tensors = [self.q, self.gates, *self.kv.cmp, *self.kv.slc, *self.kv.win]
        return tensors + [t for w in (self.phi.k, self.phi.v) for t in (w.position, w.up, w.down)]


def random_selection(length: int, heads: int, generator: torch.Generator) -> Tensor:
    """int32 `[T, heads, n]`: the forced blocks and random others, ascending."""
    n, size = CONFIG.num_selected_blocks, CONFIG.select_block_size
    blocks = torch.arange(-(-length // size), device="cuda")
    parts = []
    for first in range(0, length, 8192):
        current = (torch.arange(first, min(first + 8192, length), device="cuda") // size)[:, None]
        scores = torch.rand(len(current), heads, len(blocks), generator=generator, device="cuda")
        forced = (blocks < CONFIG.num_init_blocks) | (blocks > current - CONFIG.num_local_blocks)
        scores = scores.masked_fill(forced[:, None], 2.0).masked_fill((blocks > current)[:, None], -1.0)
        top = scores.topk(min(n, len(blocks)), dim=-1)
        chosen = top.indices.masked_fill(top.values < 0, length).sort(dim=-1).values
        parts.append(torch.nn.functional.pad(chosen.masked_fill(chosen == length, -1), (0, n - chosen.shape[-1]), value=-1).int())
    return torch.cat(parts)


def drifting(length: int, heads: int, dim: int, generator: torch.Generator) -> Tensor:
    """Keys as trained models have them: neighbours alike, a common part, outliers; unit variance."""
    steps = torch.randn(length // 16 + 2, heads, dim, generator=generator, device="cuda")
    slow = steps.repeat_interleave(16, dim=0)[:length]
    return (0.7 * slow + 0.5 * torch.randn(length, heads, dim, generator=generator, device="cuda") + 0.5 * steps[:1]).to(DTYPE)


def make_problem(layout: str, length: int, *, realistic: bool, seed: int = 0) -> Problem:
    """Random queries, keys, values and gates of a layout, bf16 on the GPU."""
    num_heads, heads, dim = LAYOUTS[layout]
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cuda") * std).to(DTYPE).requires_grad_()

    def pair() -> tuple[Tensor, Tensor]:
        key = drifting(length, heads, dim, generator).requires_grad_() if realistic else draw(length, heads, dim)
        return key, draw(length, heads, dim)

    def compressor() -> CompressorWeights:
        flat = CONFIG.compress_block_size * dim
        return CompressorWeights(draw(CONFIG.compress_block_size, dim, std=0.1), draw(2 * dim, flat, std=flat**-0.5), draw(dim, 2 * dim, std=0.02))

    return Problem(
        q=draw(length, num_heads, dim),
        kv=BranchKV(pair(), pair(), pair()),
        gates=torch.rand(length, num_heads, 3, generator=generator, device="cuda").to(DTYPE).requires_grad_(),
        phi=Phi(compressor(), compressor()),
        selection=None if realistic else random_selection(length, heads, generator),
        d_out=torch.randn(length, num_heads, dim, generator=generator, device="cuda").to(DTYPE),
    )


def visible_pairs(length: int) -> dict[str, float]:
    """Pairs (query, key) that each branch of one head computes, the causal triangle as `dense`."""
    n, size, w = CONFIG.num_selected_blocks, CONFIG.select_block_size, CONFIG.window_size
    compressed = sum(num_compressed(t + 1, CONFIG) for t in range(0, length, 64)) * 64.0
    return {
        "cmp": compressed,
        "slc": sum(min(t + 1, n * size) for t in range(0, length, 64)) * 64.0,
        "win": sum(min(t + 1, w) for t in range(0, length, 64)) * 64.0,
        "dense": length * (length + 1) / 2,
    }


def whole_work(layout: str, length: int, *, backward: bool) -> tuple[float, float]:
    """FLOPs and bytes of the whole attention (Eq. 3-12), forward or backward."""
    num_heads, heads, dim = LAYOUTS[layout]
    pairs = visible_pairs(length)
    attended = pairs["cmp"] + pairs["slc"] + pairs["win"]
    flops = num_heads * dim * (10.0 * attended if backward else 4.0 * attended + 2.0 * pairs["cmp"])
    tokens = length * dim * 2.0
    bytes_ = tokens * ((3 * num_heads + 12 * heads) if backward else (2 * num_heads + 6 * heads))
    return flops, bytes_


def peak_gb(call: Callable[[], object]) -> float:
    """GiB that a call allocates beyond what is there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def attention_rows(layout: str, length: int, problem: Problem, parts: Sequence[str], repeats: int) -> Iterator[Row]:
    """The whole of `nsa_attention`, forward without gradient and backward."""
    options = {"phi": problem.phi, "config": CONFIG, "selection": None}
    kind = "own choice" if problem.selection is None else "random"

    def forward() -> Tensor:
        out = nsa_attention(problem.q, problem.kv, problem.gates, **options)
        assert isinstance(out, Tensor)
        return out

    if "forward" in parts and problem.selection is None:
        with torch.no_grad():
            flops, bytes_ = whole_work(layout, length, backward=False)
            peak = peak_gb(forward)
            yield Row(
                layout=layout,
                length=length,
                name="nsa forward",
                ms=time_ms(lambda _: forward(), repeats=repeats),
                flops=flops,
                bytes=bytes_,
                peak_gb=peak,
            )
    if "backward" in parts and problem.selection is None:

        def train() -> Tensor:
            out = forward()
            out.backward(problem.d_out)
            for leaf in problem.leaves:
                leaf.grad = None
            return out

        peak = peak_gb(train)
        forward_ms = time_ms(lambda _: forward(), repeats=repeats)
        both_ms = time_ms(lambda _: train(), repeats=repeats)
        flops, bytes_ = whole_work(layout, length, backward=True)
        yield Row(layout=layout, length=length, name="nsa forward, kept", ms=forward_ms)
        yield Row(layout=layout, length=length, name="nsa backward", ms=both_ms - forward_ms, flops=flops, bytes=bytes_, peak_gb=peak)
    if "branches" in parts:
        yield from branch_rows(layout, length, problem, kind, repeats)


def branch_rows(layout: str, length: int, problem: Problem, kind: str, repeats: int) -> Iterator[Row]:
    """Each kernel by itself."""
    num_heads, _, dim = LAYOUTS[layout]
    pairs = visible_pairs(length)
    scale = dim**-0.5
    q, gates, d_out = problem.q.detach(), problem.gates.detach(), problem.d_out
    (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win) = ((k.detach(), v.detach()) for k, v in (problem.kv.cmp, problem.kv.slc, problem.kv.win))
    plan = KernelPlan(torch.tensor([0, length]), None, config=CONFIG, device=q.device)
    compressed, window = Band("compression", plan, CONFIG), Band("window", plan, CONFIG)
    out, dq = torch.empty_like(d_out), torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    gate = gates.unbind(-1)
    keep = {"scale": scale, "out": out, "accumulate": False, "keep": True}

    def row(name: str, call: Callable[[int], object], branch: str | None = None, factor: float = 0.0) -> Row:
        flops = factor * num_heads * dim * pairs[branch] if branch else 0.0
        return Row(layout=layout, length=length, name=name, ms=time_ms(call, repeats=repeats), flops=flops, peak_gb=peak_gb(lambda: call(0)))

    with torch.no_grad():
        kc, vc = compress(k_cmp, problem.phi.k, plan, CONFIG), compress(v_cmp, problem.phi.v, plan, CONFIG)
        out_cmp, lse_cmp = banded_forward(q, kc, vc, compressed, gate=gate[0], **keep)
        chosen = choose_blocks(q, kc, lse_cmp, plan, CONFIG, scale=scale) if problem.selection is None else problem.selection
        out_slc, lse_slc = selected_forward(q, k_slc, v_slc, chosen, plan, CONFIG, gate=gate[1], **keep)
        out_win, lse_win = banded_forward(q, k_win, v_win, window, gate=gate[2], **keep)
        outs = (out_cmp, out_slc, out_win)
        _, delta = gate_backward(d_out, gates, outs)
        deltas = delta.unbind(-1)
        if problem.selection is None:
            yield row("φ of keys and values", lambda _: (compress(k_cmp, problem.phi.k, plan, CONFIG), compress(v_cmp, problem.phi.v, plan, CONFIG)))
            yield row("compression forward", lambda _: banded_forward(q, kc, vc, compressed, gate=gate[0], **keep), "cmp", 4)
            yield row("score and top-n", lambda _: choose_blocks(q, kc, lse_cmp, plan, CONFIG, scale=scale), "cmp", 2)
            yield row("window forward", lambda _: banded_forward(q, k_win, v_win, window, gate=gate[2], **keep), "win", 4)
            yield row("gates backward", lambda _: gate_backward(d_out, gates, outs))
            back = {"scale": scale, "dq": dq, "dq_before": dq}
            yield row("compression backward", lambda _: banded_backward(d_out, q, kc, vc, lse_cmp, deltas[0], gate[0], compressed, **back), "cmp", 10)
            yield row("window backward", lambda _: banded_backward(d_out, q, k_win, v_win, lse_win, deltas[2], gate[2], window, **back), "win", 10)
        yield row(f"selected forward, {kind}", lambda _: selected_forward(q, k_slc, v_slc, chosen, plan, CONFIG, gate=gate[1], **keep), "slc", 4)
        yield row(f"inverse index, {kind}", lambda _: invert_selection(chosen, plan, CONFIG))
        yield row(
            f"selected backward, {kind}",
            lambda _: selected_backward(d_out, q, k_slc, v_slc, chosen, lse_slc, deltas[1], gate[1], plan, CONFIG, scale=scale, dq=dq, dq_before=dq),
            "slc",
            10,
        )


def dense_rows(layout: str, length: int, parts: Sequence[str], repeats: int) -> Iterator[Row]:
    """SDPA with the flash and the cuDNN backend, causal, grouped heads; a backend that refuses is left out."""
    num_heads, heads, dim = LAYOUTS[layout]
    q = torch.randn(1, num_heads, length, dim, device="cuda", dtype=DTYPE, requires_grad=True)
    k, v = (torch.randn(1, heads, length, dim, device="cuda", dtype=DTYPE, requires_grad=True) for _ in range(2))
    d_out = torch.randn(1, num_heads, length, dim, device="cuda", dtype=DTYPE)
    flops = num_heads * dim * visible_pairs(length)["dense"]
    for name, backend in (("FA2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):

        def forward(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        try:
            with torch.no_grad():
                ms = time_ms(lambda _: forward(), repeats=repeats)
            yield Row(layout=layout, length=length, name=f"dense {name} forward", ms=ms, flops=4 * flops)
            if "backward" in parts:
                out = forward()
                ms = time_ms(lambda _, out=out: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True), repeats=repeats)
                yield Row(layout=layout, length=length, name=f"dense {name} backward", ms=ms, flops=10 * flops)
        except RuntimeError as error:
            print(f"dense {name} {layout} {length}: refused ({str(error).splitlines()[0][:120]})", file=sys.stderr)


def decode_rows(layout: str, length: int, batch: int, repeats: int) -> Iterator[Row]:
    """One new token for each of `batch` sequences of `length` tokens, as a CUDA graph, L2 overwritten before each replay."""
    num_heads, heads, dim = LAYOUTS[layout]
    page, per_page = CONFIG.select_block_size, CONFIG.select_block_size // CONFIG.compress_stride
    pages = length // page
    raw = torch.randn(batch * pages + 1, 2, page, 3 * heads, dim, device="cuda", dtype=DTYPE)
    cmp = torch.randn(batch * pages + 1, per_page, heads, 2 * dim, device="cuda", dtype=DTYPE)
    cache = LayerCache(raw=raw, cmp=cmp, key_dim=dim, value_dim=dim, num_sets=3)
    table = (torch.randperm(batch * pages, device="cuda").view(batch, pages) + 1).int()
    lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    q = torch.randn(batch, 1, num_heads, dim, device="cuda", dtype=DTYPE)
    gates = torch.rand(batch, 1, num_heads, 3, device="cuda", dtype=DTYPE)
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")

    def step() -> object:
        return nsa_decode(q, cache, table, lengths, gates, phi=None, config=CONFIG)

    tokens = num_compressed(length, CONFIG) + CONFIG.num_selected_blocks * page + CONFIG.window_size
    yield Row(
        layout=layout, length=length, name=f"decode, batch {batch}", ms=graph_ms(step, flush, repeats), bytes=4.0 * dim * heads * batch * tokens
    )
    if batch * pages * page * heads * dim * 4 > 2**35:
        return
    k, v = (torch.randn(batch, heads, length, dim, device="cuda", dtype=DTYPE) for _ in range(2))
    query = q.transpose(1, 2)
    for name, backend in (("FA2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):

        def dense(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, k, v, enable_gqa=True)

        try:
            ms = graph_ms(dense, flush, repeats)
        except RuntimeError as error:
            print(f"dense {name} decode {layout} {length}: refused ({str(error).splitlines()[0][:120]})", file=sys.stderr)
            continue
        yield Row(layout=layout, length=length, name=f"dense {name} decode, batch {batch}", ms=ms, bytes=4.0 * dim * heads * batch * length)


def graph_ms(step: Callable[[], object], flush: Tensor, repeats: int) -> float:
    """Median milliseconds of a captured step, replayed with a cold L2."""
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


def check(layout: str) -> list[str]:
    """Errors of output and gradients against the torch backend in fp64 on a short sequence; selections fed alike."""
    num_heads, heads, dim = LAYOUTS[layout]
    inputs = make_inputs(CONFIG, lengths=[1400, 300], num_kv_heads=heads, group_size=num_heads // heads, key_dim=dim, value_dim=dim, device="cuda")
    exact, half = inputs.to(dtype=torch.float64), inputs.to(dtype=DTYPE)
    out, selection = nsa_attention(exact.q, exact.kv, exact.gates, **exact.options, return_selection=True, backend="torch")
    d_out = torch.randn_like(out)
    out.backward(d_out)
    lines = []
    errors: dict[str, dict[str, float]] = {}
    for backend in ("torch", "triton"):
        x = half.to()
        got = nsa_attention(x.q, x.kv, x.gates, **x.options, selection=selection, backend=backend)
        assert isinstance(got, Tensor)
        got.backward(d_out.to(DTYPE))
        errors[backend] = {"out": relative_rms(got, out)} | {
            name: relative_rms(leaf.grad, exact.leaves[name].grad)
            for name, leaf in x.leaves.items()
            if leaf.grad is not None  # type: ignore[arg-type]
        }
    for name, error in errors["triton"].items():
        verdict = "ok" if error <= max(5e-3, 2 * errors["torch"][name]) else "WRONG"
        lines.append(f"{verdict} {layout} {name}: {error:.2e} (torch in bf16 {errors['torch'][name]:.2e})")
    single = inputs.to(dtype=torch.float32, requires_grad=False)
    _, chosen = nsa_attention(single.q, single.kv, single.gates, **single.options, return_selection=True, backend="triton")
    clear = clear_choices(inputs)
    agree = same_blocks(chosen, selection)
    verdict = "ok" if bool(agree[clear].all()) else "WRONG"
    lines.append(f"{verdict} {layout} selection: {agree[clear].float().mean():.5f} of {int(clear.sum())} clear rows equal")
    return lines


def render(rows: Sequence[Row], rates: Rates) -> Table:
    """One table: every row beside its floor and the best dense time of its layout, length and direction."""
    table = Table(
        title=f"{torch.cuda.get_device_name()}, torch {torch.__version__}, GEMM {rates.flops / 1e12:.0f} TFLOP/s, copy {rates.bytes / 1e12:.2f} TB/s"
    )
    for column in ("layout", "T", "call", "ms", "dense/this", "TFLOP/s", "GB/s", "of floor", "GiB"):
        table.add_column(column, justify="left" if column in ("layout", "call") else "right")
    for row in rows:
        direction = next((word for word in ("forward", "backward", "decode") if word in row.name), "")
        batch = row.name.partition("batch")[2]
        rivals = [
            r.ms for r in rows if (r.layout, r.length) == (row.layout, row.length) and r.name.startswith("dense") and direction in r.name
            and r.name.partition("batch")[2] == batch
        ]  # fmt: skip
        whole = row.name.startswith(("nsa", "decode"))
        floor = rates.floor_ms(row)
        table.add_row(
            row.layout, str(row.length), row.name, f"{row.ms:.3f}", f"{min(rivals) / row.ms:.2f}×" if rivals and whole else "",
            f"{row.flops / row.ms / 1e9:.0f}" if row.flops else "", f"{row.bytes / row.ms / 1e6:.0f}" if row.bytes and not row.flops else "",
            f"{floor / row.ms:.0%}" if floor else "", "" if row.peak_gb is None else f"{row.peak_gb:.2f}",
        )  # fmt: skip
    return table


def main() -> int:
    """Check, time, print; exit code 1 where a check fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layouts", default="a,b")
    parser.add_argument("--lengths", default="8192,16384,32768,65536")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--batches", default="1,32", help="of the decode steps")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument("--output", type=Path, help="append the table to this file")
    args = parser.parse_args()
    layouts, lengths, parts = args.layouts.split(","), [int(x) for x in args.lengths.split(",")], args.parts.split(",")
    if unknown := [x for x in layouts if x not in LAYOUTS] + [x for x in parts if x not in PARTS]:
        parser.error(f"unknown {', '.join(unknown)}; layouts are {', '.join(LAYOUTS)}, parts {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        parser.error("this bench needs a CUDA GPU")
    failed = False
    if not args.skip_check:
        for layout in layouts:
            lines = check(layout)
            failed |= any(line.startswith("WRONG") for line in lines)
            print("\n".join(lines), flush=True)
    rates = measure_rates()
    rows: list[Row] = []

    def add(new: Iterator[Row]) -> None:
        for row in new:
            rows.append(row)
            print(f"{row.layout} {row.length} {row.name}: {row.ms:.3f} ms", flush=True)

    for layout in layouts:
        for length in lengths:
            if {"forward", "backward", "branches"} & set(parts):
                for realistic in (True, False):
                    problem = make_problem(layout, length, realistic=realistic)
                    add(attention_rows(layout, length, problem, parts, args.repeats))
                    del problem
            if "dense" in parts:
                add(dense_rows(layout, length, parts, max(3, args.repeats // 2)))
            if "decode" in parts:
                for batch in map(int, args.batches.split(",")):
                    add(decode_rows(layout, length, batch, 4 * args.repeats))
            torch.cuda.empty_cache()
    console = Console(width=150)
    console.print(render(rows, rates))
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            Console(file=file, width=150).print(render(rows, rates))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
