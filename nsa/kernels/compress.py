"""φ on packed sequences: mean(block) + down @ silu(up @ flatten(block + position)), with gradients for every input (Eq. 7).

Neighbouring blocks of l tokens share l − d of them, so the products with `up` are taken over chunks of d tokens once and
added up afterwards. A sequence with C compressed tokens has C + l/d − 1 chunks; sequence s's chunks begin at row
compressed_ends[s] + s·(l/d − 1), so that no table is needed (rows of sequences without compressed tokens hold zeros).
Triton kernels move, pool and activate; the matrix products are cuBLAS'. Gathers only, no atomics.

Eager calls go through autograd functions, calls that `torch.compile` traces through operators with fake implementations.

cuBLAS chooses how to add up by the number of rows of the whole batch, so with `deterministic` a kernel of fixed tiles takes
the products that go row by row. Gradients of weights are sums over the batch and stay with cuBLAS: the same bits from run to run.

Shapes: Tk tokens, H KV heads, C compressed tokens, R chunks, D head dim, F hidden size, ratio = l / d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from nsa.attention import CompressorWeights
from nsa.config import SparsityConfig
from nsa.kernels.launch import ceil_div, dot_precision, launch, padded, power_of_two
from nsa.kernels.tiles import KernelPlan


@dataclass(frozen=True, slots=True)
class Layout:
    """Where chunks and compressed tokens of the packed sequences lie, and whether a row's products may depend on other rows.

    key_ends and compressed_ends: int32 `[N+1]` as in the plan; num_compressed: C; block, stride: l and d."""

    key_ends: torch.Tensor
    compressed_ends: torch.Tensor
    num_compressed: int
    block: int
    stride: int
    deterministic: bool

    @property
    def num_sequences(self) -> int:
        return len(self.key_ends) - 1

    @property
    def ratio(self) -> int:
        return self.block // self.stride

    @property
    def num_chunks(self) -> int:
        return self.num_compressed + self.num_sequences * (self.ratio - 1)

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.key_ends, self.compressed_ends, self.num_sequences


@triton.jit
def owner(rows, Ends, num_sequences, EXTRA: tl.constexpr):
    """The last sequence s with Ends[s] + s·EXTRA <= row, by bisection. (A constant number of sequences, 1, does not compile: see the callers.)"""
    low = tl.zeros_like(rows)
    size = num_sequences
    while size > 1:
        half = size // 2
        middle = tl.minimum(low + half, num_sequences - 1)
        low = tl.where(tl.load(Ends + middle) + middle * EXTRA <= rows, middle, low)
        size -= half
    return low


@triton.jit(do_not_specialize=["num_sequences", "num_rows"])
def pool_kernel(
    X, Out, TokenEnds, CompressedEnds, num_sequences, num_rows, stride_x, stride_xh, stride_o, stride_oh,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Means of blocks: Out `[C, H, D]`."""
    rows, dims, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.program_id(1)
    valid = rows < num_rows
    sequence = owner(tl.minimum(rows, num_rows - 1), CompressedEnds, num_sequences, 0)
    token = tl.load(TokenEnds + sequence) + (rows - tl.load(CompressedEnds + sequence)) * STRIDE
    mask = valid[:, None] & (dims < DIM)[None, :]
    x = X + (tl.cast(token, tl.int64) * stride_x + head * stride_xh)[:, None] + dims[None, :]
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in range(BLOCK):
        acc += tl.load(x + tl.cast(i, tl.int64) * stride_x, mask=mask, other=0.0).to(tl.float32)
    out = Out + (tl.cast(rows, tl.int64) * stride_o + head * stride_oh)[:, None] + dims[None, :]
    tl.store(out, (acc / BLOCK).to(Out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_sequences", "num_chunks"])
def pack_kernel(
    X, Packed, TokenEnds, CompressedEnds, num_sequences, num_chunks, num_heads, stride_x, stride_xh,
    DIM: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tokens by chunk: Packed `[R, H, d, D]`, contiguous; zeros where a sequence has no compressed token."""
    rows, dims, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.program_id(1)
    chunks = rows // STRIDE
    inside = (chunks < num_chunks)[:, None] & (dims < DIM)[None, :]
    sequence = owner(tl.minimum(chunks, num_chunks - 1), CompressedEnds, num_sequences, RATIO - 1)
    first = tl.load(CompressedEnds + sequence)
    used = tl.load(CompressedEnds + sequence + 1) > first
    token = tl.load(TokenEnds + sequence) + (chunks - first - sequence * (RATIO - 1)) * STRIDE + rows % STRIDE
    x = X + (tl.cast(token, tl.int64) * stride_x + head * stride_xh)[:, None] + dims[None, :]
    tile = tl.load(x, mask=inside & used[:, None], other=0.0)
    at = (tl.cast(chunks, tl.int64) * num_heads + head) * STRIDE + rows % STRIDE
    tl.store(Packed + at[:, None] * DIM + dims[None, :], tile, mask=inside)


@triton.jit(do_not_specialize=["num_sequences", "num_rows"])
def activate_kernel(
    Parts, Bias, Hidden, Active, CompressedEnds, num_sequences, num_rows, num_heads,
    SIZE: tl.constexpr, RATIO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Hidden `[C, H, F]` = Bias + Σ_j Parts[chunk + j, :, j], fp32, and Active = silu of it. Parts `[R, H, ratio, F]`."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    compressed, head = rows // num_heads, rows % num_heads
    mask = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
    last = num_rows // num_heads - 1
    sequence = owner(tl.minimum(compressed, last), CompressedEnds, num_sequences, 0)
    chunk = tl.cast(compressed + sequence * (RATIO - 1), tl.int64)
    hidden = tl.zeros([ROWS, COLUMNS], tl.float32) + tl.load(Bias + columns, mask=columns < SIZE, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(RATIO):
        at = ((chunk + j) * num_heads + head) * RATIO + j
        hidden += tl.load(Parts + at[:, None] * SIZE + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    at = tl.cast(rows, tl.int64)[:, None] * SIZE + columns[None, :]
    tl.store(Hidden + at, hidden, mask=mask)
    tl.store(Active + at, (hidden * tl.sigmoid(hidden)).to(Active.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_sequences", "num_rows"])
def activate_backward_kernel(
    DActive, Hidden, DParts, CompressedEnds, num_sequences, num_rows, num_heads,
    SIZE: tl.constexpr, RATIO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """DParts `[R, H, ratio, F]` from DActive `[C, H, F]`; zero where a chunk is not the j-th of any block."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    pair, j = rows // RATIO, rows % RATIO
    chunk, head = pair // num_heads, pair % num_heads
    inside = rows < num_rows
    sequence = owner(tl.minimum(chunk, num_rows // RATIO // num_heads - 1), CompressedEnds, num_sequences, RATIO - 1)
    first, end = tl.load(CompressedEnds + sequence), tl.load(CompressedEnds + sequence + 1)
    compressed = chunk - sequence * (RATIO - 1) - j
    used = inside & (compressed >= first) & (compressed < end)
    mask = used[:, None] & (columns < SIZE)[None, :]
    at = (tl.cast(compressed, tl.int64) * num_heads + head)[:, None] * SIZE + columns[None, :]
    hidden = tl.load(Hidden + at, mask=mask, other=0.0)
    d_active = tl.load(DActive + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(hidden)
    d_hidden = d_active * sigmoid * (1.0 + hidden * (1.0 - sigmoid))
    out = DParts + tl.cast(rows, tl.int64)[:, None] * SIZE + columns[None, :]
    tl.store(out, d_hidden.to(DParts.dtype.element_ty), mask=inside[:, None] & (columns < SIZE)[None, :])


@triton.jit(do_not_specialize=["num_sequences", "num_tokens"])
def scatter_kernel(
    DOut, DPacked, DX, TokenEnds, CompressedEnds, num_sequences, num_tokens, num_heads, stride_do, stride_doh, stride_dx, stride_dxh,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, ROWS: tl.constexpr, MLP: tl.constexpr,
):  # fmt: skip
    """DX `[Tk, H, D]`: each token's part of the means it is in, plus its row of DPacked `[R, H, d, D]`."""
    rows, dims, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.program_id(1)
    inside = (rows < num_tokens)[:, None] & (dims < DIM)[None, :]
    sequence = owner(tl.minimum(rows, num_tokens - 1), TokenEnds, num_sequences, 0)
    first, end = tl.load(CompressedEnds + sequence), tl.load(CompressedEnds + sequence + 1)
    token = rows - tl.load(TokenEnds + sequence)
    chunk = token // STRIDE
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for j in tl.static_range(RATIO):
        compressed = first + chunk - j
        used = (compressed >= first) & (compressed < end)
        at = tl.cast(compressed, tl.int64) * stride_do + head * stride_doh
        acc += tl.load(DOut + at[:, None] + dims[None, :], mask=inside & used[:, None], other=0.0).to(tl.float32)
    acc = acc / BLOCK
    if MLP:
        used = (end > first) & (chunk < end - first + (RATIO - 1))
        at = (tl.cast(first + sequence * (RATIO - 1) + chunk, tl.int64) * num_heads + head) * STRIDE + token % STRIDE
        acc += tl.load(DPacked + at[:, None] * DIM + dims[None, :], mask=inside & used[:, None], other=0.0).to(tl.float32)
    out = DX + (tl.cast(rows, tl.int64) * stride_dx + head * stride_dxh)[:, None] + dims[None, :]
    tl.store(out, acc.to(DX.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def product_kernel(
    Left, Right, Added, Out, num_rows, stride_rk, stride_rn,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Out `[M, WIDTH]` = Left `[M, DEPTH]` @ Right (+ Added), summed over the depth in steps of STEP: a row's bits depend on no other row."""
    num_columns: tl.constexpr = tl.cdiv(WIDTH, COLUMNS)
    rows = tl.program_id(0) // num_columns * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % num_columns * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, STEP)
    some_rows, some_columns = (rows < num_rows)[:, None], (columns < WIDTH)[None, :]
    left = Left + tl.cast(rows, tl.int64)[:, None] * DEPTH + depth[None, :]
    right = Right + depth[:, None] * stride_rk + columns[None, :] * stride_rn
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, DEPTH, STEP):
        inside = first + depth < DEPTH
        a = tl.load(left + first, mask=some_rows & inside[None, :], other=0.0)
        b = tl.load(right + first * stride_rk, mask=inside[:, None] & some_columns, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    at, mask = tl.cast(rows, tl.int64)[:, None] * WIDTH + columns[None, :], some_rows & some_columns
    if ADD:
        acc += tl.load(Added + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(Out + at, acc.to(Out.dtype.element_ty), mask=mask)


def row_product(left: torch.Tensor, right: torch.Tensor, added: torch.Tensor | None, layout: Layout) -> torch.Tensor:
    """`[M, N]` = left `[M, K]`, contiguous, @ right `[K, N]` (+ added `[M, N]`, contiguous)."""
    if not layout.deterministic:
        return left @ right if added is None else torch.addmm(added, left, right)
    (num_rows, depth), width = left.shape, right.shape[1]
    out = torch.empty(num_rows, width, dtype=left.dtype, device=left.device)
    exact = left.dtype == torch.float32
    rows, columns, step = 64 if exact else 128, min(64 if exact else 128, padded(width)), min(32 if exact else 64, padded(depth))
    launch(
        product_kernel, (ceil_div(num_rows, rows) * ceil_div(width, columns),),
        left, right, left if added is None else added, out, num_rows, *right.stride(),
        DEPTH=depth, WIDTH=width, ROWS=rows, COLUMNS=columns, STEP=step, ADD=added is not None, PRECISION=dot_precision(),
        num_warps=4 if exact else 8, num_stages=2 if exact else 3,
    )  # fmt: skip
    return out


def tile_rows(width: int) -> int:
    """Rows of a tile of some 4096 entries."""
    return max(1, 4096 // width)


def pool(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Means of the blocks of x `[Tk, H, D]`: `[C, H, D]`."""
    dim, rows, width = x.shape[2], layout.num_compressed, power_of_two(x.shape[2])
    out = torch.empty(rows, *x.shape[1:], dtype=x.dtype, device=x.device)
    size = tile_rows(width) // 2 or 1
    launch(
        pool_kernel, (ceil_div(rows, size), x.shape[1]),
        x, out, *layout.arguments, rows, *x.stride()[:2], *out.stride()[:2],
        DIM=dim, WIDTH=width, BLOCK=layout.block, STRIDE=layout.stride, ROWS=size,
    )  # fmt: skip
    return out


def pack(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Chunks of x `[Tk, H, D]` as the rows of a matrix `[R·H, d·D]`."""
    (_, heads, dim), width = x.shape, power_of_two(x.shape[2])
    packed = torch.empty(layout.num_chunks * heads, layout.stride * dim, dtype=x.dtype, device=x.device)
    size = tile_rows(width)
    launch(
        pack_kernel, (ceil_div(layout.num_chunks * layout.stride, size), heads),
        x, packed, *layout.arguments, layout.num_chunks, heads, *x.stride()[:2],
        DIM=dim, WIDTH=width, STRIDE=layout.stride, RATIO=layout.ratio, ROWS=size,
    )  # fmt: skip
    return packed


def scatter(d_out: torch.Tensor, d_packed: torch.Tensor | None, num_tokens: int, layout: Layout) -> torch.Tensor:
    """Gradient of x `[Tk, H, D]` from those of the means `[C, H, D]` and of the packed chunks."""
    (_, heads, dim), width = d_out.shape, power_of_two(d_out.shape[2])
    d_x = torch.empty(num_tokens, heads, dim, dtype=d_out.dtype, device=d_out.device)
    size = tile_rows(width)
    launch(
        scatter_kernel, (ceil_div(num_tokens, size), heads),
        d_out, d_out if d_packed is None else d_packed, d_x,
        *layout.arguments, num_tokens, heads, *d_out.stride()[:2], *d_x.stride()[:2],
        DIM=dim, WIDTH=width, BLOCK=layout.block, STRIDE=layout.stride, RATIO=layout.ratio, ROWS=size, MLP=d_packed is not None,
    )  # fmt: skip
    return d_x


def mlp_forward(
    x: torch.Tensor, up: torch.Tensor, bias: torch.Tensor, down: torch.Tensor, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x `[Tk, H, D]`, up `[ratio·F, d·D]` (by chunk), bias `[F]`, down `[D, F]` → φ `[C, H, D]`; the hidden layer `[C·H, F]` before silu, fp32."""
    heads, size, rows = x.shape[1], bias.shape[0], layout.num_compressed * x.shape[1]
    parts = row_product(pack(x, layout), up.T, None, layout)
    hidden = torch.empty(rows, size, dtype=torch.float32, device=x.device)
    active = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    columns = min(128, power_of_two(size))
    launch(
        activate_kernel, (ceil_div(rows, 32), ceil_div(size, columns)),
        parts, bias, hidden, active, layout.compressed_ends, layout.num_sequences, rows, heads,
        SIZE=size, RATIO=layout.ratio, ROWS=32, COLUMNS=columns,
    )  # fmt: skip
    return row_product(active, down.T, pool(x, layout).flatten(0, 1), layout).unflatten(0, (-1, heads)), hidden


def mlp_backward(
    d_out: torch.Tensor, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, hidden: torch.Tensor, layout: Layout, *, of_x: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of `mlp_forward`'s x (None unless `of_x`), up, bias and down from that of its output, which is contiguous."""
    heads, size = x.shape[1], down.shape[1]
    d_rows = d_out.flatten(0, 1)
    d_down = d_rows.T @ (hidden * torch.sigmoid(hidden)).to(x.dtype)
    d_parts = torch.empty(layout.num_chunks * heads, layout.ratio, size, dtype=x.dtype, device=x.device)
    rows, columns = d_parts.shape[0] * layout.ratio, min(128, power_of_two(size))
    launch(
        activate_backward_kernel, (ceil_div(rows, 32), ceil_div(size, columns)),
        row_product(d_rows, down, None, layout), hidden, d_parts, layout.compressed_ends, layout.num_sequences, rows, heads,
        SIZE=size, RATIO=layout.ratio, ROWS=32, COLUMNS=columns,
    )  # fmt: skip
    d_bias = d_parts[:, 0].sum(dim=0, dtype=torch.float32).to(x.dtype)
    flat = d_parts.flatten(1)
    d_up = flat.T @ pack(x, layout)
    d_x = scatter(d_out, row_product(flat, up, None, layout), x.shape[0], layout) if of_x else None
    return d_x, d_up, d_bias, d_down


class Mean(torch.autograd.Function):
    """x `[Tk, H, D]` → means `[C, H, D]`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout, ctx.num_tokens = layout, x.shape[0]
        return pool(x, layout)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return scatter(grads[0].contiguous(), None, ctx.num_tokens, ctx.layout), None


class Mlp(torch.autograd.Function):
    """`mlp_forward`'s first result. Keeps x and the hidden layer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, up: torch.Tensor, bias: torch.Tensor, down: torch.Tensor, layout: Layout) -> torch.Tensor:
        out, hidden = mlp_forward(x, up, bias, down, layout)
        ctx.save_for_backward(x, up, down, hidden)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*mlp_backward(grads[0].contiguous(), *ctx.saved_tensors, ctx.layout, of_x=ctx.needs_input_grad[0]), None)


@torch.library.custom_op("nsa_grpo::compress", mutates_args=())
def traced_compress(
    x: torch.Tensor, weights: list[torch.Tensor], key_ends: torch.Tensor, compressed_ends: torch.Tensor, num_compressed: int, block: int, stride: int,
    deterministic: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """`Mean` (no weights) or `Mlp` (up, bias, down) as an operator that `torch.compile` need not look into. Called only while it
    traces: a custom operator costs the host some ten times as much as an autograd function."""
    layout = Layout(key_ends, compressed_ends, num_compressed, block, stride, deterministic)
    if not weights:
        return [pool(x, layout), x.new_empty(0)]
    return list(mlp_forward(x, *weights, layout))


@traced_compress.register_fake
def _(
    x: torch.Tensor, weights: list[torch.Tensor], key_ends: torch.Tensor, compressed_ends: torch.Tensor, num_compressed: int, block: int, stride: int,
    deterministic: bool,
) -> list[torch.Tensor]:  # fmt: skip
    hidden = x.new_empty(num_compressed * x.shape[1], weights[1].shape[0], dtype=torch.float32) if weights else x.new_empty(0)
    return [x.new_empty(num_compressed, *x.shape[1:]), hidden]


@torch.library.custom_op("nsa_grpo::compress_backward", mutates_args=())
def traced_compress_backward(
    d_out: torch.Tensor, x: torch.Tensor, weights: list[torch.Tensor], hidden: torch.Tensor, key_ends: torch.Tensor, compressed_ends: torch.Tensor,
    num_compressed: int, block: int, stride: int, deterministic: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of `traced_compress`'s x and weights."""
    layout = Layout(key_ends, compressed_ends, num_compressed, block, stride, deterministic)
    if not weights:
        return [scatter(d_out, None, x.shape[0], layout)]
    up, _, down = weights
    return [gradient for gradient in mlp_backward(d_out, x, up, down, hidden, layout) if gradient is not None]


@traced_compress_backward.register_fake
def _(
    d_out: torch.Tensor, x: torch.Tensor, weights: list[torch.Tensor], hidden: torch.Tensor, key_ends: torch.Tensor, compressed_ends: torch.Tensor,
    num_compressed: int, block: int, stride: int, deterministic: bool,
) -> list[torch.Tensor]:  # fmt: skip
    return [tensor.new_empty(tensor.shape) for tensor in (x, *weights)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    x, weights, key_ends, compressed_ends, *ctx.rest = inputs
    ctx.save_for_backward(x, output[1], key_ends, compressed_ends, *weights)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradients: list[torch.Tensor | None]) -> tuple[Any, ...]:
    x, hidden, key_ends, compressed_ends, *weights = ctx.saved_tensors
    if gradients[0] is None:
        return None, [None] * len(weights), *[None] * 6
    d_x, *d_weights = traced_compress_backward(gradients[0].contiguous(), x, weights, hidden, key_ends, compressed_ends, *ctx.rest)
    return d_x, d_weights, *[None] * 6


traced_compress.register_autograd(_backward, setup_context=_setup)


def compress(
    x: torch.Tensor, weights: CompressorWeights | None, plan: KernelPlan, config: SparsityConfig, *, deterministic: bool = False
) -> torch.Tensor:  # fmt: skip
    """Compressed tokens of packed sequences, differentiable.

    Args:
        x: `[Tk, H, D]`, keys or values of the compression branch. weights: φ's tensors, any floating dtype (used in x's);
            None for the mean.
        deterministic: a sequence's output and its part of x's gradient have the same bits whatever else is packed, and all
            gradients the same bits from run to run.
    Returns:
        `[C, H, D]` in x's dtype, the sequences' complete blocks one after the other.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    if not plan.num_compressed:
        return x[:0] + sum((tensor.sum() * 0 for tensor in (weights.position, weights.up, weights.down)), start=0) if weights else x[:0]
    layout = (plan.key_ends, plan.compressed_ends, plan.num_compressed, config.compress_block_size, config.compress_stride, deterministic)
    matrices: tuple[torch.Tensor, ...] = ()
    if weights is not None:
        up, size = weights.up.to(x.dtype), weights.up.shape[0]
        by_chunk = up.view(size, config.compress_block_size // config.compress_stride, -1).transpose(0, 1).flatten(0, 1)
        matrices = by_chunk, up @ weights.position.to(x.dtype).flatten(), weights.down.to(x.dtype)
    if torch.compiler.is_compiling():
        return traced_compress(x, list(matrices), *layout)[0]
    return Mlp.apply(x, *matrices, Layout(*layout)) if matrices else Mean.apply(x, Layout(*layout))
