"""Token sampling: the right distribution, the right log-probabilities, and randomness that belongs to the row."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.rollout.sampling import hashed_uniforms, sample_tokens


def _reference_uniform(key: int, position: int) -> float:
    """SplitMix64 in Python's unbounded integers."""
    mask = (1 << 64) - 1
    x = (key + (position + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x ^= x >> 31
    return (x >> 11) * 2.0**-53


def _draw(logits_V: torch.Tensor, count: int, *, temperature: float = 1.0, top_p: float | None = None, top_k: int = 0, key: int = 7):
    uniforms = hashed_uniforms(torch.full((count,), key), torch.arange(count))
    rows = logits_V.expand(count, -1)
    truncation = {} if top_p is None else {"top_p_B": torch.full((count,), top_p), "top_k_B": torch.full((count,), top_k)}
    return sample_tokens(rows, uniforms, torch.full((count,), temperature), **truncation)


def _assert_distributed(ids: torch.Tensor, probabilities_V: torch.Tensor) -> None:
    """Chi-square against the expected counts, at about six standard deviations, over tokens expected five times or more."""
    observed = torch.bincount(ids, minlength=len(probabilities_V)).double()
    assert not observed[probabilities_V == 0].any(), "a token of zero probability was drawn"
    expected = probabilities_V.double() * len(ids)
    rare = expected < 5
    statistic = ((observed - expected) ** 2 / expected)[~rare].sum()
    freedom = int((~rare).sum()) - 1
    if expected[rare].sum() >= 5:
        statistic += (observed[rare].sum() - expected[rare].sum()) ** 2 / expected[rare].sum()
        freedom += 1
    assert statistic < freedom + 6 * math.sqrt(2 * max(freedom, 1)) + 6, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"


@given(key=st.integers(0, 2**63 - 1), position=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_uniforms_equal_splitmix64(key: int, position: int):
    assert hashed_uniforms(torch.tensor([key]), torch.tensor([position])).item() == _reference_uniform(key, position)


def test_uniforms_are_uniform_over_keys_and_over_positions_and_uncorrelated():
    many = torch.arange(20_000)
    by_position = hashed_uniforms(torch.full_like(many, 12345), many)
    by_key = hashed_uniforms(many, torch.full_like(many, 3))
    for values in (by_position, by_key):
        _assert_distributed((values * 50).long(), torch.full((50,), 0.02))
        assert abs(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([by_position, by_key]))[0, 1]) < 0.03


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_tempered_softmax(temperature: float):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2
    ids, logprobs = _draw(logits, 20_000, temperature=temperature)
    expected = (logits / temperature).log_softmax(-1)
    _assert_distributed(ids, expected.exp())
    torch.testing.assert_close(logprobs, expected[ids], atol=2e-6, rtol=0)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, 0), (1.0, 5), (0.6, 6), (0.05, 0), (1.0, 1), (1.0, 0), (1.0, 400)])
def test_truncated_draws_follow_the_renormalised_distribution(top_p: float, top_k: int):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    temperature = 1.3
    order = sorted(range(40), key=lambda i: -logits[i].item())
    kept = order[: top_k or 40]
    mass = torch.tensor([(logits[i] / temperature).exp() for i in kept]).double()
    mass /= mass.sum()
    size = next((i + 1 for i in range(len(kept)) if mass[: i + 1].sum() >= top_p), len(kept))
    expected = torch.full((40,), -torch.inf)
    expected[kept[:size]] = (logits / temperature)[kept[:size]]
    expected = expected.log_softmax(-1)
    ids, logprobs = _draw(logits, 10_000, temperature=temperature, top_p=top_p, top_k=top_k)
    _assert_distributed(ids, expected.exp())
    torch.testing.assert_close(logprobs, expected[ids], atol=2e-6, rtol=0)


def test_top_k_among_equal_logits_keeps_the_lowest_ids():
    ids, logprobs = _draw(torch.zeros(10), 500, top_p=1.0, top_k=3)
    assert set(ids.tolist()) == {0, 1, 2}
    torch.testing.assert_close(logprobs, torch.full((500,), -math.log(3)))


def test_temperature_zero_takes_the_first_maximum_with_the_plain_logprob():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, 1.0, 5.0, 5.0]])
    uniforms = torch.tensor([0.99, 0.99], dtype=torch.float64)
    for truncation in ({}, {"top_p_B": torch.tensor([0.1, 0.1]), "top_k_B": torch.tensor([1, 1])}):
        ids, logprobs = sample_tokens(logits, uniforms, torch.zeros(2), **truncation)
        assert ids.tolist() == [1, 0]
        torch.testing.assert_close(logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]])


def test_rows_of_different_settings_do_not_disturb_each_other():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 50, generator=generator)
    uniforms = torch.rand(6, generator=generator, dtype=torch.float64)
    temperature = torch.tensor([0.0, 1.0, 0.3, 1.0, 2.0, 1.0])
    top_p = torch.tensor([1.0, 1.0, 0.5, 0.9, 1.0, 0.2])
    top_k = torch.tensor([0, 0, 0, 3, 7, 9])
    together = sample_tokens(logits, uniforms, temperature, top_p, top_k)
    for row in range(6):
        one = slice(row, row + 1)
        alone = sample_tokens(logits[one], uniforms[one], temperature[one], top_p[one], top_k[one])
        assert alone[0] == together[0][row]
        assert alone[1] == together[1][row]
    plain = sample_tokens(logits[1:2], uniforms[1:2], temperature[1:2])
    assert plain[0] == together[0][1]


@pytest.mark.parametrize("vocabulary", [2, 403, 50_000])
def test_extreme_uniforms_never_return_a_masked_token(vocabulary: int):
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(3))
    logits[0, 0] = logits[0, -1] = -torch.inf if vocabulary > 2 else 0.0
    for uniform in (0.0, 2.0**-53, 0.5, 1 - 2.0**-53):
        ids, logprobs = sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64), torch.ones(1))
        assert 0 <= ids.item() < vocabulary
        assert math.isfinite(logprobs.item())


def test_tiny_temperature_is_greedy_and_nan_logits_stay_inside_the_vocabulary():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    ids, logprobs = sample_tokens(logits, torch.tensor([0.999], dtype=torch.float64), torch.tensor([1e-38]))
    assert ids.item() == 1
    assert logprobs.item() == 0
    ids, logprobs = sample_tokens(torch.tensor([[0.0, torch.nan, 1.0]]), torch.tensor([0.5], dtype=torch.float64), torch.ones(1))
    assert 0 <= ids.item() < 3
    assert math.isnan(logprobs.item())
