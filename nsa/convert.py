"""Turn a dense Llama, Qwen2 or Qwen3 checkpoint into an NSA checkpoint that starts out as the same function.

    nsa-grpo convert HuggingFaceTB/SmolLM2-135M-Instruct models/smollm2-nsa select_block_size=16 num_selected_blocks=8

The dense K/V projections become the selection branch's (and are copied to the other two with kv=separate), the gates
start at exactly (0, 1, 0) in a form that learns (gate=blend), φ starts as mean pooling. So up to n·l' tokens, where the
selection branch sees everything, the logits are the dense model's; this is measured before the folder gets its name.

Leaves out training: beyond n·l' tokens the converted model drops what it does not select, and needs tuning.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from nsa.config import NSAConfig
from nsa.dense import (
    SUPPORTED,
    dtype_of,
    end_of_sequence_ids,
    load_dense,
    locate,
    read_config,
    read_generation_config,
    read_tokenizer,
    require_supported,
    rope_parameters,
)
from nsa.model import NSAForCausalLM

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest allowed |Δ logit| in fp32, as a fraction of the largest |logit|."""

_DEFAULTS = {"kv": "shared", "gate": "blend"}
_INTEGER_KEYS = (
    "compress_block_size",
    "compress_stride",
    "select_block_size",
    "num_selected_blocks",
    "window_size",
    "num_init_blocks",
    "num_local_blocks",
    "compressor_hidden_size",
)
_CHOICE_KEYS = {
    "kv": ("shared", "separate"),
    "gate": ("blend", "fixed"),
    "compressor": ("mlp", "mean"),
    "attention_backend": ("auto", "torch", "triton", "reference"),
    "dtype": ("float32", "bfloat16", "float16"),
}
_COPIED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
)
_SAMPLE_TEXT = (
    "A train leaves the station at nine with 48 passengers. At the first stop 17 get off and 5 get on; at the second, half of those "
    "on board leave.\nHow many are left? First, 48 - 17 + 5 = 36, then 36 / 2 = 18, so 18 people stay on the train. "
    "def area(width, height):\n    return width * height\n\nThe river rises in the hills, passes three towns and reaches the sea after 210 km. "
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitCheck:
    """One comparison with the dense model on the same token ids (both in fp32)."""

    num_tokens: int
    error: float
    """max |Δ logit| / max |dense logit| over the compared positions (the last 512)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What `convert` wrote and measured."""

    path: Path
    dense_length: int
    """n·l': up to this many tokens the model is the dense one."""
    num_parameters: int
    num_new_parameters: int
    """Those the dense model does not have: gates, φ, and the other branches' K/V projections."""
    dtype: str
    checks: tuple[LogitCheck, ...]
    seconds: float
    has_tokenizer: bool

    def summary(self) -> str:
        """A few lines for a terminal."""
        errors = ", ".join(f"{check.error:.1e} at {check.num_tokens} tokens" for check in self.checks)
        lines = [
            f"wrote {self.path}: {self.num_parameters / 1e6:.2f}M parameters, {self.num_new_parameters / 1e6:.2f}M of them new, {self.dtype}",
            f"dense up to n·l' = {self.dense_length} tokens; checked against the dense model (fp32, of the largest logit): {errors}; "
            f"allowed {TOLERANCE:.0e}",
            f"took {self.seconds:.0f} s",
        ]
        if not self.has_tokenizer:
            lines.append("the source has no tokenizer: none was written")
        return "\n".join(lines)


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["window_size=64", "kv=shared"]` → keyword arguments of `convert`.

    Raises:
        ValueError: not key=value, an unknown key, or a value of the wrong kind.
    """
    overrides: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"expected key=value, got {pair!r}")
        _require_known(key)
        overrides[key] = int(text) if key in _INTEGER_KEYS and text.lstrip("-").isdigit() else text
    _check_overrides(overrides)
    return overrides


def convert(source: str | os.PathLike[str], destination: str | os.PathLike[str], **overrides: Any) -> Conversion:
    """Write an NSA checkpoint of the dense model `source` to the folder `destination`, and check its logits.

    Args:
        source: folder, hub name, .gguf file, or folder with one .gguf file.
        destination: folder that does not exist yet or is empty. It appears only once the check has passed.
        overrides: compress_block_size (l), compress_stride (d), select_block_size (l'), num_selected_blocks (n),
            window_size (w), num_init_blocks, num_local_blocks, kv (shared | separate), gate (blend | fixed),
            compressor (mlp | mean), compressor_hidden_size, attention_backend, dtype of the written weights
            (default: the source's).

    Raises:
        ValueError: an unknown key or a value out of range, a source that cannot be read or is not supported, a
            destination with something in it, or logits further than TOLERANCE from the dense model's.
    """
    start = time.monotonic()
    _check_overrides(overrides)
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"destination {destination} exists and is not an empty folder: give a new one")
    origin = locate(source)
    dense_config = read_config(origin)
    options = {**_DEFAULTS, **overrides}
    dtype = dtype_of(options.pop("dtype", None), dense_config)
    config = nsa_config(dense_config, **options)

    tokenizer = read_tokenizer(origin)
    generation = read_generation_config(origin, dense_config)
    stop_ids = end_of_sequence_ids(dense_config, generation, tokenizer)
    config.eos_token_id = stop_ids[0] if len(stop_ids) == 1 else (stop_ids or None)
    generation.eos_token_id = config.eos_token_id

    logger.info("reading %s", origin)
    dense = load_dense(origin, dtype)
    samples = _sample_ids(config, tokenizer)
    # nn.Module's, for Transformers' own .float() refuses models read from a GGUF file, though their weights are plain tensors by now.
    torch.nn.Module.float(dense)
    expected = _logits(dense, samples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NSAForCausalLM(config)
    num_new = _copy_weights(dense, model)
    del dense
    model.generation_config = generation
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    torch.nn.Module.to(model, dtype)

    logger.info("writing and checking %s", destination)
    with _temporary_folder(destination) as folder:
        model.save_pretrained(folder)
        del model
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        written = NSAForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        checks = _compare(expected, _logits(written, samples), samples)
        del written
        worst = max(check.error for check in checks)
        if not worst <= TOLERANCE:
            raise ValueError(
                f"the converted model's logits differ from the dense model's by {worst:.1e} of the largest (allowed {TOLERANCE:.0e}); "
                "nothing was written"
            )
        _publish(folder, destination)
    return Conversion(
        path=destination,
        dense_length=config.sparsity.dense_length,
        num_parameters=num_parameters,
        num_new_parameters=num_new,
        dtype=str(dtype).removeprefix("torch."),
        checks=checks,
        seconds=time.monotonic() - start,
        has_tokenizer=tokenizer is not None,
    )


def nsa_config(dense: PreTrainedConfig, **options: Any) -> NSAConfig:
    """The NSA config of a dense Llama/Qwen2/Qwen3 config; `options` are further NSAConfig fields.

    Raises:
        ValueError: an architecture or feature that NSAForCausalLM does not have, or an option out of range.
    """
    require_supported(dense)
    heads = dense.num_attention_heads
    bias = bool(getattr(dense, "attention_bias", False))
    if options.get("gate") == "fixed":
        options.setdefault("fixed_gates", [0.0, 1.0, 0.0])
    return NSAConfig(
        **{key: getattr(dense, key) for key in _COPIED_KEYS},
        head_dim=getattr(dense, "head_dim", None) or dense.hidden_size // heads,
        rope_parameters=dict(rope_parameters(dense)),
        attention_bias=bias or dense.model_type == "qwen2",
        attention_output_bias=bias,
        mlp_bias=bool(getattr(dense, "mlp_bias", False)),
        qk_norm=dense.model_type == "qwen3",
        eos_token_id=dense.eos_token_id,
        **options,
    )


def _require_known(key: str) -> None:
    known = (*_INTEGER_KEYS, *_CHOICE_KEYS)
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"unknown key {key}; {hint}")


def _check_overrides(overrides: dict[str, Any]) -> None:
    for key, value in overrides.items():
        _require_known(key)
        if key in _INTEGER_KEYS:
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{key} must be an integer, got {value!r}")
        elif key == "gate" and value == "sigmoid":
            raise ValueError(
                "gate=sigmoid cannot be exactly (0, 1, 0), so it cannot start as the dense model: use gate=blend (which learns) or gate=fixed"
            )
        elif value not in _CHOICE_KEYS[key]:
            raise ValueError(f"{key} must be one of {', '.join(_CHOICE_KEYS[key])}, got {value!r}")


def _copy_weights(dense: PreTrainedModel, model: PreTrainedModel) -> int:
    """Copy every dense weight to its namesake, and K/V to the other branches; returns how many numbers are new."""
    state = dict(dense.named_parameters())
    num_new = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (value := state.pop(name, None)) is not None:
                parameter.copy_(value)
                continue
            num_new += parameter.numel()
            for prefix in ("cmp_", "win_"):
                for projection in ("k_proj", "v_proj"):
                    if f".{prefix}{projection}." in name:
                        parameter.copy_(dense.get_parameter(name.replace(prefix + projection, projection)))
    if state:
        raise ValueError(f"cannot convert: the model has weights that NSA has no place for: {', '.join(list(state)[:5])}; supported are {SUPPORTED}")
    return num_new


def _sample_ids(config: NSAConfig, tokenizer: Any | None) -> list[torch.Tensor]:
    """Token ids `[1, T]` of two lengths: n·l' (or the context, if shorter) and an odd third of it. Text, then random ids."""
    longest = min(config.sparsity.dense_length, config.max_position_embeddings)
    text = tokenizer(_SAMPLE_TEXT, add_special_tokens=False).input_ids if tokenizer is not None else []
    generator = torch.Generator().manual_seed(0)
    random_ids = torch.randint(0, config.vocab_size, (longest,), generator=generator).tolist()
    ids = torch.tensor([token_id for token_id in text if token_id < config.vocab_size] + random_ids)
    return [ids[None, :length] for length in (max(1, longest // 3 | 1), longest)]


@torch.no_grad()
def _logits(model: PreTrainedModel, samples: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """fp32 logits `[positions, V]` of each sample's last (up to) 512 positions."""
    return [model(input_ids=ids, use_cache=False, logits_to_keep=min(512, ids.shape[1])).logits[0] for ids in samples]


def _compare(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor], samples: Sequence[torch.Tensor]) -> tuple[LogitCheck, ...]:
    return tuple(
        LogitCheck(num_tokens=ids.shape[1], error=float((found - wanted).abs().max() / wanted.abs().max()))
        for wanted, found, ids in zip(expected, got, samples)
    )


@contextlib.contextmanager
def _temporary_folder(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` (same file system, so that it can be renamed), removed at the end whatever happens."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, destination: Path) -> None:
    """Give the finished folder its name, and it and its files the permissions that new ones have (safetensors writes 0600)."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)
    if destination.is_dir():
        destination.rmdir()
    folder.rename(destination)
