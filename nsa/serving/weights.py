"""Where a checkpoint's tensors lie in the served model, and linear layers that read their weights at every call.

`HfParameter` lets a trainer write new weights in place, under the names of our checkpoints: vLLM merges projections and
splits them over ranks, this says which part is whose. On the CPU, vLLM packs weights once and computes with the copy;
`LiveLinear` and `LiveEmbedding` compute with the parameter itself, so that what is written in place counts.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.platforms import current_platform


@dataclass(frozen=True, slots=True)
class HfParameter:
    """This rank's part of one tensor of the checkpoint.

    name: the checkpoint's. view: the live memory. dim: along which ranks hold parts (the same on all of them), this one's from
    `start` on, of `size` in all; None where every rank holds the whole tensor (start and size are then 0)."""

    name: str
    view: torch.Tensor
    dim: int | None = None
    size: int = 0
    start: int = 0


class Live:
    """Mixed into vLLM's ways to multiply: on the CPU, where vLLM packs weights away, the parameter is read as it is now."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if not current_platform.is_cpu():
            super().process_weights_after_loading(layer)  # type: ignore[misc]

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return functional.linear(x, layer.weight, bias) if current_platform.is_cpu() else super().apply(layer, x, bias)  # type: ignore[misc]


class LiveLinear(Live, UnquantizedLinearMethod):
    """Of linear layers."""


class LiveEmbedding(Live, UnquantizedEmbeddingMethod):
    """Of the embedding and the output head."""


def make_live(model: nn.Module) -> None:
    """Let all of a model's linear layers and embeddings read their parameters at every call."""
    for layer in model.modules():
        module: Any = layer
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedLinearMethod):
            module.quant_method = LiveLinear()
        elif isinstance(method, UnquantizedEmbeddingMethod):
            module.quant_method = LiveEmbedding()


def _part(name: str, view: torch.Tensor, dim: int, size: int, start: int) -> HfParameter:
    return HfParameter(name, view, dim, size, start) if get_tensor_model_parallel_world_size() > 1 else HfParameter(name, view)


def own_rows(name: str, rows: torch.Tensor) -> HfParameter:
    """A tensor whose rows are split over the ranks, evenly and in order."""
    return _part(name, rows, 0, rows.shape[0] * get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank() * rows.shape[0])


def _linear(prefix: str, module: Any, names: tuple[str, ...]) -> Iterator[HfParameter]:
    """A linear layer that ranks hold parts of, `names` the projections that it merges (itself where it merges none)."""
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    if isinstance(module, RowParallelLinear):
        width = module.weight.shape[1]
        yield _part(f"{prefix}.weight", module.weight.data, 1, width * ranks, rank * width)
        if module.bias is not None:
            yield HfParameter(f"{prefix}.bias", module.bias.data)
        return
    sizes = module.output_sizes if isinstance(module, MergedColumnParallelLinear) else [module.output_size]
    parent, offset = prefix.rpartition(".")[0], 0
    for name, size in zip(names, sizes):  # what follows the named projections in a product is the caller's
        width = size // ranks
        for leaf in ("weight", "bias"):
            tensor = getattr(module, leaf)
            if tensor is not None:
                yield _part(f"{parent}.{name}.{leaf}", tensor.data[offset : offset + width], 0, size, rank * width)
        offset += width


def hf_parameters(model: nn.Module, merged: dict[str, tuple[str, ...]], tied: bool) -> Iterator[HfParameter]:
    """Every parameter of the checkpoint once.

    Args:
        merged: names of the projections that a merged layer of that name holds, in its order.
        tied: the output head is the embedding.
    """
    for prefix, layer in model.named_modules():
        module: Any = layer
        own = prefix.rpartition(".")[2]
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            yield from _linear(prefix, module, merged.get(own, (own,)))
        elif isinstance(module, VocabParallelEmbedding):
            if own != "lm_head" or not tied:
                shard = module.shard_indices
                start, rows = shard.org_vocab_start_index, shard.num_org_elements
                yield _part(f"{prefix}.weight", module.weight.data[:rows], 0, module.org_vocab_size, start)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                of_heads = name == "branch_mix" or own == "branch_gate"  # all others are whole on each rank
                yield (own_rows if of_heads else HfParameter)(f"{prefix}.{name}", parameter.data)
