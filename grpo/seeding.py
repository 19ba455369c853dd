"""Seeds: one run seed folded with names and numbers into independent 63-bit seeds, and the global generators.

Leaves out per-token randomness, which the engine draws from (seed, prompt, sample, position) itself.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def fold(seed: int, *parts: int | str) -> int:
    """A 63-bit seed that depends on `seed` and every part, in order; the same on every machine and Python version.

    A part's type counts: `fold(0, 1)` and `fold(0, "1")` differ, and so do `("ab", "c")` and `("a", "bc")`.

    Example: `fold(config.train.seed, "rollout", step)`.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *parts):
        data = part.encode() if isinstance(part, str) else str(int(part)).encode()
        digest.update(b"s" if isinstance(part, str) else b"i")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (all devices), each with its own fold of `seed`."""
    random.seed(fold(seed, "python"))
    np.random.seed(fold(seed, "numpy") & 0xFFFFFFFF)
    torch.manual_seed(fold(seed, "torch"))
