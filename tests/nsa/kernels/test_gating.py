"""Gate gradients and delta terms against the formula in fp64."""

import pytest
import torch

from nsa.kernels.gating import gate_backward
from nsa.testing import relative_rms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(num_tokens, num_heads, dim, dtype, gate_dtype, bound):
    generator = torch.Generator().manual_seed(0)
    d_out, *outs = (torch.randn(num_tokens, num_heads, dim, generator=generator).to(DEVICE, dtype) for _ in range(4))
    gates = torch.rand(num_tokens, num_heads, 3, generator=generator).to(DEVICE, gate_dtype)
    d_gates, delta = gate_backward(d_out, gates, (outs[0], outs[1], outs[2]))
    want = torch.stack([(d_out.double() * out.double()).sum(-1) for out in outs], dim=-1)
    assert d_gates.dtype == gate_dtype and delta.dtype == torch.float32
    assert relative_rms(d_gates, want) <= bound
    assert relative_rms(delta, want * gates.double()) <= 1e-5


@pytest.mark.parametrize(("num_tokens", "num_heads", "dim"), [(1, 1, 8), (63, 9, 64), (7, 4, 96), (111, 3, 24)])
def test_matches_the_formula(num_tokens, num_heads, dim):
    check(num_tokens, num_heads, dim, torch.float32, torch.float32, 1e-5)


def test_half_precision_outputs_with_fp32_gates():
    check(63, 4, 32, torch.float16, torch.float32, 1e-5)


def test_strided_inputs_and_no_tokens():
    d_out, first, second, third = (torch.randn(4, 10, 16, device=DEVICE).transpose(0, 1) for _ in range(4))
    gates = torch.rand(3, 10, 4, device=DEVICE).permute(1, 2, 0)
    d_gates, delta = gate_backward(d_out, gates, (first, second, third))
    want = torch.stack([(d_out * out).sum(-1) for out in (first, second, third)], dim=-1)
    assert relative_rms(d_gates, want) <= 1e-5 and relative_rms(delta, want * gates) <= 1e-5
    empty = gate_backward(d_out[:0], gates[:0], (first[:0], second[:0], third[:0]))
    assert empty[0].shape == empty[1].shape == (0, 4, 3)


@pytest.mark.gpu
def test_bf16_on_the_gpu():
    check(5000, 64, 128, torch.bfloat16, torch.bfloat16, 5e-3)
