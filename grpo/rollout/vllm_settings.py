"""What vLLM is started with, worked out from a run's configuration before vLLM is imported.

Leaves out starting it (vllm_driver.py) and using it (vllm_engine.py).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

from grpo.config import RunConfig
from grpo.memory_plan import cache_bytes_per_token, plan_memory, read_model_config
from grpo.placement import shares_gpu, sleeps
from nsa.config import NSAConfig

_GPU_MARGIN = 0.1  # of the GPU: CUDA contexts, fragments, what the plan does not count
_LEAST_SHARE = 0.1
_CPU_CACHE_BYTES = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """Arguments of `VllmDriver`, in our terms."""

    model_path: str
    device: str
    """`cpu` or `cuda`; vLLM's build must be for it."""
    dtype: str
    max_sequences: int
    context: int
    """Longest sequence, prompt and completion."""
    cache_bytes: int | None
    """Size of the cache; None: what `gpu_share` leaves."""
    gpu_share: float
    """Share of the GPU's memory for weights, cache and activations together."""
    tensor_parallel: int
    sleeps: bool
    cuda_graphs: bool
    records_selection: bool
    attention_backend: str
    stall_deadline_s: float


def vllm_settings(config: RunConfig, device: str, gpu_bytes: int | None) -> VllmSettings:
    """The settings of a run on `device` (`cpu` or `cuda`), whose GPU has `gpu_bytes`.

    Raises:
        ValueError: vLLM is not installed, or the configuration asks for something it cannot do.
    """
    check_installed()
    section, model = config.rollout, read_model_config(config.model.path)
    if device == "cpu" and section.tensor_parallel > 1:
        raise ValueError(f"rollout.tensor_parallel is {section.tensor_parallel}, which needs as many GPUs; model.device is cpu")
    context = model.max_position_embeddings
    if section.max_cache_tokens is not None:
        context = min(context, section.max_cache_tokens)
    records = config.algorithm.selection == "replay"
    return VllmSettings(
        model_path=config.model.path,
        device=device,
        dtype=config.model.dtype,
        max_sequences=section.max_sequences,
        context=context,
        cache_bytes=_cache_bytes(config, model, device, records=records),
        gpu_share=_gpu_share(config, model, gpu_bytes),
        tensor_parallel=section.tensor_parallel,
        sleeps=sleeps(config),
        cuda_graphs=section.cuda_graphs,
        records_selection=records,
        attention_backend=config.model.attention_backend,
        stall_deadline_s=section.stall_deadline_s,
    )


def check_installed() -> None:
    """Raise ValueError where vLLM is missing, or does not find our plugin (a package's entry points are in its metadata)."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "rollout.engine is vllm, but vLLM is not installed here: pip install '.[vllm]' in a checkout, or set rollout.engine to torch"
        )
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(plugin.value.startswith("nsa.serving") for plugin in plugins):
        raise ValueError(
            "vLLM is installed, but does not find the plugin for NSA models: install nsa-grpo itself with pip (a PYTHONPATH is not enough)"
        )


def _cache_bytes(config: RunConfig, model: NSAConfig, device: str, *, records: bool) -> int | None:
    tokens = config.rollout.max_cache_tokens
    per_token = cache_bytes_per_token(model, config.model.dtype)
    if records:
        per_token += model.num_hidden_layers * (model.num_key_value_heads or 1) * model.num_selected_blocks * 4
    if tokens is not None:
        pages = -(-tokens // model.page_size) + 1  # vLLM keeps one page for itself
        return int(pages * model.page_size * per_token)
    if device == "cuda":
        return None
    longest = int((model.max_position_embeddings + 2 * model.page_size) * per_token)
    return max(longest, min(_CPU_CACHE_BYTES, longest * config.rollout.max_sequences))


def _gpu_share(config: RunConfig, model: NSAConfig, gpu_bytes: int | None) -> float:
    """`rollout.gpu_share`, else what the learner leaves of the GPU they share, else all but a margin."""
    if config.rollout.gpu_share is not None:
        return config.rollout.gpu_share
    if gpu_bytes is None or not shares_gpu(config):
        return 1 - _GPU_MARGIN
    plan = plan_memory(config, model, prompt_tokens=config.data.max_prompt_tokens or 512)
    learner = plan.learner_weights + plan.optimizer + plan.reference
    if not sleeps(config):
        learner += plan.logits + plan.activations
    return max(_LEAST_SHARE, 1 - _GPU_MARGIN - learner / gpu_bytes)
