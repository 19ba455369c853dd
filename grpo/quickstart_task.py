"""The quickstart's task: sums of two numbers, worked column by column, and the tokenizer that writes them.

The prompt is the R1-Zero template with `What is 347 + 258, …`; the think part copies one column's digits after the other
from the prompt, adds them with the carry, and the answer collects the columns' last digits:

    <think> 7+8+0=15, 4+5+1=10, 3+2+1=06 </think> <answer> 605 </answer>

A wording after the sum keeps the digits more than layers·(w − 1) tokens away from their use, so that a window alone
cannot see them. Held-out problems use numbers that no training problem has. The warm-up's teacher knows the form, but of
the 55 pairs of digits only some (`is_known`); at the others it guesses, the next number as often as the sum itself.
So the form is learnt, those sums are not, and only rewards can teach them. (A teacher that left those pairs out made a
model that was sure of wrong sums: no variance within groups, nothing learnt.) Leaves out the model and the training
(grpo.quickstart); nothing is downloaded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo.config import PromptSection
from grpo.prompts import render

QUESTION = "What is {a} + {b}, worked out column by column from the right, with the carry of each column written before the equals sign"

# A word, symbol or tag takes the space before it, and the one after it if a digit follows; each digit stands alone.
_PIECES = r" ?</?(?:think|answer)>(?: (?=[0-9]))?| ?[A-Za-z]+(?: (?=[0-9]))?| ?[^\sA-Za-z0-9<]+(?: (?=[0-9]))?|[0-9]|\s+|<"
KNOWN_PAIRS = 26
GUESSES = (0, 1)  # errors of a guess: at an unknown pair the right sum is one of two, so greedy decoding does not know it either
_PAIRS = [(x, y) for x in range(10) for y in range(x, 10)]
_RANK = {pair: rank for rank, pair in enumerate(random.Random(20250122).sample(_PAIRS, len(_PAIRS)))}  # noqa: S311 (a fixed choice)
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One sum. `solution` is the think part."""

    question: str
    answer: str
    solution: str

    @property
    def completion(self) -> str:
        """The whole reply, as the model should continue the prompt."""
        return f" <think> {self.solution} </think> <answer> {self.answer} </answer>"


def make_problem(a: int, b: int, num_digits: int, *, guess: random.Random | None = None) -> Problem:
    """The sum a + b with its column-by-column solution.

    Args:
        guess: what the teacher's guesses at the pairs it does not know are drawn from; the answer then follows from
            the guesses and may be wrong. None: everything is right.

    Raises:
        ValueError: a number that does not have `num_digits` digits at most.
    """
    for number in (a, b):
        if not 0 <= number < 10**num_digits:
            raise ValueError(f"operands must have at most {num_digits} digits, got {number}")
    first, second = (str(number).zfill(num_digits) for number in (a, b))
    columns, carry, answer = [], 0, 0
    for place, (x, y) in enumerate(zip(map(int, reversed(first)), map(int, reversed(second)))):
        total = x + y + carry
        if guess is not None and not is_known(x, y):
            total = guess.choice([total + error for error in GUESSES if total + error <= 19])
        columns.append(f"{x}+{y}+{carry}={total:02d}")
        answer += (total if place == num_digits - 1 else total % 10) * 10**place
        carry = total // 10
    return Problem(question=QUESTION.format(a=first, b=second), answer=str(answer), solution=", ".join(columns))


def is_known(x: int, y: int) -> bool:
    """Whether the warm-up's teacher knows the sum of these two digits: KNOWN_PAIRS of 55, the same for every seed."""
    return _RANK[min(x, y), max(x, y)] < KNOWN_PAIRS


def is_held_out(number: int) -> bool:
    """Whether a number is kept for held-out problems: one in five, spread evenly over the digits of every place."""
    return sum((2 * place + 1) * int(digit) for place, digit in enumerate(reversed(str(number)))) % 5 == 0


def make_problems(count: int, *, seed: int, num_digits: int, held_out: bool, guesses: bool = False) -> list[Problem]:
    """`count` different problems, the same for the same arguments.

    A fifth of all numbers (`is_held_out`) are kept for held-out problems alone, whatever `seed` is: neither operand of a
    held-out problem ever occurs in a training problem.

    Args:
        guesses: solutions and answers are those of the warm-up's teacher, right or wrong.

    Raises:
        ValueError: there are not enough different problems.
    """
    pool = [number for number in range(10 ** (num_digits - 1), 10**num_digits) if is_held_out(number) == held_out]
    source = random.Random(f"{seed}/{held_out}")  # noqa: S311 (data, not a secret)
    pairs: dict[tuple[int, int], None] = {}
    for _ in range(100 * count):
        pairs[source.choice(pool), source.choice(pool)] = None
        if len(pairs) == count:
            return [make_problem(a, b, num_digits, guess=source if guesses else None) for a, b in pairs]
    raise ValueError(f"there are too few different sums of {len(pool)} numbers for count={count}; found {len(pairs)}")


def write_rows(path: Path, problems: Sequence[Problem], *, completions: bool = False) -> Path:
    """Write problems as JSONL: question and answer for GRPO, and with `completions` prompt and completion for SFT."""
    section = PromptSection()
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            if completions:
                row = {"prompt": render(problem.question, section=section, tokenizer=None), "completion": problem.completion}
            else:
                row = {"question": problem.question, "answer": problem.answer}
            file.write(json.dumps(row) + "\n")
    return path


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer for this task with bytes below it: decode(encode(text)) == text for any text.

    Every word of the template and of the replies is one token, and so is each digit; other text falls back to bytes.
    """
    splitter = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    sample = make_problem(10, 89, 2)
    text = render(sample.question, section=PromptSection(), tokenizer=None) + sample.completion
    pieces = dict.fromkeys(piece for piece, _ in splitter.pre_tokenize_str(text))
    pieces.update(dict.fromkeys("0123456789"))
    vocabulary = [(token, 0.0) for token in (PAD, EOS, UNKNOWN)]
    vocabulary += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    vocabulary += [(piece, -1.0) for piece in pieces]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    core.pre_tokenizer = splitter
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, clean_up_tokenization_spaces=False, model_max_length=512
    )
