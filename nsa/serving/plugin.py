"""vLLM's entry point `vllm.general_plugins`: makes vLLM know checkpoints of `model_type: nsa_grpo`.

vLLM calls `register` in each of its processes, perhaps several times. It names things and builds nothing: the model,
its kernels and CUDA are touched only when vLLM asks for the class. Nothing here is called by users.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from nsa.config import NSAConfig

ARCHITECTURE = "NSAForCausalLM"
ATTENTION_OP = "nsa_sparse_attention"


def register() -> None:
    """Register configuration, model class, configuration check and the attention operator's name with vLLM."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.config import CompilationConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from nsa.serving.settings import NSASettings
    from nsa.serving.versions import warn_if_untested

    warn_if_untested()
    AutoConfig.register(NSAConfig.model_type, NSAConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"nsa.serving.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = NSASettings
    operator = f"vllm::{ATTENTION_OP}"
    if operator not in CompilationConfig._attention_ops:  # piecewise CUDA graphs are split here
        CompilationConfig._attention_ops.append(operator)
