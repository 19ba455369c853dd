"""Reading a dense checkpoint for conversion: where it is, whether NSA has its architecture, tokenizer, EOS ids, weights.

A source is a folder, a hub name, a .gguf file or a folder with one. Every fault is a ValueError of one line. Leaves out
what is made of it (convert.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from nsa.layers import ROPE_TYPES

logger = logging.getLogger(__name__)

SUPPORTED = "dense Llama, Qwen2 and Qwen3 checkpoints with full attention in every layer and RoPE of type default, linear, llama3 or yarn"


@dataclass(frozen=True, slots=True)
class Source:
    """Where transformers finds the dense checkpoint: its first argument and the gguf_file keyword, if any."""

    name: str
    keywords: dict[str, str]

    def __str__(self) -> str:
        return str(Path(self.name, *self.keywords.values()))


def locate(source: str | os.PathLike[str]) -> Source:
    """Resolve a folder, a .gguf file, a folder with one .gguf file, or (if nothing is there) a hub name."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"source {path} is a file but not a .gguf file: give a checkpoint folder, a hub name or a .gguf file")
        return Source(str(path.parent), {"gguf_file": path.name})
    if path.is_dir():
        if (path / "config.json").is_file():
            return Source(str(path), {})
        found = sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise ValueError(f"source {path} has no config.json and {len(found)} .gguf files: give a checkpoint folder or one .gguf file")
        return Source(str(path), {"gguf_file": found[0].name})
    if str(source).endswith(".gguf") or str(source).startswith(("/", ".", "~")) or str(source).count("/") > 1:
        raise ValueError(f"no checkpoint at {source}")
    return Source(str(source), {})


def read_config(origin: Source) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(origin.name, **origin.keywords)
    except ImportError as error:
        raise ValueError(
            f"{origin}: reading GGUF needs the packages gguf and accelerate: pip install 'nsa-grpo[gguf]' ({_first_line(error)})"
        ) from error
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"cannot read a model config from {origin}: {_first_line(error)}; supported are {SUPPORTED}") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def dtype_of(name: str | None, config: PreTrainedConfig) -> torch.dtype:
    """The written weights' dtype: as asked for, else the source's, else (GGUF, old configs) fp32."""
    dtype = getattr(torch, name) if name else getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32


def read_tokenizer(origin: Source) -> Any | None:
    """The source's tokenizer, or None (with a log line) where it has none."""
    folder = Path(origin.name)
    if (
        folder.is_dir()
        and not origin.keywords
        and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"))
    ):
        logger.warning("%s has no tokenizer files: the converted checkpoint will have none", origin)
        return None
    try:
        return AutoTokenizer.from_pretrained(origin.name, **origin.keywords)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot read the tokenizer of {origin}: {_first_line(error)}") from error


def read_generation_config(origin: Source, config: PreTrainedConfig) -> GenerationConfig:
    """The source's generation_config.json; without one, what its config implies."""
    if not origin.keywords:
        with contextlib.suppress(OSError):
            return GenerationConfig.from_pretrained(origin.name)
    return GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)


def end_of_sequence_ids(config: PreTrainedConfig, generation: GenerationConfig, tokenizer: Any | None) -> list[int]:
    """Every id that ends a sequence: the generation config's, the config's and the tokenizer's, in this order."""
    ids: list[int] = []
    for given in (generation.eos_token_id, config.eos_token_id, getattr(tokenizer, "eos_token_id", None)):
        for token_id in given if isinstance(given, list | tuple) else [given]:
            if token_id is not None and token_id not in ids:
                ids.append(int(token_id))
    return ids


def load_dense(origin: Source, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(origin.name, dtype=dtype, **origin.keywords).eval()
    except ImportError as error:
        raise ValueError(f"{origin}: {_first_line(error)} (GGUF files need: pip install 'nsa-grpo[gguf]')") from error
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot read the weights of {origin}: {_first_line(error)}") from error


def require_supported(config: PreTrainedConfig) -> None:
    def refuse(what: str) -> ValueError:
        return ValueError(f"cannot convert {what}; supported are {SUPPORTED}")

    if config.model_type == "nsa_grpo":
        raise refuse("a checkpoint that is an NSA model already")
    if config.model_type not in ("llama", "qwen2", "qwen3"):
        raise refuse(f"model type {config.model_type!r}")
    if getattr(config, "quantization_config", None):
        raise refuse("quantised weights (take the original checkpoint, or a GGUF file, which is dequantised)")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise refuse("sliding-window layers")
    rope = rope_parameters(config)
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        raise refuse(f"RoPE of type {rope.get('rope_type')!r}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse(f"partial RoPE (partial_rotary_factor={rope['partial_rotary_factor']})")
    if config.hidden_act not in ("silu", "swish"):
        raise refuse(f"activation {config.hidden_act!r}")


def rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}
