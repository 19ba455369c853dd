"""What the launches of all kernels share: padded tile widths, base-2 exponents, the precision of fp32 products."""

from __future__ import annotations

import torch
import triton

LOG2_E = 1.4426950408889634
"""Scores are scaled by this once, so that kernels can use exp2."""


def padded(size: int) -> int:
    """The power of two that a tile dimension of `size` takes, at least 16 (as `tl.dot` asks)."""
    return max(16, triton.next_power_of_2(size))


def dot_precision() -> str:
    """`input_precision` of products: fp32 ones are exact unless the user allowed TF32; others do not care."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
