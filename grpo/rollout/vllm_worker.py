# pyright: reportMissingImports=false
"""What vLLM's worker processes do for our engine: take weights in by their checkpoint names, sum them up, read selections.

vLLM mixes `WeightAccess` into its worker class (`worker_extension_cls`), so every method here is called by name, in the
process that holds the model, on every rank of the tensor-parallel group at once. Weights are written in place into views
of the live parameters (`hf_parameters` of nsa.serving's model): nothing is allocated, CUDA graphs stay valid, and the sum
is taken over the very memory that the forward pass reads. Leaves out transport and versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from grpo.transfer import GroupAddress, TensorInfo, WeightGroup
from grpo.weight_sync import checksum


class WeightAccess:
    """Mixed into vLLM's worker: `get_model()` is the worker's."""

    get_model: Any
    model_runner: Any
    device: Any
    vllm_config: Any
    _nsa_group: WeightGroup
    _nsa_known: dict[str, Any]
    _nsa_missing: set[str]

    def nsa_begin_load(self) -> None:
        """Expect every parameter once."""
        self._nsa_known = {parameter.name: parameter for parameter in self.get_model().hf_parameters()}
        self._nsa_missing = set(self._nsa_known)

    def nsa_load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
        """Copy whole tensors (any dtype and device) into this rank's part of the parameters.

        Returns:
            None, or what is wrong (an unknown name, another shape): exceptions lose their type between processes. What came
            before the fault has been copied.
        """
        with torch.inference_mode():
            for name, tensor in named_tensors:
                parameter = self._nsa_known.get(name)
                if parameter is None:
                    return f"the model has no parameter named {name!r}"
                part = own_part(parameter, tensor)
                if part is None:
                    return f"{name} must have shape {whole_shape(parameter)}, got {tuple(tensor.shape)}"
                parameter.view.copy_(part)
                self._nsa_missing.discard(name)
        return None

    def nsa_join(self, address: GroupAddress) -> None:
        """Join the group that weights are broadcast in, behind rank 0, the sender."""
        from vllm.distributed import get_tensor_model_parallel_rank

        self._nsa_group = WeightGroup(address, 1 + get_tensor_model_parallel_rank(), self.device)

    def nsa_receive(self, infos: Sequence[TensorInfo]) -> str | None:
        """`nsa_load` of what the group's sender broadcasts."""
        return self.nsa_load(self._nsa_group.receive(infos))

    def nsa_end_load(self) -> str | None:
        """None, or which parameters did not come."""
        names = sorted(self._nsa_missing)
        self._nsa_known = {}
        if names:
            return f"no tensor came for {len(names)} of the model's parameters: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the sender may change its tensors from here on
        return None

    def nsa_checksum(self) -> int:
        """`weight_sync.checksum` of the whole model; every rank gives the same."""
        return checksum((parameter.name, whole(parameter)) for parameter in self.get_model().hf_parameters())

    def nsa_free_memory(self) -> int:
        """Free bytes of this rank's GPU."""
        return torch.cuda.mem_get_info()[0]

    def nsa_weight_bytes(self) -> int:
        """Bytes of this rank's parameters."""
        return sum(parameter.nbytes for parameter in self.get_model().parameters())

    def nsa_zero_cache(self) -> int:
        """Fill the cache with zeros (memory that comes back at wake-up holds anything, NaN too); returns its bytes."""
        zeroed = 0
        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            found = getattr(layer, "kv_cache", None)
            for cache in found if isinstance(found, list | tuple) else [found]:
                if cache is not None:
                    zeroed += cache.zero_().nbytes
        return zeroed

    def nsa_read_selection(self, request_id: str, num_tokens: int) -> torch.Tensor:
        """Block choices `[num_tokens, layers, Hkv, n]` of a request that finished in the step before (nsa.serving)."""
        return self.get_model().read_selection(self.model_runner, request_id, num_tokens)


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of the whole tensor of which `parameter` (nsa.serving's HfParameter) holds a part."""
    shape = list(parameter.view.shape)
    if parameter.dim is not None:
        shape[parameter.dim] = parameter.size
    return tuple(shape)


def own_part(parameter: Any, tensor: torch.Tensor) -> torch.Tensor | None:
    """The part of a whole tensor that `parameter` holds on this rank; None where the shapes do not fit."""
    if tuple(tensor.shape) != whole_shape(parameter):
        return None
    dim = parameter.dim
    return tensor if dim is None else tensor.narrow(dim, parameter.start, parameter.view.shape[dim])


def whole(parameter: Any) -> torch.Tensor:
    """The parameter itself, or the whole tensor where ranks hold parts of it: bits added up, so that −0 stays −0."""
    view, dim = parameter.view, parameter.dim
    if dim is None:
        return view
    from vllm.distributed import get_tp_group

    tensor = view.new_zeros(whole_shape(parameter))
    tensor.narrow(dim, parameter.start, view.shape[dim]).copy_(view)
    torch.distributed.all_reduce(tensor.view(-1).view(torch.uint8), group=get_tp_group().device_group)
    return tensor
