"""The quickstart's task, tokenizer and settings; the whole job in small is marked slow."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from grpo import quickstart
from grpo.config import PromptSection
from grpo.prompts import R1_ZERO_TEMPLATE, render
from grpo.quickstart_task import GUESSES, KNOWN_PAIRS, build_tokenizer, is_known, make_problem, make_problems, write_rows

TOKENIZER = build_tokenizer()
SECTION = PromptSection()


def test_column_sums_are_right() -> None:
    problem = make_problem(347, 258, 3)
    assert problem.answer == "605"
    assert problem.solution == "7+8+0=15, 4+5+1=10, 3+2+1=06"
    assert problem.completion == " <think> 7+8+0=15, 4+5+1=10, 3+2+1=06 </think> <answer> 605 </answer>"
    assert make_problem(999, 999, 3).answer == "1998"
    with pytest.raises(ValueError, match="at most 2 digits, got 100"):
        make_problem(100, 1, 2)


def test_reply_is_well_formed_and_its_answer_is_accepted() -> None:
    from rewards.format import is_well_formed
    from rewards.math_equal import equivalent

    problem = make_problem(86, 79, 2)
    assert is_well_formed(problem.completion)
    assert equivalent("165", problem.completion)


def test_held_out_operands_never_occur_in_training() -> None:
    def operands(held_out: bool, seed: int) -> set[str]:
        problems = make_problems(200, seed=seed, num_digits=3, held_out=held_out)
        assert len({problem.question for problem in problems}) == 200
        return {number for problem in problems for number in problem.question.removeprefix("What is ").split(",")[0].split(" + ")}

    assert not (operands(True, 0) | operands(True, 1)) & (operands(False, 0) | operands(False, 1))
    assert make_problems(5, seed=3, num_digits=3, held_out=False) == make_problems(5, seed=3, num_digits=3, held_out=False)
    with pytest.raises(ValueError, match="too few different sums of 18 numbers"):
        make_problems(400, seed=0, num_digits=2, held_out=True)


def test_warm_up_guesses_at_unknown_pairs_without_favouring_the_sum() -> None:
    problems = make_problems(3000, seed=0, num_digits=2, held_out=False, guesses=True)
    columns = [column for problem in problems for column in problem.solution.split(", ")]
    errors: dict[bool, list[int]] = {True: [], False: []}
    for column in columns:
        terms, total = column.split("=")
        x, y, carry = map(int, terms.split("+"))
        errors[is_known(x, y)].append(int(total) - x - y - carry)
    assert set(errors[True]) == {0}
    shares = {error: errors[False].count(error) / len(errors[False]) for error in GUESSES}
    assert sum(shares.values()) == 1.0
    assert all(abs(share - 1 / len(GUESSES)) < 0.05 for share in shares.values())
    assert sum(is_known(x, y) for x in range(10) for y in range(x, 10)) == KNOWN_PAIRS
    for problem in problems[:50]:  # the answer follows from the columns, right or wrong
        ones, tens = (column.split("=")[1] for column in problem.solution.split(", "))
        assert problem.answer == str(int(tens) * 10 + int(ones) % 10)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_tokenizer_gives_back_any_text(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.unk_token_id not in ids


def test_template_words_and_digits_are_single_tokens(tmp_path: Path) -> None:
    problem = make_problem(347, 258, 3)
    prompt = render(problem.question, section=SECTION, tokenizer=None)
    text = prompt + problem.completion
    pieces = [TOKENIZER.decode([index]) for index in TOKENIZER(text)["input_ids"]]
    assert "".join(pieces) == text
    assert [piece for piece in pieces if any(character.isdigit() for character in piece)] == list("347258" + "78015" + "45110" + "32106" + "605")
    assert len(TOKENIZER(R1_ZERO_TEMPLATE.replace("{question}", ""))["input_ids"]) <= 80
    assert len(TOKENIZER) <= 450
    # prompt and completion apart give the same tokens as together, as SFT and sampling need
    assert TOKENIZER(prompt)["input_ids"] + TOKENIZER(problem.completion)["input_ids"] == TOKENIZER(text)["input_ids"]
    TOKENIZER.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == TOKENIZER(text)["input_ids"]


def test_numbers_lie_beyond_the_window_and_sequences_beyond_the_selected_blocks() -> None:
    model = quickstart.MODEL
    problem = make_problem(347 % 10**quickstart.NUM_DIGITS, 258 % 10**quickstart.NUM_DIGITS, quickstart.NUM_DIGITS)
    prompt = TOKENIZER(render(problem.question, section=SECTION, tokenizer=None))["input_ids"]
    last_digit = max(index for index, token in enumerate(prompt) if TOKENIZER.decode([token]).isdigit())
    reach = model["num_hidden_layers"] * (model["window_size"] - 1)
    assert len(prompt) - 1 - last_digit > reach  # already the first token of the reply is too far away
    assert len(prompt) > model["num_selected_blocks"] * model["select_block_size"] + model["window_size"]
    assert quickstart.TWINS["full"]["num_selected_blocks"] * model["select_block_size"] >= model["max_position_embeddings"]


def test_rows_are_written_for_both_stages(tmp_path: Path) -> None:
    problems = make_problems(3, seed=0, num_digits=2, held_out=False)
    rows = [json.loads(line) for line in write_rows(tmp_path / "a.jsonl", problems).read_text().splitlines()]
    assert rows[0] == {"question": problems[0].question, "answer": problems[0].answer}
    rows = [json.loads(line) for line in write_rows(tmp_path / "b.jsonl", problems, completions=True).read_text().splitlines()]
    assert rows[2]["prompt"].endswith("Assistant:")
    assert rows[2]["completion"] == problems[2].completion


def test_settings_follow_folder_seed_and_overrides(tmp_path: Path) -> None:
    sft, grpo = quickstart.configurations(tmp_path, seed=3, overrides=["train.steps=2", "sft.steps=4"])
    assert (sft.steps, grpo.train.steps, grpo.train.seed) == (4, 2, 3)
    assert sft.model.path == f"{tmp_path}/base"
    assert grpo.model.path == f"{tmp_path}/sft/checkpoints/final"
    assert grpo.runtime.kind == "ray"
    assert grpo.prompt.template == "r1_zero"
    assert sft.seed != quickstart.configurations(tmp_path, seed=4)[0].seed


@pytest.mark.parametrize("twin", ["none", "window", "full"])
def test_base_model_and_twins_are_made_and_can_be_loaded(tmp_path: Path, twin: str) -> None:
    from nsa.model import NSAForCausalLM

    parameters = quickstart.make_base(tmp_path, seed=0, twin=twin)
    model = NSAForCausalLM.from_pretrained(tmp_path / "base")
    assert 2e5 < parameters == sum(parameter.numel() for parameter in model.parameters()) < 1e6
    assert model.config.gate == ("sigmoid" if twin == "none" else "fixed")
    held_out = (tmp_path / "data" / "held_out.jsonl").read_text().splitlines()
    assert len(held_out) == quickstart.NUM_HELD_OUT


def test_folders_in_use_are_left_alone(tmp_path: Path) -> None:
    assert quickstart._free_folder(tmp_path / "new") == tmp_path / "new"
    assert quickstart._free_folder(tmp_path) == tmp_path.with_name(f"{tmp_path.name}-2")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not empty"):
        quickstart.main(["--out", str(tmp_path)])


def test_whole_job_in_small_runs_through_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["runtime.kind=local", "runtime.threads=1", "train.steps=2", "rollout.prompts_per_step=2", "rollout.group_size=4", "rollout.max_tokens=8"]
    small += ["data.eval_limit=4", "evaluation.samples=2", "evaluation.k=[1,2]", "sft.steps=2", "sft.batch_tokens=600", "sft.runtime_threads=1"]
    page = quickstart.run(tmp_path / "out", overrides=small)
    assert page.read_text().count("data:image/png") >= 4
    assert (tmp_path / "out/grpo/checkpoints/final/config.json").is_file()
    printed = capsys.readouterr().out
    assert "pass@1" in printed
    assert "minutes" in printed
    assert str(page) in printed.replace("\n", "")
