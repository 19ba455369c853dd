"""Copy named tensors into a model in place, strict about names and shapes.

Leaves out where they come from (grpo.weight_sync) and versions (the engine's).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class WeightError(ValueError):
    """Named tensors that do not fit the model."""


@torch.no_grad()
def load_named(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy every tensor into the parameter (or persistent buffer) of its name; dtype and device are converted.

    The tensors may come one at a time and are not kept. Names that share one parameter (tied weights) count as one: any of
    them will do.

    Raises:
        WeightError: an unknown name, another shape, or, at the end, a parameter that no tensor came for. What came before
            the fault has been copied: the model is then half loaded.
    """
    targets = model.state_dict(keep_vars=True)
    missing = {id(tensor): name for name, tensor in reversed(list(targets.items()))}
    for name, tensor in named_tensors:
        target = targets.get(name)
        if target is None:
            raise WeightError(f"the model has no parameter named {name!r}")
        if target.shape != tensor.shape:
            raise WeightError(f"{name} must have shape {tuple(target.shape)}, got {tuple(tensor.shape)}")
        target.copy_(tensor)
        missing.pop(id(target), None)
    if missing:
        names = list(missing.values())
        raise WeightError(f"no tensor came for {len(names)} of the model's parameters: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}")
