"""Draw one token per row from logits, with randomness that belongs to the row and not to the batch.

Pure tensor functions, free of host synchronisation (they are captured in CUDA graphs). Shape suffixes: B rows, V vocabulary.

One uniform number per (row, position) comes from a hash of the row's key (`grpo.seeding.fold(seed, prompt_id, sample)`)
and the position, so a draw does not depend on what else is in the batch, on the slot it sits in or on the device. The
token is the inverse of the cumulative distribution at that number. The distribution is held as *integers*: weight
⌊2⁴⁰·exp(x − max x)⌋ per token. Integer sums are exact in any order, so the cumulative sum is monotone on every device, a
token of weight 0 (masked, or below 2⁻⁴⁰ of the likeliest token) is never returned, and there is no tail left over at the
end of the vocabulary by rounding. What that cuts off is less than V·2⁻⁴⁰ of the likeliest token's mass, far below fp32.
A Gumbel race would need a hash per (row, token) for the same guarantee: V times the work.

Leaves out penalties, logit biases and grammars.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WEIGHT_SCALE = 2.0**40  # V < 2²³ keeps the sum below 2⁶³


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as an unsigned value."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    """x ^ (x >>> bits): `>>` on int64 copies the sign bit, so it is masked off."""
    return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))


def hashed_uniforms(keys_B: Tensor, positions_B: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64 `[B]`, a function of (key, position) alone: SplitMix64 (Steele et al. 2014), the
    generator seeded with the key and read at the position, 53 bits. Both arguments int64 `[B]`."""
    x = keys_B + (positions_B + 1) * _GOLDEN
    x = _xor_shift(x, 30) * _MIX_1
    x = _xor_shift(x, 27) * _MIX_2
    x = _xor_shift(x, 31)
    return ((x >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53


def _kept(x_BV: Tensor, top_p_B: Tensor, top_k_B: Tensor) -> Tensor:
    """Which tokens top-k, then top-p (over what top-k left, renormalised) keep, bool `[B, V]`. Equal logits rank by token
    id; the token that crosses top_p is kept, so at least one always is."""
    sorted_BV, order_BV = x_BV.sort(dim=-1, descending=True, stable=True)
    vocabulary = x_BV.shape[-1]
    rank_V = torch.arange(vocabulary, device=x_BV.device)
    within_k_BV = rank_V < torch.where(top_k_B > 0, top_k_B, vocabulary)[:, None]
    probabilities_BV = sorted_BV.masked_fill(~within_k_BV, -torch.inf).softmax(dim=-1, dtype=torch.float64)
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
    within_p_BV = (before_BV < top_p_B[:, None]) | (top_p_B[:, None] >= 1)
    return torch.zeros_like(within_k_BV).scatter(-1, order_BV, within_k_BV & within_p_BV)


def sample_tokens(
    logits_BV: Tensor, uniforms_B: Tensor, temperature_B: Tensor, top_p_B: Tensor | None = None, top_k_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits_BV: fp32.
        uniforms_B: float64 in [0, 1), from `hashed_uniforms`.
        temperature_B: fp32; 0 takes the likeliest token (ties: the lowest id) whatever top-p and top-k say.
        top_p_B, top_k_B: float in (0, 1] and int64 (0 = off). Both None means no truncation in any row, and saves a sort.

    Returns:
        Token ids `[B]` int64, and their log-probabilities `[B]` fp32 under the distribution drawn from, after temperature
        and truncation (temperature 0: under the plain distribution). Logits with NaN give NaN log-probabilities, never an
        id outside the vocabulary.
    """
    vocabulary = logits_BV.shape[-1]
    greedy_B = temperature_B == 0
    maximum_B, argmax_B = logits_BV.max(dim=-1)  # of equal values the first
    x_BV = (logits_BV - maximum_B[:, None]) / torch.where(greedy_B, 1.0, temperature_B)[:, None]
    if top_p_B is not None and top_k_B is not None:
        x_BV = x_BV.masked_fill(~(_kept(x_BV, top_p_B, top_k_B) | greedy_B[:, None]), -torch.inf)
    mass_BV = x_BV.exp()
    cumulative_BV = (mass_BV * _WEIGHT_SCALE).to(torch.int64).cumsum(dim=-1)
    total_B = cumulative_BV[:, -1]
    target_B = torch.minimum((uniforms_B * total_B).to(torch.int64), total_B - 1)
    drawn_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0].clamp_(max=vocabulary - 1)
    ids_B = torch.where(greedy_B, argmax_B, drawn_B)
    logprobs_B = x_BV.gather(-1, ids_B[:, None])[:, 0] - mass_BV.sum(dim=-1).log()
    return ids_B, logprobs_B
