"""nsa_attention's backends against the oracle and against the claims that hold for any of them."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from nsa.attention import nsa_attention
from nsa.config import SparsityConfig
from nsa.testing import AttentionInputs, assert_same_selection, clear_choices, cumulative, make_inputs, relative_rms

SMALL = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=6, num_local_blocks=2)
WIDE = SparsityConfig(compress_block_size=32, compress_stride=16, select_block_size=64, num_selected_blocks=4, window_size=48)
TINY = SparsityConfig(
    compress_block_size=2, compress_stride=1, select_block_size=2, num_selected_blocks=2, window_size=3, num_init_blocks=0, num_local_blocks=1
)


def run(inputs: AttentionInputs, backend: str = "torch", **options):
    return nsa_attention(inputs.q, inputs.kv, inputs.gates, **inputs.options, backend=backend, **options)


def gradients(out: torch.Tensor, inputs: AttentionInputs) -> dict[str, torch.Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    found = torch.autograd.grad((out * weights).sum(), list(inputs.leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(inputs.leaves, found, strict=True))


def assert_equals_oracle(inputs: AttentionInputs, *, backend: str = "torch", bound: float = 1e-5, backward: bool = True) -> None:
    """Selections equal where clear; output within `bound` and gradients within 5 times that (relative RMS), given the same selection.

    The oracle runs in fp64, so that all of the error is the backend's.
    """
    exact = inputs.to(dtype=torch.float64)
    expected, chosen = run(exact, "reference", return_selection=True)
    out, selection = run(inputs, backend, return_selection=True)
    assert selection.dtype == torch.int16
    assert_same_selection(selection, chosen, clear_choices(inputs))
    if not torch.equal(selection, chosen):
        expected = run(exact, "reference", selection=selection)
    assert relative_rms(out, expected) <= bound
    assert (out - expected).abs().max() <= 10 * bound
    if backward:
        wanted = gradients(expected, exact)
        for name, gradient in gradients(out, inputs).items():
            assert relative_rms(gradient, wanted[name]) <= 5 * bound, name


@pytest.mark.parametrize("length", [1, 7, 63, 111])
@pytest.mark.parametrize("compressor", ["mlp", "mean"])
def test_odd_lengths_equal_the_oracle_with_every_gradient(length, compressor):
    assert_equals_oracle(make_inputs(replace(SMALL, compressor=compressor), lengths=[length], seed=length))


def test_length_1000_equals_the_oracle():
    assert_equals_oracle(make_inputs(WIDE, lengths=[1000], num_kv_heads=1, group_size=3), backward=False)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 7])
def test_any_group_size_equals_the_oracle(group_size):
    assert_equals_oracle(make_inputs(SMALL, lengths=[90], group_size=group_size))


@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (12, 20), (24, 5)])
@pytest.mark.parametrize("kv", ["separate", "shared"])
def test_key_and_value_dims_may_differ_and_branches_may_share(key_dim, value_dim, kv):
    assert_equals_oracle(make_inputs(SMALL, lengths=[50, 33], key_dim=key_dim, value_dim=value_dim, kv=kv))


@pytest.mark.parametrize("lengths", [[5, 1, 90, 16, 17], [40, 40, 40], [3] * 9])
def test_packed_sequences_equal_the_oracle(lengths):
    assert_equals_oracle(make_inputs(SMALL, lengths=lengths))


@pytest.mark.parametrize(("query_lengths", "lengths"), [([20, 1, 9], [60, 61, 9]), ([50, 30], [50, 40]), ([1, 1, 1], [5, 70, 33]), ([7], [64])])
def test_queries_may_be_the_last_tokens_of_longer_sequences(query_lengths, lengths):
    assert_equals_oracle(make_inputs(SMALL, lengths=lengths, query_lengths=query_lengths))


@st.composite
def any_inputs(draw) -> AttentionInputs:
    d = draw(st.integers(1, 4))
    l = d * draw(st.integers(1, 3))
    size = l + d * draw(st.integers(0, 3))
    num_init, num_local = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    config = SparsityConfig(
        compress_block_size=l,
        compress_stride=d,
        select_block_size=size,
        num_selected_blocks=num_init + num_local + draw(st.integers(0, 3)),
        window_size=draw(st.integers(1, 20)),
        num_init_blocks=num_init,
        num_local_blocks=num_local,
        compressor=draw(st.sampled_from(["mean", "mlp"])),
    )
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    query_lengths = None
    if draw(st.booleans()):
        query_lengths = [draw(st.integers(1, length)) for length in lengths]
    return make_inputs(
        config,
        lengths=lengths,
        query_lengths=query_lengths,
        num_kv_heads=draw(st.integers(1, 2)),
        group_size=draw(st.sampled_from([1, 2, 3, 4, 7])),
        key_dim=draw(st.sampled_from([4, 6])),
        value_dim=draw(st.sampled_from([2, 4, 5])),
        kv=draw(st.sampled_from(["separate", "shared"])),
        seed=draw(st.integers(0, 99)),
    )


@given(inputs=any_inputs())
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_any_shape_and_config_equals_the_oracle_with_every_gradient(inputs):
    assert_equals_oracle(inputs)


@pytest.mark.parametrize(("kv", "compressor"), [("separate", "mlp"), ("shared", "mean")])
def test_gradcheck_of_every_input(kv, compressor):
    config = replace(TINY, compressor=compressor)
    inputs = make_inputs(config, lengths=[1, 5], num_kv_heads=1, key_dim=3, value_dim=2, kv=kv, dtype=torch.float64)
    assert clear_choices(inputs, bound=1e-3).all()
    names = list(inputs.leaves)
    assert torch.autograd.gradcheck(lambda *leaves: run(inputs.with_leaves(dict(zip(names, leaves, strict=True)))), tuple(inputs.leaves.values()))


@pytest.mark.parametrize("length", [1, 5, 63, 111, 256])
def test_dense_attention_up_to_n_times_block_size(length):
    config = replace(WIDE, num_selected_blocks=4)
    assert config.dense_length == 256
    inputs = make_inputs(config, lengths=[length], group_size=3)
    inputs = replace(inputs, gates=torch.tensor([0.0, 1.0, 0.0]).expand_as(inputs.gates))
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, *inputs.kv.slc))
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    assert (run(inputs) - dense).abs().max() <= 1e-5


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("changed", [1, 8, 40, 63, 64, 69])
def test_changing_a_token_leaves_earlier_outputs_bit_equal(backend, changed):
    inputs = make_inputs(SMALL, lengths=[70])
    before, chosen = run(inputs, backend, return_selection=True)
    with torch.no_grad():
        there = (torch.arange(70) == changed)[:, None, None]
        leaves = {name: x if name.startswith("phi") else x + there for name, x in inputs.leaves.items()}
    after, chosen_after = run(inputs.with_leaves(leaves), backend, return_selection=True)
    assert torch.equal(after[:changed], before[:changed])
    assert torch.equal(chosen_after[:changed], chosen[:changed])
    assert not torch.equal(after[changed], before[changed])


def test_no_gradient_reaches_later_tokens():
    inputs = make_inputs(SMALL, lengths=[70])
    run(inputs)[:41].sum().backward()
    for name, leaf in inputs.leaves.items():
        if not name.startswith("phi"):
            assert leaf.grad[:41].any(), name
            assert not leaf.grad[41:].any(), name


@pytest.mark.parametrize("lengths", [[3], [1], [7, 2, 40]])
def test_sequences_shorter_than_l_give_no_nan(lengths):
    inputs = make_inputs(SMALL, lengths=lengths)
    out = run(inputs)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(x.grad is None or x.grad.isfinite().all() for x in inputs.leaves.values())
    only_compression = replace(inputs, gates=torch.tensor([1.0, 0.0, 0.0]).expand_as(inputs.gates))
    assert not run(only_compression)[: min(7, lengths[0])].any()


def test_packing_never_mixes_sequences():
    lengths = [30, 7, 45, 1]
    inputs = make_inputs(SMALL, lengths=lengths)
    out, chosen = run(inputs, return_selection=True)
    sequence = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    for n in range(4):
        own = sequence == n
        with torch.no_grad():
            leaves = {
                name: x if name.startswith("phi") else torch.where(own[:, None, None], x, 3 * x + 1).contiguous() for name, x in inputs.leaves.items()
            }
        other, other_chosen = run(inputs.with_leaves(leaves), return_selection=True)
        assert torch.equal(other[own], out[own])
        assert torch.equal(other_chosen[own], chosen[own])
        found = gradients(run(inputs) * own[:, None, None], inputs)
        for name in found.keys() - {name for name in found if name.startswith("phi")}:
            assert not found[name][~own].any(), name


def test_packed_batch_equals_single_sequences():
    lengths = [30, 7, 45, 1]
    inputs = make_inputs(SMALL, lengths=lengths)
    out, chosen = run(inputs, return_selection=True)
    clear = clear_choices(inputs)
    ends = cumulative(lengths).tolist()
    for a, b in pairwise(ends):
        leaves = {name: x if name.startswith("phi") else x[a:b] for name, x in inputs.leaves.items()}
        single = replace(inputs.with_leaves(leaves), cu_seqlens=cumulative([b - a]))
        alone, alone_chosen = run(single, return_selection=True)
        assert_same_selection(alone_chosen, chosen[a:b], clear[a:b])
        assert (alone - out[a:b]).abs().max() <= 1e-5


def test_ties_go_to_the_lower_block():
    inputs = make_inputs(SMALL, lengths=[90])
    _, selection = run(replace(inputs, q=torch.zeros_like(inputs.q)), return_selection=True)
    assert selection[88].tolist() == [[0, 1, 10, 11]] * 2
    assert selection[40].tolist() == [[0, 1, 4, 5]] * 2
    # Keys that repeat every block: all blocks but those at the edges tie, whatever the query.
    period = make_inputs(replace(SMALL, compressor="mean"), lengths=[90])
    keys = period.kv.cmp[0].detach()[:8].repeat(12, 1, 1)[:90]
    period = period.with_leaves(period.leaves | {"cmp_k": keys})
    _, selection = run(period, return_selection=True)
    _, expected = run(period, "reference", return_selection=True)
    assert torch.equal(selection, expected)
    assert selection[80:].eq(torch.tensor([0, 1, 9, 10])[None, None])[:8].all()


def test_selection_is_recorded_replayed_and_chosen_anew():
    inputs = make_inputs(SMALL, lengths=[75, 20])
    out, own = run(inputs, return_selection=True)
    replayed, used = run(inputs, selection=own, return_selection=True)
    assert torch.equal(used, own)
    assert torch.equal(replayed, out)
    forced = own.clone()
    forced[50:75] = torch.tensor([1, 3, 5, -1])
    forced[60:65, 1] = torch.tensor([-2, -1, -1, -1])
    exact = inputs.to(dtype=torch.float64)
    expected, expected_used = run(exact, "reference", selection=forced, return_selection=True)
    replayed, used = run(inputs, selection=forced, return_selection=True)
    assert torch.equal(used, expected_used)
    assert relative_rms(replayed, expected) <= 1e-5
    wanted = gradients(expected, exact)
    for name, gradient in gradients(replayed, inputs).items():
        assert relative_rms(gradient, wanted[name]) <= 5e-5, name


def test_two_runs_are_bit_equal():
    inputs = make_inputs(SMALL, lengths=[75, 20, 33])
    first, second = run(inputs, deterministic=True), run(inputs, deterministic=True)
    assert torch.equal(first, second)
    again = gradients(second, inputs)
    for name, gradient in gradients(first, inputs).items():
        assert torch.equal(gradient, again[name]), name


def test_bf16_stays_near_the_oracle():
    inputs = make_inputs(SMALL, lengths=[111])
    exact = inputs.to(dtype=torch.bfloat16).to(dtype=torch.float64)
    out, selection = run(inputs.to(dtype=torch.bfloat16), return_selection=True)
    assert out.dtype == torch.bfloat16
    assert relative_rms(out, run(exact, "reference", selection=selection)) <= 1e-2


def test_long_sequences_are_computed_in_chunks_with_the_same_result(monkeypatch):
    inputs = make_inputs(SMALL, lengths=[111, 60])
    whole, chosen = run(inputs, return_selection=True)
    monkeypatch.setattr("nsa.torch_backend.CHUNK_SCORES", 4000)
    chunked, chunk_chosen = run(inputs, return_selection=True)
    assert_same_selection(chunk_chosen, chosen, clear_choices(inputs))
    assert (chunked - whole).abs().max() <= 1e-5


def test_an_empty_batch_gives_an_empty_output():
    inputs = make_inputs(SMALL, lengths=[0])
    out, selection = run(inputs, return_selection=True)
    assert out.shape == (0, 4, 8)
    assert selection.shape == (0, 2, 4)


def test_wrong_calls_are_named():
    inputs = make_inputs(SMALL, lengths=[9])
    with pytest.raises(ValueError, match="backend"):
        run(inputs, "cuda")
    with pytest.raises(ValueError, match="selection"):
        run(inputs, selection=torch.zeros(9, 2, 3, dtype=torch.int16))
    with pytest.raises(ValueError, match="phi"):
        run(replace(inputs, phi=None))
    with pytest.raises(ValueError, match="gates"):
        run(replace(inputs, gates=inputs.gates[:, :1]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        run(replace(inputs, cu_seqlens=cumulative([4, 4])))
    with pytest.raises(ValueError, match="at least as many keys as queries"):
        run(replace(inputs, cu_seqlens=cumulative([4, 5]), cu_seqlens_k=cumulative([5, 4])))
    with pytest.raises(ValueError, match="Hkv"):
        run(replace(inputs, q=inputs.q[:, :3], gates=inputs.gates[:, :3]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        run(replace(inputs, cu_seqlens=torch.tensor([0, 6, 3, 9])))
