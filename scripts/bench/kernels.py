"""Check, then time the sparse-attention kernels beside dense attention and other public kernels, in one run on one GPU.

    python scripts/bench/kernels.py                                       # everything: three layouts, 1k to 128k
    python scripts/bench/kernels.py --layouts smollm2 --lengths 1024,8192 --parts forward,backward,dense
    python scripts/bench/kernels.py --parts decode --batches 1,32 --output scripts/bench/RESULTS.md
    python scripts/bench/kernels.py --parts dense,peers --peers ~/sfnsa,~/fla --peer-names sfnsa,fla

Layouts (query heads / KV heads / head dim): a 64/4/128, b 32/8/128, smollm2 9/3/64; the paper's l 32, d 16, l' 64, n 16, w 512.
Dense: PyTorch's SDPA with the flash and the cuDNN backend, whichever runs; peers: attention/peers.py. Times are CUDA events around single
calls, the median of `--repeats` after a warm-up, going round several sets of inputs where one would stay in the L2 cache (branches
by themselves use one). Each call makes its host work anew; in short calls that bounds them. Decode steps, and with `graph` forward and
backward together, are CUDA graphs replayed after the L2 cache was overwritten: what the GPU alone takes.
The floor of a row is the larger of its FLOPs at the GEMM rate and its bytes at the copy rate measured here.
Blocks are always the kernels' own choice, on queries and keys whose neighbours are as much alike as a trained model's (attention/
workload.py says how much), or on random ones, which makes it a random choice (worst locality). Single branches have given random
blocks instead.
Peak memory: GB (10⁹ bytes) beyond inputs and output; in `backward` rows of forward and backward together, saved tensors and
gradients counted in. First call: seconds of one forward and backward, or one decode step, at 8,192 tokens, nothing compiled before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Python puts this folder first on its path, where kernels.py would pass for the package `kernels` that transformers looks for.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parents[1]), *(entry for entry in sys.path if Path(entry).resolve() != HERE)]

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nsa.attention import nsa_attention, nsa_decode, plan_batch
from nsa.blocks import num_compressed
from nsa.kernels.banded import Band, BandTensors, banded_backward, banded_forward, both_dq
from nsa.kernels.compress import compress
from nsa.kernels.gating import gate_backward
from nsa.kernels.inverse import invert_selection
from nsa.kernels.scoring import choose_blocks
from nsa.kernels.selected import selected_backward, selected_forward
from nsa.kernels.tiles import KernelPlan
from nsa.testing import clear_choices, make_inputs, relative_rms, same_blocks
from scripts.bench.attention.first_call import KINDS, LENGTH, first_call_seconds
from scripts.bench.attention.peers import NAMES, peer_decode_rows, peer_rows
from scripts.bench.attention.timing import Row, graph_ms, measure_rates, peak_gb, render, time_ms
from scripts.bench.attention.workload import (
    CONFIG,
    DTYPE,
    LAYOUTS,
    Problem,
    make_problems,
    make_step,
    random_selection,
    rotation,
    visible_pairs,
    whole_work,
)

LONGEST_TRAINING = 65536
"""Beyond this length, forward alone is timed, ours and dense."""
PARTS = ("forward", "backward", "graph", "branches", "deterministic", "dense", "peers", "decode", "first-call")


def attention_rows(problems: Sequence[Problem], parts: Sequence[str], repeats: int, *, deterministic: bool = False) -> Iterator[Row]:
    """The whole of `nsa_attention`, forward without gradient, forward that keeps what the backward needs, and backward."""
    problem = problems[0]
    kind = f"deterministic, {problem.keys}" if deterministic else problem.keys
    common = {"layout": problem.layout, "length": problem.length}

    def forward(index: int) -> Tensor:
        x = problems[index % len(problems)]
        out = nsa_attention(x.q, x.kv, x.gates, phi=x.phi, config=CONFIG, deterministic=deterministic, backend="triton")
        assert isinstance(out, Tensor)
        return out

    def train(index: int) -> Tensor:
        out, x = forward(index), problems[index % len(problems)]
        out.backward(x.d_out)
        for leaf in x.leaves:
            leaf.grad = None
        return out.detach()

    if "forward" in parts:
        with torch.no_grad():
            flops, bytes_ = whole_work(problem.layout, problem.length, backward=False)
            ms = time_ms(forward, repeats=repeats)
            yield Row(**common, name=f"nsa forward, {kind}", ms=ms, flops=flops, bytes=bytes_, peak_gb=peak_gb(lambda: forward(0)))
    if "backward" in parts:
        train(0)
        peak, kept_ms, both_ms = peak_gb(lambda: train(0)), time_ms(forward, repeats=repeats), time_ms(train, repeats=repeats)
        flops, bytes_ = whole_work(problem.layout, problem.length, backward=True)
        yield Row(**common, name=f"nsa, kept for the other pass, {kind}", ms=kept_ms)
        yield Row(**common, name=f"nsa backward, {kind}", ms=both_ms - kept_ms, flops=flops, bytes=bytes_, peak_gb=peak)
    if "graph" in parts:
        ends = torch.tensor([0, problem.length])
        plan = plan_batch(ends, None, config=CONFIG, num_heads=problem.q.shape[1], device=problem.q.device, backend="triton")

        def step() -> object:
            with torch.enable_grad():
                out = nsa_attention(
                    problem.q, problem.kv, problem.gates, phi=problem.phi, config=CONFIG, cu_seqlens=plan, deterministic=deterministic
                )
                assert isinstance(out, Tensor)
                return torch.autograd.grad(out, problem.leaves, problem.d_out)

        yield Row(**common, name=f"nsa forward and backward, CUDA graph, {kind}", ms=graph_ms(step, repeats))


def branch_rows(problem: Problem, repeats: int) -> Iterator[Row]:
    """Each kernel by itself; on random keys those alone that depend on the blocks, with given random ones."""
    layout, length = problem.layout, problem.length
    num_heads, heads, dim = LAYOUTS[layout]
    kind = "own blocks" if problem.realistic else "random blocks"
    pairs = visible_pairs(length)
    scale = dim**-0.5
    q, gates, d_out = problem.q.detach(), problem.gates.detach(), problem.d_out
    (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win) = ((k.detach(), v.detach()) for k, v in (problem.kv.cmp, problem.kv.slc, problem.kv.win))
    plan = KernelPlan(torch.tensor([0, length]), None, config=CONFIG, device=q.device)
    compressed, window = Band("compression", plan, CONFIG), Band("window", plan, CONFIG)
    out, dq = torch.empty_like(d_out), torch.zeros_like(q)
    gate = gates.unbind(-1)
    keep = {"scale": scale, "out": out, "accumulate": False, "keep": True}

    def row(name: str, call: Callable[[int], object], branch: str | None = None, factor: float = 0.0) -> Row:
        flops = factor * num_heads * dim * pairs[branch] if branch else 0.0
        return Row(layout=layout, length=length, name=name, ms=time_ms(call, repeats=repeats), flops=flops, peak_gb=peak_gb(lambda: call(0)))

    with torch.no_grad():
        kc, vc = compress(k_cmp, problem.phi.k, plan, CONFIG), compress(v_cmp, problem.phi.v, plan, CONFIG)
        out_cmp, lse_cmp = banded_forward(q, kc, vc, compressed, gate=gate[0], **keep)
        chosen = choose_blocks(q, kc, lse_cmp, plan, CONFIG, scale=scale) if problem.realistic else random_selection(length, heads)
        out_slc, lse_slc = selected_forward(q, k_slc, v_slc, chosen, plan, CONFIG, gate=gate[1], **keep)
        out_win, lse_win = banded_forward(q, k_win, v_win, window, gate=gate[2], **keep)
        outs = (out_cmp, out_slc, out_win)
        _, delta = gate_backward(d_out, gates, outs)
        deltas = delta.unbind(-1)
        if problem.realistic:
            yield row("φ of keys and values", lambda _: (compress(k_cmp, problem.phi.k, plan, CONFIG), compress(v_cmp, problem.phi.v, plan, CONFIG)))
            yield row("compression forward", lambda _: banded_forward(q, kc, vc, compressed, gate=gate[0], **keep), "cmp", 4)
            yield row("score and top-n", lambda _: choose_blocks(q, kc, lse_cmp, plan, CONFIG, scale=scale), "cmp", 2)
            yield row("window forward", lambda _: banded_forward(q, k_win, v_win, window, gate=gate[2], **keep), "win", 4)
            both = (BandTensors(compressed, kc, vc, gate[0]), BandTensors(window, k_win, v_win, gate[2]))
            yield row("gates backward", lambda _: gate_backward(d_out, gates, outs))
            back = {"scale": scale, "dq": dq, "dq_before": dq}
            yield row("compression backward", lambda _: banded_backward(d_out, q, kc, vc, lse_cmp, deltas[0], gate[0], compressed, **back), "cmp", 10)
            yield row("window backward", lambda _: banded_backward(d_out, q, k_win, v_win, lse_win, deltas[2], gate[2], window, **back), "win", 10)
            lses, both_deltas = (lse_cmp, lse_win), (deltas[0], deltas[2])
            yield row("dq of compression and window", lambda _: both_dq(d_out, q, *both, lses, both_deltas, scale=scale, dq=dq))
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

    def draw(heads: int) -> Tensor:
        return torch.randn(1, heads, length, dim, device="cuda", dtype=DTYPE, requires_grad=True)

    inputs = [(draw(num_heads), draw(heads), draw(heads)) for _ in range(rotation(layout, length))]
    d_out = draw(num_heads).detach()
    flops = num_heads * dim * visible_pairs(length)["dense"]
    for name, backend in (("FA2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):

        def forward(index: int, backend: SDPBackend = backend) -> Tensor:
            q, k, v = inputs[index % len(inputs)]
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        try:
            with torch.no_grad():
                yield Row(layout=layout, length=length, name=f"dense {name} forward", ms=time_ms(forward, repeats=repeats), flops=4 * flops)
            if "backward" in parts:
                outs = [forward(index) for index in range(len(inputs))]

                def backward(index: int, outs: list[Tensor] = outs) -> object:
                    return torch.autograd.grad(outs[index % len(outs)], inputs[index % len(outs)], d_out, retain_graph=True)

                yield Row(layout=layout, length=length, name=f"dense {name} backward", ms=time_ms(backward, repeats=repeats), flops=10 * flops)
            if "graph" in parts:

                def step(forward: Callable[[int], Tensor] = forward) -> object:
                    with torch.enable_grad():
                        return torch.autograd.grad(forward(0), inputs[0], d_out)

                call = f"dense {name} forward and backward, CUDA graph"
                yield Row(layout=layout, length=length, name=call, ms=graph_ms(step, repeats), flops=14 * flops)
        except RuntimeError as error:
            print(f"dense {name} {layout} {length}: refused ({str(error).splitlines()[0][:120]})", file=sys.stderr)


def decode_rows(layout: str, length: int, batch: int, repeats: int) -> Iterator[Row]:
    """One new token for each of `batch` sequences of `length` tokens, as a CUDA graph, L2 overwritten before each replay."""
    _, heads, dim = LAYOUTS[layout]
    step = make_step(layout, length, batch)

    def decode() -> object:
        return nsa_decode(step.q, step.cache, step.table, step.lengths, step.gates, phi=None, config=CONFIG, backend="triton")

    tokens = num_compressed(length, CONFIG) + CONFIG.num_selected_blocks * CONFIG.select_block_size + CONFIG.window_size
    yield Row(layout=layout, length=length, name=f"decode, batch {batch}", ms=graph_ms(decode, repeats), bytes=4.0 * dim * heads * batch * tokens)
    if batch * length * heads * dim * 4 > 2**35:
        return
    k, v = (torch.randn(batch, heads, length, dim, device="cuda", dtype=DTYPE) for _ in range(2))
    query = step.q.transpose(1, 2)
    for name, backend in (("FA2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):

        def dense(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, k, v, enable_gqa=True)

        try:
            ms = graph_ms(dense, repeats)
        except RuntimeError as error:
            print(f"dense {name} decode {layout} {length}: refused ({str(error).splitlines()[0][:120]})", file=sys.stderr)
            continue
        yield Row(layout=layout, length=length, name=f"dense {name} decode, batch {batch}", ms=ms, bytes=4.0 * dim * heads * batch * length)


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


def first_call_rows(layout: str) -> Iterator[Row]:
    """Milliseconds of a process's first call, everything compiled in it."""
    for kind in KINDS:
        yield Row(layout=layout, length=LENGTH, name=f"first call, {kind}", ms=1e3 * first_call_seconds(layout, kind))


def arguments() -> argparse.Namespace:
    """The command line, lists split and names checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768,65536,131072")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--keys", default="alike,random", help="whether neighbouring queries and keys are alike in what whole calls and branches are timed on"
    )
    parser.add_argument("--batches", default="1,32", help="of the decode steps")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peers", default="", help="checkouts of peers, put on Python's path")
    parser.add_argument("--peer-names", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument("--output", type=Path, help="append the table to this file")
    args = parser.parse_args()
    allowed = {"layouts": tuple(LAYOUTS), "parts": PARTS, "keys": ("alike", "random"), "peer_names": NAMES}
    for name, names in allowed.items():
        setattr(args, name, tuple(getattr(args, name).split(",")))
        if unknown := [x for x in getattr(args, name) if x not in names]:
            parser.error(f"--{name.replace('_', '-')}: unknown {', '.join(unknown)}; allowed are {', '.join(names)}")
    args.lengths, args.batches = ([int(x) for x in value.split(",")] for value in (args.lengths, args.batches))
    if not torch.cuda.is_available():
        parser.error("this bench needs a CUDA GPU")
    return args


def rows_of(layout: str, length: int, args: argparse.Namespace) -> Iterator[Row]:
    """Every row of a layout and length that was asked for."""
    parts, repeats = args.parts, args.repeats
    if length > LONGEST_TRAINING:
        parts = tuple(part for part in parts if part in ("forward", "dense"))
    whole = {"forward", "backward", "graph", "branches", "deterministic"} & set(parts)
    for keys in args.keys if whole else ():
        problems = make_problems(layout, length, realistic=keys == "alike")
        yield from attention_rows(problems, parts, repeats)
        if "deterministic" in parts and keys == "alike":
            yield from attention_rows(problems, parts, repeats, deterministic=True)
        if "branches" in parts:
            yield from branch_rows(problems[0], repeats)
        del problems
        torch.cuda.empty_cache()
    if "dense" in parts:
        yield from dense_rows(layout, length, parts, max(3, repeats // 2))
    if "peers" in parts:
        yield from peer_rows(make_problems(layout, length, realistic=True), max(3, repeats // 2), args.peer_names)
    if "decode" in parts:
        for batch in args.batches:
            yield from decode_rows(layout, length, batch, 4 * repeats)
            if "peers" in parts and "sfnsa" in args.peer_names:
                yield from peer_decode_rows(layout, length, batch, 4 * repeats)
    torch.cuda.empty_cache()


def main() -> int:
    """Check, time, print; exit code 1 where a check fails."""
    args = arguments()
    sys.path.extend(entry for entry in args.peers.split(",") if entry)
    failed = False
    if not args.skip_check:
        for layout in args.layouts:
            lines = check(layout)
            failed |= any(line.startswith("WRONG") for line in lines)
            print("\n".join(lines), flush=True)
    rates, rows = measure_rates(), []
    for layout in args.layouts:
        for length in args.lengths:
            for row in rows_of(layout, length, args):
                rows.append(row)
                print(f"{row.layout} {row.length} {row.name}: {row.ms:.3f} ms" + (f", peak {row.peak_gb:.2f} GB" if row.peak_gb else ""), flush=True)
        if "first-call" in args.parts:
            for row in first_call_rows(layout):
                rows.append(row)
                print(f"{row.layout} {row.length} {row.name}: {row.ms / 1e3:.1f} s", flush=True)
    Console(width=150).print(render(rows, rates))
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            Console(file=file, width=150).print(render(rows, rates))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
