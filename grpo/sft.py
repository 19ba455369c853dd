"""Supervised fine-tuning of an NSA model: cold start before GRPO, adaptation after conversion.

    nsa-grpo sft configs/sft_gsm8k_smollm2.yaml

    texts → token ids → steps of batch_tokens → packed micro-batches → log-probs of the completions → mean over the step → AdamW

The loss is the mean over all completion tokens of a step, whatever its split into micro-batches. Model, log-probs and
optimizer are the GRPO learner's. Leaves out a validation loss (`nsa-grpo eval` says more) and resuming.

Shape suffixes: T packed tokens of a micro-batch, N its sequences (N1 = N + 1), R predicted (completion) tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from grpo.batching import pack
from grpo.checkpoint import CheckpointStore, RunLock
from grpo.config import SftConfig
from grpo.data_types import Batch
from grpo.learner import load_policy, resolve_device
from grpo.log import RunLogger, prepare_run_dir
from grpo.memory_plan import read_model_config
from grpo.micro_batch import prepare, row_logprobs
from grpo.optimizer import gradient_norms, learning_rate, make_optimizer, set_learning_rate
from grpo.prompt_settings import save_prompt_settings
from grpo.seeding import seed_everything
from grpo.sft_data import Dropped, SftExample, SftText, load_texts, plan_steps, tokenize
from nsa.attention import resolve_backend
from nsa.config import NSAConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """What is trained on: the examples, which of them make up each step, and one line about what was left out."""

    examples: list[SftExample]
    steps: list[tuple[int, ...]]
    description: str


def run_sft(config: SftConfig, texts: Sequence[SftText | tuple[str, str]] | None = None) -> Path:
    """Train `config.model.path` and write a checkpoint that `train`, `eval` and `sft` take as model.path.

    Args:
        config: the run's configuration.
        texts: examples in memory ((prompt, completion) pairs), in place of reading `config.data.train`.

    Returns:
        `<run_dir>/checkpoints/final`.

    Raises:
        FileNotFoundError, ValueError: data, tokenizer or model that cannot be used; found before the weights are loaded where possible.
        CheckpointError: the checkpoint could not be written, or another process uses the run folder.
    """
    device = resolve_device(config.model.device)
    resolve_backend(config.model.attention_backend, device)
    if config.runtime_threads is not None:
        torch.set_num_threads(config.runtime_threads)
    seed_everything(config.seed)
    model_config = read_model_config(config.model.path)
    tokenizer = _load_tokenizer(config.model.path)
    data = _prepare_data(config, model_config, tokenizer, texts)
    run_dir = prepare_run_dir(config, config.log, config.name)
    lock = RunLock(run_dir)
    try:
        trainer = _Trainer(config, load_policy(config), device, total_steps=len(data.steps))  # type: ignore[arg-type] (reads config.model alone)
        with RunLogger(run_dir, config.log, name=config.name, total_steps=len(data.steps), config=config.model_dump(mode="json")) as log:
            log.message(data.description)
            log.samples(0, [_sample(example, tokenizer) for example in data.examples[:2]])
            _train(trainer, data, log)
        store = CheckpointStore(run_dir / "checkpoints", keep_last=1, keep_best=False)
        saved = store.save(len(data.steps), lambda folder: trainer.save(folder, tokenizer))
        store.link("final", saved)
    finally:
        lock.release()
    return run_dir / "checkpoints" / "final"


def make_batch(examples: Sequence[SftExample], weight: float) -> Batch:
    """Pack whole examples one after the other; each completion token (a sequence's first token excepted) has loss weight `weight`."""
    lengths_N = torch.tensor([example.num_tokens for example in examples])
    cu_seqlens_N1 = torch.zeros(len(examples) + 1, dtype=torch.int32)
    cu_seqlens_N1[1:] = lengths_N.cumsum(0)
    num_tokens = int(cu_seqlens_N1[-1])
    positions_T = torch.arange(num_tokens) - cu_seqlens_N1[:-1].long().repeat_interleave(lengths_N)
    first_predicted_T = torch.tensor([max(1, len(example.prompt_ids)) for example in examples]).repeat_interleave(lengths_N)
    zeros_T = torch.zeros(num_tokens)
    return Batch(
        token_ids_T=torch.tensor(list(chain.from_iterable(chain(example.prompt_ids, example.completion_ids) for example in examples))),
        positions_T=positions_T,
        cu_seqlens_N1=cu_seqlens_N1,
        samples_N2=torch.stack([torch.arange(len(examples)), torch.zeros(len(examples), dtype=torch.int64)], dim=1),
        loss_weights_T=torch.where(positions_T >= first_predicted_T, weight, 0.0),
        advantages_T=zeros_T,
        sampler_logprobs_T=zeros_T,
    )


class _Trainer:
    """Model and optimizer of one run."""

    def __init__(self, config: SftConfig, model: Any, device: torch.device, *, total_steps: int) -> None:
        self.config, self.device, self.total_steps = config, device, total_steps
        self.model = model.to(device, torch.float32).requires_grad_(True).eval()
        self._saved_backend = self.model.config.attention_backend
        if config.model.attention_backend != "auto":
            self.model.config.attention_backend = config.model.attention_backend
        if config.model.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
            self.model.train()
        dtype = getattr(torch, config.model.dtype)
        self._compute_dtype: torch.dtype | None = None if dtype == torch.float32 else dtype
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self._optimizer = make_optimizer(self.model.named_parameters(), config.optimizer)

    def step(self, step: int, examples: Sequence[SftExample]) -> dict[str, float]:
        """One optimizer step (number `step`, from 0) over the examples; `loss` is that before the update.

        Raises:
            ValueError: a gradient that is not finite; the weights are left as they were.
        """
        section = self.config.optimizer
        num_predicted = sum(example.num_tokens - max(1, len(example.prompt_ids)) for example in examples)
        bins = pack([example.num_tokens for example in examples], section.micro_batch_tokens)
        rate = learning_rate(step, self.total_steps, section)
        set_learning_rate(self._optimizer, rate)
        self._optimizer.zero_grad(set_to_none=True)
        sums = [self._accumulate(make_batch([examples[index] for index in members], 1 / num_predicted)) for members in bins]
        loss, entropy = (torch.stack(values).sum().item() for values in zip(*sums))
        return {"loss": loss, "entropy": entropy / num_predicted, "learning_rate": rate, **self._update(step)}

    def _accumulate(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward of one micro-batch; returns its share of the loss and the sum of its rows' entropies."""
        micro = prepare(batch, self.device)
        logprobs_R, entropy_R, _ = row_logprobs(
            self.model,
            micro,
            temperature=1.0,
            chunk=self.config.optimizer.logprob_chunk_tokens,
            compute_dtype=self._compute_dtype,
            replay=False,
        )
        loss = -(logprobs_R * micro.batch.loss_weights_T[micro.rows_R]).sum()
        self._scaler.scale(loss).backward()
        return loss.detach(), entropy_R.sum()

    def _update(self, step: int) -> dict[str, float]:
        """Clip and update; returns gradient norms before clipping."""
        self._scaler.unscale_(self._optimizer)
        by_kind = gradient_norms(self.model.named_parameters())
        total = torch.stack(list(by_kind.values())).square().sum().sqrt()
        if not math.isfinite(total.item()) and not self._scaler.is_enabled():
            raise ValueError(f"step {step + 1}: the gradient is not finite; try a lower optimizer.learning_rate (the weights were left as they were)")
        torch.nn.utils.clip_grads_with_norm_(list(self.model.parameters()), self.config.optimizer.max_grad_norm, total)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return {"grad_norm": total.item(), **{f"grad_norm/{kind}": norm.item() for kind, norm in by_kind.items()}}

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Write the fp32 model, the tokenizer and the prompt settings."""
        self.model.config.attention_backend = self._saved_backend
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_prompt_settings(folder, self.config.prompt)


def _train(trainer: _Trainer, data: _Data, log: RunLogger) -> None:
    """All steps, one line of metrics each."""
    num_tokens = num_examples = 0
    for step, members in enumerate(data.steps):
        start = time.monotonic()
        examples = [data.examples[index] for index in members]
        metrics = trainer.step(step, examples)
        seconds = time.monotonic() - start
        step_tokens = sum(example.num_tokens for example in examples)
        num_tokens += step_tokens
        num_examples += len(examples)
        progress = {"num_tokens": num_tokens, "epoch": num_examples / len(data.examples)}
        log.log(step + 1, {**metrics, **progress, "tokens_per_second": step_tokens / seconds, "step_time": seconds})


def _prepare_data(config: SftConfig, model_config: NSAConfig, tokenizer: Any, texts: Sequence[SftText | tuple[str, str]] | None) -> _Data:
    """Everything that can be wrong with the data is found here."""
    dropped = Dropped()
    if texts is None:
        given, dropped = load_texts(config.data, config.prompt, tokenizer)
    else:
        given = [text if isinstance(text, SftText) else SftText(prompt=text[0], completion=text[1]) for text in texts]
    if dropped.tags_in_solution and not given:
        raise ValueError(f"{config.data.train}: the solutions of all {dropped.tags_in_solution} rows hold think or answer tags")
    max_tokens = min(config.data.max_tokens, model_config.max_position_embeddings)
    eos_id = _end_of_sequence(tokenizer, model_config)
    examples, too_long = tokenize(given, config.prompt, tokenizer, eos_id=eos_id, max_tokens=max_tokens)
    dropped = replace(dropped, too_long=too_long)
    highest = max(max(chain(example.prompt_ids, example.completion_ids)) for example in examples)
    if highest >= model_config.vocab_size:
        raise ValueError(f"the tokenizer gives token id {highest}, but the model of {config.model.path} has {model_config.vocab_size} tokens")
    steps = plan_steps(
        examples,
        batch_tokens=config.batch_tokens,
        epochs=config.epochs,
        steps=config.steps,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )
    num_tokens = sum(example.num_tokens for example in examples)
    lines = [f"{len(examples)} examples, {num_tokens} tokens, {len(steps)} steps"]
    if dropped.too_long:
        lines.append(f"{dropped.too_long} longer than {max_tokens} tokens left out")
    if dropped.tags_in_solution:
        lines.append(f"{dropped.tags_in_solution} with think or answer tags in their solution left out")
    return _Data(examples=examples, steps=steps, description="; ".join(lines))


def _load_tokenizer(path: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"model.path: no usable tokenizer in {path}: {reason}") from error


def _end_of_sequence(tokenizer: Any, model_config: NSAConfig) -> int:
    """The tokenizer's EOS id, else the first of the model's."""
    given = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else model_config.eos_token_id
    if isinstance(given, list):
        given = given[0] if given else None
    if given is None:
        raise ValueError("neither the tokenizer nor the model's config names an end-of-sequence token, so completions could not end")
    return int(given)


def _sample(example: SftExample, tokenizer: Any) -> dict[str, Any]:
    """What the model is shown, decoded from the token ids."""
    return {
        "question": tokenizer.decode(list(example.prompt_ids)),
        "completion": tokenizer.decode(list(example.completion_ids)),
        "num_tokens": example.num_tokens,
        "num_completion_tokens": len(example.completion_ids),
    }
