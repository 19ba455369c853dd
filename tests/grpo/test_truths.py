"""Selection agreement and the mismatch bound on small worked inputs."""

import pytest
import torch

from grpo.loss import LossSums
from grpo.truths import LearnerError, check_mismatch, describe_step, first_ratio_deviation, is_sparse, selection_agreement
from nsa.config import SparsityConfig

SPARSITY = SparsityConfig(
    compress_block_size=4, compress_stride=4, select_block_size=4, num_selected_blocks=3, num_local_blocks=1, window_size=4, compressor="mean"
)


def test_a_query_is_sparse_once_it_sees_more_than_n_blocks():
    assert is_sparse(torch.tensor([0, 3, 11, 12, 13, 100]), SPARSITY).tolist() == [False, False, False, True, True, True]


def test_agreement_counts_shared_blocks_of_recorded_sparse_queries():
    positions = torch.tensor([2, 16, 17, 18])
    recorded = torch.tensor([[0, -1, -1], [0, 1, 4], [-2, -2, -2], [0, 3, 4]], dtype=torch.int16)[:, None, None]
    own = torch.tensor([[9, 9, 9], [0, 2, 4], [0, 1, 4], [0, 3, 4]])[:, None, None]
    assert selection_agreement(recorded, own, positions, SPARSITY) == (5.0, 6.0)
    # shifted lists share blocks 3 and 4 although no place is equal
    assert selection_agreement(torch.tensor([[[[0, 3, 4]]]]), torch.tensor([[[[3, 4, 5]]]]), torch.tensor([20]), SPARSITY) == (2.0, 3.0)


def test_mismatch_bound():
    def sums(total):
        return LossSums(
            sums={"mismatch/mean": torch.tensor(total), "tokens": torch.tensor(4.0)}, maxima={"mismatch/max": torch.tensor(1.0)}, minima={}
        )

    check_mismatch(sums(0.375), 0.1)
    check_mismatch(sums(40.0), None)
    with pytest.raises(LearnerError, match=r"is 0.125 nats \(largest 1\)"):
        check_mismatch(sums(0.5), 0.1)


def test_first_ratio_is_exactly_one_or_the_step_stops():
    logprobs = torch.tensor([-1.0, -2.0])
    assert first_ratio_deviation(logprobs, logprobs.clone()) == 0
    with pytest.raises(LearnerError, match="not deterministic"):
        first_ratio_deviation(logprobs, torch.nextafter(logprobs, torch.tensor(0.0)))


def test_a_step_without_groups_is_described_without_dividing_by_zero():
    metrics = describe_step([], [], policy_version=3, sparsity=SPARSITY)
    assert metrics["groups/dead_fraction"] == 0
    assert "selection/sparse_queries" not in metrics
