"""How much memory a configuration needs, counted from shapes before anything is loaded; `doctor` and `config check` show it.

Weights, optimizer and cache are exact counts; activations are an estimate, and say so. Leaves out allocator fragmentation
and the processes themselves (about 0.5 GiB each).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from grpo.config import RunConfig
from grpo.placement import sleeps
from nsa.config import NSAConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ACTIVATIONS_PER_LAYER = 24
"""Values kept for the backward pass per token and layer, in units of hidden_size, without checkpointing (a rough figure:
the dense block's 17 of arXiv 2205.05198 §4.1, and the further branches of NSA)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of the parts of one run, learner and sampler together."""

    num_parameters: int
    learner_weights: int
    """fp32 masters, and the copies in the pass's dtype where that differs."""
    optimizer: int
    """Gradients and AdamW's two moments, fp32."""
    reference: int
    sampler_weights: int
    cache: int
    cache_tokens: int
    logits: int
    """Three fp32 copies of one chunk's logits."""
    activations: int
    """Estimate, for one micro-batch."""
    sleeps: bool
    """The sampler gives its memory up while the learner works."""

    @property
    def total(self) -> int:
        """What is needed at one time."""
        sampler, learner = self.sampler_weights + self.cache, self.logits + self.activations
        return self.learner_weights + self.optimizer + self.reference + (max(sampler, learner) if self.sleeps else sampler + learner)

    def lines(self) -> list[tuple[str, str]]:
        """(what, size) pairs for a terminal."""
        return [
            ("parameters", f"{self.num_parameters / 1e6:.2f}M"),
            ("learner weights", size(self.learner_weights)),
            ("optimizer and gradients", size(self.optimizer)),
            ("reference", size(self.reference) if self.reference else "none (KL is off)"),
            ("sampler weights", size(self.sampler_weights)),
            ("cache", f"{size(self.cache)} for {self.cache_tokens} tokens"),
            ("logits", size(self.logits)),
            ("activations (estimate)", size(self.activations)),
            ("at one time, as the sampler sleeps" if self.sleeps else "together", size(self.total)),
        ]


def size(count: float) -> str:
    """1536 → "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def read_model_config(path: str) -> NSAConfig:
    """The checkpoint's config, nothing else of it.

    Raises:
        FileNotFoundError: neither a folder nor a model that the hub (or its cache) gives.
        ValueError: another architecture, or a config that cannot be used.
    """
    from transformers import AutoConfig

    import nsa.model  # noqa: F401 (registers model_type nsa_grpo)

    folder = Path(path).expanduser()
    if folder.exists() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model.path: {path} is not a checkpoint: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(str(folder) if folder.exists() else path)
    except OSError as error:
        raise FileNotFoundError(f"model.path: no checkpoint at {path} (neither a folder here nor a hub model that can be reached)") from error
    if not isinstance(config, NSAConfig):
        raise ValueError(
            f"model.path: {path} is a {config.model_type} model, not nsa_grpo; make an NSA model of it with `nsa-grpo convert {path} FOLDER`"
        )
    return config


def count_parameters(config: NSAConfig) -> int:
    """Number of weights, by building the model without memory; tied ones count once."""
    import torch

    from nsa.model import NSAForCausalLM

    with torch.device("meta"):
        model = NSAForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


def cache_bytes_per_token(config: NSAConfig, dtype: str) -> float:
    """Raw K/V of every branch's set and the compressed tokens, all layers."""
    heads, key, value = config.num_key_value_heads or 0, config.head_dim or 0, config.value_head_dim or 0
    raw = (3 if config.kv == "separate" else 1) * heads * 2 * max(key, value)
    return config.num_hidden_layers * DTYPE_BYTES[dtype] * (raw + heads * (key + value) / config.compress_stride)


def plan_memory(config: RunConfig, model: NSAConfig, *, prompt_tokens: int) -> MemoryPlan:
    """The plan of a run whose longest prompt has `prompt_tokens` tokens."""
    parameters = count_parameters(model)
    dtype = config.model.dtype
    width = DTYPE_BYTES[dtype]
    rows = min(config.rollout.max_sequences, config.rollout.prompts_per_step * config.rollout.group_size)
    pages = -(-(prompt_tokens + config.rollout.max_tokens) // model.page_size)
    tokens = config.rollout.max_cache_tokens or rows * pages * model.page_size
    kept = 1 if config.model.gradient_checkpointing else _ACTIVATIONS_PER_LAYER
    micro = max(config.optimizer.micro_batch_tokens, prompt_tokens + config.rollout.max_tokens)
    return MemoryPlan(
        num_parameters=parameters,
        learner_weights=parameters * (4 if width == 4 else 4 + width),
        optimizer=parameters * 12,
        reference=parameters * 4 if config.algorithm.kl_coefficient > 0 else 0,
        sampler_weights=parameters * width,
        cache=int(tokens * cache_bytes_per_token(model, dtype)),
        cache_tokens=tokens,
        logits=3 * 4 * min(config.optimizer.logprob_chunk_tokens, micro) * model.vocab_size,
        activations=micro * model.num_hidden_layers * model.hidden_size * kept * width,
        sleeps=sleeps(config),
    )
