"""What an NSA checkpoint asks of vLLM's configuration: the cache's block size, and which features it goes without.

vLLM calls `NSASettings.verify_and_update_config` for the architecture before it builds anything.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false
from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.models.config import VerifyAndUpdateConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class NSASettings(VerifyAndUpdateConfig):
    """Sets the block size to the checkpoint's page and refuses what the attention backend cannot do."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Adjust `vllm_config` in place.

        Raises:
            ValueError: a block size that is no multiple of l', or a feature that NSA does not have in vLLM.
        """
        config, cache, parallel = vllm_config.model_config.hf_config, vllm_config.cache_config, vllm_config.parallel_config
        size = config.select_block_size
        if not cache.user_specified_block_size:
            cache.block_size = config.page_size
            cache.user_specified_block_size = True
        elif cache.block_size % size:
            raise ValueError(f"block_size must be a multiple of select_block_size={size} (or left out), got {cache.block_size}")
        if cache.cache_dtype != "auto":
            raise ValueError(f"kv_cache_dtype must be 'auto' for NSA checkpoints, got {cache.cache_dtype!r}")
        tensor_parallel = parallel.tensor_parallel_size
        if config.num_key_value_heads % tensor_parallel:
            raise ValueError(f"tensor_parallel_size must divide num_key_value_heads={config.num_key_value_heads}, got {tensor_parallel}")
        for name, value in (
            ("speculative_config", vllm_config.speculative_config),
            ("lora_config", vllm_config.lora_config),
            ("quantization", vllm_config.model_config.quantization),
        ):
            if value is not None:
                raise ValueError(f"NSA checkpoints run without {name} in vLLM, got {value}")
        for name in ("pipeline_parallel_size", "decode_context_parallel_size"):
            if getattr(parallel, name) != 1:
                raise ValueError(f"{name} must be 1 for NSA checkpoints, got {getattr(parallel, name)}")
        # Fused code rounds where eager code does, so that the learner's log-probabilities are met.
        vllm_config.compilation_config.inductor_compile_config.setdefault("emulate_precision_casts", True)
