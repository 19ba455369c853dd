"""Log-probabilities of given tokens and entropies from hidden states, without ever holding [T, V] logits.

Positions are handled in chunks: the forward pass keeps one number per position (the log-normaliser), the backward pass
recomputes a chunk's logits and at once turns them into gradients of the hidden states and the LM head. Autograd alone
would keep every chunk's logits until the end. Leaves out which positions matter: callers gather those rows first.

Shape suffixes: T positions, E hidden size, V vocabulary, C positions of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch


def _matmul(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """a @ b in `out_dtype`. Half-precision products are rounded to it directly on CUDA, and by way of their own dtype elsewhere."""
    if a.dtype == out_dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out_dtype)
    return (a @ b).to(out_dtype)


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_logits(hidden_TE: torch.Tensor, weight_VE: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """`[T, V]` logits divided by the temperature, in fp32 (fp64 for fp64 inputs); the product runs in hidden's dtype.

    The learner's log-probs are those of softmax(head_logits(...)); a sampler that uses it too rounds alike.
    """
    logits_TV = _matmul(hidden_TE, weight_VE.to(hidden_TE.dtype).t(), _softmax_dtype(hidden_TE.dtype))
    return logits_TV if temperature == 1.0 else logits_TV / temperature


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TE: torch.Tensor, weight_VE: torch.Tensor, targets_T: torch.Tensor, temperature: float, chunk: int, dtype: torch.dtype
    ):
        wide = _softmax_dtype(dtype)
        logprobs_T = torch.empty(hidden_TE.shape[0], dtype=wide, device=hidden_TE.device)
        entropy_T, normaliser_T = torch.empty_like(logprobs_T), torch.empty_like(logprobs_T)
        weight = weight_VE.to(dtype)
        for start in range(0, hidden_TE.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits_CV = head_logits(hidden_TE[rows].to(dtype), weight, temperature=temperature)
            normaliser_C = logits_CV.logsumexp(-1)
            logprobs_T[rows] = logits_CV.gather(1, targets_T[rows, None]).squeeze(1) - normaliser_C
            # H = log Z − Σ p·logit; the probabilities overwrite a copy, so two chunk-sized tensors exist at most.
            probs_CV = (logits_CV - normaliser_C[:, None]).exp_()
            entropy_T[rows] = normaliser_C - probs_CV.mul_(logits_CV).sum(-1)
            normaliser_T[rows] = normaliser_C
        ctx.save_for_backward(hidden_TE, weight_VE, targets_T, normaliser_T)
        ctx.temperature, ctx.chunk, ctx.dtype = temperature, chunk, dtype
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        grad_T = grads[0]
        hidden_TE, weight_VE, targets_T, normaliser_T = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = _softmax_dtype(ctx.dtype)
        weight = weight_VE.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden_TE) if needs_hidden else None
        grad_weight = torch.zeros(weight_VE.shape, dtype=wide, device=weight_VE.device) if needs_weight else None
        for start in range(0, hidden_TE.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            hidden_CE = hidden_TE[rows].to(ctx.dtype)
            # ∂ log p(target) / ∂ logit = (1[target] − p) / temperature
            grad_C1 = grad_T[rows, None] / ctx.temperature
            grad_CV = (head_logits(hidden_CE, weight, temperature=ctx.temperature).sub_(normaliser_T[rows, None])).exp_().mul_(-grad_C1)
            grad_CV.scatter_add_(1, targets_T[rows, None], grad_C1)
            grad_CV = grad_CV.to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = _matmul(grad_CV, weight, wide).to(hidden_TE.dtype)
            if grad_weight is not None:
                grad_weight += _matmul(grad_CV.t(), hidden_CE, wide)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VE.dtype), None, None, None, None


def token_logprobs(
    hidden_TE: torch.Tensor,
    weight_VE: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 2048,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden @ weightᵀ / temperature) at the targets, and the entropy of that distribution, in nats.

    Args:
        hidden_TE: hidden states `[T, E]` of the positions that predict `targets_T`.
        weight_VE: LM head `[V, E]`, any float dtype (fp32 master weights are fine).
        targets_T: token ids `[T]`, int64.
        temperature: the sampler's.
        chunk: positions whose logits exist at the same time.
        compute_dtype: dtype of the matrix products; None: hidden's. Softmax, sums and the weight gradient's
            accumulation are fp32 (fp64 for fp64).

    Returns:
        logprobs_T (differentiable in hidden and weight) and entropy_T (without gradient), both fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes that do not fit, a temperature or chunk that is not positive.
    """
    if hidden_TE.ndim != 2 or weight_VE.ndim != 2 or hidden_TE.shape[1] != weight_VE.shape[1] or targets_T.shape != hidden_TE.shape[:1]:
        raise ValueError(
            f"need hidden [T, E], weight [V, E] and targets [T], got {tuple(hidden_TE.shape)}, {tuple(weight_VE.shape)} and {tuple(targets_T.shape)}"
        )
    if temperature <= 0 or chunk < 1:
        raise ValueError(f"temperature must be > 0 and chunk >= 1, got {temperature} and {chunk}")
    with torch.autocast(hidden_TE.device.type, enabled=False):
        return _TokenLogprobs.apply(hidden_TE, weight_VE, targets_T, temperature, chunk, compute_dtype or hidden_TE.dtype)  # type: ignore[return-value]
