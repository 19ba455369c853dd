"""The model's configuration, and the part of it that the attention functions need.

`NSAConfig` is a Hugging Face config (`model_type: nsa_grpo`). `SparsityConfig` is the small frozen record of the
paper's l, d, l', n, w and of the choices the paper leaves open; kernels, cache and oracle take that and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from transformers import PreTrainedConfig

Compressor = Literal["mean", "mlp"]
KVMode = Literal["separate", "shared"]
GateForm = Literal["sigmoid", "blend", "fixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsityConfig:
    """The paper's l, d, l', n, w (NSA §4.1; the defaults are its settings) and how blocks are forced and pooled.

    Raises:
        ValueError: a value outside what Eq. 7-12 allow (d divides l and l', l <= l', n holds the forced blocks).
    """

    compress_block_size: int = 32
    """l: tokens pooled into one compressed token."""
    compress_stride: int = 16
    """d: distance between the starts of neighbouring compressed tokens."""
    select_block_size: int = 64
    """l': tokens of one selectable block."""
    num_selected_blocks: int = 16
    """n: blocks each query attends to, forced ones included."""
    window_size: int = 512
    """w: the last w tokens, the query's own included."""
    num_init_blocks: int = 1
    """Forced blocks at the sequence's start."""
    num_local_blocks: int = 2
    """Forced blocks at the query: its own and those just before."""
    compressor: Compressor = "mlp"
    """φ: `mean` pools; `mlp` adds a learnt residual MLP over the block with intra-block positions."""

    def __post_init__(self) -> None:
        l, d, block, n = self.compress_block_size, self.compress_stride, self.select_block_size, self.num_selected_blocks
        for name in ("compress_block_size", "compress_stride", "select_block_size", "num_selected_blocks", "window_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if l % d or block % d:
            raise ValueError(f"compress_stride must divide compress_block_size and select_block_size, got d={d}, l={l}, l'={block}")
        if l > block:
            raise ValueError(f"compress_block_size must be <= select_block_size (Eq. 9), got l={l}, l'={block}")
        if self.num_init_blocks < 0 or self.num_local_blocks < 1:
            raise ValueError(f"num_init_blocks must be >= 0 and num_local_blocks >= 1, got {self.num_init_blocks} and {self.num_local_blocks}")
        if n < self.num_init_blocks + self.num_local_blocks:
            raise ValueError(f"num_selected_blocks must hold the {self.num_init_blocks} initial and {self.num_local_blocks} local blocks, got {n}")
        if self.compressor not in ("mean", "mlp"):
            raise ValueError(f"compressor must be 'mean' or 'mlp', got {self.compressor!r}")

    @property
    def dense_length(self) -> int:
        """n·l': up to this many tokens the selection branch is full attention."""
        return self.num_selected_blocks * self.select_block_size


class NSAConfig(PreTrainedConfig):
    """A Llama- or Qwen2/3-shaped decoder with native sparse attention in every layer."""

    model_type = "nsa_grpo"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 22
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    """d_v where it differs from head_dim."""
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: Any = None
    attention_bias: bool = False
    """Bias on the q, k, v projections (Qwen2, and Llama where it has one)."""
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query's and key's head dimension before RoPE (Qwen3)."""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    kv: str = "separate"
    """`separate`: K and V of their own for each branch, as in the paper; `shared`: one set for all three."""
    gate: str = "sigmoid"
    """`sigmoid`: the paper's; `blend`: exactly (0, 1, 0) at initialisation and learning from there (conversion);
    `fixed`: the constants of `fixed_gates` (ablations)."""
    fixed_gates: list[float] | None = None
    compressor_hidden_size: int | None = None
    """Width of φ's MLP; None = head_dim."""

    compress_block_size: int = 32
    compress_stride: int = 16
    select_block_size: int = 64
    num_selected_blocks: int = 16
    window_size: int = 512
    num_init_blocks: int = 1
    num_local_blocks: int = 2
    compressor: str = "mlp"
    attention_backend: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.value_head_dim is None:
            self.value_head_dim = self.head_dim
        if self.compressor_hidden_size is None:
            self.compressor_hidden_size = self.head_dim
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, got {self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if self.kv not in ("separate", "shared"):
            raise ValueError(f"kv must be 'separate' or 'shared', got {self.kv!r}")
        if self.gate not in ("sigmoid", "blend", "fixed"):
            raise ValueError(f"gate must be 'sigmoid', 'blend' or 'fixed', got {self.gate!r}")
        if (self.gate == "fixed") != (self.fixed_gates is not None):
            raise ValueError(f"fixed_gates goes with gate='fixed' and only with it, got gate={self.gate!r}, fixed_gates={self.fixed_gates}")
        if self.fixed_gates is not None and (len(self.fixed_gates) != 3 or not all(0 <= g <= 1 for g in self.fixed_gates)):
            raise ValueError(f"fixed_gates must be three numbers in [0, 1] (compression, selection, window), got {self.fixed_gates}")
        _ = self.sparsity

    @property
    def sparsity(self) -> SparsityConfig:
        """The attention functions' part of this config."""
        return SparsityConfig(
            compress_block_size=self.compress_block_size,
            compress_stride=self.compress_stride,
            select_block_size=self.select_block_size,
            num_selected_blocks=self.num_selected_blocks,
            window_size=self.window_size,
            num_init_blocks=self.num_init_blocks,
            num_local_blocks=self.num_local_blocks,
            compressor=self.compressor,  # type: ignore[arg-type]
        )

    @property
    def page_size(self) -> int:
        """Tokens of one cache page: the smallest multiple of l' that is at least 64 tokens (l' is a multiple of d)."""
        return self.select_block_size * max(1, -(-64 // self.select_block_size))
