"""The vectorised judges of selections in `nsa/testing.py` agree with the oracle's loops."""

import pytest
import torch

from nsa.config import SparsityConfig
from nsa.reference import reference_attention, reference_block_scores
from nsa.testing import chosen_blocks, clear_choices, exact_block_scores, make_inputs, query_positions, selection_gap


@pytest.mark.parametrize(("init", "local", "num"), [(1, 2, 4), (0, 1, 3), (2, 1, 5)])
def test_scores_choices_and_gaps_equal_the_oracles(init: int, local: int, num: int) -> None:
    config = SparsityConfig(
        compress_block_size=8,
        compress_stride=4,
        select_block_size=8,
        num_selected_blocks=num,
        window_size=6,
        num_init_blocks=init,
        num_local_blocks=local,
    )
    inputs = make_inputs(config, lengths=[71, 1, 0, 33], query_lengths=[71, 1, 0, 7]).to(dtype=torch.float64, requires_grad=False)
    scores, positions = exact_block_scores(inputs), query_positions(inputs)
    expected = reference_block_scores(inputs.q, inputs.kv, **inputs.options)
    assert torch.equal(scores.isneginf(), expected.isneginf())
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-14)
    _, selection = reference_attention(inputs.q, inputs.kv, inputs.gates, **inputs.options, return_selection=True)
    assert torch.equal(chosen_blocks(scores, positions, config), selection.long())
    gaps, taken = selection_gap(scores, positions, config), 0
    for row, t in enumerate(positions.tolist()):
        free = range(init, t // 8 + 1 - local)
        take = num - (t // 8 + 1 - len(free))
        for head in range(2):
            ranked = sorted(scores[row, head, free.start : free.stop].tolist(), reverse=True)
            if 0 < take < len(free):
                assert gaps[row, head] == (ranked[take - 1] - ranked[take]) / ranked[0]
                taken += 1
            else:
                assert gaps[row, head] == torch.inf
    assert taken > 50
    assert torch.equal(clear_choices(inputs, bound=1e-2), gaps > 1e-2)
