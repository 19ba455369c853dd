"""Other public implementations beside ours in the same run, whichever can be imported; `kernels.py --peers DIR,…` adds checkouts to the path.

| name | package | what it computes here |
|---|---|---|
| sfnsa | mdy666/Scalable-Flash-Native-Sparse-Attention | all of NSA, φ = mean; decode too |
| xunhao | XunhaoLai/native-sparse-attention-triton | the same |
| fsa | Relaxed-System-Lab/Flash-Sparse-Attention | the same; its own selected attention for groups of up to 8, as its module does |
| fla | fla-org/flash-linear-attention, `parallel_nsa` | compression with l = d = 64, which is less work; groups of 16 and more |
| FA4 | flash-attn-4 | dense attention, and the window by itself |

All of them take one set of K and V for the three branches, and their windows come from the package flash-attn: here that is
PyTorch's copy of the same kernel (FA2). Nothing of theirs is kept in this repository; an adapter calls their public functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nsa.blocks import num_compressed
from scripts.bench.attention.timing import Row, graph_ms, peak_gb, time_ms
from scripts.bench.attention.workload import CONFIG, DTYPE, LAYOUTS, Problem, visible_pairs, whole_work

Forward = Callable[[], Tensor]


def fa2_window(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    """Causal attention over the last w tokens by PyTorch's FA2: `[T, Hq, D]`."""
    length = q.shape[0]
    return torch.ops.aten._flash_attention_forward(
        q[None], k[None], v[None], None, None, length, length, 0.0, True, False,
        scale=q.shape[-1] ** -0.5, window_size_left=CONFIG.window_size - 1, window_size_right=0,
    )[0][0]  # fmt: skip


def ends_of(problem: Problem) -> Tensor:
    return torch.tensor([0, problem.length], dtype=torch.int32, device="cuda")


def sfnsa(problem: Problem) -> Forward:
    import flash_nsa
    from flash_nsa.modules import hf_level_nsa

    num_heads, heads, dim = LAYOUTS[problem.layout]
    hf_level_nsa.swa_varlen_func = fa2_window
    settings = flash_nsa.NSAConfig(
        head_dim=dim, num_heads=num_heads, num_kv_heads=heads, kernel_size=CONFIG.compress_block_size, stride=CONFIG.compress_stride,
        block_size=CONFIG.select_block_size, top_n=CONFIG.num_selected_blocks, num_init_blocks=CONFIG.num_init_blocks,
        num_local_blocks=CONFIG.num_local_blocks, window_size=CONFIG.window_size,
    )  # fmt: skip
    core, ends = flash_nsa.HFNSACore(settings), ends_of(problem)
    return lambda: core(problem.q, *problem.kv.slc, problem.gates, ends)


def gated(problem: Problem, compressed: Tensor, selected: Tensor, window: Tensor) -> Tensor:
    gates = problem.gates
    return gates[..., :1] * compressed + gates[..., 1:2] * selected + gates[..., 2:] * window


def by_branches(problem: Problem, pool: Callable, compression: Callable, selection: Callable) -> Forward:
    """xunhao and fsa have the same functions: pooling, compression attention with the choice of blocks, selected attention."""
    (key, value), ends = problem.kv.slc, ends_of(problem)
    size, stride = CONFIG.compress_block_size, CONFIG.compress_stride

    def forward() -> Tensor:
        (kc, ends_c), (vc, _) = pool(key, None, ends, size, stride), pool(value, None, ends, size, stride)
        out, blocks = compression(
            problem.q, kc, vc, size, stride, CONFIG.select_block_size, CONFIG.num_selected_blocks, ends, ends_c,
            problem.length, kc.shape[0], None, CONFIG.num_init_blocks, CONFIG.num_local_blocks,
        )  # fmt: skip
        selected = selection(problem.q, key, value, blocks, CONFIG.select_block_size, ends)
        return gated(problem, out, selected, fa2_window(problem.q, key, value))

    return forward


def xunhao(problem: Problem) -> Forward:
    from native_sparse_attention.ops import avgpool_compress, compressed_attention, topk_sparse_attention

    return by_branches(problem, avgpool_compress, compressed_attention, topk_sparse_attention)


def fsa(problem: Problem) -> Forward:
    from fsa.ops import FSA_topk_sparse_attention
    from nsa_ref.ops import avgpool_compress, compressed_attention, topk_sparse_attention

    num_heads, heads, _ = LAYOUTS[problem.layout]
    return by_branches(
        problem, avgpool_compress, compressed_attention, FSA_topk_sparse_attention if num_heads <= 8 * heads else topk_sparse_attention
    )


def fla(problem: Problem) -> Forward:
    from fla.ops.nsa import parallel_nsa

    compressed, selected, window = (gate[None].contiguous() for gate in problem.gates.unbind(-1))

    def forward() -> Tensor:
        q, (key, value) = problem.q, problem.kv.slc
        out = parallel_nsa(
            q[None], key[None], value[None], g_cmp=compressed, g_slc=selected, block_counts=CONFIG.num_selected_blocks,
            block_size=CONFIG.select_block_size,
        )  # fmt: skip
        return torch.addcmul(out[0], fa2_window(q, key, value), window[0][..., None])

    return forward


def fa4(problem: Problem, window: int | None) -> Forward:
    from flash_attn.cute import flash_attn_func

    q, key, value = (x[None] for x in (problem.q, *problem.kv.slc))
    size = {} if window is None else {"window_size": (window - 1, 0)}

    def forward() -> Tensor:
        out = flash_attn_func(q, key, value, causal=True, **size)
        return (out[0] if isinstance(out, tuple) else out)[0]

    return forward


def measured(
    problems: Sequence[Problem], name: str, forwards: Sequence[Forward], repeats: int, work: Callable[[bool], tuple[float, float]]
) -> Iterator[Row]:  # fmt: skip
    """Rows of a forward without gradient, and of the backward: both together less the forward that keeps what it needs."""
    common = {"layout": problems[0].layout, "length": problems[0].length}

    def forward(index: int) -> Tensor:
        return forwards[index % len(forwards)]()

    def train(index: int) -> Tensor:
        out, problem = forward(index), problems[index % len(problems)]
        out.backward(problem.d_out)
        for leaf in problem.leaves:
            leaf.grad = None
        return out.detach()

    with torch.no_grad():
        ms, (flops, bytes_) = time_ms(forward, repeats=repeats, warmup=2), work(False)
        yield Row(**common, name=f"{name} forward", ms=ms, flops=flops, bytes=bytes_, peak_gb=peak_gb(lambda: forward(0)))
    train(0)
    peak, kept, both = peak_gb(lambda: train(0)), time_ms(forward, repeats=repeats, warmup=1), time_ms(train, repeats=repeats, warmup=1)
    flops, bytes_ = work(True)
    yield Row(**common, name=f"{name} backward", ms=both - kept, flops=flops, bytes=bytes_, peak_gb=peak)


WHOLE = {"sfnsa": sfnsa, "xunhao": xunhao, "fsa": fsa, "fla": fla}
NAMES = (*WHOLE, "FA4", "FA2")


def peer_rows(problems: Sequence[Problem], repeats: int, names: tuple[str, ...] = NAMES) -> Iterator[Row]:
    """Every peer of `names` that can be imported and takes this layout; one line on stderr for each that cannot."""
    layout, length = problems[0].layout, problems[0].length
    num_heads, _, dim = LAYOUTS[layout]

    def banded(branch: str) -> Callable[[bool], tuple[float, float]]:
        return lambda backward: ((10.0 if backward else 4.0) * num_heads * dim * visible_pairs(length)[branch], 0.0)

    jobs: list[tuple[str, Callable[[Problem], Forward], Callable[[bool], tuple[float, float]]]] = []
    for name in names:
        if name in WHOLE:
            jobs.append((f"peer {name}", WHOLE[name], lambda backward: whole_work(layout, length, backward=backward)))
        elif name == "FA4":
            jobs.append(("dense FA4", lambda problem: fa4(problem, None), banded("dense")))
            jobs.append(("window FA4", lambda problem: fa4(problem, CONFIG.window_size), banded("win")))
        else:
            jobs.append(("window FA2", lambda problem: lambda: fa2_window(problem.q, *problem.kv.win), banded("win")))
    for name, make, work in jobs:
        try:
            yield from measured(problems, name, [make(problem) for problem in problems], repeats, work)
        except Exception as error:  # noqa: BLE001 — whatever a peer does, the others go on
            leave_out(f"{name} {layout} {length}", error)
        torch.cuda.empty_cache()


def leave_out(what: str, error: Exception) -> None:
    lines = str(error).strip().splitlines() or [""]
    print(f"{what}: left out ({type(error).__name__}: {lines[0][:160]})", file=sys.stderr, flush=True)


def peer_decode_rows(layout: str, length: int, batch: int, repeats: int) -> Iterator[Row]:
    """sfnsa's decode step as a CUDA graph: shuffled pages of 256 tokens, compressed tokens in pages of the same cache, none of them new."""
    num_heads, heads, dim = LAYOUTS[layout]
    page, compressed = 256, num_compressed(length, CONFIG)
    columns, cmp_columns = -(-length // page), -(-compressed // page)
    try:
        from flash_nsa import nsa_decode as decode

        table = torch.randperm(batch * (columns + cmp_columns), device="cuda").int().view(batch, -1)
        k, v = (torch.randn(table.numel(), page, heads, dim, device="cuda", dtype=DTYPE) for _ in range(2))
        q, gates = torch.randn(batch, num_heads, dim, device="cuda", dtype=DTYPE), torch.rand(batch, num_heads, 3, device="cuda", dtype=DTYPE)
        lengths, none = torch.full((batch,), length, dtype=torch.int32, device="cuda"), torch.full((batch,), -1, dtype=torch.int32, device="cuda")
        tables = table[:, :columns].contiguous(), table[:, columns:].contiguous()
        most = {"fixed_y_maxlen": 1 << compressed.bit_length(), "fixed_num_slc_blocks": max(16, length // CONFIG.select_block_size)}
        ms = graph_ms(lambda: decode(q, k, v, gates, lengths, tables[0], none, tables[1], **most), repeats)
    except Exception as error:  # noqa: BLE001 — as above
        leave_out(f"peer sfnsa decode {layout} {length}", error)
        return
    tokens = compressed + CONFIG.num_selected_blocks * CONFIG.select_block_size + CONFIG.window_size
    yield Row(layout=layout, length=length, name=f"peer sfnsa decode, batch {batch}", ms=ms, bytes=4.0 * dim * heads * batch * tokens)
