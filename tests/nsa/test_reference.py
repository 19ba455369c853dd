"""The oracle against the paper: Eq. 7-12, one test per claim, by means that do not use the oracle's own code."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention, silu

from nsa.attention import BranchKV
from nsa.config import SparsityConfig
from nsa.reference import compress, literal_eq9, overlap_scores, reference_attention, reference_block_scores
from nsa.testing import AttentionInputs, clear_choices, cumulative, make_inputs, query_positions, same_blocks

SMALL = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=6, num_local_blocks=2)
TINY = SparsityConfig(
    compress_block_size=2, compress_stride=1, select_block_size=2, num_selected_blocks=2, window_size=3, num_init_blocks=0, num_local_blocks=1
)


def run(inputs: AttentionInputs, **options) -> torch.Tensor:
    return reference_attention(inputs.q, inputs.kv, inputs.gates, **inputs.options, **options)


def with_gates(inputs: AttentionInputs, *gates: float) -> AttentionInputs:
    return replace(inputs, gates=torch.tensor(gates, dtype=inputs.q.dtype).expand_as(inputs.gates))


def masked_attention(q, k, v, mask) -> torch.Tensor:
    """SDPA of `[T, Hq, Dk]` over `[S, Hkv, Dk]` with a mask `[T, S]`."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize(
    ("l", "d", "size"), [(32, 16, 64), (16, 16, 16), (8, 4, 8), (64, 16, 64), (16, 8, 48), (4, 1, 6), (8, 8, 64), (12, 4, 16), (1, 1, 1)]
)
def test_eq9_as_printed_is_the_block_overlap(l, d, size):
    config = SparsityConfig(compress_block_size=l, compress_stride=d, select_block_size=size)
    num_tokens = 5 * size + size // 2
    num_blocks, num_compressed = -(-num_tokens // size), (num_tokens - l) // d + 1
    p_cmp = [3 * i * i + 1 for i in range(num_compressed)]
    tokens_in_common = [
        sum(p * len(set(range(i * d, i * d + l)) & set(range(j * size, (j + 1) * size))) for i, p in enumerate(p_cmp)) // d for j in range(num_blocks)
    ]
    assert literal_eq9(p_cmp, num_blocks, config) == tokens_in_common
    assert overlap_scores(p_cmp, num_blocks, config) == tokens_in_common


@given(
    d=st.integers(1, 8),
    in_block=st.integers(1, 6),
    more=st.integers(0, 6),
    p_cmp=st.lists(st.integers(0, 9), max_size=40),
    num_blocks=st.integers(0, 12),
)
@settings(max_examples=100, deadline=None)
def test_eq9_as_printed_is_the_block_overlap_for_any_sizes(d, in_block, more, p_cmp, num_blocks):
    config = SparsityConfig(compress_block_size=d * in_block, compress_stride=d, select_block_size=d * (in_block + more))
    assert literal_eq9(p_cmp, num_blocks, config) == overlap_scores(p_cmp, num_blocks, config)


def test_eq9_weights_of_the_papers_block_sizes():
    config = SparsityConfig()
    weights = [overlap_scores([float(i == k) for i in range(20)], 4, config)[2] for k in range(20)]
    assert weights[7:12] == [1, 2, 2, 2, 1]
    assert sum(weights) == 8


def test_compressed_token_i_is_phi_of_tokens_from_i_times_d():
    inputs = make_inputs(SMALL, lengths=[27])
    k, weights = inputs.kv.cmp[0], inputs.phi.k
    tokens = compress(k, weights, SMALL)
    assert tokens.shape[0] == (27 - 8) // 4 + 1
    for i in range(tokens.shape[0]):
        for h in range(2):
            block = k[4 * i : 4 * i + 8, h]
            expected = block.mean(0) + weights.down @ silu(weights.up @ (block + weights.position).flatten())
            torch.testing.assert_close(tokens[i, h], expected)
    pooled = compress(k, None, SMALL)
    torch.testing.assert_close(pooled[3, 1], k[12:20, 1].mean(0))


@pytest.mark.parametrize(("length", "num_compressed"), [(7, 0), (8, 1), (11, 1), (12, 2), (1, 0)])
def test_only_complete_blocks_are_compressed(length, num_compressed):
    assert compress(torch.ones(length, 1, 2), None, SMALL).shape == (num_compressed, 1, 2)


def test_compression_branch_sees_blocks_whose_last_token_is_not_after_the_query():
    inputs = with_gates(make_inputs(SMALL, lengths=[41]), 1, 0, 0)
    k, v = compress(inputs.kv.cmp[0], inputs.phi.k, SMALL), compress(inputs.kv.cmp[1], inputs.phi.v, SMALL)
    last = torch.arange(k.shape[0]) * 4 + 7
    expected = masked_attention(inputs.q, k, v, last[None] <= torch.arange(41)[:, None])
    out = run(inputs)
    assert not out[:7].any()
    torch.testing.assert_close(out[7:], expected[7:])


def test_window_branch_sees_the_last_w_tokens():
    inputs = with_gates(make_inputs(SMALL, lengths=[41]), 0, 0, 1)
    age = torch.arange(41)[:, None] - torch.arange(41)[None]
    torch.testing.assert_close(run(inputs), masked_attention(inputs.q, *inputs.kv.win, (age >= 0) & (age < 6)))


def test_selection_branch_is_causal_attention_over_the_chosen_blocks():
    inputs = with_gates(make_inputs(SMALL, lengths=[75]), 0, 1, 0)
    out, selection = run(inputs, return_selection=True)
    block = torch.arange(75) // 8
    causal = torch.arange(75)[:, None] >= torch.arange(75)[None]
    for h in range(2):
        mask = (block[None, :, None] == selection[:, h, None]).any(-1) & causal
        k, v = (x[:, h : h + 1] for x in inputs.kv.slc)
        torch.testing.assert_close(out[:, 2 * h : 2 * h + 2], masked_attention(inputs.q[:, 2 * h : 2 * h + 2], k, v, mask))


def test_branches_add_up_with_their_gates():
    inputs = make_inputs(SMALL, lengths=[33])
    parts = [run(with_gates(inputs, *one)) for one in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    torch.testing.assert_close(run(inputs), sum(inputs.gates[..., c, None] * part for c, part in enumerate(parts)))


@pytest.mark.parametrize("length", [1, 5, 32])
def test_dense_attention_up_to_n_times_block_size(length):
    inputs = with_gates(make_inputs(SMALL, lengths=[length], group_size=3), 0, 1, 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    assert (run(inputs) - masked_attention(inputs.q, *inputs.kv.slc, causal)).abs().max() <= 1e-5


def test_a_sequence_shorter_than_l_has_an_empty_compression_branch_and_no_nan():
    inputs = make_inputs(SMALL, lengths=[3])
    out = run(inputs)
    out.sum().backward()
    assert out.isfinite().all()
    assert not run(with_gates(inputs, 1, 0, 0)).any()
    assert all(x.grad is None or x.grad.isfinite().all() for x in inputs.leaves.values())


def test_selection_holds_initial_and_local_blocks_and_the_best_of_the_rest():
    inputs = make_inputs(SMALL, lengths=[75])
    _, selection = run(inputs, return_selection=True)
    scores = reference_block_scores(inputs.q, inputs.kv, **inputs.options)
    assert selection.dtype == torch.int16
    assert selection.shape == (75, 2, 4)
    for t in range(75):
        own = t // 8
        for h in range(2):
            row = selection[t, h].tolist()
            blocks = [j for j in row if j >= 0]
            assert row == sorted(blocks) + [-1] * (4 - len(blocks))
            assert len(set(blocks)) == min(4, own + 1)
            assert {0, max(0, own - 1), own} <= set(blocks) <= set(range(own + 1))
            left_out = set(range(own + 1)) - set(blocks)
            free = set(blocks) - {0, own - 1, own}
            if free and left_out:
                assert min(scores[t, h, j] for j in free) >= max(scores[t, h, j] for j in left_out)


def test_block_scores_sum_the_overlap_weighted_probabilities_over_the_group():
    inputs = make_inputs(SMALL, lengths=[60], group_size=3)
    scores = reference_block_scores(inputs.q, inputs.kv, **inputs.options)
    k = compress(inputs.kv.cmp[0], inputs.phi.k, SMALL)
    t, h = 50, 1
    num_complete = (t + 1 - 8) // 4 + 1
    p = torch.softmax(inputs.q[t, 3:6] @ k[:num_complete, h].T / 16**0.5, dim=-1).sum(0).tolist()
    # l = l' = 8, d = 4: block j has both halves of compressed token 2j and one half each of 2j - 1 and 2j + 1.
    expected = [(p[2 * j - 1] if j else 0) + 2 * p[2 * j] + p[2 * j + 1] for j in range(5)]
    torch.testing.assert_close(scores[t, h, :5], torch.tensor(expected, dtype=torch.float64))
    assert scores[t, h, 7:].eq(-torch.inf).all()
    assert scores[t, h, :7].isfinite().all()


def test_all_heads_of_a_group_share_one_choice_and_groups_differ():
    inputs = make_inputs(SMALL, lengths=[120], num_kv_heads=3)
    _, selection = run(inputs, return_selection=True)
    assert (selection[:, 0] != selection[:, 1]).any()
    assert (selection[:, 1] != selection[:, 2]).any()


def test_ties_go_to_the_lower_block():
    inputs = make_inputs(SMALL, lengths=[90])
    inputs = replace(inputs, q=torch.zeros_like(inputs.q))
    _, selection = run(inputs, return_selection=True)
    assert selection[88].tolist() == [[0, 1, 10, 11]] * 2
    assert selection[40].tolist() == [[0, 1, 4, 5]] * 2


def test_local_blocks_count_the_querys_own():
    config = replace(SMALL, num_local_blocks=1, num_init_blocks=0, num_selected_blocks=1)
    _, selection = run(make_inputs(config, lengths=[50]), return_selection=True)
    assert (selection[:, :, 0] == torch.arange(50)[:, None] // 8).all()


def test_later_tokens_change_nothing_before_them():
    inputs = make_inputs(SMALL, lengths=[70])
    before = run(inputs)
    for changed in (9, 40, 64):
        with torch.no_grad():
            later = {name: x.clone() if name.startswith("phi") else torch.cat([x[:changed], x[changed:] + 1]) for name, x in inputs.leaves.items()}
        after = run(inputs.with_leaves(later))
        assert torch.equal(after[:changed], before[:changed])
        assert not torch.equal(after[changed:], before[changed:])


def test_packed_sequences_equal_single_ones():
    lengths = [1, 30, 7, 45]
    inputs = make_inputs(SMALL, lengths=lengths)
    out, selection = run(inputs, return_selection=True)
    ends = cumulative(lengths).tolist()
    for a, b in pairwise(ends):
        kv = BranchKV(**{name: tuple(x[a:b] for x in getattr(inputs.kv, name)) for name in ("cmp", "slc", "win")})
        alone, chosen = reference_attention(inputs.q[a:b], kv, inputs.gates[a:b], phi=inputs.phi, config=SMALL, return_selection=True)
        torch.testing.assert_close(out[a:b], alone)
        assert torch.equal(selection[a:b], chosen)


def test_with_more_keys_than_queries_the_queries_are_the_last_tokens():
    full = make_inputs(SMALL, lengths=[30, 50])
    out, selection = run(full, return_selection=True)
    rows = torch.cat([torch.arange(25, 30), torch.arange(30, 80)])
    tail = replace(full, q=full.q[rows], gates=full.gates[rows], cu_seqlens=cumulative([5, 50]), cu_seqlens_k=cumulative([30, 50]))
    tail_out, tail_selection = run(tail, return_selection=True)
    torch.testing.assert_close(tail_out, out[rows])
    assert torch.equal(tail_selection, selection[rows])
    assert torch.equal(query_positions(tail), torch.cat([torch.arange(25, 30), torch.arange(50)]))


def test_a_given_selection_is_used_and_rows_of_minus_2_are_chosen_anew():
    inputs = make_inputs(SMALL, lengths=[75])
    out, own = run(inputs, return_selection=True)
    given_blocks = own.clone()
    given_blocks[60:] = torch.tensor([1, 3, 7, -1])
    given_blocks[70, 1] = -2
    replayed, used = run(inputs, selection=given_blocks, return_selection=True)
    torch.testing.assert_close(replayed[:60], out[:60])
    assert torch.equal(used[70, 1], own[70, 1])
    torch.testing.assert_close(replayed[70, 2:], out[70, 2:])
    used[70, 1] = -2
    assert torch.equal(used, given_blocks)
    mask = torch.isin(torch.arange(75) // 8, torch.tensor([1, 3, 7]))
    k, v = (x[:, :1] for x in inputs.kv.slc)
    expected = masked_attention(inputs.q[62:63, :2], k, v, (mask & (torch.arange(75) <= 62))[None])
    torch.testing.assert_close(run(with_gates(inputs, 0, 1, 0), selection=given_blocks)[62:63, :2], expected)


def test_scale_multiplies_the_logits_of_every_branch_and_of_the_scores():
    inputs = make_inputs(SMALL, lengths=[60])
    default = run(inputs)
    scaled = run(replace(inputs, q=inputs.q * 2), scale=0.5 * 16**-0.5)
    torch.testing.assert_close(scaled, default)


@pytest.mark.parametrize(("kv", "compressor"), [("separate", "mlp"), ("shared", "mean")])
def test_gradcheck_of_every_input(kv, compressor):
    config = replace(TINY, compressor=compressor)
    inputs = make_inputs(config, lengths=[1, 5], num_kv_heads=1, key_dim=3, value_dim=2, kv=kv, dtype=torch.float64)
    assert clear_choices(inputs, bound=1e-3).all()
    names = list(inputs.leaves)
    assert torch.autograd.gradcheck(lambda *leaves: run(inputs.with_leaves(dict(zip(names, leaves, strict=True)))), tuple(inputs.leaves.values()))


def test_the_choice_of_blocks_passes_no_gradient_to_the_compressor():
    inputs = with_gates(make_inputs(SMALL, lengths=[60]), 0, 1, 0)
    run(inputs).sum().backward()
    assert inputs.kv.slc[0].grad.any()
    assert not inputs.kv.cmp[0].grad.any()
    assert not inputs.phi.k.up.grad.any()


def test_inputs_of_one_seed_are_equal_and_choices_mostly_clear():
    first, second = make_inputs(SMALL, lengths=[200]), make_inputs(SMALL, lengths=[200], dtype=torch.float64)
    torch.testing.assert_close(first.q.double(), second.q, rtol=1e-6, atol=1e-6)
    assert clear_choices(first).double().mean() > 0.99
    assert same_blocks(run(first, return_selection=True)[1], run(second, return_selection=True)[1])[clear_choices(first)].all()


def test_wrong_calls_are_named():
    inputs = make_inputs(SMALL, lengths=[9])
    with pytest.raises(ValueError, match="float32 or float64"):
        run(inputs.to(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="compressor='mlp'"):
        run(replace(inputs, phi=None))
    with pytest.raises(ValueError, match="9 queries"):
        run(replace(inputs, cu_seqlens=cumulative([4, 4])))
    with pytest.raises(ValueError, match="5 queries but only 4 keys"):
        run(replace(inputs, cu_seqlens=cumulative([4, 5]), cu_seqlens_k=cumulative([5, 4])))
