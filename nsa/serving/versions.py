"""Everything that differs between the vLLM versions that the plugin runs under."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false
from __future__ import annotations

import logging
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheSpec

TESTED = ("0.25.1", "0.27.1", "0.32.0")


@lru_cache(maxsize=1)
def warn_if_untested() -> None:
    """One line in the log where this vLLM is not among those that the tests ran with."""
    from vllm import __version__

    version = __version__.split("+")[0]
    if version not in TESTED:
        logging.getLogger("vllm.nsa").warning("NSA's plugin is tested with vLLM %s; this is %s", ", ".join(TESTED), version)


def raw_spec(*, page_size: int, num_kv_heads: int, dim: int, dtype: torch.dtype) -> KVCacheSpec:
    """A cache of K and V, `[pages, 2, page, num_kv_heads, dim]`."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(block_size=page_size, num_kv_heads=num_kv_heads, head_size=dim, dtype=dtype)


def side_spec(*, page_size: int, stride: int, num_kv_heads: int, dim: int, dtype: torch.dtype) -> KVCacheSpec:
    """A cache with one vector a head for every `stride` tokens, `[pages, page/stride, num_kv_heads, dim]`, in the raw cache's group."""
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    compression: dict[str, Any] = {"compress_ratio" if "compress_ratio" in MLAAttentionSpec.__dataclass_fields__ else "tokens_per_state": stride}
    return MLAAttentionSpec(block_size=page_size, num_kv_heads=num_kv_heads, head_size=dim, dtype=dtype, **compression)


def as_pages(cache: torch.Tensor, *shape: int) -> torch.Tensor:
    """A bound cache as `[pages, *shape]`. Since 0.28 or so it comes as `[pages, heads, states, content]` over the same memory, a
    page at a time, instead of in the shape that the backend names."""
    if cache.shape[1:] == shape:
        return cache
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    size = math.prod(shape)
    assert cache.stride(0) == size and cache[0].numel() == size, (cache.shape, cache.stride(), shape)
    return cache.as_strided((cache.shape[0], *shape), (size, *strides))


def request_pages(runner: Any, request_id: str, count: int) -> torch.Tensor:
    """The first pages of a request that the model runner (V1 or V2) knows, int64 `[count]`.

    Raises:
        ValueError: the runner does not know the request (any more).
    """
    known = runner.req_states.req_id_to_index if hasattr(runner, "req_states") else runner.requests
    if request_id not in known:
        raise ValueError(f"vLLM's model runner does not know the request {request_id!r} (any more)")
    if known is getattr(runner, "requests", None):
        return torch.tensor(known[request_id].block_ids[0][:count])
    return runner.block_tables.block_tables[0].gpu[known[request_id], :count].long()
