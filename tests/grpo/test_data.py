"""Reading problems, building prompts, and the resumable stream."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.config import PromptSection
from grpo.data import PromptStream, build_prompts, load_rows
from grpo.data_types import Prompt
from grpo.records import read_records

ROWS: list[dict[str, Any]] = [{"question": "1+1?", "answer": 2, "level": "easy"}, {"question": "1/2?", "answer": 0.5, "level": "hard"}]


def write_lines(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    return path


class LetterTokenizer:
    """One token per character: all that build_prompts needs."""

    eos_token_id = None
    chat_template = None

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(prompt_id=str(i), token_ids=(i,), question=f"q{i}", answer="0", text=f"q{i}") for i in range(count)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.ndjson"])
def test_json_lines_and_numbers_as_answers(tmp_path: Path, name: str) -> None:
    rows = load_rows(write_lines(tmp_path / name, ROWS))
    assert [(row.question, row.answer, row.meta) for row in rows] == [("1+1?", "2", {"level": "easy"}), ("1/2?", "0.5", {"level": "hard"})]


def test_json_list_data_object_and_lines_under_the_name_json(tmp_path: Path) -> None:
    for content in (json.dumps(ROWS), json.dumps({"data": ROWS}), "\n".join(map(json.dumps, ROWS))):
        (tmp_path / "rows.json").write_text(content, encoding="utf-8")
        assert [row.answer for row in load_rows(tmp_path / "rows.json")] == ["2", "0.5"]


def test_csv_with_quotes_and_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('problem,answer,note\n"a, ""b""\nc",7,x\n', encoding="utf-8-sig")
    (row,) = load_rows(tmp_path / "rows.csv")
    assert (row.question, row.answer, row.meta) == ('a, "b"\nc', "7", {"note": "x"})


def test_parquet_in_verls_layout(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    row = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}],
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "train", "index": 0},
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "verl.parquet")
    (read,) = load_rows(tmp_path / "verl.parquet")
    assert (read.question, read.answer, read.system) == ("2+2?", "4", "Be brief.")
    assert read.meta == {key: row[key] for key in ("data_source", "reward_model", "extra_info")}


def test_verl_ground_truth_that_is_not_text_becomes_json(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "make 24"}], "reward_model": {"ground_truth": {"target": 24, "numbers": [6, 4]}}}
    (read,) = load_rows(write_lines(tmp_path / "rows.jsonl", [row]))
    assert json.loads(read.answer) == {"target": 24, "numbers": [6, 4]}


def test_trl_layout_with_text_or_messages(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2+2?", "solution": r"So $\boxed{\frac{4}{1}}$.", "k": 1},
        {"prompt": [{"role": "user", "content": "3+3?"}], "solution": "6", "k": 2},
    ]
    first, second = load_rows(write_lines(tmp_path / "rows.jsonl", rows))
    assert (first.question, first.answer, first.solution) == ("2+2?", r"\frac{4}{1}", rows[0]["solution"])
    assert (second.question, second.answer) == ("3+3?", "6")
    assert first.meta == {"solution": rows[0]["solution"], "k": 1}


def test_dataset_folder_and_saved_dataset(tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_list([{"problem": "2+2?", "answer": "4"}])
    dataset.save_to_disk(tmp_path / "saved")
    assert load_rows(tmp_path / "saved")[0].answer == "4"


def test_gsm8k_answers_are_split_at_the_hashes(tmp_path: Path) -> None:
    (row,) = load_rows(write_lines(tmp_path / "rows.jsonl", [{"question": "q", "answer": "1000+200\n#### 1,200"}]))
    assert (row.answer, row.solution) == ("1200", "1000+200")


def test_lines_are_split_at_newlines_only(tmp_path: Path) -> None:
    rows = load_rows(write_lines(tmp_path / "rows.jsonl", [{"question": "a\u2028b\u0085c\x0cd", "answer": "1"}]))
    assert rows[0].question == "a\u2028b\u0085c\x0cd"


def test_columns_by_name_and_dotted_path_and_limit(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"info": {"q": "x"}, "gold": True}, {"broken": 1}])
    (row,) = load_rows(path, question_column="info.q", answer_column="gold", limit=1)
    assert (row.question, row.answer) == ("x", "True")
    assert row.meta == {"info": {"q": "x"}, "gold": True}


def test_missing_file_suggests_near_names(tmp_path: Path) -> None:
    write_lines(tmp_path / "gsm8k_train.jsonl", ROWS)
    with pytest.raises(FileNotFoundError, match=r"gsm8k_trian\.jsonl; near it: gsm8k_train\.jsonl"):
        load_rows(tmp_path / "gsm8k_trian.jsonl")
    with pytest.raises(FileNotFoundError, match=r"folder .* does not exist"):
        load_rows(tmp_path / "nowhere" / "x.jsonl")


def test_hub_name_without_network_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"data 'nobody/nothing' \(split 'train'\): neither a file here nor a dataset"):
        load_rows("nobody/nothing")


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b""), ("a.jsonl", b"\n \n"), ("a.json", b"[]"), ("a.csv", b"question,answer\n")])
def test_empty_dataset(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="the dataset is empty"):
        load_rows(tmp_path / name)


@pytest.mark.parametrize("answer", [None, "", "  ", float("nan"), ["4"]])
def test_row_without_answer_names_file_and_row(tmp_path: Path, answer: Any) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [*ROWS, {"question": "q", "answer": answer}])
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 3: no answer in column answer"):
        load_rows(path)


@pytest.mark.parametrize("question", [None, " ", 5, [{"role": "assistant", "content": "x"}], ["x"]])
def test_row_without_question_names_file_and_row(tmp_path: Path, question: Any) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [ROWS[0], {"question": question, "answer": "1"}])
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 2: "):
        load_rows(path)


def test_unknown_columns_list_what_the_row_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1: no answer column; looked for answer, ground_truth, solution, the row has question, label"):
        load_rows(write_lines(tmp_path / "rows.jsonl", [{"question": "q", "label": "1"}]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"question": "q", "answer": "1"}\n{"question": ', "row 2: not JSON"),
        ("a.jsonl", b"[1, 2]\n", "row 1: must be an object"),
        ("a.jsonl", b'{"answer": ' + b"[" * 100_000, "not JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"question": "q", "answer": "1"}\n' * 50, mtime=0)[:40], "damaged gzip"),
        ("a.jsonl.gz", b"plain text", "damaged gzip"),
        ("a.jsonl", b'{"question": "\xff"}', "not UTF-8"),
        ("a.parquet", b"PAR1 nothing", "not a readable parquet"),
        ("a.csv", b"question,answer\na,b,c\n", "row 1: more fields than the header"),
        ("a.txt", b"hello", "unknown type of data file"),
    ],
)
def test_broken_files_give_one_clear_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path / name)


def test_records_are_read_lazily(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\nbroken', encoding="utf-8")
    assert list(read_records(tmp_path / "a.jsonl", limit=1)) == [(f"{tmp_path / 'a.jsonl'}, row 1", {"a": 1})]


def test_long_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = load_rows(write_lines(tmp_path / "rows.jsonl", [{"question": "x" * n, "answer": "1"} for n in (3, 9, 5)]))
    prompts, dropped = build_prompts(rows, LetterTokenizer(), PromptSection(template="none"), 5)  # type: ignore[arg-type]
    assert ([prompt.prompt_id for prompt in prompts], dropped) == (["0", "2"], 1)
    assert prompts[0].text == "xxx"
    assert prompts[0].token_ids == (120, 120, 120)


def test_only_too_long_prompts_is_an_error(tmp_path: Path) -> None:
    rows = load_rows(write_lines(tmp_path / "rows.jsonl", ROWS))
    with pytest.raises(ValueError, match=r"all 2 prompts are longer than 3 tokens \(the shortest has 4\)"):
        build_prompts(rows, LetterTokenizer(), PromptSection(template="none"), 3)  # type: ignore[arg-type]


def test_every_epoch_is_another_permutation_with_ids_of_its_own() -> None:
    stream = PromptStream(make_prompts(20), seed=3)
    first, second = stream.next(20), stream.next(20)
    assert sorted(prompt.question for prompt in first) == sorted(prompt.question for prompt in second)
    assert [prompt.question for prompt in first] != [prompt.question for prompt in second]
    assert {prompt.prompt_id for prompt in first}.isdisjoint(prompt.prompt_id for prompt in second)
    assert stream.epoch == 1.0 + 20 / 20


def test_order_depends_on_the_seed_alone() -> None:
    def draw(seed: int) -> list[str]:
        return [prompt.prompt_id for prompt in PromptStream(make_prompts(20), seed=seed).next(30)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert [prompt.prompt_id for prompt in PromptStream(make_prompts(3), seed=1, shuffle=False).next(7)] == [
        "0",
        "1",
        "2",
        "0#1",
        "1#1",
        "2#1",
        "0#2",
    ]


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 7), before=st.lists(st.integers(1, 9), max_size=4), after=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_resumed_stream_goes_on_exactly(count: int, before: list[int], after: list[int]) -> None:
    whole = PromptStream(make_prompts(count), seed=5)
    for n in before:
        whole.next(n)
    resumed = PromptStream(make_prompts(count), seed=5)
    resumed.load_state(json.loads(json.dumps(whole.state())))
    assert [whole.next(n) for n in after] == [resumed.next(n) for n in after]


def test_state_of_other_data_or_seed_is_refused() -> None:
    state = PromptStream(make_prompts(5), seed=1).state()
    with pytest.raises(ValueError, match="the training data"):
        PromptStream(make_prompts(6), seed=1).load_state(state)
    with pytest.raises(ValueError, match="seed changed"):
        PromptStream(make_prompts(5), seed=2).load_state(state)


def test_stream_refuses_nothing_and_draws_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptStream([], seed=0)
    with pytest.raises(ValueError, match="n >= 1"):
        PromptStream(make_prompts(1), seed=0).next(0)
