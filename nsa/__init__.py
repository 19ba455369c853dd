"""Native sparse attention (DeepSeek, 2025): the attention functions, their cache, and a Hugging Face model.

Importing this package registers `model_type: nsa_grpo` with Transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from nsa.attention import BranchKV, CompressorWeights, LayerCache, Phi, nsa_attention, nsa_decode
from nsa.cache import NSACache
from nsa.config import NSAConfig, SparsityConfig
from nsa.model import NSAForCausalLM, NSAModel

AutoConfig.register("nsa_grpo", NSAConfig, exist_ok=True)
AutoModel.register(NSAConfig, NSAModel, exist_ok=True)
AutoModelForCausalLM.register(NSAConfig, NSAForCausalLM, exist_ok=True)

__all__ = [
    "BranchKV",
    "CompressorWeights",
    "LayerCache",
    "NSACache",
    "NSAConfig",
    "NSAForCausalLM",
    "NSAModel",
    "Phi",
    "SparsityConfig",
    "nsa_attention",
    "nsa_decode",
]
