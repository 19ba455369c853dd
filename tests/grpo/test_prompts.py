"""Rendering and tokenising of prompts."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grpo.config import PromptSection
from grpo.prompts import R1_ZERO_TEMPLATE, encode, render

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(*, chat: str | None = None, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, and specials; adds <s> and </s> by itself where asked."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    single = [*(["<s>"] if bos else []), "$A", *(["</s>"] if eos else [])]
    pairs = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(single), special_tokens=pairs)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat
    return fast


def test_r1_zero_template_is_the_papers_word_for_word() -> None:
    assert render("What is 2 + 3?", section=PromptSection(), tokenizer=None) == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first thinks about "
        "the reasoning process in the mind and then provides the user with the answer. The reasoning process and answer are enclosed within "
        "<think> ... </think> and <answer> ... </answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> answer "
        "here </answer>. User: What is 2 + 3?. Assistant:"
    )
    assert R1_ZERO_TEMPLATE.count("{question}") == 1
    assert "\n" not in R1_ZERO_TEMPLATE


def test_prefilled_think_follows_the_prompt_after_one_space() -> None:
    assert render("2+2", section=PromptSection(prefill_think=True), tokenizer=None).endswith("User: 2+2. Assistant: <think>")


def test_question_is_replaced_literally_and_other_braces_stay(tmp_path: Path) -> None:
    file = tmp_path / "template.txt"
    file.write_text('{"style": {}} Q: {question}\nagain {question} %s {0}\nA:\n', encoding="utf-8")
    text = render(r"\frac{1}{2} {question} \1", section=PromptSection(template=str(file)), tokenizer=None)
    assert text == '{"style": {}} Q: \\frac{1}{2} {question} \\1\nagain \\frac{1}{2} {question} \\1 %s {0}\nA:'


def test_template_file_without_placeholder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "template.txt"
    file.write_text("Q: {problem}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"does not contain \{question\}"):
        render("x", section=PromptSection(template=str(file)), tokenizer=None)


def test_unknown_template_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean r1_zero"):
        render("x", section=PromptSection(template="r1-zero"), tokenizer=None)


def test_template_none_is_the_question_itself() -> None:
    assert render(" 1+1= ", section=PromptSection(template="none"), tokenizer=None) == " 1+1= "
    assert render("1+1=\n", section=PromptSection(template="none", prefill_think=True), tokenizer=None) == "1+1=\n<think>"


def test_chat_template_puts_system_first_and_opens_the_answer() -> None:
    tokenizer = byte_tokenizer(chat=CHAT)
    section = PromptSection(template="chat", system="Think.")
    expected = "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render("Hi", section=section, tokenizer=tokenizer) == expected
    assert render("Hi", section=section, tokenizer=tokenizer, system="row's own") == expected
    assert "row's own" in render("Hi", section=PromptSection(template="chat"), tokenizer=tokenizer, system="row's own")
    assert render("Hi", section=PromptSection(template="chat", prefill_think=True), tokenizer=tokenizer).endswith("assistant\n<think>")


def test_chat_template_that_opens_think_needs_the_setting() -> None:
    tokenizer = byte_tokenizer(chat=CHAT.replace("assistant\n", "assistant\n<think>\n"))
    with pytest.raises(ValueError, match="prefill_think: true"):
        render("Hi", section=PromptSection(template="chat"), tokenizer=tokenizer)
    text = render("Hi", section=PromptSection(template="chat", prefill_think=True), tokenizer=tokenizer)
    assert text.endswith("assistant\n<think>\n")


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no system role here') }}"])
def test_unusable_chat_template_is_one_clear_error(template: str | None) -> None:
    with pytest.raises(ValueError, match="chat template"):
        render("Hi", section=PromptSection(template="chat"), tokenizer=byte_tokenizer(chat=template))


def test_tokens_encode_the_text_and_bos_comes_from_the_tokenizer_alone() -> None:
    plain, with_bos = byte_tokenizer(), byte_tokenizer(bos=True, eos=True, chat=CHAT)
    assert plain.decode(encode(["ab é"], section=PromptSection(), tokenizer=plain)[0]) == "ab é"
    assert with_bos.decode(encode(["ab"], section=PromptSection(), tokenizer=with_bos)[0]) == "<s>ab"
    chat = PromptSection(template="chat")
    assert with_bos.decode(encode([render("ab", section=chat, tokenizer=with_bos)], section=chat, tokenizer=with_bos)[0]).startswith(
        "<|im_start|>user"
    )
