"""NSA inside vLLM: the caches' backends, the metadata of a step, and the operator that every layer calls.

A layer keeps two caches in one KV group, hence under one block table: raw K and V, and compressed tokens, d times fewer.
A compressed token is written when its last raw token is, into that token's page, so prefix caching, chunked prefill and
preemption need no thought: a page depends only on the tokens up to its end. All new tokens of a step are written before
any is attended to, because vLLM lets a request read pages that another one fills in the same step.

Decodes come first in a batch. A step of decodes alone takes everything from the device and has shapes that depend on
the batch's alone, so it can be a CUDA graph; a step with prefills uses the lengths on the host.

Leaves out the model (model.py) and what differs between vLLM versions (versions.py).
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata

from nsa.attention import BranchKV, KeyValue, LayerCache, nsa_attention, nsa_decode, plan_batch, resolve_backend
from nsa.blocks import selection_dtype
from nsa.cache import CacheWrite, plan_write, read_tokens, write_layer
from nsa.packing import Packing
from nsa.serving.plugin import ATTENTION_OP
from nsa.serving.versions import as_pages, raw_spec, side_spec
from nsa.serving.warmup import warm_up

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from nsa.attention import Phi
    from nsa.config import NSAConfig, SparsityConfig
    from nsa.kernels.tiles import KernelPlan

GATHERED_KEYS = 2**18
"""Cached tokens that one attention call of a prefill step copies out of the pages, at least one sequence's."""
DECODE_TOKENS = 512
"""Tokens of one decode call of a step with prefills; its scratch memory grows with them."""
TOGETHER = 16
"""Neighbouring tokens of a sequence that such a call takes as one: they read the compressed tokens together."""
LONG_CONTEXT = 512
"""New tokens are attended to by decode calls where the sequence is at least so many times as long: a call costs about 2 µs a token, and
copying about 2 ns a cached one (H100, 1b shape)."""
RECORD_SELECTION = "nsa_record_selection"
"""Key of vLLM's `additional_config`: keep every token's block choices beside its page."""


@dataclass(frozen=True, slots=True)
class DecodePart:
    """Tokens of a step that are attended to as the last m of a sequence: B·m rows of the step's tokens (m neighbours after one another),
    block table `[B, P]` and lengths `[B]`, 0 for padding."""

    rows: slice | torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """Neighbouring sequences of a step that are prefilled in one call: their rows among the step's tokens, the plan, whether the new
    tokens are the whole sequences, the block table `[N, P]`, and, for the torch backend, the raw slots of all keys that are cached."""

    rows: slice
    plan: Packing | KernelPlan
    whole: bool
    block_table: torch.Tensor
    key_slots: torch.Tensor | None


@dataclass(slots=True)
class StepMetadata(AttentionMetadata):
    """One step's batch, shared by all layers. Without `rows_T` each row has one new token (`seq_lens` 0: padding); `write` is
    made on the device by the first layer of each pass (inside the CUDA graph, where there is one)."""

    num_tokens: int
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    parts: tuple[DecodePart | PrefillPart, ...]
    rows_T: torch.Tensor | None = None
    positions_T: torch.Tensor | None = None
    complete: torch.Tensor | None = None
    """Indices of the new tokens that complete a compressed token, where the host knows them."""
    write: CacheWrite | None = field(default=None)

    def plan_write(self, page_size: int, config: SparsityConfig) -> CacheWrite:
        """Where this step's tokens go."""
        if self.rows_T is None or self.positions_T is None:
            rows, positions = torch.arange(self.num_tokens, device=self.seq_lens.device), self.seq_lens.long() - 1
            return plan_write(self.block_table, rows, positions, page_size=page_size, config=config, dynamic=False)
        plan = plan_write(self.block_table, self.rows_T, self.positions_T, page_size=page_size, config=config, dynamic=False)
        return CacheWrite(plan.raw_slots, plan.cmp_slots[self.complete], plan.cmp_sources[self.complete])


class NSAMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Turns vLLM's description of a batch into `StepMetadata`."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        config: NSAConfig = vllm_config.model_config.hf_config
        self.sparsity, self.backend_name = config.sparsity, config.attention_backend
        self.on_kernels = resolve_backend(self.backend_name, device) == "triton"
        self.num_heads = config.num_attention_heads // vllm_config.parallel_config.tensor_parallel_size
        self.page_size = vllm_config.cache_config.block_size

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> StepMetadata:
        common = common_attn_metadata
        columns = common.block_table_tensor.shape[1]
        if not self.on_kernels:  # they stop where a sequence ends, and of each width there would be others to compile
            columns = min(columns, -(-common.max_seq_len // self.page_size))
        if common.max_query_len <= 1:
            table, lengths = common.block_table_tensor[: common.num_reqs, :columns], common.seq_lens[: common.num_reqs]
            part = DecodePart(slice(0, common.num_reqs), table, lengths)
            return StepMetadata(num_tokens=common.num_reqs, block_table=table, seq_lens=lengths, parts=(part,))
        ends = common.query_start_loc_cpu.numpy().astype(np.int64)
        counts = np.diff(ends)
        num_rows = int((counts > 0).sum())  # padded rows, at the end, have no tokens
        ends, counts, lengths = ends[: num_rows + 1], counts[:num_rows], self._host_lengths(common)[:num_rows]
        rows = np.repeat(np.arange(num_rows), counts)
        positions = np.arange(len(rows)) + (lengths - ends[1:])[rows]
        l, d = self.sparsity.compress_block_size, self.sparsity.compress_stride
        (complete,) = ((positions >= l - 1) & ((positions - (l - 1)) % d == 0)).nonzero()
        step = StepMetadata(
            num_tokens=len(rows),
            block_table=common.block_table_tensor[:num_rows, :columns],
            seq_lens=common.seq_lens[:num_rows],
            parts=(),
            rows_T=self._to_device(rows),
            positions_T=self._to_device(positions),
            complete=self._to_device(complete),
        )
        step.parts = tuple(self._parts(step, ends, counts, lengths))
        return step

    @staticmethod
    def _host_lengths(common: CommonAttentionMetadata) -> np.ndarray:
        """int64 `[B]` on the host: exact, as there is no speculative decoding."""
        lengths = common.seq_lens_cpu_upper_bound
        return (common.seq_lens.cpu() if lengths is None else lengths).numpy().astype(np.int64)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _parts(self, step: StepMetadata, ends: np.ndarray, counts: np.ndarray, lengths: np.ndarray) -> Iterator[DecodePart | PrefillPart]:
        """The step's sequences in calls of one way each: single tokens, few tokens after many, and everything else.

        The first two cost n·l' + w + s/d tokens each and nothing more. They are for the few new tokens after a long cached prompt
        too, where copying all of it would cost more."""
        few = (counts <= self.page_size) & (lengths >= LONG_CONTEXT * counts) & (lengths > counts)
        ways = np.where(counts == 1, 0, np.where(few, 1, 2)).tolist()
        keys = lengths.tolist()
        first = 0
        while first < len(keys):
            last, total = first + 1, keys[first]
            while last < len(keys) and ways[last] == ways[first] and (ways[first] != 2 or total + keys[last] <= GATHERED_KEYS):
                total += keys[last]
                last += 1
            if ways[first] == 0:
                yield DecodePart(slice(int(ends[first]), int(ends[last])), step.block_table[first:last], step.seq_lens[first:last])
            elif ways[first] == 1:
                yield from self._few_parts(step, ends[first:last], counts[first:last])
            else:
                yield self._prefill_part(step, first, last, ends, lengths)
            first = last

    def _few_parts(self, step: StepMetadata, starts: np.ndarray, counts: np.ndarray) -> Iterator[DecodePart]:
        """The last TOGETHER · k tokens of each sequence by TOGETHER, those before them one by one."""
        assert step.rows_T is not None and step.positions_T is not None
        for together, skipped, taken in ((1, 0 * counts, counts % TOGETHER), (TOGETHER, counts % TOGETHER, counts - counts % TOGETHER)):
            inner = np.arange(taken.sum()) - np.repeat(taken.cumsum() - taken, taken)
            rows = self._to_device(np.repeat(starts + skipped, taken) + inner)
            size = max(1, DECODE_TOKENS // together) * together
            for begin in range(0, len(rows), size):
                part = rows[begin : begin + size]
                last = part[together - 1 :: together]
                yield DecodePart(part, step.block_table[step.rows_T[last]], (step.positions_T[last] + 1).int())

    def _prefill_part(self, step: StepMetadata, first: int, last: int, ends: np.ndarray, lengths: np.ndarray) -> PrefillPart:
        lengths, query_ends = lengths[first:last], ends[first : last + 1] - ends[first]
        key_ends = np.concatenate([[0], lengths.cumsum()])
        whole = bool((query_ends == key_ends).all())
        plan = plan_batch(
            torch.from_numpy(query_ends), torch.from_numpy(key_ends), config=self.sparsity, num_heads=self.num_heads, device=self.device,
            backend=self.backend_name,
        )  # fmt: skip
        table, slots = step.block_table[first:last], None
        if not whole and not self.on_kernels:
            position = np.arange(key_ends[-1]) - np.repeat(key_ends[:-1], lengths)
            sequence, page = np.repeat(np.arange(len(lengths)), lengths), position // self.page_size
            slots = table[self._to_device(sequence), self._to_device(page)].long() * self.page_size + self._to_device(position % self.page_size)
        return PrefillPart(slice(int(ends[first]), int(ends[last])), plan, whole, table, slots)


class SideMetadataBuilder(AttentionMetadataBuilder[AttentionMetadata]):
    """Side caches have no metadata of their own: the layer's attention uses the raw cache's."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> AttentionMetadata:
        return AttentionMetadata()


class NSABackend(AttentionBackend):
    """The raw cache."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "NSA"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("NSA's layers call their own operator")

    @staticmethod
    def get_builder_cls() -> type[NSAMetadataBuilder]:
        return NSAMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto") -> tuple[int, ...]:
        return (num_blocks, 2, block_size, num_kv_heads, head_size)


class SideBackend(NSABackend):
    """A cache of one vector a head: compressed tokens."""

    @staticmethod
    def get_name() -> str:
        return "NSA_SIDE"

    @staticmethod
    def get_builder_cls() -> Any:
        return SideMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto") -> tuple[int, ...]:
        return (num_blocks, block_size, num_kv_heads, head_size)


def announce(layer: nn.Module, name: str) -> None:
    """Make a layer with a cache known to vLLM under its name."""
    context = get_current_vllm_config().compilation_config.static_forward_context
    if name in context:
        raise ValueError(f"two layers are called {name}")
    context[name] = layer


class SideCache(nn.Module, AttentionLayerBase):
    """Pages `[pages, page/stride, num_kv_heads, dim]` beside a layer's raw ones."""

    def __init__(self, name: str, *, stride: int, num_kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.stride, self.num_kv_heads, self.dim, self.dtype = stride, num_kv_heads, dim, dtype
        self.page_size: int = get_current_vllm_config().cache_config.block_size
        self.kv_cache = torch.tensor([])
        announce(self, name)

    def pages(self) -> torch.Tensor:
        """The cache, `[pages, page/stride, num_kv_heads, dim]`."""
        return as_pages(self.kv_cache, self.page_size // self.stride, self.num_kv_heads, self.dim)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return side_spec(page_size=self.page_size, stride=self.stride, num_kv_heads=self.num_kv_heads, dim=self.dim, dtype=self.dtype)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return SideBackend


class NSACacheLayer(nn.Module, AttentionLayerBase):
    """One layer's caches and its attention; φ's tensors stay with the model.

    Args:
        name: the layer's, with its index in it. first: whether it is the first of the model.
        num_kv_heads: of this tensor-parallel rank. phi: gives the compressor's tensors as they are now.
    """

    def __init__(self, config: NSAConfig, name: str, *, first: bool, num_kv_heads: int, dtype: torch.dtype, phi: Callable[[], Phi | None]) -> None:
        super().__init__()
        assert config.head_dim and config.value_head_dim
        self.name, self.first, self.num_kv_heads, self.dtype = name, first, num_kv_heads, dtype
        self.sparsity, self.backend_name = config.sparsity, config.attention_backend
        self.key_dim, self.value_dim = config.head_dim, config.value_head_dim
        self.num_sets = 3 if config.kv == "separate" else 1
        self.num_rows = self.num_sets * num_kv_heads
        self.phi = phi
        self.kv_cache = torch.tensor([])
        serving = get_current_vllm_config()
        self.page_size: int = serving.cache_config.block_size
        announce(self, name)
        dim = self.key_dim + self.value_dim
        self.max_tokens, self.max_length = serving.scheduler_config.max_num_batched_tokens, serving.model_config.max_model_len
        self.measured = not first
        self.compressed = SideCache(f"{name}.compressed", stride=self.sparsity.compress_stride, num_kv_heads=num_kv_heads, dim=dim, dtype=dtype)
        self.selected = None
        if serving.additional_config.get(RECORD_SELECTION):
            kind, num = selection_dtype(serving.model_config.max_model_len, self.sparsity), self.sparsity.num_selected_blocks
            self.selected = SideCache(f"{name}.selected", stride=1, num_kv_heads=num_kv_heads, dim=num, dtype=kind)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return raw_spec(page_size=self.page_size, num_kv_heads=self.num_rows, dim=max(self.key_dim, self.value_dim), dtype=self.dtype)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return NSABackend

    def cache(self) -> LayerCache:
        """The pages as `nsa.attention` takes them."""
        raw = as_pages(self.kv_cache, 2, self.page_size, self.num_rows, max(self.key_dim, self.value_dim))
        return LayerCache(raw, self.compressed.pages(), self.key_dim, self.value_dim, self.num_sets)

    def forward(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Attention of this step's tokens: q `[T, Hq, Dk]` and keys `[T, sets·Hkv, Dk]` after RoPE, values
        `[T, sets·Hkv, Dv]`, gates `[T, Hq, 3]` → `[T, Hq, Dv]`."""
        out = q.new_empty(q.shape[0], q.shape[1], self.value_dim)
        torch.ops.vllm.nsa_sparse_attention(q, keys, values, gates, out, self.name)
        return out

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, gates: torch.Tensor, out: torch.Tensor, step: StepMetadata) -> None:
        """What the operator does, with this step's metadata. Rows of `out` that no request has are left as they are."""
        cache, phi, on_kernels = self.cache(), self.phi(), resolve_backend(self.backend_name, q.device) == "triton"
        keys, values = keys[: step.num_tokens], values[: step.num_tokens]
        if self.first and (self.selected is not None or not on_kernels):
            step.write = step.plan_write(cache.page_size, self.sparsity)
        key_sets, value_sets = keys.split(self.num_kv_heads, dim=1), values.split(self.num_kv_heads, dim=1)
        if on_kernels:
            from nsa.kernels.page_write import write_pages

            positions = step.seq_lens if step.positions_T is None else step.positions_T
            write_pages(
                cache, keys, values, step.block_table, positions, rows=step.rows_T, complete=step.complete, phi=phi, config=self.sparsity
            )  # fmt: skip
        else:
            assert step.write is not None
            write_layer(cache, key_sets, value_sets, step.write, phi)
        common: dict[str, Any] = {"phi": phi, "config": self.sparsity, "return_selection": self.selected is not None}
        for part in step.parts:
            if isinstance(part, DecodePart):
                shape = (len(part.seq_lens), -1)
                queries, gate = q[part.rows].unflatten(0, shape), gates[part.rows].unflatten(0, shape)
                to = out[part.rows].unflatten(0, shape) if isinstance(part.rows, slice) else None  # indexed rows would be a copy
                result = nsa_decode(queries, cache, part.block_table, part.seq_lens, gate, out=to, backend=self.backend_name, **common)
            else:
                kv, compressed = self._keys_of(part, key_sets, value_sets, cache, on_kernels=on_kernels)
                gate = gates[part.rows]
                if gate.data_ptr() % 16:  # 3·Hq numbers a row: Triton compiles a kernel anew for a pointer that is not aligned
                    gate = gate.clone()
                result = nsa_attention(q[part.rows], kv, gate, cu_seqlens=part.plan, compressed=compressed, **common)
            self._store(out, part.rows, result, step)

    def _keys_of(
        self, part: PrefillPart, key_sets: Sequence[torch.Tensor], value_sets: Sequence[torch.Tensor], cache: LayerCache, *, on_kernels: bool
    ) -> tuple[BranchKV, KeyValue | None]:
        """K and V of a prefill's sequences, and on the kernels also their compressed tokens, which the cache holds by now."""
        compressed = None
        if part.whole:
            key_sets, value_sets = ([x[part.rows] for x in sets] for sets in (key_sets, value_sets))
        if on_kernels:
            from nsa.kernels.page_read import read_pages

            assert not isinstance(part.plan, Packing)
            read, compressed = read_pages(cache, part.block_table, part.plan, raw=not part.whole, config=self.sparsity)
            if not part.whole:
                key_sets, value_sets = (x.split(self.num_kv_heads, dim=1) for x in read)
        elif part.key_slots is not None:
            key_sets, value_sets = read_tokens(cache, part.key_slots)
        sets = list(zip(key_sets, value_sets, strict=True))
        return BranchKV(*sets) if len(sets) == 3 else BranchKV(sets[0], sets[0], sets[0]), compressed

    def measure(self, q: torch.Tensor) -> None:
        """Before the caches exist, on a GPU: compile what prefills need, and take the memory that one of cached sequences takes."""
        if self.measured or resolve_backend(self.backend_name, q.device) != "triton" or q.device.type != "cuda":
            return
        self.measured = True
        warm_up(
            self.sparsity, self.phi(), num_heads=q.shape[1], num_kv_heads=self.num_kv_heads, num_sets=self.num_sets, key_dim=self.key_dim,
            value_dim=self.value_dim, page_size=self.page_size, dtype=self.dtype, device=q.device, num_tokens=self.max_tokens,
            max_length=self.max_length, record=self.selected is not None,
        )  # fmt: skip
        gathered = (max(GATHERED_KEYS, self.max_length), self.num_rows, 2 * max(self.key_dim, self.value_dim))
        torch.empty(*gathered, dtype=self.dtype, device=q.device)

    def _store(
        self, out: torch.Tensor, rows: slice | torch.Tensor, result: torch.Tensor | tuple[torch.Tensor, torch.Tensor], step: StepMetadata
    ) -> None:
        """Keep attention's result for some rows of the step, and their block choices where they are recorded."""
        attended, chosen = result if isinstance(result, tuple) else (result, None)
        if attended.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
            out[rows] = attended.reshape(-1, *out.shape[1:])
        if self.selected is not None and chosen is not None and step.write is not None:
            slots = self.selected.pages().flatten(0, 1)
            slots[step.write.raw_slots[rows]] = chosen.reshape(-1, *slots.shape[1:]).to(slots.dtype)


def nsa_sparse_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, gates: torch.Tensor, out: torch.Tensor, layer_name: str) -> None:
    """The operator: finds its layer and the step's metadata. Without metadata (vLLM measures memory) it writes zeros."""
    context = get_forward_context()
    layer = context.no_compile_layers[layer_name]
    if not isinstance(context.attn_metadata, dict):
        layer.measure(q)
        out.zero_()
        return
    layer.attend(q, keys, values, gates, out, context.attn_metadata[layer_name])


def _nothing(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, gates: torch.Tensor, out: torch.Tensor, layer_name: str) -> None:
    return None


direct_register_custom_op(op_name=ATTENTION_OP, op_func=nsa_sparse_attention, mutates_args=["out"], fake_impl=_nothing)
