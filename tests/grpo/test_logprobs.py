"""Chunked log-probs: equal to the naive ones, right gradients, and never [T, V] at once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.logprobs import head_logits, token_logprobs


def inputs(T=13, E=8, V=17, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, E, dtype=dtype, generator=generator, requires_grad=True)
    weight = torch.randn(V, E, dtype=dtype, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(V, (T,), generator=generator)


def naive(hidden, weight, targets, temperature):
    logprobs = (hidden @ weight.t() / temperature).log_softmax(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements any operation returned."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return out


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_the_naive_ones(chunk, temperature):
    hidden, weight, targets = inputs()
    factors = torch.linspace(-1, 2, 13, dtype=torch.float64)
    expected, expected_entropy = naive(hidden, weight, targets, temperature)
    expected_grads = torch.autograd.grad((expected * factors).sum(), (hidden, weight))
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature=temperature, chunk=chunk)
    grads = torch.autograd.grad((logprobs * factors).sum(), (hidden, weight))
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    for ours, theirs in zip(grads, expected_grads):
        torch.testing.assert_close(ours, theirs)
    assert not entropy.requires_grad


def test_gradcheck_in_fp64():
    hidden, weight, targets = inputs(T=5, E=3, V=6)
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, temperature=0.9, chunk=2)[0], (hidden, weight))


def test_gradient_flows_to_hidden_alone_where_the_head_is_frozen():
    hidden, weight, targets = inputs()
    weight.requires_grad_(False)
    token_logprobs(hidden, weight, targets)[0].sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_intermediate_is_larger_than_a_chunk_of_logits():
    T, E, V, chunk = 256, 4, 300, 8
    hidden, weight, targets = inputs(T, E, V, torch.float32)
    with LargestTensor() as seen:
        token_logprobs(hidden, weight, targets, chunk=chunk)[0].sum().backward()
    assert seen.largest <= max(chunk * V, V * E, T * E)
    with LargestTensor() as seen:
        naive(hidden, weight, targets, 1.0)[0].sum().backward()
    assert seen.largest >= T * V  # the measure would have seen it


def test_half_precision_products_give_fp32_results_near_the_exact_ones():
    hidden, weight, targets = inputs(T=64, E=32, V=50, dtype=torch.float32)
    exact = naive(hidden.double(), weight.double(), targets, 1.0)[0]
    exact_grad = torch.autograd.grad(exact.sum(), weight)[0]
    logprobs, entropy = token_logprobs(hidden, weight, targets, compute_dtype=torch.bfloat16, chunk=16)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs - exact).abs().max() < 0.2
    grad = torch.autograd.grad(logprobs.sum(), weight)[0]
    assert grad.dtype == torch.float32
    assert (grad - exact_grad).norm() < 0.02 * exact_grad.norm()


def test_logprobs_are_those_of_softmax_of_head_logits_and_stay_finite_for_large_logits():
    hidden, weight, targets = inputs(dtype=torch.float32)
    hidden = hidden.detach() * 1e4
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature=0.5)
    expected = head_logits(hidden, weight, temperature=0.5).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, expected)
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(entropy).all()


def test_no_positions_give_empty_results_and_zero_gradient():
    hidden, weight, targets = inputs(T=0)
    logprobs, entropy = token_logprobs(hidden, weight, targets)
    assert logprobs.shape == entropy.shape == (0,)
    assert torch.autograd.grad(logprobs.sum(), weight)[0].abs().sum() == 0


def test_wrong_shapes_and_values_are_refused():
    hidden, weight, targets = inputs()
    with pytest.raises(ValueError, match="hidden"):
        token_logprobs(hidden, weight[:, :3], targets)
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(hidden, weight, targets, temperature=0)
    with pytest.raises(ValueError, match="chunk"):
        token_logprobs(hidden, weight, targets, chunk=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_on_a_gpu_are_rounded_once_to_fp32(dtype):
    hidden, weight, targets = (tensor.detach().cuda() for tensor in inputs(T=64, E=32, V=50, dtype=torch.float32))
    hidden, weight = hidden.to(dtype).float(), weight.to(dtype).float().requires_grad_()  # so that only the product can round
    exact = naive(hidden.double(), weight.double(), targets, 1.0)[0]
    exact_grad = torch.autograd.grad(exact.sum(), weight)[0]
    logprobs, _ = token_logprobs(hidden, weight, targets, compute_dtype=dtype, chunk=16)
    assert (logprobs - exact).abs().max() < 1e-4
    assert (torch.autograd.grad(logprobs.sum(), weight)[0] - exact_grad).norm() < 0.01 * exact_grad.norm()
