"""How a question becomes the text, and the tokens, of a prompt: R1-Zero template, chat template, a file, or as it is.

Leaves out data (grpo/data.py) and what rewards expect; the one link to them is `prefill_think`, which must say the truth
about the rendered text: a prompt that ends with `<think>` without the setting is refused, for the format reward would be 0 for ever.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from grpo.config import PromptSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK = "<think>"
PLACEHOLDER = "{question}"

R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> ... </think> and <answer> ... </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: {question}. Assistant:"
)
"""The R1-Zero paper's template, word for word, as one paragraph; the period after the question is part of it."""

_BUILT_IN = ("r1_zero", "chat", "none")


def load_template(section: PromptSection) -> str | None:
    """The text with `{question}` in it, or None for `chat`. A file's last newline is left out.

    Raises:
        ValueError: neither a built-in name nor a file, or a file without `{question}`.
    """
    if section.template == "r1_zero":
        return R1_ZERO_TEMPLATE
    if section.template == "none":
        return PLACEHOLDER
    if section.template == "chat":
        return None
    path = Path(section.template).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(section.template, _BUILT_IN, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"prompt.template: {section.template!r} is neither one of {', '.join(_BUILT_IN)} nor a file{hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt.template: {path} is not UTF-8 text") from error
    if PLACEHOLDER not in text:
        raise ValueError(f"prompt.template: {path} does not contain {PLACEHOLDER}, the place where the question goes")
    return text.removesuffix("\n")


def render(question: str, *, section: PromptSection, tokenizer: PreTrainedTokenizerBase | None, system: str | None = None) -> str:
    """The prompt's text. `system` is the row's own system message, used by `chat` where `section.system` is None.

    With `prefill_think` the text ends with `<think>` (set off by one space, except after a chat template's own generation
    prompt or white space). `tokenizer` may be None unless the template is `chat`.

    Raises:
        ValueError: unusable template, no chat template, or a text that ends with `<think>` although `prefill_think` is off.
    """
    template = load_template(section)
    text = _render_chat(question, tokenizer, section.system or system) if template is None else template.replace(PLACEHOLDER, question)
    already = text.rstrip().endswith(THINK)
    if section.prefill_think:
        if already:
            return text
        gap = " " if template is not None and text and not text[-1].isspace() else ""
        return text + gap + THINK
    if already:
        raise ValueError(f"the prompt made by prompt.template: {section.template} already ends with {THINK}; set prompt.prefill_think: true")
    return text


def _render_chat(question: str, tokenizer: PreTrainedTokenizerBase | None, system: str | None) -> str:
    from jinja2 import TemplateError

    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("prompt.template: chat needs a tokenizer with a chat template, and this one has none; use r1_zero, none or a template file")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise ValueError(f"prompt.template: the tokenizer's chat template refuses the messages: {error}") from error


def encode(texts: list[str], *, section: PromptSection, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of rendered prompts. BOS is there only if the tokenizer adds it by itself, or the chat template wrote it;
    an EOS that the tokenizer appends by itself is taken off, for a prompt is to be continued."""
    special = section.template != "chat"
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=special, padding=False, truncation=False, return_attention_mask=False)["input_ids"]  # type: ignore[assignment]
    eos = tokenizer.eos_token_id
    if special and eos is not None:
        rows = [ids[:-1] if ids and ids[-1] == eos and not text.endswith(str(tokenizer.eos_token)) else ids for ids, text in zip(rows, texts)]
    return [list(ids) for ids in rows]
