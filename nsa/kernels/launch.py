"""What the launches of all kernels share: padded tile widths, base-2 exponents, the precision of fp32 products, a cheap launch and a rehearsal.

On the host `kernel[grid](...)` costs 30-80 µs for 20-45 arguments: Triton binds them by name, asks each how to specialise,
and makes a dictionary key of it all. `launch` remembers which compiled kernel came of it and calls that one directly.
`triton.cdiv` and `triton.next_power_of_2` cost 5 µs each when called on the host, so there are plain ones here.

Compiling the 22 kernels of a training call one after the other takes half a minute. `rehearse_once` runs a call's host code without
launching anything, and has what it would launch compiled side by side: Triton's compiler leaves the interpreter lock most of the time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

LOG2_E = 1.4426950408889634
"""Scores are scaled by this once, so that kernels can use exp2."""
REMEMBERS = triton.__version__.startswith(("3.6", "3.7", "3.8", "3.9"))
"""Whether this is a Triton whose compiled kernels take every parameter in order and are specialised as `kinds` says; others search each time."""

AsyncCompileMode = getattr(triton, "AsyncCompileMode", None)
"""Triton's own way of compiling in threads, where it has one."""

rehearsed: set[Hashable] = set()
"""The devices and kinds of calls that `rehearse_once` has seen."""
rehearsal: ContextVar[list[Any] | None] = ContextVar("rehearsal", default=None)
"""While a rehearsal runs, the kernels that it asked for."""

compiled_kernels: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""For `launch`: what it was called with, and the compiled kernel with the values of its remaining parameters."""


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`, which is at least 1."""
    return 1 << (size - 1).bit_length()


def ceil_div(count: int, size: int) -> int:
    """How many tiles of `size` hold `count`."""
    return -(-count // size)


def padded(size: int) -> int:
    """The power of two that a tile dimension of `size` takes, at least 16 (as `tl.dot` asks)."""
    return max(16, power_of_two(size))


def widths(key_dim: int, value_dim: int) -> dict[str, int]:
    """Head dimensions as kernels take them."""
    return {"KEY_DIM": key_dim, "KEY_PAD": padded(key_dim), "VALUE_DIM": value_dim, "VALUE_PAD": padded(value_dim)}


def dot_precision() -> str:
    """`input_precision` of products: fp32 ones are exact unless the user allowed TF32; others do not care."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def kinds(arguments: tuple[Any, ...]) -> list[Any] | None:
    """All that a compiled kernel may depend on in arguments that are no constants; None if that is not known."""
    found: list[Any] = []
    for value in arguments:
        if type(value) is int:
            found.append((value % 16 == 0) + 2 * (value == 1) + 4 * (not -(2**31) <= value < 2**31))
        elif isinstance(value, torch.Tensor):
            found.append(value.dtype)
            found.append(value.data_ptr() % 16 == 0)
        elif type(value) is float:
            found.append(float)
        elif type(value) is tuple:
            inner = kinds(value)
            if inner is None:
                return None
            found.append(tuple(inner))
        elif hasattr(value, "block_shape") and hasattr(value, "layout"):  # a view for the copy engine: its sizes and strides are not compiled in
            layout = value.layout
            found.append((value.base.dtype, *value.block_shape, layout.swizzle_byte_width, layout.element_bitwidth, layout.transposed))
        else:
            return None
    return found


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """`kernel[grid](*arguments, **settings)`, cheaper on the host from the second call of its kind on.

    During a rehearsal the kernel is only compiled.

    Args:
        kernel: a `@triton.jit` function. grid: one to three sizes.
        arguments: the kernel's first parameters in their order, all those that are not `tl.constexpr`.
        settings: its constants and Triton's options (num_warps, num_stages, maxnreg). Products and sums are fused unless
            `enable_fp_fusion` says otherwise, whatever a version of Triton does by itself (3.10 does not fuse).
    """
    if isinstance(kernel, JITFunction):
        settings.setdefault("enable_fp_fusion", True)
    asked = rehearsal.get()
    if asked is not None:
        asked.append(kernel.warmup(*arguments, grid=grid, **settings))
        return
    key = kinds(arguments)
    if key is None or not REMEMBERS or not isinstance(kernel, JITFunction):
        kernel[grid](*arguments, **settings)
        return
    key = (id(kernel), torch.cuda.current_device(), *key, *settings, *settings.values())
    found = compiled_kernels.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **settings)
        rest = list(kernel.signature.parameters.values())[len(arguments) :]
        compiled_kernels[key] = compiled, tuple([settings.get(parameter.name, parameter.default) for parameter in rest])
        return
    compiled, constants = found
    compiled[(*grid, 1, 1)[:3]](*arguments, *constants)


def rehearse_once(kind: Hashable, device: torch.device, work: Callable[[], object]) -> None:
    """Compile what the launches in `work()` need, side by side, the first time a `kind` is met.

    Args:
        kind: all that decides which kernels `work` launches. device: where; nothing is done unless it is a CUDA device.
        work: host code that only launches kernels and allocates; what it computes is garbage. A kernel that does not
            compile is passed over here: its launch says why.
    """
    if device.type != "cuda" or (device, kind) in rehearsed or AsyncCompileMode is None or torch.cuda.is_current_stream_capturing():
        return
    rehearsed.add((device, kind))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        with AsyncCompileMode(pool, ignore_errors=True):
            token = rehearsal.set(kernels := [])
            try:
                work()
            finally:
                rehearsal.reset(token)
        list(pool.map(lambda kernel: load(kernel, device), kernels))


def load(kernel: Any, device: torch.device) -> None:
    """Bring a compiled kernel to a device and compile its launcher, which takes as long as a small kernel."""
    compiled = kernel.result(ignore_errors=True) if hasattr(kernel, "result") else kernel
    if compiled is not None:
        with torch.cuda.device(device):
            compiled._init_handles()
