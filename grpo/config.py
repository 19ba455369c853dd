"""The whole configuration of a run: strict pydantic models, read once, passed on as typed sections.

`load_config(path, overrides)` reads YAML (duplicate keys refused), applies dotted overrides, and rejects unknown keys
with a suggestion. configs/README.md explains every key. Nothing here loads a model, data or a reward.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A strict, frozen section; attribute docstrings become the JSON schema's descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, use_attribute_docstrings=True, protected_namespaces=())


class ModelSection(Section):
    """The policy and how it is run."""

    path: str
    """NSA checkpoint: a folder or a hub name."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is a GPU; `cuda` without a GPU is an error."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the forward and backward pass; master weights and optimizer are fp32."""
    attention_backend: Literal["auto", "torch", "triton"] = "auto"
    gradient_checkpointing: bool = False


class DataSection(Section):
    """Where problems come from. Paths may be JSONL (.gz), CSV, parquet, or a Hugging Face dataset name."""

    train: str
    eval: str | None = None
    """Held-out problems for the evaluations before, during and after training."""
    split: str = "train"
    """Split of a hub dataset for training."""
    eval_split: str = "test"
    question_column: str | None = None
    """None: the first of question, problem, prompt that the rows have."""
    answer_column: str | None = None
    """None: the first of answer, ground_truth, solution that the rows have (verl's layout is recognised)."""
    limit: PositiveInt | None = None
    eval_limit: PositiveInt | None = None
    shuffle: bool = True
    max_prompt_tokens: PositiveInt | None = None
    """Longer prompts are dropped and counted; None: the model's context less rollout.max_tokens."""


class PromptSection(Section):
    """How a question becomes a prompt."""

    template: str = "r1_zero"
    """`r1_zero`, `chat` (the tokenizer's chat template), `none`, or the path of a text file with `{question}` in it."""
    system: str | None = None
    """System message of the chat template."""
    prefill_think: bool = False
    """The prompt ends with `<think>`, which then is not part of the completion."""


class RolloutSection(Section):
    """Sampling."""

    engine: Literal["torch", "vllm"] = "torch"
    """`torch`: the built-in engine; `vllm`: vLLM with our plugin (extra `vllm`)."""
    prompts_per_step: PositiveInt = 32
    group_size: Annotated[int, Field(ge=2)] = 8
    """Samples per prompt (G); a group of one has no group-relative advantage."""
    max_tokens: PositiveInt = 256
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0
    stop: tuple[str, ...] = ("</answer>",)
    """Strings that end a completion (they stay in its text)."""
    max_sequences: PositiveInt = 256
    """Sequences decoded at the same time."""
    max_cache_tokens: PositiveInt | None = None
    """Tokens the cache can hold; None: enough for max_sequences of full length."""
    cuda_graphs: bool = True
    """Replay decode steps as CUDA graphs on a GPU."""
    gpu_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """vLLM: share of the GPU's memory for its weights, cache and activations; None: what the learner leaves of a GPU they
    share, else 0.9. With max_cache_tokens the cache has that size."""
    tensor_parallel: PositiveInt = 1
    """vLLM: GPUs that one engine is spread over."""
    sleep: bool | None = None
    """Free the engine's memory while the learner works; None: where vLLM and the learner share a GPU."""
    stall_deadline_s: PositiveFloat = 300.0
    """vLLM: longest time without a new token, and longest single call, before it counts as hung."""
    dynamic_sampling: bool = False
    """Sample further prompts until prompts_per_step groups have reward variance (DAPO)."""
    max_sampling_rounds: PositiveInt = 3
    """Cap of dynamic sampling: rounds of prompts_per_step prompts in one step."""

    @model_validator(mode="after")
    def _full_distribution(self) -> RolloutSection:
        if self.top_p < 1 or self.top_k > 0:
            raise ValueError(f"training needs the full distribution: top_p must be 1 and top_k 0, got top_p={self.top_p}, top_k={self.top_k}")
        return self

    @model_validator(mode="after")
    def _engine_keys(self) -> RolloutSection:
        if self.engine == "torch":
            for key in ("gpu_share", "tensor_parallel", "stall_deadline_s"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} is for vLLM alone: set rollout.engine to vllm, or leave it out")
        elif not 0.01 <= self.temperature <= 2:
            raise ValueError(f"vLLM samples at temperatures from 0.01 to 2, got temperature={self.temperature}")
        return self


class RewardSpec(Section):
    """One reward function."""

    name: str
    """A registered name (`accuracy`, `format`, …), `path/to/file.py:function` or `package.module:function`."""
    weight: float = 1.0
    arguments: dict[str, Any] = {}
    """Keyword arguments given to the function at every call."""
    deadline_s: PositiveFloat | None = None
    """Seconds one call may take; None: rewards.deadline_s."""


class RewardsSection(Section):
    """Rewards and the workers that run them."""

    functions: tuple[RewardSpec, ...] = (RewardSpec(name="accuracy"), RewardSpec(name="format", weight=0.1))
    workers: PositiveInt = 2
    deadline_s: PositiveFloat = 5.0
    """Seconds one call of a function may take before its worker is killed."""
    failure_value: float | None = 0.0
    """Reward of a sample whose function timed out, raised or died; null leaves the sample out of its group."""
    memory_mb: PositiveInt | None = None
    """Address-space limit of a worker; None: no limit."""

    @model_validator(mode="after")
    def _some(self) -> RewardsSection:
        if not self.functions:
            raise ValueError("rewards.functions is empty: name at least one reward")
        names = [spec.name for spec in self.functions]
        if len(set(names)) != len(names):
            raise ValueError(f"a reward is named twice in rewards.functions: {names}")
        return self


class AlgorithmSection(Section):
    """GRPO and its relatives."""

    loss: Literal["grpo", "token_mean", "dr_grpo", "gspo"] = "dr_grpo"
    """Aggregation: per-sequence mean, mean over the step's tokens (DAPO), constant denominator (Dr. GRPO), sequence ratio (GSPO)."""
    advantage: Literal["std", "mean", "leave_one_out"] = "mean"
    """(r − mean)/std, r − mean, or r − mean of the others."""
    drop_zero_variance: bool = True
    """Leave groups whose rewards are all equal out of the loss and its counts."""
    epsilon_low: PositiveFloat = 0.2
    epsilon_high: PositiveFloat = 0.28
    kl_coefficient: NonNegativeFloat = 0.0
    kl_place: Literal["loss", "reward"] = "loss"
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    reference_refresh_steps: PositiveInt | None = None
    """Every N steps the reference becomes the policy; None: never."""
    tis_cap: PositiveFloat | None = 2.0
    """Cap C of the truncated importance weight min(π_learner,old/π_sampler, C); null turns it off."""
    inner_epochs: PositiveInt = 1
    """μ: updates per rollout."""
    mini_batches: PositiveInt = 1
    """Optimizer steps the rollout is split into in each inner epoch."""
    overlong_filter: bool = False
    """Leave truncated completions out of the loss."""
    overlong_penalty_tokens: NonNegativeInt = 0
    """Lc of DAPO's soft penalty: falls from 0 to −1 over the last Lc tokens before max_tokens; 0 is off."""
    selection: Literal["recompute", "replay"] = "recompute"
    """Block choices of the learner: computed anew, or those recorded in the rollout."""
    mismatch_bound: PositiveFloat | None = 0.1
    """Largest allowed mean |Δ log p| between sampler and learner; above it the run stops. null: never."""

    @model_validator(mode="after")
    def _estimator(self) -> AlgorithmSection:
        if self.kl_coefficient > 0 and self.kl_place == "loss" and self.kl_estimator == "k1":
            raise ValueError("algorithm.kl_estimator: k1 in the loss has no gradient in expectation; use k2 or k3, or kl_place: reward")
        return self


class OptimizerSection(Section):
    """AdamW with warm-up, schedule and clipping."""

    learning_rate: PositiveFloat = 1e-6
    gate_learning_rate_scale: PositiveFloat = 1.0
    """Factor on the learning rate of the branch gates."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end of the schedule, as a fraction of learning_rate."""
    max_grad_norm: PositiveFloat = 1.0
    micro_batch_tokens: PositiveInt = 16384
    """Token budget of one packed micro-batch; a sequence is never split."""
    logprob_chunk_tokens: PositiveInt = 2048
    """Positions whose logits exist at the same time."""


class TrainSection(Section):
    """Length, evaluation and checkpoints."""

    steps: PositiveInt = 100
    seed: NonNegativeInt = 0
    eval_every: PositiveInt | None = None
    """Evaluate every N steps (besides before and after); None: only before and after."""
    eval_before: bool = True
    eval_after: bool = True
    save_every: PositiveInt | None = None
    """Checkpoint every N steps (besides the last); None: only the last."""
    keep_last: PositiveInt = 2
    keep_best: bool = True
    """Also keep the checkpoint with the best evaluation (pass@1), or the best reward where there is no evaluation."""


class EvaluationSection(Section):
    """Sampling of evaluations."""

    samples: PositiveInt = 8
    """Completions per problem."""
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0
    max_tokens: PositiveInt | None = None
    """None: rollout.max_tokens."""
    k: tuple[PositiveInt, ...] = (1, 8)
    """pass@k and maj@k for these k (each at most `samples`)."""
    greedy: bool = True
    """Also one greedy completion per problem."""
    seed: NonNegativeInt = 1234

    @model_validator(mode="after")
    def _enough(self) -> EvaluationSection:
        if max(self.k) > self.samples:
            raise ValueError(f"evaluation.k={list(self.k)} needs as many samples; evaluation.samples is {self.samples}")
        return self


class RuntimeSection(Section):
    """Processes."""

    kind: Literal["ray", "local"] = "ray"
    """`ray`: rollout, reward and learner actors; `local`: the same classes in one process."""
    address: str | None = None
    """Ray cluster to join; None: RAY_ADDRESS, else a local instance of our own."""
    rollout_gpus: NonNegativeFloat | None = None
    """GPU share of the rollout actor; None: half of one where the model runs on CUDA, else 0."""
    learner_gpus: NonNegativeFloat | None = None
    threads: PositiveInt | None = None
    """CPU threads of each actor; None: all cores."""
    start_deadline_s: PositiveFloat = 180.0
    rollout_deadline_s: PositiveFloat = 1800.0
    learner_deadline_s: PositiveFloat = 1800.0


class LogSection(Section):
    """What is written where."""

    run_dir: str = "runs/{name}"
    """Folder of the run; `{name}` is the config's name, `{time}` the start time."""
    wandb: bool = False
    """Log to wandb: online where a key is set, otherwise offline."""
    wandb_project: str = "nsa-grpo"
    samples_per_step: NonNegativeInt = 4
    """Completions shown in each step's sample table."""
    progress: bool = True


class RunConfig(Section):
    """A GRPO run."""

    name: str = "run"
    model: ModelSection
    data: DataSection
    prompt: PromptSection = PromptSection()
    rollout: RolloutSection = RolloutSection()
    rewards: RewardsSection = RewardsSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    evaluation: EvaluationSection = EvaluationSection()
    runtime: RuntimeSection = RuntimeSection()
    log: LogSection = LogSection()


class SftDataSection(Section):
    """Rows for supervised fine-tuning: prompt/completion columns, or problem/solution/answer rows that are rendered."""

    train: str
    split: str = "train"
    limit: PositiveInt | None = None
    shuffle: bool = True
    max_tokens: PositiveInt = 2048
    """Longer examples are dropped and counted."""


class SftOptimizerSection(OptimizerSection):
    """AdamW for supervised fine-tuning."""

    learning_rate: PositiveFloat = 1e-4


class SftConfig(Section):
    """An SFT run (`nsa-grpo sft`)."""

    name: str = "sft"
    model: ModelSection
    data: SftDataSection
    prompt: PromptSection = PromptSection()
    optimizer: SftOptimizerSection = SftOptimizerSection()
    epochs: PositiveInt = 1
    steps: PositiveInt | None = None
    """Stop after this many optimizer steps, whatever epochs says."""
    batch_tokens: PositiveInt = 65536
    """Tokens (prompt and completion) of one optimizer step."""
    seed: NonNegativeInt = 0
    runtime_threads: PositiveInt | None = None
    log: LogSection = LogSection()


ConfigT = TypeVar("ConfigT", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line per fault."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-6 as a string; users mean a number.
_UniqueKeyLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """YAML → Python values, duplicate keys refused.

    Raises:
        ConfigError: not YAML, or a key twice.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from error


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += _known_keys(annotation, f"{prefix}{name}.")
    return keys


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override must look like key.sub=value, got {override!r}")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is not a section")
        node = child
    node[last] = parse_yaml(value)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `tree` with `key.sub=value` strings applied in order (values are YAML).

    Raises:
        ConfigError: not of that form, not YAML, or a key below something that is not a section.
    """
    tree = copy.deepcopy(tree)
    for override in overrides:
        _apply_override(tree, override)
    return tree


def _suggestion(where: str, known: list[str]) -> str:
    """What an unknown key may have been meant for: the same name elsewhere, one of its section that looks like it, or else what that has."""
    section, _, name = where.rpartition(".")
    beside = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    near = [key for key in known if key.rpartition(".")[2] == name] or [beside[key] for key in difflib.get_close_matches(name, beside, n=1)]
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(beside.values())}"


def _describe(error: ValidationError, schema: type[BaseModel]) -> str:
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            lines.append(f"unknown key {where}; {_suggestion(where, _known_keys(schema))}")
        elif fault["type"] == "missing":
            lines.append(f"{where} is required")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            given = fault.get("input")
            shown = "" if isinstance(given, dict | BaseModel) else f" (given {given!r})"
            lines.append(f"{where}: {message}{shown}" if where else message)
    return "\n".join(lines)


def build_config(schema: type[ConfigT], tree: dict[str, Any]) -> ConfigT:
    """Validate a plain dict against `schema`.

    Raises:
        ConfigError: one line per fault, with a suggestion for unknown keys.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_describe(error, schema)) from error


def load_config(schema: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file, apply `key.sub=value` overrides (values are YAML) and validate.

    Raises:
        ConfigError: no such file, not YAML, a duplicate or unknown key, a value out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no config file at {path}")
    tree = parse_yaml(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(tree).__name__}")
    return build_config(schema, apply_overrides({"name": path.stem, **tree}, overrides))
