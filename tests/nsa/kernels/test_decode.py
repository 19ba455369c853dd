"""Decode kernels against the oracle, the torch backend and themselves in another batch or split."""

import contextlib
import importlib
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from gluon_stand_in import OneGroup, gluon_functions, run_kernel

from nsa import torch_backend
from nsa.attention import LayerCache
from nsa.cache import NSACache, plan_write, write_layer
from nsa.kernels import banded, decode
from nsa.kernels.decode import DecodeTiles, decode_tiles, paged_decode
from nsa.reference import reference_attention
from nsa.testing import AttentionInputs, assert_same_selection, clear_choices, cumulative, make_inputs, relative_rms, same_blocks, tiny_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAPER = {"compress_block_size": 32, "compress_stride": 16, "select_block_size": 64, "num_selected_blocks": 16, "window_size": 512}


@dataclass(frozen=True)
class Decode:
    """Arguments of a decode call, and the same queries and keys packed (on the CPU)."""

    inputs: AttentionInputs
    q: torch.Tensor
    cache: LayerCache
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    gates: torch.Tensor

    def run(self, backend=paged_decode, selection=None, **options):
        return backend(
            self.q, self.cache, self.block_table, self.seq_lens, self.gates, config=self.inputs.config, selection=selection,
            return_selection=True, scale=self.inputs.q.shape[-1] ** -0.5, **options,
        )  # fmt: skip

    def part(self, rows: list[int], columns: int | None = None) -> "Decode":
        """The same call for some sequences of the batch, or with a block table of fewer columns."""
        return replace(
            self, q=self.q[rows], block_table=self.block_table[rows, :columns].contiguous(), seq_lens=self.seq_lens[rows], gates=self.gates[rows]
        )


def prepare(inputs: AttentionInputs, *, num_new: int = 1, columns: int | None = None, dtype: torch.dtype | None = None) -> Decode:
    """A cache that holds every sequence of `inputs`; what nobody has written is NaN. Pages are dealt out in turns."""
    inputs = inputs.to(requires_grad=False)
    config, num_kv_heads, value_dim = inputs.config, *inputs.kv.slc[1].shape[1:]
    shared = inputs.kv.cmp[0] is inputs.kv.slc[0]
    lengths = inputs.cu_seqlens.diff()
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
    model = tiny_config(
        num_hidden_layers=1, num_attention_heads=inputs.q.shape[1], num_key_value_heads=num_kv_heads, head_dim=inputs.q.shape[2],
        value_head_dim=value_dim, kv="shared" if shared else "separate", **settings,
    )  # fmt: skip
    pages = sum(-(-length // model.page_size) for length in lengths.tolist())
    cache = NSACache(model, num_pages=pages + 1, dtype=inputs.q.dtype)
    layer = cache.layers[0]
    layer.raw.fill_(torch.nan)
    layer.cmp.fill_(torch.nan)
    ids = [cache.add_sequence() for _ in lengths]
    for start in range(0, int(lengths.max()), model.page_size):
        live = [i for i in range(len(ids)) if lengths[i] > start]
        cache.reserve([ids[i] for i in live], [min(model.page_size, int(lengths[i]) - start) for i in live])
    table = cache.block_table(ids, columns)
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    plan = plan_write(
        table, torch.repeat_interleave(torch.arange(len(ids)), lengths.long()), positions, page_size=cache.page_size, config=config, dynamic=True
    )
    sets = [inputs.kv.slc] if shared else [inputs.kv.cmp, inputs.kv.slc, inputs.kv.win]
    write_layer(layer, [k for k, _ in sets], [v for _, v in sets], plan, inputs.phi)
    rows = (inputs.cu_seqlens[1:, None] - num_new + torch.arange(num_new)).flatten()
    shape = (len(ids), num_new)
    dtype = dtype or inputs.q.dtype
    moved = LayerCache(layer.raw.to(DEVICE, dtype), layer.cmp.to(DEVICE, dtype), layer.key_dim, layer.value_dim, layer.num_sets)
    last = replace(inputs, q=inputs.q[rows], gates=inputs.gates[rows], cu_seqlens=cumulative([num_new] * len(ids)), cu_seqlens_k=inputs.cu_seqlens)
    q, gates = (x.unflatten(0, shape).to(DEVICE, dtype) for x in (last.q, last.gates))
    return Decode(last, q, moved, table.to(DEVICE), lengths.to(DEVICE), gates)


def oracle(call: Decode, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and selection of the reference in fp64 on the packed sequences."""
    exact = call.inputs.to(dtype=torch.float64, requires_grad=False)
    return reference_attention(exact.q, exact.kv, exact.gates, **exact.options, return_selection=True, **options)


def assert_matches_oracle(call: Decode, bound: float = 1e-5, **options) -> None:
    out, chosen = (x.flatten(0, 1).cpu() for x in call.run(**options))
    expected, blocks = oracle(call)
    clear = clear_choices(call.inputs)
    assert_same_selection(chosen, blocks, clear)
    assert (chosen == blocks)[clear].all()
    assert clear.all(dim=-1).double().mean() > 0.9
    assert relative_rms(out[clear.all(-1)], expected[clear.all(-1)]) <= bound


@pytest.mark.parametrize(
    ("group_size", "key_dim", "value_dim", "kv"), [(1, 8, 16, "separate"), (2, 16, 8, "shared"), (3, 12, 20, "separate"), (7, 16, 48, "separate")]
)
def test_sequences_of_many_lengths(group_size, key_dim, value_dim, kv):
    config = tiny_config(compressor="mlp" if group_size > 1 else "mean").sparsity
    heads = 2 if group_size == 2 else 1
    lengths = [1, 7, 63, 64, 111] if group_size < 7 else [7, 111]
    inputs = make_inputs(config, lengths=lengths, num_kv_heads=heads, group_size=group_size, key_dim=key_dim, value_dim=value_dim, kv=kv)
    assert_matches_oracle(prepare(inputs, columns=3))


@pytest.mark.parametrize(
    ("l", "d", "size", "n", "window"), [(4, 4, 4, 6, 10), (8, 2, 24, 3, 40), (32, 16, 64, 4, 70), (12, 6, 18, 5, 1), (8, 4, 128, 3, 20)]
)
def test_other_block_sizes(l, d, size, n, window):
    config = tiny_config(compress_block_size=l, compress_stride=d, select_block_size=size, num_selected_blocks=n, window_size=window).sparsity
    assert_matches_oracle(prepare(make_inputs(config, lengths=[470], num_kv_heads=1)))


@pytest.mark.parametrize(("num_new", "lengths"), [(2, [65, 2]), (8, [100])])
def test_several_new_tokens(num_new, lengths):
    assert_matches_oracle(prepare(make_inputs(tiny_config().sparsity, lengths=lengths, num_kv_heads=1), num_new=num_new))


def test_few_enough_blocks_are_all_chosen():
    inputs = make_inputs(tiny_config(num_selected_blocks=16).sparsity, lengths=[100, 33], num_kv_heads=1)
    out, chosen = (x.flatten(0, 1).cpu() for x in prepare(inputs).run())
    expected, blocks = oracle(prepare(inputs))
    assert torch.equal(chosen, blocks)
    assert relative_rms(out, expected) <= 1e-5


@pytest.mark.parametrize(("init", "local"), [(0, 1), (2, 1), (1, 3)])
def test_forced_blocks(init, local):
    config = tiny_config(num_init_blocks=init, num_local_blocks=local).sparsity
    assert_matches_oracle(prepare(make_inputs(config, lengths=[120], num_kv_heads=1)))


def tiles(call: Decode, **changes) -> DecodeTiles:
    return replace(decode_tiles(call.q, call.cache, call.block_table.shape[1] * call.cache.page_size, call.inputs.config), **changes)


@pytest.mark.parametrize(("leaf", "chunk"), [(16, 32), (32, 16), (128, 256)])
@pytest.mark.parametrize("at_once", [False, True])
def test_many_leaves_and_chunks(monkeypatch, leaf, chunk, at_once):
    monkeypatch.setattr(decode, "MAX_CHOSEN", 32768 if at_once else 0)
    inputs = make_inputs(tiny_config(num_selected_blocks=6).sparsity, lengths=[1100, 60], num_kv_heads=1, group_size=2)
    call = prepare(inputs)
    assert_matches_oracle(call, tiles=tiles(call, leaf=leaf, chunk=chunk))


def test_how_many_leaves_a_program_takes_and_the_table_width_change_no_bit():
    inputs = make_inputs(tiny_config(num_selected_blocks=5).sparsity, lengths=[320, 64], num_kv_heads=1)
    call = prepare(inputs)
    out, chosen = call.run(tiles=tiles(call, leaf=16, compression_leaves=1, block_leaves=1, chunk=16))
    for k in (2, 4):
        other, same = call.run(tiles=tiles(call, leaf=16, compression_leaves=k, block_leaves=k, chunk=16 * k))
        assert torch.equal(other, out)
        assert torch.equal(same, chosen)
    for row, columns in ((0, 5), (1, 1)):
        narrow = call.part([row], columns)
        other, same = narrow.run(tiles=tiles(narrow, leaf=16, chunk=16))
        assert torch.equal(other[0], out[row])
        assert torch.equal(same[0], chosen[row])


@pytest.mark.parametrize("at_once", [False, True])
def test_ties_go_to_the_lower_block(monkeypatch, at_once):
    monkeypatch.setattr(decode, "MAX_CHOSEN", 32768 if at_once else 0)
    inputs = make_inputs(tiny_config().sparsity, lengths=[512], num_kv_heads=1).to(requires_grad=False)
    for key, value in (inputs.kv.cmp, inputs.kv.slc):
        key.copy_(key[:1].expand_as(key))
        value.copy_(value[:1].expand_as(value))
    call = prepare(inputs)
    _, chosen = call.run(tiles=tiles(call, leaf=16, chunk=16))
    assert chosen.tolist() == [[[[0, 1, 62, 63]]]]


@pytest.mark.parametrize("at_once", [False, True])
def test_equal_keys_tie_though_their_leaves_have_other_maxima(monkeypatch, at_once):
    """Blocks 5 and 40 hold the same keys, of logit 6.8 (base 2), and one place is free. In the leaf of block 40 there is a logit of 7.2."""
    monkeypatch.setattr(decode, "MAX_CHOSEN", 32768 if at_once else 0)
    config = tiny_config(compressor="mean", compress_block_size=4, compress_stride=4).sparsity
    inputs = make_inputs(config, lengths=[512], num_kv_heads=1, group_size=1, kv="separate").to(requires_grad=False)
    keys, query = inputs.kv.cmp[0], inputs.q[-1]
    keys.mul_(0.1)
    unit = query / (query.square().sum() * query.shape[-1] ** -0.5 * 1.4426950408889634)
    keys[40:48] = keys[320:328] = 6.8 * unit
    keys[328:332] = 7.2 * unit
    call = prepare(inputs)
    _, chosen = call.run(tiles=tiles(call, leaf=16, chunk=16))
    assert chosen.tolist() == [[[[0, 5, 62, 63]]]]


@pytest.mark.parametrize("kind", ["normal", "wide", "flat", "zero", "few", "ties", "infinite"])
def test_the_best_scores_are_chosen_however_they_are_spread(kind):
    """One head's scores of 250 blocks, given to the kernel: 1 initial and 2 local blocks, and the 13 best others, ties to the lower block."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(256, generator=generator)
    scores = {
        "normal": draws.abs(), "wide": torch.exp(12 * draws), "flat": 1 + 1e-4 * draws, "zero": 0 * draws, "few": (draws > 2).float(),
        "ties": (2 * draws).abs().round() / 4, "infinite": torch.where(draws > 1.0, torch.inf, draws.abs()),
    }[kind]  # fmt: skip
    ranked = scores[:250].clone()
    ranked[[0, 248, 249]] = torch.inf
    expected = ranked.sort(descending=True, stable=True).indices[:16].sort().values
    assert torch.equal(choose(scores), expected.int())


def choose(scores: torch.Tensor) -> torch.Tensor:
    """16 of 250 blocks, chosen by the kernel from one head's scores `[256]`; it writes nothing else."""
    zeros, selection = torch.zeros(8, device=DEVICE), torch.full((2, 16), -7, dtype=torch.int32, device=DEVICE)
    decode.launch(
        decode.choose_kernel, (1, 1, 1), zeros, zeros + 0.125, zeros, scores.to(DEVICE), torch.empty(2, device=DEVICE), selection, selection,
        torch.tensor([250 * 64], device=DEVICE), 0, 0, 0, 0, 8, 1, HEADS=1, GROUP=1, GROUP2=1, STRIDE=16, FIRST=0, PER_BLOCK=4, GROUPS=32,
        LEAVES=8, SIZE=64, NUM=16, NUM2=16, NUM_INIT=1, NUM_LOCAL=2, GIVEN=False, LATE=False, PDL=False, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    assert (selection[1] == -7).all()
    return selection[0].cpu()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_scores_that_are_not_numbers_choose_blocks_that_exist(sign, share):
    scores = torch.rand(256, generator=torch.Generator().manual_seed(1))
    nan = torch.copysign(torch.tensor(torch.nan), torch.tensor(sign))
    chosen = choose(torch.where(torch.rand(256, generator=torch.Generator().manual_seed(2)) < share, nan, scores)).tolist()
    assert chosen == sorted(set(chosen))
    assert chosen[0] >= 0 and chosen[-1] < 250


def test_a_given_selection_is_replayed_and_rows_of_minus_2_choose():
    inputs = make_inputs(tiny_config().sparsity, lengths=[90, 70])
    call = prepare(inputs)
    given = oracle(call)[1].clone()
    given[0] = torch.tensor([1, 4, 7, -1])
    given[1, 1] = -2
    expected, blocks = torch_backend_rows(call, given)
    out, chosen = call.run(selection=given[:, None].to(DEVICE))
    assert torch.equal(chosen.cpu(), blocks)
    assert relative_rms(out, expected) <= 1e-5


def torch_backend_rows(call: Decode, given: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    out, chosen = call.run(torch_backend.paged_decode, selection=None if given is None else given[:, None].to(DEVICE))
    return out.cpu(), chosen.cpu()


def test_padded_rows_give_zeros_and_disturb_nobody():
    call = prepare(make_inputs(tiny_config().sparsity, lengths=[90, 40, 75], num_kv_heads=1))
    alone, chosen = call.run()
    lengths = call.seq_lens * torch.tensor([1, 0, 1], device=DEVICE)
    out, used = replace(call, seq_lens=lengths).run()
    assert torch.equal(out[[0, 2]], alone[[0, 2]]) and torch.equal(used[[0, 2]], chosen[[0, 2]])
    assert (out[1] == 0).all() and (used[1] == -1).all()


def test_a_row_is_the_same_in_any_batch():
    call = prepare(make_inputs(tiny_config().sparsity, lengths=[90, 40, 131], num_kv_heads=1, group_size=1), num_new=2)
    out, chosen = call.run()
    for rows in ([2], [1, 0]):
        other, same = call.part(rows).run()
        assert torch.equal(other, out[rows]) and torch.equal(same, chosen[rows])


@pytest.mark.parametrize("replays", [False, True])
def test_where_the_best_blocks_are_ranked_changes_no_bit(monkeypatch, replays):
    """In one kernel, or among each chunk's best by a second one; short, padded and replayed rows included."""
    call = prepare(make_inputs(tiny_config().sparsity, lengths=[331, 40, 75, 14], num_kv_heads=2, group_size=2), num_new=3)
    call = replace(call, seq_lens=call.seq_lens * torch.tensor([1, 1, 0, 1], device=DEVICE))
    given = None
    if replays:
        given = torch.full((4, 3, 2, 4), -2, device=DEVICE)
        given[0, :, 1] = torch.tensor([1, 4, 7, -1], device=DEVICE)
    results, launched = [], []
    monkeypatch.setattr(decode, "launch", lambda kernel, *a, real=decode.launch, **k: (launched.append(kernel), real(kernel, *a, **k)))
    for most in (32768, 0):
        monkeypatch.setattr(decode, "MAX_CHOSEN", most)
        results.append(call.run(selection=given, tiles=tiles(call, leaf=16, chunk=16)))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    assert launched.count(decode.choose_kernel) == launched.count(decode.pick_kernel) == launched.count(decode.score_kernel) == 1


def test_any_strides():
    call = prepare(make_inputs(tiny_config().sparsity, lengths=[90]))
    wide = LayerCache(torch.cat([call.cache.raw] * 2, -1)[..., : call.cache.raw.shape[-1]], torch.cat([call.cache.cmp] * 2, 2)[:, :, :2], 16, 8, 3)
    q = call.q.transpose(2, 3).contiguous().transpose(2, 3)
    gates = call.gates.transpose(1, 3).contiguous().transpose(1, 3)
    strided = Decode(call.inputs, q, wide, call.block_table.long(), call.seq_lens.long(), gates)
    for found, expected in zip(strided.run(), call.run(), strict=True):
        assert torch.equal(found, expected)


def test_half_precision_is_as_near_the_exact_result_as_the_torch_backend():
    inputs = make_inputs(tiny_config().sparsity, lengths=[90, 300], num_kv_heads=1, group_size=4, key_dim=32, value_dim=32)
    call = prepare(inputs, dtype=torch.float16)
    given = oracle(call)[1][:, None].to(DEVICE)
    exact = oracle(call)[0]
    out, _ = call.run(selection=given)
    torch_out, _ = call.run(torch_backend.paged_decode, selection=given)
    assert out.dtype == torch.float16
    assert relative_rms(out.flatten(0, 1), exact) <= max(2 * relative_rms(torch_out.flatten(0, 1), exact), 1e-3)


def stand_in(kernel, early):
    """A Gluon kernel of decode_hopper.py or decode_blocks_hopper.py, run by the stand-in."""
    sources = gluon_functions(importlib.import_module(name) for name in ("nsa.kernels.decode_hopper", kernel.fn.__module__))
    constants = {
        "NOTHING": -1.0e6, "RECOMPUTE": -2,
        "power_of_two": lambda exponent: torch.where(exponent < -126, 0.0, torch.exp2(exponent.double()).float()),
    }  # fmt: skip

    def run(grid, *arguments, num_warps, enable_fp_fusion, maxnreg=None, **settings):
        run_kernel(kernel.fn.__name__, sources, grid, partial(OneGroup, early=early), constants, arguments, settings)

    return run


@contextlib.contextmanager
def hopper(monkeypatch, early=False, processors=2):
    """The Hopper kernels; by the stand-in where there is no GPU."""
    if DEVICE == "cuda":
        if not banded.runs_hopper_kernels(torch.device(DEVICE, 0)):
            pytest.skip("no Hopper GPU with Triton 3.6")
        yield
        return
    modules = [pytest.importorskip(f"nsa.kernels.{name}") for name in ("decode_hopper", "decode_blocks_hopper")]

    def launched(kernel, grid, *arguments, real=decode.launch, **settings):
        run = stand_in(kernel, early) if type(kernel).__name__ == "GluonJITFunction" else lambda *a, **s: real(kernel, *a, **s)
        run(grid, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "runs_hopper_kernels", lambda device: True)
        patch.setattr(decode, "launch", launched)
        for module in modules:
            patch.setattr(module, "launch", launched)
            patch.setattr(module, "num_processors", lambda device: processors)
        yield


def on_triton(monkeypatch, call, **options):
    with monkeypatch.context() as patch:
        patch.setattr(decode, "takes_hopper", lambda *_: False)
        return call.run(**options)


def wide_call(lengths, group_size=4, kv="separate", num_new=1, num_kv_heads=1, key_dim=64, value_dim=64, **settings):
    config = tiny_config(**{**PAPER, "num_selected_blocks": 3, "window_size": 100} | settings).sparsity
    inputs = make_inputs(config, lengths=lengths, num_kv_heads=num_kv_heads, group_size=group_size, key_dim=key_dim, value_dim=value_dim, kv=kv)
    return prepare(inputs, num_new=num_new, dtype=torch.float16)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([4500, 70, 9], {}),
        ([1000, 300], {"num_new": 2, "group_size": 3}),
        ([400, 90, 10], {"kv": "shared"}),
        ([900], {"key_dim": 128, "group_size": 1}),
    ],
)
def test_hopper_kernels_agree_with_the_triton_ones(monkeypatch, lengths, options, early):
    call = wide_call(lengths, **options)
    expected, blocks = on_triton(monkeypatch, call)
    with hopper(monkeypatch, early):
        out, chosen = call.run()
    same = same_blocks(chosen, blocks)
    assert same.double().mean() > 0.9
    rows = same.all(-1)
    assert relative_rms(out[rows], expected[rows]) <= 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "key_dim", "value_dim"), [(64, 4, 128, 128), (32, 8, 128, 128), (9, 1, 192, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_new", [1, 4])
def test_paper_sizes_agree_with_the_torch_backend_in_a_cuda_graph(num_heads, num_kv_heads, key_dim, value_dim, dtype, num_new):
    """Selections of the torch backend are replayed, so that outputs compare; choices are compared where scores are not close."""
    call = random_call(num_heads, num_kv_heads, key_dim, value_dim, dtype, num_new, lengths=[16384, 0, 9000, 1500, 31, 4])
    expected, blocks = call.run(torch_backend.paged_decode)
    live = call.seq_lens > 0
    replayed, _ = call.run(selection=blocks)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_rms(replayed[live], expected[live]) <= bound
    out, chosen = call.run()
    assert same_blocks(chosen[live], blocks[live]).double().mean() > 0.9
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.run()
    call.seq_lens.copy_(call.seq_lens.flip(0))
    again = call.run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, again, strict=True))
    call.seq_lens.copy_(call.seq_lens.flip(0))
    graph.replay()
    assert torch.equal(captured[0], out) and torch.equal(captured[1], chosen)
    alone, same = call.part([2]).run()
    assert torch.equal(alone[0], out[2]) and torch.equal(same[0], chosen[2])
    narrow, same = call.part([3], columns=24).run()
    assert torch.equal(narrow[0], out[3]) and torch.equal(same[0], chosen[3])
    for k in (1, 2, 4):
        other, same = call.run(tiles=tiles(call, compression_leaves=k, block_leaves=k))
        assert torch.equal(other, out) and torch.equal(same, chosen)


def random_call(num_heads, num_kv_heads, key_dim, value_dim, dtype, num_new, lengths) -> Decode:
    """A call on random pages; its `inputs` only carry config and dims."""
    config = tiny_config(**PAPER).sparsity
    inputs = make_inputs(config, lengths=[1], num_kv_heads=num_kv_heads, group_size=num_heads // num_kv_heads, key_dim=key_dim, value_dim=value_dim)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)

    columns, batch = -(-max(lengths) // 64), len(lengths)
    pages = columns * batch + 1
    cache = LayerCache(
        draw(pages, 2, 64, 3 * num_kv_heads, max(key_dim, value_dim)), draw(pages, 4, num_kv_heads, key_dim + value_dim), key_dim, value_dim, 3
    )
    table = (torch.randperm(pages - 1, generator=generator, device=DEVICE) + 1).view(batch, columns).int()
    gates = torch.sigmoid(draw(batch, num_new, num_heads, 3))
    seq_lens = torch.tensor(lengths, device=DEVICE, dtype=torch.int32)
    return Decode(inputs, draw(batch, num_new, num_heads, key_dim), cache, table, seq_lens, gates)


def test_sequences_that_share_a_prompt(monkeypatch):
    """Neighbours with the same first pages: their common leaves are read once for all of them."""
    call = wide_call([9000, 4300], group_size=4)
    shared = replace(call.part([0, 0, 0, 0, 1, 0, 0]), seq_lens=torch.tensor([9000, 8997, 6200, 8999, 4300, 8800, 5], device=DEVICE))
    table = shared.block_table.clone()
    table[3, 100:130] = table[0, 100:130].flip(0)
    shared = replace(shared, block_table=table, q=torch.cat([shared.q[:4].roll(1, 2), shared.q[4:]]))
    expected, blocks = on_triton(monkeypatch, shared)
    for processors in (1, 40):
        with hopper(monkeypatch, processors=processors):
            out, chosen = shared.run()
        rows = same_blocks(chosen, blocks)
        assert rows.double().mean() > 0.9
        assert relative_rms(out[rows.all(-1)], expected[rows.all(-1)]) <= 2e-3
        if DEVICE == "cuda":
            for row in range(7):
                alone, same = shared.part([row]).run()
                assert torch.equal(alone[0], out[row]) and torch.equal(same[0], chosen[row])


def test_hopper_kernels_replay_a_selection(monkeypatch):
    call = wide_call([900, 70, 300])
    call = replace(call, seq_lens=call.seq_lens * torch.tensor([1, 0, 1], device=DEVICE))
    given = torch.full((3, 1, 1, 3), -2, device=DEVICE)
    given[0] = torch.tensor([2, 5, -1], device=DEVICE)
    expected, blocks = on_triton(monkeypatch, call, selection=given)
    for most in (32768, 0):
        monkeypatch.setattr(decode, "MAX_CHOSEN", most)
        with hopper(monkeypatch):
            out, chosen = call.run(selection=given)
        assert torch.equal(chosen, blocks)
        assert relative_rms(out, expected) <= 2e-3
