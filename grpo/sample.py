"""`nsa-grpo sample CHECKPOINT`: completions of a checkpoint, to look at.

Settings are a run's own keys: evaluation.{samples,temperature,top_p,top_k,max_tokens,seed}, rollout.{max_tokens,stop},
model.*, prompt.*; the prompt section is the one saved with the checkpoint unless overridden. Scores nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from grpo.config import RunConfig, apply_overrides, build_config
from grpo.data import Row, build_prompts, load_rows
from grpo.data_types import Prompt
from grpo.memory_plan import read_model_config
from grpo.prompt_settings import load_prompt_settings
from grpo.rollout.engine import Sampling


def run_sample(checkpoint: str, *, prompt: str | None, data: str | None, num_rows: int, overrides: Sequence[str]) -> int:
    """Sample one question, or the first rows of a dataset, and print the completions."""
    config = sample_config(checkpoint, data, overrides)
    room = read_model_config(checkpoint).max_position_embeddings - _max_tokens(config)
    rows = _rows(config, prompt, num_rows)
    from transformers import AutoTokenizer

    from grpo.runtime import build_engine

    prompts, dropped = build_prompts(rows, AutoTokenizer.from_pretrained(checkpoint), config.prompt, max(room, 0))
    console = Console()
    if dropped:
        console.print(f"{dropped} of {len(rows)} prompts leave no room for {_max_tokens(config)} tokens in the context and were left out")
    section = config.evaluation
    sampling = Sampling(
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        max_tokens=_max_tokens(config),
        stop=config.rollout.stop,
        seed=section.seed,
        group_size=section.samples,
    )
    engine = build_engine(config)
    try:
        for group in engine.generate(prompts, sampling):
            _show(console, group.prompt, [(one.text, one.finish_reason, len(one.token_ids)) for one in group.completions], known=data is not None)
    finally:
        engine.close()
    return 0


def sample_config(checkpoint: str, data: str | None, overrides: Sequence[str]) -> RunConfig:
    """A run configuration for looking at a checkpoint: one sample a prompt, at most 512 tokens, unless overridden.

    Raises:
        ConfigError: an override that is not a key of a run's configuration.
    """
    tree: dict[str, Any] = {
        "model": {"path": checkpoint},
        "data": {"train": data or "-", "split": "test"},
        "rollout": {"max_tokens": 512},
        "evaluation": {"samples": 1, "k": [1]},
    }
    settings = load_prompt_settings(checkpoint)
    if settings is not None:
        tree["prompt"] = settings.model_dump(mode="json")
    return build_config(RunConfig, apply_overrides(tree, overrides))


def _rows(config: RunConfig, prompt: str | None, num_rows: int) -> list[Row]:
    if prompt is not None:
        if not prompt.strip():
            raise ValueError("--prompt is empty")
        return [Row(question=prompt, answer="")]
    data = config.data
    return load_rows(data.train, split=data.split, question_column=data.question_column, answer_column=data.answer_column, limit=num_rows)


def _max_tokens(config: RunConfig) -> int:
    return config.evaluation.max_tokens or config.rollout.max_tokens


def _show(console: Console, prompt: Prompt, completions: list[tuple[str, str, int]], *, known: bool) -> None:
    console.rule(Text(f"prompt {prompt.prompt_id} ({len(prompt.token_ids)} tokens)"))
    console.print(Text(prompt.text, style="dim"))
    if known:
        console.print(Text(f"gold answer: {prompt.answer}", style="bold"))
    for number, (text, finish_reason, count) in enumerate(completions):
        console.rule(Text(f"sample {number}: {count} tokens, {finish_reason}"), style="dim", characters="·")
        console.print(Text(text))
