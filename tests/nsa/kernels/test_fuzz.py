"""Random calls of `nsa_attention` and `nsa_decode` on the kernels, judged by the torch backend in fp64 (hypothesis).

A setting fixes what kernels are compiled for; lengths, chunking, replay, scale and values are drawn. Inputs lie between NaNs (except
in the layout `packed`), and every tensor that a call allocates is NaN (integers: the largest) until it is written. Both judges get
the same numbers: bf16 inputs are made first and then read in fp64, and the blocks the kernels used are replayed.
An error is the RMS of the difference over the RMS of the exact result. It may reach BOUNDS of the dtype, and twice the error
of plain PyTorch in the same dtype where that is more.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nsa.attention import LayerCache, nsa_attention, nsa_decode
from nsa.blocks import num_compressed
from nsa.config import SparsityConfig
from nsa.testing import (
    AttentionInputs,
    assert_same_selection,
    chosen_blocks,
    exact_block_scores,
    make_inputs,
    query_positions,
    relative_rms,
    selection_gap,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Score gaps up to this may be decided either way: compressed keys are rounded to the dtype before they are scored."""
POISON_ROWS = 8


@dataclass(frozen=True, slots=True)
class Setting:
    """What one set of compiled kernels stands for: block sizes, query heads per KV head, Dk, Dv, dtype, memory layout, K/V sets."""

    config: SparsityConfig
    group_size: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    layout: str
    kv: str = "separate"
    num_kv_heads: int = 2

    def __str__(self) -> str:
        c = self.config
        sizes = f"l{c.compress_block_size}d{c.compress_stride}b{c.select_block_size}n{c.num_selected_blocks}w{c.window_size}{c.compressor}"
        return f"{sizes}-g{self.group_size}-{self.key_dim}x{self.value_dim}-{str(self.dtype)[6:]}-{self.layout}-{self.kv}"


@dataclass(frozen=True, slots=True)
class Call:
    """What is drawn anew for each call: keys and queries of every sequence, whether blocks are given, mode, scale, values."""

    key_lengths: list[int]
    query_lengths: list[int]
    replay: bool
    deterministic: bool
    scale: float | None
    seed: int


def config(l: int, d: int, size: int, n: int, window: int, compressor: str, init: int = 1, local: int = 2) -> SparsityConfig:
    return SparsityConfig(
        compress_block_size=l, compress_stride=d, select_block_size=size, num_selected_blocks=n, window_size=window, compressor=compressor,
        num_init_blocks=init, num_local_blocks=local,
    )  # fmt: skip


@st.composite
def calls(draw, *, longest: int) -> Call:
    """One sequence has at least a quarter of `longest` keys, so that no gradient is rounding alone; the others have any length, 0 and 1 included."""
    lengths = draw(st.lists(st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, longest // 2)), max_size=3))
    lengths.insert(draw(st.integers(0, len(lengths))), draw(st.integers(longest // 4, longest)))
    queries = lengths
    if draw(st.booleans()):
        queries = [length if draw(st.booleans()) else draw(st.integers(min(1, length), length)) for length in lengths]
    return Call(
        key_lengths=lengths,
        query_lengths=queries,
        replay=draw(st.booleans()),
        deterministic=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.2])),
        seed=draw(st.integers(0, 2**31)),
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, or the largest integer: what PyTorch fills them with while it is asked to be deterministic."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values `[T, H, E]`, last dimension contiguous, in another layout with NaN around them."""
    num, heads, dim = x.shape
    if layout == "packed":
        return x
    if layout == "margins":
        buffer = x.new_full((num + 2 * POISON_ROWS, 3 * heads, dim), torch.nan)
        view = buffer[POISON_ROWS : POISON_ROWS + num, :heads]
    else:
        buffer = x.new_full((heads, (num + 2 * POISON_ROWS) | 1, dim), torch.nan)  # odd, so that 16 never divides a stride of the gates
        view = buffer[:, POISON_ROWS : POISON_ROWS + num].transpose(0, 1)
    return view.copy_(x)


def some_blocks(inputs: AttentionInputs, generator: torch.Generator) -> torch.Tensor:
    """Legal choices `[T, Hkv, n]`: any number of visible blocks, ascending; a third of the rows ask for the kernels' own."""
    size, num = inputs.config.select_block_size, inputs.config.num_selected_blocks
    last = query_positions(inputs)[:, None, None] // size
    shape = (len(last), inputs.kv.slc[0].shape[1])
    rank = torch.rand(*shape, max(num, int(last.max()) + 1), generator=generator)
    count = torch.randint(1, num + 1, (*shape, 1), generator=generator)
    best = rank.masked_fill(torch.arange(rank.shape[2]) > last, -1).topk(num, dim=-1)
    rows = best.indices.masked_fill((best.values < 0) | (torch.arange(num) >= count), 2**15 - 1).sort(dim=-1).values
    rows[rows == 2**15 - 1] = -1
    rows[torch.rand(shape, generator=generator) < 0.3] = -2
    return rows.to(inputs.q.device, torch.int32)


def gradients(inputs: AttentionInputs) -> dict[str, torch.Tensor]:
    """By leaf; zero where nothing flowed."""
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in inputs.leaves.items()}


def check_attention(setting: Setting, call: Call) -> None:
    inputs = make_inputs(
        setting.config, lengths=call.key_lengths, query_lengths=call.query_lengths, num_kv_heads=setting.num_kv_heads,
        group_size=setting.group_size, key_dim=setting.key_dim, value_dim=setting.value_dim, kv=setting.kv, dtype=setting.dtype,
        device=DEVICE, seed=call.seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(call.seed)
    given_blocks = some_blocks(inputs, generator) if call.replay else None
    d_out = torch.randn(*inputs.q.shape[:2], setting.value_dim, generator=generator).to(DEVICE, setting.dtype)
    leaves = {name: laid_out(x.detach(), setting.layout) if x.ndim == 3 else x.detach().clone() for name, x in inputs.leaves.items()}
    x = inputs.with_leaves({name: leaf.requires_grad_() for name, leaf in leaves.items()})
    with poisoned_memory():
        out, used = nsa_attention(
            x.q, x.kv, x.gates, **x.options, selection=given_blocks, return_selection=True, scale=call.scale, deterministic=call.deterministic,
            backend="triton",
        )  # fmt: skip
        out.backward(laid_out(d_out, setting.layout))
    check_choices(inputs, used, given_blocks, call.scale)
    judged = {}
    for dtype in (torch.float64, setting.dtype):
        y = inputs.to(dtype=dtype)
        expected = nsa_attention(y.q, y.kv, y.gates, **y.options, selection=used, scale=call.scale, backend="torch")
        assert isinstance(expected, torch.Tensor)
        expected.backward(d_out.to(dtype))
        judged[dtype] = {"out": expected.detach()} | gradients(y)
    for name, value in ({"out": out.detach()} | gradients(x)).items():
        exact = judged[torch.float64][name]
        error, plain = relative_rms(value, exact), relative_rms(judged[setting.dtype][name], exact)
        assert error <= max(BOUNDS[setting.dtype], 2 * plain), f"{name}: {error:.2e}, plain PyTorch {plain:.2e}"


def check_choices(inputs: AttentionInputs, used: torch.Tensor, given_blocks: torch.Tensor | None, scale: float | None) -> None:
    """Given rows are kept as they are; the others hold as many blocks as there may be, ascending, the right ones where that is clear."""
    config, used, scores = inputs.config, used.cpu().long(), exact_block_scores(inputs, scale=scale).cpu()
    positions = query_positions(inputs)
    own = torch.ones(used.shape[:2], dtype=torch.bool) if given_blocks is None else given_blocks[..., 0].cpu() == -2
    if given_blocks is not None:
        assert torch.equal(used[~own], given_blocks.cpu().long()[~own])
    expected = chosen_blocks(scores, positions, config)
    clear = selection_gap(scores, positions, config) > ROUNDING[inputs.q.dtype]
    assert_same_selection(used, expected, clear & own)
    assert torch.equal((used >= 0)[own], (expected >= 0)[own])
    assert ((used[..., 1:] > used[..., :-1]) | (used[..., 1:] < 0))[own].all(), "blocks stand in ascending order"
    last = (positions // config.select_block_size)[:, None]
    assert (used.amax(dim=-1) == last)[own].all(), "the query's own block is the last one"


ATTENTION = [
    Setting(config(32, 16, 64, 16, 512, "mlp"), 16, 128, 128, torch.bfloat16, "packed", num_kv_heads=1),
    Setting(config(32, 16, 64, 16, 512, "mlp"), 4, 128, 128, torch.bfloat16, "margins"),
    Setting(config(32, 16, 64, 6, 100, "mean"), 3, 64, 64, torch.bfloat16, "packed", "shared", 3),
    Setting(config(16, 8, 16, 8, 64, "mlp"), 1, 64, 64, torch.float16, "head_major"),
    Setting(config(8, 4, 8, 4, 6, "mlp"), 7, 32, 32, torch.float32, "margins", num_kv_heads=1),
    Setting(config(32, 32, 32, 5, 100, "mean", 0, 1), 2, 192, 128, torch.bfloat16, "head_major"),
    Setting(config(16, 16, 64, 6, 33, "mlp"), 8, 256, 256, torch.bfloat16, "packed", num_kv_heads=1),
    Setting(config(64, 16, 128, 5, 256, "mean", 2, 2), 9, 96, 64, torch.bfloat16, "margins", num_kv_heads=1),
    Setting(config(8, 2, 24, 3, 40, "mlp"), 1, 32, 96, torch.float16, "packed"),
    Setting(config(12, 6, 18, 5, 1, "mean"), 4, 64, 192, torch.float16, "head_major", num_kv_heads=1),
    Setting(config(4, 4, 4, 6, 10, "mean"), 8, 32, 64, torch.float32, "margins", "shared", 1),
]
"""Wide heads in fp32 take minutes to compile, so fp32 is tested with narrow ones."""
DECODE = [
    Setting(config(32, 16, 64, 16, 512, "mlp"), 16, 128, 128, torch.bfloat16, "packed", num_kv_heads=1),
    Setting(config(32, 16, 64, 16, 512, "mlp"), 4, 128, 128, torch.bfloat16, "margins"),
    Setting(config(8, 4, 8, 4, 6, "mlp"), 3, 64, 32, torch.float32, "margins"),
    Setting(config(32, 32, 32, 5, 100, "mean", 0, 1), 9, 192, 128, torch.float16, "packed", num_kv_heads=1),
    Setting(config(12, 6, 18, 5, 1, "mean"), 7, 96, 32, torch.float16, "margins", "shared", 1),
    Setting(config(16, 8, 16, 8, 64, "mlp"), 1, 64, 256, torch.bfloat16, "packed", "shared"),
]
MINIATURE = Setting(config(8, 4, 8, 3, 6, "mlp"), 3, 16, 8, torch.float32, "margins", num_kv_heads=1)
GPU = settings(max_examples=19, deadline=None, database=None, phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck))
CPU = settings(GPU, max_examples=2, derandomize=True)


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ATTENTION, ids=str)
@GPU
@given(st.data())
def test_random_attention_calls(setting: Setting, data: st.DataObject) -> None:
    blocks = setting.config.num_selected_blocks * setting.config.select_block_size
    check_attention(setting, data.draw(calls(longest=min(1500, 3 * blocks))))


@CPU
@given(calls(longest=40))
def test_random_attention_calls_in_miniature(call: Call) -> None:
    check_attention(MINIATURE, call)


@dataclass(frozen=True, slots=True)
class Step:
    """One decode call: tokens that each sequence has (0: a padded row), how many of them are queries, and the rest as in Call."""

    lengths: list[int]
    num_new: int
    extra_columns: int
    replay: bool
    scale: float | None
    seed: int


@st.composite
def steps(draw, *, longest: int, num_new: int) -> Step:
    lengths = draw(st.lists(st.one_of(st.just(0), st.integers(num_new, longest)), min_size=1, max_size=4))
    return Step(
        lengths=[*lengths, draw(st.integers(max(num_new, longest // 4), longest))],
        num_new=num_new,
        extra_columns=draw(st.integers(0, 2)),
        replay=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.2])),
        seed=draw(st.integers(0, 2**31)),
    )


def filled_cache(setting: Setting, step: Step, page: int, generator: torch.Generator) -> tuple[LayerCache, torch.Tensor]:
    """Pages and block table: random where a sequence has tokens, NaN elsewhere, in the scratch page too."""
    columns = -(-max(step.lengths) // page) + step.extra_columns
    stride, heads = setting.config.compress_stride, setting.num_kv_heads
    first, per_page = setting.config.compress_block_size // stride - 1, page // stride
    sets, pages = (1 if setting.kv == "shared" else 3), columns * len(step.lengths) + 1
    raw = torch.full((pages, 2, page, sets * heads, max(setting.key_dim, setting.value_dim)), torch.nan)
    cmp = torch.full((pages, per_page, heads, setting.key_dim + setting.value_dim), torch.nan)
    table = (torch.randperm(pages - 1, generator=generator) + 1).view(-1, columns)
    for row, length in zip(table, step.lengths, strict=True):
        token, slot = torch.arange(length), torch.arange(num_compressed(length, setting.config)) + first
        raw[row[token // page], :, token % page] = torch.randn(length, 2, *raw.shape[3:], generator=generator)
        cmp[row[slot // per_page], slot % per_page] = torch.randn(len(slot), *cmp.shape[2:], generator=generator)
        raw[row[-(-length // page) :]] = torch.nan
    cache = LayerCache(raw.to(DEVICE, setting.dtype), cmp.to(DEVICE, setting.dtype), setting.key_dim, setting.value_dim, sets)
    return cache, table.int().to(DEVICE)


def check_decode(setting: Setting, step: Step) -> None:
    config, generator = setting.config, torch.Generator().manual_seed(step.seed)
    page = config.select_block_size * max(1, -(-64 // config.select_block_size))
    cache, table = filled_cache(setting, step, page, generator)
    heads = setting.num_kv_heads * setting.group_size
    batch, num_new = len(step.lengths), step.num_new
    q = torch.randn(batch * num_new, heads, setting.key_dim, generator=generator).to(DEVICE, setting.dtype)
    gates = torch.rand(batch * num_new, heads, 3, generator=generator).to(DEVICE, setting.dtype)
    lengths = torch.tensor(step.lengths, dtype=torch.int32, device=DEVICE)
    live = lengths > 0
    given_blocks = None
    if step.replay:
        shape = make_inputs(
            config, lengths=[max(n, num_new) for n in step.lengths], query_lengths=[num_new] * batch, num_kv_heads=setting.num_kv_heads, group_size=1
        )
        given_blocks = some_blocks(shape, generator).unflatten(0, (batch, num_new)).to(DEVICE)
    options = {"phi": None, "config": config, "return_selection": True, "scale": step.scale}
    args = [laid_out(x, setting.layout).unflatten(0, (batch, num_new)) for x in (q, gates)]
    with poisoned_memory():
        out, used = nsa_decode(args[0], cache, table, lengths, args[1], selection=given_blocks, backend="triton", **options)
    judged = {}
    for dtype in (torch.float64, setting.dtype):
        other = replace(cache, raw=cache.raw.to(dtype), cmp=cache.cmp.to(dtype))
        queries, weights = (x.to(dtype).unflatten(0, (batch, num_new)) for x in (q, gates))
        judged[dtype] = nsa_decode(queries, other, table, lengths, weights, selection=used.int(), backend="torch", **options)[0][live]
        if dtype == torch.float64:
            chosen = nsa_decode(queries, other, table, lengths, weights, selection=given_blocks, backend="torch", **options)[1]
    agree = (chosen == used)[live].all(dim=-1)
    assert agree.double().mean() >= 0.9, f"blocks agree in {agree.double().mean():.2f} of the rows"
    exact, plain = judged[torch.float64], relative_rms(judged[setting.dtype], judged[torch.float64])
    error = relative_rms(out[live], exact)
    assert error <= max(BOUNDS[setting.dtype], 2 * plain), f"{error:.2e}, plain PyTorch {plain:.2e}"
    assert (out[~live] == 0).all() and (used[~live] == -1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("setting", DECODE, ids=str)
@GPU
@given(st.data())
def test_random_decode_calls(setting: Setting, data: st.DataObject) -> None:
    longest = min(3000, 4 * setting.config.num_selected_blocks * setting.config.select_block_size)
    check_decode(setting, data.draw(steps(longest=longest, num_new=data.draw(st.sampled_from([1, 3])))))


@CPU
@given(steps(longest=80, num_new=2))
def test_random_decode_calls_in_miniature(step: Step) -> None:
    check_decode(MINIATURE, step)


def test_lengths_of_one_token_have_exact_outputs() -> None:
    """With one key each, every branch gives that key's value or nothing, and queries and keys have no gradient."""
    inputs = make_inputs(MINIATURE.config, lengths=[1, 1, 0, 1], num_kv_heads=1, group_size=3, device=DEVICE)
    out = nsa_attention(inputs.q, inputs.kv, inputs.gates, **inputs.options, backend="triton")
    assert isinstance(out, torch.Tensor)
    out.sum().backward()
    _, selected, window = inputs.gates.detach().unbind(-1)
    expected = selected[..., None] * inputs.kv.slc[1].detach() + window[..., None] * inputs.kv.win[1].detach()
    assert relative_rms(out, expected) <= 1e-6
    for name in ("q", "cmp_k", "slc_k", "win_k"):
        assert gradients(inputs)[name].abs().max() <= 1e-5, name
