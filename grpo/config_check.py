"""`nsa-grpo config check`: everything that can be found wrong with a run before a model is loaded, cheapest first.

Data, every reward on sample rows (through the run's own Scorer), checkpoint, prompts, GPU, memory. Goes on after a fault,
so one call lists them all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from grpo.config import RunConfig, SftConfig
from grpo.data import Row, load_rows
from grpo.doctor import device_memory
from grpo.learner import resolve_device
from grpo.memory_plan import plan_memory, read_model_config, size
from grpo.rewards_check import score_samples
from grpo.rollout.vllm_settings import check_installed
from nsa.attention import resolve_backend

_SAMPLE_ROWS = 2


def check_config(config: RunConfig | SftConfig) -> int:
    """Print one line per check; 1 if any failed."""
    checks = _Checks()
    if isinstance(config, SftConfig):
        checks.run("data", lambda: _sft_data(config))
        checks.run("model", lambda: _model(config.model.path))
        checks.run("device", lambda: _device(config))
    else:
        checks.run("data", lambda: _data(config))
        checks.run("rewards", lambda: _rewards(config))
        if checks.run("model", lambda: _model(config.model.path)):
            checks.run("prompts", lambda: _prompts(config, checks))
        if checks.run("device", lambda: _device(config)) and not checks.failed("model"):
            checks.run("memory", lambda: _memory(config, checks))
    return checks.finish()


class _Checks:
    """Runs checks, prints their lines, counts faults, and carries the longest prompt to the memory check."""

    def __init__(self) -> None:
        self._console = Console()
        self._failed: list[str] = []
        self.prompt_tokens: int | None = None

    def run(self, name: str, check: Callable[[], str]) -> bool:
        """True if `check` returned; its result, or the user error it raised, is printed."""
        try:
            found, fine = check(), True
        except (ValueError, OSError) as error:
            found, fine = str(error), False
            self._failed.append(name)
        for line in found.split("\n"):
            self._console.print(f"{'ok   ' if fine else 'error'}  {name}: {line}", markup=False, highlight=False, soft_wrap=True)
        return fine

    def failed(self, name: str) -> bool:
        return name in self._failed

    def finish(self) -> int:
        if self._failed:
            self._console.print(f"{len(self._failed)} of the checks failed: {', '.join(self._failed)}", highlight=False)
        return 1 if self._failed else 0


def _data(config: RunConfig) -> str:
    data = config.data
    columns = {"question_column": data.question_column, "answer_column": data.answer_column}
    parts = [f"{len(load_rows(data.train, split=data.split, limit=data.limit, **columns))} training problems"]
    if data.eval is not None:
        parts.append(f"{len(load_rows(data.eval, split=data.eval_split, limit=data.eval_limit, **columns))} evaluation problems")
    return ", ".join(parts)


def _rewards(config: RunConfig) -> str:
    data = config.data
    columns = {"question_column": data.question_column, "answer_column": data.answer_column}
    note = ""
    try:
        rows = load_rows(data.train, split=data.split, limit=_SAMPLE_ROWS, **columns)
    except (ValueError, OSError):  # the data check has said why
        rows, note = [Row(question="What is 1 + 1?", answer="2")], " (tried on a row of ours without further columns, as the data cannot be read)"
    samples = score_samples(rows, config.rewards, prefilled=config.prompt.prefill_think)
    if samples.faults:
        raise ValueError("\n".join(fault + note for fault in samples.faults))
    pairs = {name: values[0] for name, values in samples.values.items()}
    return (
        ", ".join(f"{name} gives {_number(right)} for a gold answer and {_number(wrong)} for a wrong one" for name, (right, wrong) in pairs.items())
        + note
    )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def _model(path: str) -> str:
    model = read_model_config(path)
    folder = Path(path).expanduser()
    weights = ("model.safetensors", "model.safetensors.index.json")
    if folder.is_dir() and not any((folder / name).is_file() for name in weights):
        raise ValueError(f"model.path: {path} has a config.json but no weights ({' or '.join(weights)})")
    sparsity = f"dense up to {model.sparsity.dense_length} tokens, window {model.window_size}"
    return f"{model.num_hidden_layers} layers, hidden size {model.hidden_size}, context {model.max_position_embeddings}, {sparsity}"


def _prompts(config: RunConfig, checks: _Checks) -> str:
    from grpo.problems import load_problems

    problems = load_problems(config)
    lengths = [len(prompt.token_ids) for prompt in (*problems.train, *problems.evaluation)]
    checks.prompt_tokens = max(lengths)
    return f"{min(lengths)} to {max(lengths)} tokens" + (f"; {problems.note}" if problems.note else "")


def _device(config: RunConfig | SftConfig) -> str:
    name, _ = device_memory(config.model.device)
    resolve_backend(config.model.attention_backend, resolve_device(config.model.device))
    if isinstance(config, RunConfig) and config.rollout.engine == "vllm":
        check_installed()
    return name


def _memory(config: RunConfig, checks: _Checks) -> str:
    model = read_model_config(config.model.path)
    plan = plan_memory(config, model, prompt_tokens=checks.prompt_tokens or config.data.max_prompt_tokens or 512)
    name, free = device_memory(config.model.device)
    text = f"{size(plan.total)} needed (cache {size(plan.cache)}, activations about {size(plan.activations)}), {size(free)} free in {name}"
    if plan.total > free:
        raise ValueError(f"{text}; lower rollout.max_sequences or optimizer.micro_batch_tokens, or set model.gradient_checkpointing")
    return text


def _sft_data(config: SftConfig) -> str:
    from transformers import AutoTokenizer

    from grpo.sft_data import load_texts

    read_model_config(config.model.path)
    texts, tagged = load_texts(config.data, config.prompt, AutoTokenizer.from_pretrained(config.model.path))
    left_out = f", {tagged} left out for think or answer tags in their solution" if tagged else ""
    return f"{len(texts)} examples{left_out}"
