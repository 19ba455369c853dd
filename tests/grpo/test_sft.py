"""SFT: rows become the right text and tokens, steps hold every example once, the loss is right, a run leaves a usable checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.config import LogSection, ModelSection, PromptSection, RunConfig, SftConfig, SftDataSection, SftOptimizerSection, load_config
from grpo.data import build_prompts as build_training_prompts
from grpo.data import load_rows
from grpo.log import read_lines
from grpo.prompt_settings import load_prompt_settings
from grpo.prompts import R1_ZERO_TEMPLATE
from grpo.quickstart_task import build_tokenizer, make_problems
from grpo.sft import _Trainer, make_batch, run_sft
from grpo.sft_data import SftExample, SftText, clean_solution, fill, load_texts, plan_steps, think_answer, tokenize
from nsa.config import NSAConfig
from nsa.model import NSAForCausalLM
from rewards.format import is_well_formed

GSM8K_ROW = {"question": "How many?", "answer": "She has 48/2 = <<48/2=24>>24 clips.\nThat is 24+1,000=<<24+1000=1024>>1024.\n#### 1,024"}
PLAIN_ROW = {"problem": "How many?", "answer": "1024", "solution": "She has 48/2 = 24 clips.\nThat is 24+1,000=1024.", "source": "gsm8k"}
SOLUTION = "She has 48/2 = 24 clips.\nThat is 24+1,000=1024."


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: str, *, prompt: PromptSection | None = None) -> list[SftText]:
    return load_texts(SftDataSection(train=path), prompt or PromptSection(), build_tokenizer())[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny NSA model with the quickstart's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = NSAConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        compress_block_size=8,
        compress_stride=4,
        select_block_size=8,
        num_selected_blocks=4,
        window_size=16,
    )
    NSAForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_config(checkpoint: Path, run_dir: Path, *, optimizer: dict | None = None, data: dict | None = None, **fields) -> SftConfig:
    return SftConfig(
        model=ModelSection(path=str(checkpoint), device="cpu"),
        data=SftDataSection(**{"train": "in memory", **(data or {})}),
        optimizer=SftOptimizerSection(**{"learning_rate": 3e-3, "micro_batch_tokens": 600, **(optimizer or {})}),
        log=LogSection(run_dir=str(run_dir), progress=False),
        **{"batch_tokens": 1000, **fields},
    )


def sums(count: int, seed: int = 0) -> list[tuple[str, str]]:
    problems = make_problems(count, seed=seed, num_digits=2, held_out=False)
    return [(R1_ZERO_TEMPLATE.replace("{question}", problem.question), problem.completion) for problem in problems]


# ---- text


def test_think_answer_form() -> None:
    assert think_answer("… Assistant:", "1+1=2", "2", prefilled=False) == " <think> 1+1=2 </think> <answer> 2 </answer>"
    assert think_answer("… Assistant: <think>", "1+1=2", "2", prefilled=True) == " 1+1=2 </think> <answer> 2 </answer>"
    assert think_answer("<|assistant|>\n", "1+1=2", "2", prefilled=False) == "<think> 1+1=2 </think> <answer> 2 </answer>"


@pytest.mark.parametrize("prefilled", [False, True])
def test_the_form_is_what_the_format_reward_wants(prefilled: bool) -> None:
    assert is_well_formed(think_answer("Assistant:", SOLUTION, "1024", prefilled=prefilled), prefilled=prefilled)


def test_calculator_marks_and_answer_line_are_cut() -> None:
    assert clean_solution(GSM8K_ROW["answer"]) == SOLUTION
    assert clean_solution("if 3<<5 then 2<3") == "if 3<<5 then 2<3"


@pytest.mark.parametrize("row", [GSM8K_ROW, PLAIN_ROW], ids=["gsm8k", "solution column"])
def test_problem_rows_are_rendered_with_the_runs_template(row: dict, tmp_path: Path) -> None:
    texts = read(write_rows(tmp_path / "rows.jsonl", [row]))
    prompt = R1_ZERO_TEMPLATE.replace("{question}", "How many?")
    assert texts == [SftText(prompt=prompt, completion=f" <think> {SOLUTION} </think> <answer> 1024 </answer>")]


def test_prefilled_prompts_keep_the_opening_tag(tmp_path: Path) -> None:
    (text,) = read(write_rows(tmp_path / "rows.jsonl", [PLAIN_ROW]), prompt=PromptSection(prefill_think=True))
    assert text.prompt.endswith("Assistant: <think>")
    assert text.completion == f" {SOLUTION} </think> <answer> 1024 </answer>"


def test_prompt_and_completion_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [{"prompt": "Q: 1+1?\nA:", "completion": " 2", "question": "ignored"}, {"prompt": "x", "completion": "y\n"}]
    assert read(write_rows(tmp_path / "rows.jsonl", rows)) == [SftText(prompt="Q: 1+1?\nA:", completion=" 2"), SftText(prompt="x", completion="y\n")]


def test_solutions_with_tags_of_their_own_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [PLAIN_ROW, {**PLAIN_ROW, "solution": "a </think> b"}])
    texts, tagged = load_texts(SftDataSection(train=path), PromptSection(), build_tokenizer())
    assert (len(texts), tagged.tags_in_solution) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"the dataset is empty"),
        ([{"question": "a", "answer": "5"}], r"row 1: SFT needs columns prompt and completion, or .*; the row has question, answer"),
        ([PLAIN_ROW, {**PLAIN_ROW, "solution": "  "}], r"problem 2 \('How many\?'\) has no solution"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], r"row 2: column completion must hold a text, got nothing"),
        ([{"prompt": "a", "completion": ["b"]}], r"row 1: column completion must hold a text, got \['b'\]"),
        ([{"prompt": "", "completion": "b"}], r"row 1: column prompt must hold a text"),
    ],
)
def test_rows_that_cannot_be_used_are_named(rows: list[dict], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(write_rows(tmp_path / "rows.jsonl", rows))


# ---- tokens


def test_tokens_are_those_of_sampling_with_an_end_of_sequence(tmp_path: Path) -> None:
    tokenizer, section = build_tokenizer(), PromptSection()
    path = write_rows(tmp_path / "rows.jsonl", [PLAIN_ROW])
    (example,), too_long = tokenize(read(path), section, tokenizer, eos_id=1, max_tokens=10_000)
    (prompt,), _ = build_training_prompts(load_rows(path), tokenizer, section)
    assert too_long == 0
    assert example.prompt_ids == prompt.token_ids
    assert example.completion_ids[-1] == 1
    assert tokenizer.decode(example.completion_ids[:-1]) == f" <think> {SOLUTION} </think> <answer> 1024 </answer>"


def test_too_long_examples_are_left_out_and_counted() -> None:
    texts = [SftText(prompt="1", completion="2" * length) for length in (3, 50, 4)]
    examples, too_long = tokenize(texts, PromptSection(), build_tokenizer(), eos_id=1, max_tokens=10)
    assert ([example.num_tokens for example in examples], too_long) == ([5, 6], 1)
    with pytest.raises(ValueError, match="all 3 examples are longer than 4 tokens"):
        tokenize(texts, PromptSection(), build_tokenizer(), eos_id=1, max_tokens=4)
    with pytest.raises(ValueError, match="at least one example"):
        tokenize([], PromptSection(), build_tokenizer(), eos_id=1, max_tokens=4)


# ---- steps


def example_of(length: int, prompt: int = 1) -> SftExample:
    return SftExample(prompt_ids=tuple(range(3, 3 + prompt)), completion_ids=tuple(range(50, 50 + length - prompt)))


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=40), budget=st.integers(1, 100), epochs=st.integers(1, 3), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_epoch_holds_every_example_once_within_the_budget(lengths: list[int], budget: int, epochs: int, seed: int) -> None:
    examples = [example_of(length) for length in lengths]
    options = {"batch_tokens": budget, "seed": seed, "shuffle": True}
    steps = plan_steps(examples, epochs=epochs, steps=None, **options)
    flat = [index for step in steps for index in step]
    for epoch in range(epochs):
        assert sorted(flat[epoch * len(examples) : (epoch + 1) * len(examples)]) == list(range(len(examples)))
    assert all(len(step) == 1 or sum(lengths[index] for index in step) <= budget for step in steps)
    assert steps == plan_steps(examples, epochs=epochs, steps=None, **options)
    longer = plan_steps(examples, epochs=1, steps=len(steps) + 3, **options)
    assert len(longer) == len(steps) + 3
    assert longer[: len(steps)] == steps


def test_order_without_shuffle_and_with_another_seed() -> None:
    examples = [example_of(5) for _ in range(30)]
    options = {"batch_tokens": 10, "epochs": 1, "steps": None}
    assert [i for step in plan_steps(examples, seed=0, shuffle=False, **options) for i in step] == list(range(30))
    assert plan_steps(examples, seed=0, shuffle=True, **options) != plan_steps(examples, seed=1, shuffle=True, **options)


def test_an_example_longer_than_the_budget_stands_alone() -> None:
    assert [len(run) for run in fill([example_of(n) for n in (4, 90, 4, 4)], 10)] == [1, 1, 2]


def test_batch_rows_are_the_completions() -> None:
    batch = make_batch([example_of(5, prompt=2), example_of(3, prompt=1)], 0.25)
    assert batch.token_ids_T.tolist() == [3, 4, 50, 51, 52, 3, 50, 51]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.cu_seqlens_N1.tolist() == [0, 5, 8]
    assert batch.loss_weights_T.tolist() == [0, 0, 0.25, 0.25, 0.25, 0, 0.25, 0.25]


def test_an_empty_prompt_leaves_the_first_token_unpredicted() -> None:
    batch = make_batch([example_of(3), SftExample(prompt_ids=(), completion_ids=(5, 6))], 1.0)
    assert batch.loss_weights_T.tolist() == [0, 1, 1, 0, 1]


# ---- training


def test_loss_is_the_token_mean_and_does_not_depend_on_the_micro_batches(checkpoint: Path, tmp_path: Path) -> None:
    examples = [example_of(length, prompt=prompt) for length, prompt in ((40, 10), (17, 3), (60, 1), (9, 8))]
    results = []
    for budget in (1, 60, 1000):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        config = make_config(checkpoint, tmp_path, optimizer={"micro_batch_tokens": budget, "logprob_chunk_tokens": 7})
        results.append(_Trainer(config, model, torch.device("cpu"), total_steps=1).step(0, examples))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([[*example.prompt_ids, *example.completion_ids]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])
        total -= float(logprobs[-len(example.completion_ids) :].sum())
        count += len(example.completion_ids)
    for result in results:
        assert result["loss"] == pytest.approx(total / count, rel=1e-5)
        assert result["grad_norm"] == pytest.approx(results[0]["grad_norm"], rel=1e-4)


def test_a_run_learns_and_its_checkpoint_can_be_trained_on(checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(checkpoint, tmp_path / "run", steps=30, optimizer={"learning_rate": 2e-2, "warmup_steps": 3, "schedule": "cosine"})
    final = run_sft(config, sums(40))
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[0]["loss"] > 5
    assert lines[-1]["loss"] < 2.5
    assert {"grad_norm", "learning_rate", "entropy", "num_tokens", "epoch", "tokens_per_second", "grad_norm/gate", "grad_norm/phi"} <= lines[0].keys()
    assert all(lines[0][f"grad_norm/{kind}"] > 0 for kind in ("q", "k", "v", "cmp_k", "cmp_v", "win_k", "win_v", "gate"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert isinstance(model, NSAForCausalLM)
    assert tokenizer.eos_token_id == build_tokenizer().eos_token_id
    assert load_prompt_settings(final) == PromptSection()
    sample = read_lines(tmp_path / "run" / "samples.jsonl")[0]
    assert (sample["question"], sample["completion"].removesuffix("<eos>")) == sums(40)[0]
    assert run_sft(make_config(final, tmp_path / "again", steps=1), sums(4)).is_dir()


def test_the_same_seed_gives_the_same_weights_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    weights = []
    for name in ("one", "two"):
        torch.rand(5)
        final = run_sft(make_config(checkpoint, tmp_path / name, steps=3), sums(20))
        weights.append((final / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("fields", [{"dtype": "bfloat16"}, {"gradient_checkpointing": True}], ids=str)
def test_autocast_and_gradient_checkpointing_train_the_same_model(fields: dict, checkpoint: Path, tmp_path: Path) -> None:
    plain = make_config(checkpoint, tmp_path / "plain", steps=2)
    changed = plain.model_copy(
        update={"model": plain.model.model_copy(update=fields), "log": LogSection(run_dir=str(tmp_path / "x"), progress=False)}
    )
    losses = []
    for config in (plain, changed):
        run_dir = run_sft(config, sums(10)).parents[1]
        losses.append([line["loss"] for line in read_lines(run_dir / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_rows_from_a_file_with_dropped_ones_reported(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in sums(5)] + [{"prompt": "1" * 300, "completion": "2"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    run_sft(make_config(checkpoint, tmp_path / "run", data={"train": path}))
    assert "5 examples" in (out := capsys.readouterr().out)
    assert "1 longer than 256 tokens left out" in out


def test_faults_are_found_before_a_run_folder_is_made(checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(checkpoint, tmp_path / "run", data={"train": str(tmp_path / "none.jsonl")})
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.jsonl"):
        run_sft(config)
    with pytest.raises(ValueError, match="at least one example"):
        run_sft(config, [])
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(FileNotFoundError, match=r"model\.path: .* is not a checkpoint"):
        run_sft(make_config(bare, tmp_path / "run"), sums(2))
    (bare / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(ValueError, match=r"model\.path: no usable tokenizer"):
        run_sft(make_config(bare, tmp_path / "run"), sums(2))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((checkpoint / name).read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(ValueError, match=r"token id \d+, but the model of .* has 100 tokens"):
        run_sft(make_config(tmp_path, tmp_path / "run"), sums(2))


def test_a_finished_run_is_not_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(checkpoint, tmp_path / "run", steps=1)
    run_sft(config, sums(4))
    with pytest.raises(ValueError, match="already holds a run"):
        run_sft(config, sums(4))


def test_shipped_configs_are_valid() -> None:
    folder = Path(__file__).parents[2] / "configs"
    sft = load_config(SftConfig, folder / "sft_gsm8k_smollm2.yaml")
    run = load_config(RunConfig, folder / "gsm8k_smollm2_1gpu.yaml")
    assert run.model.path == f"{sft.log.run_dir}/checkpoints/final"
    assert run.prompt == sft.prompt
    assert all(len((folder / name).read_text().splitlines()) <= 60 for name in ("sft_gsm8k_smollm2.yaml", "gsm8k_smollm2_1gpu.yaml"))
