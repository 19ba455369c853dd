"""A run's training and evaluation prompts, and the tokenizer that made them: everything a user can get wrong in data.

Loads no model weights. Leaves out reading and rendering (grpo.data, grpo.prompts).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

import nsa  # noqa: F401 (registers the model type)
from grpo.config import RunConfig
from grpo.data import build_prompts, load_rows
from grpo.data_types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """Prompts of a run. `note` is a line for people about dropped prompts, or ""."""

    train: tuple[Prompt, ...]
    evaluation: tuple[Prompt, ...]
    tokenizer: PreTrainedTokenizerBase
    note: str


def load_problems(config: RunConfig) -> Problems:
    """Read data and tokenizer and render every prompt.

    Raises:
        ValueError, FileNotFoundError: no such model or data, unusable rows, all prompts too long.
    """
    context = _context_length(config.model.path)
    room = context - config.rollout.max_tokens
    if room < 1:
        raise ValueError(f"rollout.max_tokens is {config.rollout.max_tokens}, but the model's context is {context}: nothing is left for the prompt")
    limit = min(room, config.data.max_prompt_tokens or room)
    data = config.data
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    columns = {"question_column": data.question_column, "answer_column": data.answer_column}
    rows = load_rows(data.train, split=data.split, limit=data.limit, **columns)
    train, dropped = build_prompts(rows, tokenizer, config.prompt, limit)
    notes = [f"{dropped} of {len(rows)} training prompts are longer than {limit} tokens and were left out"] if dropped else []
    evaluation: list[Prompt] = []
    if data.eval is not None:
        rows = load_rows(data.eval, split=data.eval_split, limit=data.eval_limit, **columns)
        eval_limit = min(limit, context - (config.evaluation.max_tokens or config.rollout.max_tokens))
        evaluation, dropped = build_prompts(rows, tokenizer, config.prompt, eval_limit)
        notes += [f"{dropped} of {len(rows)} evaluation prompts are longer than {eval_limit} tokens and were left out"] if dropped else []
    return Problems(train=tuple(train), evaluation=tuple(evaluation), tokenizer=tokenizer, note="; ".join(notes))


def _context_length(path: str) -> int:
    """max_position_embeddings of a checkpoint.

    Raises:
        ValueError: there is no checkpoint of that name.
    """
    folder = Path(path).expanduser()
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"model.path {path!r} is not a checkpoint: it has no config.json")
    try:
        loaded = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model.path {path!r} is neither a checkpoint folder nor a model that the hub (or its offline cache) gives: {reason}"
        ) from error
    return int(loaded.max_position_embeddings)
