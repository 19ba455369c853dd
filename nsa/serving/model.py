"""The model for vLLM: the same layers as `nsa.layers`, with vLLM's parallel projections, paged attention and weight names of our checkpoints.

Precision follows the Hugging Face model: residual stream, norms, RoPE and gates in fp32, every projection in its weights'
dtype. Tensor parallel: heads (and what belongs to a head) are split over ranks; φ, which all heads share, is on each.

Shapes: T tokens of a step, E hidden size, Hq/Hkv heads of this rank, Dk/Dv head dims.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from vllm.compilation.decorators import support_torch_compile
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from nsa.attention import Phi
from nsa.layers import BranchGates, Compressor, RMSNorm, RotaryEmbedding, rotate
from nsa.serving.backend import NSACacheLayer
from nsa.serving.versions import request_pages
from nsa.serving.weights import HfParameter, hf_parameters, make_live, own_rows

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from nsa.config import NSAConfig

KEY_NAMES = {"separate": ("cmp_k_proj", "k_proj", "win_k_proj"), "shared": ("k_proj",)}
VALUE_NAMES = {"separate": ("cmp_v_proj", "v_proj", "win_v_proj"), "shared": ("v_proj",)}
GATE_ROWS = 16
"""The gates' logits take a multiple of so many columns of a layer's one product: each of its rows then begins at 16 bytes."""


def default_loader(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
    """Copy a whole tensor."""
    if parameter.shape != loaded.shape:
        raise ValueError(f"a parameter of shape {tuple(parameter.shape)} was given {tuple(loaded.shape)}")
    parameter.data.copy_(loaded)


def gates_in_product(config: NSAConfig) -> bool:
    """Whether a layer's one product gives the gates' logits too: a product of their own takes as long as a small kernel. Their bias
    stands alone, so the product must have none."""
    return config.gate != "fixed" and not config.attention_bias


def padded_rows(count: int) -> int:
    """`count` rounded up to GATE_ROWS."""
    return -(-count // GATE_ROWS) * GATE_ROWS


def padded_gates(weight: torch.Tensor, ranks: int) -> torch.Tensor:
    """The gates' weights `[3·Hq, E]` with zeros after each rank's rows, as the one product holds them."""
    rows = weight.shape[0] // ranks
    return nn.functional.pad(weight.unflatten(0, (ranks, rows)), (0, 0, 0, padded_rows(rows) - rows)).flatten(0, 1)


class ServedMLP(nn.Module):
    """SwiGLU, gate and up projection in one product."""

    def __init__(self, config: NSAConfig, dtype: torch.dtype, prefix: str) -> None:
        super().__init__()
        self.dtype = dtype
        sizes, bias = [config.intermediate_size] * 2, config.mlp_bias
        self.gate_up_proj = MergedColumnParallelLinear(config.hidden_size, sizes, bias=bias, return_bias=False, prefix=f"{prefix}.gate_up_proj")
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, bias=bias, return_bias=False, prefix=f"{prefix}.down_proj")
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x.to(self.dtype)).chunk(2, dim=-1)
        return self.down_proj(self.activation(gate) * up)


class GateBias(nn.Module):
    """The bias of gates whose logits come out of the layer's one product: `[3·Hq]` of this rank's heads."""

    def __init__(self, num_heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3 * num_heads, dtype=dtype), requires_grad=False)
        self.bias.weight_loader = load_own_rows  # type: ignore[attr-defined]


def load_own_rows(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
    """Copy this rank's rows of a tensor whose rows are split over the ranks."""
    rows = parameter.shape[0]
    default_loader(parameter, loaded[get_tensor_model_parallel_rank() * rows :][:rows])


class ServedAttention(nn.Module):
    """`nsa.layers.NSAAttention` with one product for queries, all K and V sets and (where it has no bias) the gates' logits, in this order."""

    def __init__(self, config: NSAConfig, dtype: torch.dtype, layer_index: int, prefix: str) -> None:
        super().__init__()
        assert config.num_key_value_heads and config.head_dim and config.value_head_dim
        ranks = get_tensor_model_parallel_world_size()
        self.config, self.dtype = config, dtype
        self.key_dim, self.value_dim = config.head_dim, config.value_head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads // ranks, config.num_key_value_heads // ranks
        key_size, value_size = config.num_key_value_heads * self.key_dim, config.num_key_value_heads * self.value_dim
        num_sets, hidden = len(KEY_NAMES[config.kv]), config.hidden_size
        sizes = [config.num_attention_heads * self.key_dim, *[key_size] * num_sets, *[value_size] * num_sets]
        self.widths = [sizes[0] // ranks, num_sets * key_size // ranks, num_sets * value_size // ranks]
        self.one_product = gates_in_product(config)
        if self.one_product:
            self.widths.append(padded_rows(3 * self.num_heads))
            sizes.append(self.widths[-1] * ranks)
            self.branch_gate: Any = GateBias(self.num_heads, dtype)
        self.qkv_proj = MergedColumnParallelLinear(hidden, sizes, bias=config.attention_bias, return_bias=False, prefix=f"{prefix}.qkv_proj")
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.value_dim, hidden, bias=config.attention_output_bias, return_bias=False, prefix=f"{prefix}.o_proj"
        )
        if config.qk_norm:
            self.q_norm = RMSNorm(self.key_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.key_dim, config.rms_norm_eps)
        if config.compressor == "mlp":
            self.phi_k, self.phi_v = Compressor(config, self.key_dim), Compressor(config, self.value_dim)
        if config.gate != "fixed" and not self.one_product:
            self.branch_gate = ColumnParallelLinear(
                hidden, 3 * config.num_attention_heads, bias=True, return_bias=False, prefix=f"{prefix}.branch_gate"
            )
        if config.gate == "blend":
            self.branch_mix = nn.Parameter(torch.zeros(self.num_heads, 3), requires_grad=False)
            self.branch_mix.weight_loader = load_own_rows  # type: ignore[attr-defined]
        self.gates = BranchGates(config)
        self.gates.num_heads = self.num_heads
        name = f"{prefix}.attention"
        self.attention = NSACacheLayer(config, name, first=layer_index == 0, num_kv_heads=self.num_kv_heads, dtype=dtype, phi=self.phi)

    def gate_rows(self) -> torch.Tensor:
        """The rows of the one product that are the gates' weights, `[3·Hq, E]`."""
        return self.qkv_proj.weight.data[sum(self.widths[:-1]) :][: 3 * self.num_heads]

    def _gate_logits(self, x: torch.Tensor, product: list[torch.Tensor]) -> torch.Tensor | None:
        """`[T, 3·Hq]` in the weights' dtype, rounded once after the bias as a linear layer does."""
        if self.config.gate == "fixed":
            return None
        if not self.one_product:
            return self.branch_gate(x)
        logits = product[0][:, : 3 * self.num_heads]
        return (logits.float() + self.branch_gate.bias.float()).to(self.dtype)

    def phi(self) -> Phi | None:
        """The compressor's tensors, None for the mean."""
        return Phi(self.phi_k.tensors(), self.phi_v.tensors()) if self.config.compressor == "mlp" else None

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x fp32 `[T, E]` (normed); cos, sin `[T, 1, Dk]` → `[T, E]`."""
        x = x.to(self.dtype)
        queries, keys, values, *rest = self.qkv_proj(x).split(self.widths, dim=-1)
        queries, keys = queries.unflatten(-1, (-1, self.key_dim)), keys.unflatten(-1, (-1, self.key_dim))
        if self.config.qk_norm:
            queries, keys = self.q_norm(queries).to(self.dtype), self.k_norm(keys).to(self.dtype)
        queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        gates = self.gates(self._gate_logits(x, rest), self.branch_mix if self.config.gate == "blend" else None, x.shape[0], x.device)
        out = self.attention(queries, keys, values.unflatten(-1, (-1, self.value_dim)), gates)
        return self.o_proj(out.flatten(1))


class ServedLayer(nn.Module):
    """Pre-norm attention and MLP around an fp32 residual stream."""

    def __init__(self, config: NSAConfig, dtype: torch.dtype, layer_index: int, prefix: str) -> None:
        super().__init__()
        self.self_attn = ServedAttention(config, dtype, layer_index, f"{prefix}.self_attn")
        self.mlp = ServedMLP(config, dtype, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0})
class ServedModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: NSAConfig = vllm_config.model_config.hf_config
        self.dtype = vllm_config.model_config.dtype
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ServedLayer(config, self.dtype, i, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        device = self.norm.weight.device
        with torch.device("cpu"):  # frequencies as the learner has them: powers differ by a bit between devices
            self.rotary = RotaryEmbedding(config)
        self.rotary.to(device)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `[T, E]` in the weights' dtype."""
        hidden = (self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds).float()
        cos, sin = self.rotary(positions)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        return self.norm(hidden).to(self.dtype)


class NSAForCausalLM(nn.Module):
    """What vLLM loads for the architecture of that name."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: NSAConfig = vllm_config.model_config.hf_config
        self.config = config
        self.model = ServedModel(vllm_config=vllm_config, prefix=f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=f"{prefix}.lm_head" if prefix else "lm_head")
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.merged = {"qkv_proj": ("q_proj", *KEY_NAMES[config.kv], *VALUE_NAMES[config.kv]), "gate_up_proj": ("gate_proj", "up_proj")}
        self.one_product = gates_in_product(config)
        self.shards = {name: (layer, index) for layer, names in self.merged.items() for index, name in enumerate(names)}
        make_live(self)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take tensors under the names of our checkpoints, any number of them at a time.

        Returns:
            the names of this model's parameters that were set.
        Raises:
            ValueError: a name that the model does not have, or another shape.
        """
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            target, shard = name, None
            *stem, component, leaf = name.split(".")
            if component in self.shards:
                layer, shard = self.shards[component]
                target = ".".join([*stem, layer, leaf])
            elif (component, leaf) == ("branch_gate", "weight") and self.one_product:
                shard, target = len(self.merged["qkv_proj"]), ".".join([*stem, "qkv_proj", leaf])
                tensor = padded_gates(tensor, get_tensor_model_parallel_world_size())
            if target not in parameters:
                raise ValueError(f"the checkpoint has a tensor {name!r} that an NSA model of this configuration does not have")
            parameter = parameters[target]
            loader: Any = getattr(parameter, "weight_loader", default_loader)
            loader(*((parameter, tensor) if shard is None else (parameter, tensor, shard)))
            loaded.add(target)
        return loaded

    def hf_parameters(self) -> Iterator[HfParameter]:
        """Every tensor of the checkpoint once, as a view of the live parameters, to be written in place."""
        yield from hf_parameters(self, self.merged, self.config.tie_word_embeddings)
        for name, module in self.named_modules():
            if isinstance(module, ServedAttention) and module.one_product:
                yield own_rows(f"{name}.branch_gate.weight", module.gate_rows())

    def read_selection(self, runner: Any, request_id: str, num_tokens: int) -> torch.Tensor:
        """Block choices of a request's first tokens, cached ones included.

        They lie beside the request's pages, and vLLM forgets whose pages they are when the step after the request's last
        one begins. So: ask between the two, from the thread that steps the engine, without asynchronous scheduling.

        Args:
            runner: the worker's model runner. request_id: vLLM's internal one (what `add_request` returns).
        Returns:
            `[num_tokens, layers, Hkv, n]` on the CPU, Hkv of this rank, in the format of `nsa_attention`.
        Raises:
            ValueError: the engine does not record (`additional_config={"nsa_record_selection": True}`), or no such request.
        """
        layers: Any = self.model.layers
        caches = [layer.self_attn.attention.selected for layer in layers]
        if caches[0] is None:
            raise ValueError('start vLLM with additional_config={"nsa_record_selection": True} to read selections')
        tables = [cache.pages() for cache in caches]
        pages = request_pages(runner, request_id, -(-num_tokens // tables[0].shape[1])).to(tables[0].device)
        return torch.stack([table[pages].flatten(0, 1)[:num_tokens] for table in tables], dim=1).cpu()
