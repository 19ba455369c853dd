"""The built-in engine against naive decoding, and everything that must not change its results."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo.data_types import Completion, Group, Prompt
from grpo.rollout.decode_batch import DecodeBatch, bucket
from grpo.rollout.engine import Sampling
from grpo.rollout.requests import eos_token_ids
from grpo.rollout.sampling import hashed_uniforms, sample_tokens
from grpo.rollout.scheduler import PageCounts, Scheduler
from grpo.rollout.stops import StopStrings, TokenPieces
from grpo.rollout.torch_engine import TorchEngine
from grpo.seeding import fold
from nsa.config import NSAConfig
from nsa.model import NSAForCausalLM

VOCABULARY = 96
EOS = (1, 2)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Tokens of one to three characters, so that strings can be made in several ways and span tokens."""
    pieces = ["<pad>", "<eos>", "<end>", *"abcdefghijklmnopqrstuvwxyz<>/.,é ", "ab", "b>", "</", "</a", "a>", "ans", "wer", "er>", "</ans", "wer>"]
    pieces += [f"{first}{second}" for first in "stuvwxyz" for second in "abcdefgh"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces[:VOCABULARY])}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", additional_special_tokens=["<end>"])


TOKENIZER = _tokenizer()


def _model(seed: int = 0, **changes: Any) -> NSAForCausalLM:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "compress_block_size": 8, "compress_stride": 4, "select_block_size": 8, "num_selected_blocks": 4,
        "window_size": 16, "max_position_embeddings": 256, "initializer_range": 0.3, "eos_token_id": list(EOS), "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(seed)
    return NSAForCausalLM(NSAConfig(**{**settings, **changes})).eval()


def _engine(model: NSAForCausalLM | None = None, **changes: Any) -> TorchEngine:
    settings: dict[str, Any] = {"max_sequences": 16, "version": 3, **changes}
    return TorchEngine(model or _model(), TOKENIZER, **settings)


def _prompt(number: int, length: int) -> Prompt:
    generator = torch.Generator().manual_seed(number)
    token_ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
    return Prompt(prompt_id=f"p{number}", token_ids=tuple(token_ids), question="", answer="", text="")


def _prompts(*lengths: int) -> list[Prompt]:
    return [_prompt(number, length) for number, length in enumerate(lengths)]


def _by_prompt(groups: Sequence[Group]) -> dict[str, tuple[Completion, ...]]:
    assert len({group.prompt.prompt_id for group in groups}) == len(groups)
    return {group.prompt.prompt_id: group.completions for group in groups}


def _assert_drawn(model: NSAForCausalLM, group: Group, sampling: Sampling) -> None:
    """Every token is the one that full recomputation of what stands before it draws; by induction the whole completion is."""
    prompt = group.prompt.token_ids
    for index, completion in enumerate(group.completions):
        ids, length = torch.tensor([*prompt, *completion.token_ids]), len(completion.token_ids)
        with torch.no_grad():
            hidden = model.model.forward_packed(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)])).hidden_TE
            logits = (hidden[len(prompt) - 1 : -1] @ model.lm_head.weight.T).float()
        key = torch.tensor(fold(sampling.seed, group.prompt.prompt_id, index)).expand(length)
        settings = [torch.tensor(value).expand(length) for value in (sampling.temperature * 1.0, sampling.top_p, sampling.top_k)]
        expected, logprobs = sample_tokens(logits, hashed_uniforms(key, torch.arange(length)), *settings)
        assert list(completion.token_ids) == expected.tolist()
        torch.testing.assert_close(torch.tensor(completion.logprobs), logprobs, atol=1e-4, rtol=0)
        assert length == sampling.max_tokens or completion.token_ids[-1] in EOS


def _equal_tokens(left: Sequence[Group], right: Sequence[Group]) -> None:
    first, second = _by_prompt(left), _by_prompt(right)
    assert first.keys() == second.keys()
    for name, completions in first.items():
        for one, other in zip(completions, second[name], strict=True):
            assert one.token_ids == other.token_ids
            assert one.text == other.text
            assert one.finish_reason == other.finish_reason
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"kv": "shared", "compressor": "mean"}, {"gate": "blend", "qk_norm": True, "tie_word_embeddings": False}])
@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"group_size": 4}, {"group_size": 2, "temperature": 0.7}, {"group_size": 3, "temperature": 1.3, "top_p": 0.8, "top_k": 20}],
)
def test_tokens_and_logprobs_equal_naive_recomputation(changes: dict[str, Any], settings: dict[str, Any]):
    model, sampling = _model(**changes), Sampling(**settings, max_tokens=24, seed=5)
    groups = list(_engine(model).generate(_prompts(1, 5, 33, 70, 64), sampling))
    assert len(groups) == 5
    for group in groups:
        assert len(group.completions) == sampling.group_size
        _assert_drawn(model, group, sampling)
    if sampling.group_size > 1:
        assert len({completion.token_ids for completion in _by_prompt(groups)["p3"]}) > 1


def test_logprobs_equal_score_and_versions_are_stamped():
    engine = _engine()
    groups = list(engine.generate(_prompts(1, 9, 50, 64, 101), Sampling(max_tokens=40, group_size=4)))
    sequences = [(*group.prompt.token_ids, *completion.token_ids) for group in groups for completion in group.completions]
    completions = [completion for group in groups for completion in group.completions]
    scored = engine.score(sequences)
    for completion, sequence, values in zip(completions, sequences, scored, strict=True):
        assert values.shape == (len(sequence),)
        assert values[0] == 0
        torch.testing.assert_close(values[-len(completion.token_ids) :], torch.tensor(completion.logprobs), atol=1e-4, rtol=0)
        assert completion.policy_version == 3
        assert not values.is_inference()


def test_score_handles_short_sequences_and_splits_by_budget(monkeypatch: pytest.MonkeyPatch):
    engine = _engine()
    sequences = [[5], [], [5, 6], list(range(3, 60)), list(range(10, 40))]
    whole = engine.score(sequences)
    assert [len(values) for values in whole] == [1, 0, 2, 57, 30]
    monkeypatch.setattr("grpo.rollout.torch_engine.PACKED_TOKENS", 40)
    for one, other in zip(whole, engine.score(sequences), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_results_do_not_depend_on_batch_size_order_company_or_interval(monkeypatch: pytest.MonkeyPatch):
    model = _model()
    prompts = _prompts(3, 64, 20, 90, 65)
    sampling = Sampling(max_tokens=20, group_size=3, seed=11, stop=("a>", "ab", "é"))
    expected = list(_engine(model, max_sequences=64).generate(prompts, sampling))
    for max_sequences in (2, 5):
        _equal_tokens(list(_engine(model, max_sequences=max_sequences).generate(prompts, sampling)), expected)
    _equal_tokens(list(_engine(model).generate(prompts[::-1], sampling)), expected)
    one = list(_engine(model).generate(prompts[3:4], sampling))
    assert one[0].completions[2].token_ids == _by_prompt(expected)["p3"][2].token_ids
    _equal_tokens(list(_engine(model, max_cache_tokens=64 * 5).generate(prompts, sampling)), expected)
    monkeypatch.setattr("grpo.rollout.generation.PACKED_TOKENS", 50)
    _equal_tokens(list(_engine(model).generate(prompts, sampling)), expected)
    for steps in (1, 100):
        engine = _engine(model, max_sequences=6)
        engine._steps_per_look = steps
        _equal_tokens(list(engine.generate(prompts, sampling)), expected)


def test_another_seed_gives_other_tokens_and_the_same_seed_the_same():
    engine = _engine()
    prompts = _prompts(10, 20)
    first = list(engine.generate(prompts, Sampling(max_tokens=10, seed=1, group_size=2)))
    _equal_tokens(list(engine.generate(prompts, Sampling(max_tokens=10, seed=1, group_size=2))), first)
    other = _by_prompt(list(engine.generate(prompts, Sampling(max_tokens=10, seed=2, group_size=2))))
    assert other["p0"][0].token_ids != _by_prompt(first)["p0"][0].token_ids


def test_padding_to_buckets_changes_nothing():
    """What a CUDA graph runs: rows and pages beyond those in use, on the scratch page."""
    model = _model()
    prompts = _prompts(3, 64, 20, 90, 41)
    sampling = Sampling(max_tokens=30, group_size=3, record_selection=True)
    expected = list(_engine(model).generate(prompts, sampling))
    engine = _engine(model)
    cache, batch = engine._prepare(sampling, 40, 130)
    batch._pads, batch._dynamic = True, False
    assert engine._prepare(sampling, 40, 130) == (cache, batch)
    _equal_tokens(list(engine.generate(prompts, sampling)), expected)
    assert engine._batch is batch


def test_buckets_cover_every_size():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 200)] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 256]
    assert all(n <= bucket(n) <= 1.5 * n + 1 for n in range(1, 500))


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that characters outside ASCII span tokens."""
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, _byte_tokenizer()])
@pytest.mark.parametrize("stop", [("a>",), ("</answer>", "</ans"), ("é",), (" ",), ("b", "er>"), ("xa", "zzz"), ("aé", "é.")])
def test_stop_strings_end_at_the_first_token_that_completes_one(tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...]):
    pieces = TokenPieces(tokenizer, len(tokenizer) + 3)
    assert len(pieces.texts) == len(tokenizer) + 3
    stops = StopStrings(stop, pieces)
    candidates = stops.candidate_ids(len(pieces.texts)).tolist()
    generator = torch.Generator().manual_seed(0)
    # Mostly random tokens, with the stop's own characters often in a row.
    own = [
        [i for i, piece in enumerate(pieces.texts) if piece and (piece in text or (not char.isascii() and piece == "\ufffd"))]
        for text in stop
        for char in text
    ]
    found = 0
    for _ in range(150):
        token_ids: list[int] = []
        while len(token_ids) < 40:
            token_ids += torch.randint(0, len(tokenizer), (2,), generator=generator).tolist()
            for options in own if torch.rand(1, generator=generator) < 0.5 else []:
                token_ids.append(options[int(torch.randint(0, len(options), (1,), generator=generator))])
        texts = [tokenizer.decode(token_ids[: n + 1], skip_special_tokens=True) for n in range(len(token_ids))]
        expected = next((n + 1 for n, text in enumerate(texts) if any(s in text for s in stop)), None)
        assert stops.first_end(token_ids, 0) == expected
        if expected:
            found += 1
            assert candidates[token_ids[expected - 1]]
            assert stops.first_end(token_ids, expected - 1) == expected
    if tokenizer is TOKENIZER:
        assert found > 5


def test_a_stop_string_whose_last_character_spans_tokens_is_found():
    tokenizer = _byte_tokenizer()
    token_ids: list[int] = [int(tokenizer.convert_tokens_to_ids(char)) for char in "abÃ©c"]  # type: ignore[arg-type]
    assert tokenizer.decode(token_ids) == "abéc"
    assert StopStrings(("bé",), TokenPieces(tokenizer, 256)).first_end(token_ids, 0) == 4


def test_completions_end_at_stop_strings_eos_and_length():
    model = _model()
    prompts = _prompts(*range(4, 12))
    free = Sampling(max_tokens=40, group_size=4)
    stop = ("b", "sa", "é")
    reasons = set()
    plain = _by_prompt(list(_engine(model).generate(prompts, free)))
    stopped = _by_prompt(list(_engine(model).generate(prompts, replace(free, stop=stop))))
    for name, completions in plain.items():
        for before, after in zip(completions, stopped[name], strict=True):
            texts = [TOKENIZER.decode(list(before.token_ids[: n + 1]), skip_special_tokens=True) for n in range(len(before.token_ids))]
            end = next((n + 1 for n, text in enumerate(texts) if any(s in text for s in stop)), len(texts))
            assert after.token_ids == before.token_ids[:end]
            assert after.text == texts[end - 1]
            ended = any(s in after.text for s in stop) or after.token_ids[-1] in EOS
            assert after.finish_reason == ("stop" if ended else "length")
            assert len(after.logprobs) == len(after.token_ids)
            assert before.finish_reason == ("stop" if before.token_ids[-1] in EOS else "length")
            assert not any(token in EOS for token in before.token_ids[:-1])
            reasons.add((before.finish_reason, after.finish_reason, before.token_ids[-1]))
    assert {reason[0] for reason in reasons} == {"stop", "length"}
    assert set(EOS) <= {reason[2] for reason in reasons}


def test_max_tokens_of_one_gives_one_token_each():
    groups = list(_engine().generate(_prompts(1, 64, 30), Sampling(max_tokens=1, group_size=5)))
    assert all(len(completion.token_ids) == 1 for group in groups for completion in group.completions)


def test_groups_come_as_soon_as_they_are_complete():
    engine = _engine(max_sequences=4)
    stream = engine.generate(_prompts(10, 20, 30, 40, 50, 60), Sampling(max_tokens=40, group_size=2))
    first = next(stream)
    assert len(first.completions) == 2
    assert engine.health()["running_sequences"] + engine._running._scheduler.num_to_start > 0  # type: ignore[union-attr]
    assert len(list(stream)) == 5


def test_no_prompts_give_no_groups():
    engine = _engine()
    assert list(engine.generate([], Sampling(stop=("x",)))) == []


def _assert_all_pages_free(engine: TorchEngine) -> None:
    health = engine.health()
    assert health["cache_pages_free"] == health["cache_pages"] > 0
    assert engine._cache is not None
    assert engine._cache.num_sequences == 0
    assert health["running_sequences"] == 0


def test_pages_come_back_after_the_end_after_an_abandoned_request_and_after_an_exception(monkeypatch: pytest.MonkeyPatch):
    prompts, sampling = _prompts(10, 70, 64, 3), Sampling(max_tokens=16, group_size=3)
    engine = _engine(max_sequences=6)
    expected = list(engine.generate(prompts, sampling))
    _assert_all_pages_free(engine)

    stream = engine.generate(prompts, sampling)
    next(stream)
    assert engine.health()["cache_pages_free"] < engine.health()["cache_pages"]
    stream.close()  # type: ignore[attr-defined]
    _assert_all_pages_free(engine)

    for broken in ("step", "add", "read_flags", "keep", "read_outputs"):
        original = getattr(DecodeBatch, broken)
        calls = 0

        def fail(self: DecodeBatch, *arguments: Any, original: Any = original) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise OSError("broken on purpose")
            return original(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(DecodeBatch, broken, fail)
            with pytest.raises(OSError, match="on purpose"):
                list(engine.generate(prompts, sampling))
        _assert_all_pages_free(engine)
    _equal_tokens(list(engine.generate(prompts, sampling)), expected)


def test_one_request_at_a_time_and_nothing_changes_under_it():
    engine = _engine(max_sequences=2)
    stream = engine.generate(_prompts(4, 5, 6), Sampling(max_tokens=20))
    next(stream)
    with pytest.raises(RuntimeError, match="generate while a request is in progress"):
        engine.generate(_prompts(4), Sampling())
    with pytest.raises(RuntimeError, match="load_weights while a request is in progress"):
        engine.load_weights(4, engine.model.state_dict().items())
    with pytest.raises(RuntimeError, match="sleep while a request is in progress"):
        engine.sleep()
    assert len(engine.score([[4, 5, 6]])[0]) == 3
    assert len(list(stream)) == 2
    engine.load_weights(4, engine.model.state_dict().items())


def test_recorded_selection_equals_that_of_a_packed_pass():
    model = _model()
    prompts = _prompts(1, 40, 64, 100)
    sampling = Sampling(max_tokens=40, group_size=2, record_selection=True, stop=("b",))
    engine = _engine(model, max_sequences=3)
    count = 0
    for group in engine.generate(prompts, sampling):
        for completion in group.completions:
            prompt_length, length = len(group.prompt.token_ids), len(completion.token_ids)
            ids = torch.tensor([*group.prompt.token_ids, *completion.token_ids])
            with torch.no_grad():
                expected = model.model.forward_packed(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)]), return_selection=True).selection
            assert expected is not None
            assert group.prompt_selection is not None
            assert completion.selection is not None
            assert completion.selection.dtype == group.prompt_selection.dtype == torch.int16
            assert torch.equal(group.prompt_selection, expected[:prompt_length])
            assert completion.selection.shape == (length, *expected.shape[1:])
            assert torch.equal(completion.selection[:-1], expected[prompt_length:-1])
            assert bool((completion.selection[-1] == -2).all())
            assert not completion.selection.is_inference()
            count += int((completion.selection[:-1].amax(-1) * 8 >= 64).sum())
    assert count > 0, "no selection beyond the prompt's first page was compared"
    plain = next(engine.generate(prompts[:1], replace(sampling, record_selection=False)))
    assert plain.prompt_selection is None
    assert plain.completions[0].selection is None


def test_load_weights_changes_outputs_and_version():
    engine, prompts, sampling = _engine(), _prompts(20, 70), Sampling(max_tokens=12, group_size=2)
    old = _by_prompt(list(engine.generate(prompts, sampling)))
    engine.load_weights(9, _model(seed=1).named_parameters())  # without lm_head.weight, which is tied
    new = list(engine.generate(prompts, sampling))
    _equal_tokens(new, list(_engine(_model(seed=1)).generate(prompts, sampling)))
    assert _by_prompt(new)["p0"][0].token_ids != old["p0"][0].token_ids
    assert {completion.policy_version for group in new for completion in group.completions} == {9}
    assert engine.health()["version"] == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda named: named | {"model.layers.7.mlp.up_proj.weight": torch.zeros(3)}, "no parameter named 'model.layers.7.mlp.up_proj.weight'"),
        (lambda named: {name: tensor for name, tensor in named.items() if name != "model.norm.weight"}, "no tensor came for 1 .*model.norm.weight"),
        (lambda named: named | {"model.norm.weight": torch.ones(5)}, r"model.norm.weight must have shape \(32,\), got \(5,\)"),
    ],
)
def test_wrong_weights_are_refused_until_a_whole_set_comes(change: Any, message: str):
    engine, whole = _engine(), dict(_model(seed=1).named_parameters())
    with pytest.raises(ValueError, match=message):
        engine.load_weights(4, change(whole).items())
    for call in (engine.health, lambda: engine.generate(_prompts(3), Sampling())):
        with pytest.raises(RuntimeError, match="loaded in part"):
            call()
    engine.load_weights(4, whole.items())
    assert engine.health()["version"] == 4


def test_impossible_requests_are_refused_before_anything_starts():
    engine = _engine(max_cache_tokens=128)
    cases: list[tuple[list[Prompt], Sampling, str]] = [
        (_prompts(4, 100), Sampling(max_tokens=100), r"'p1' \(100 tokens\) with max_tokens=100 needs 4 cache pages of 64 tokens, the cache has 2"),
        (_prompts(250), Sampling(max_tokens=10), "'p0' has 250 tokens and max_tokens is 10: more than the model's context of 256"),
        (_prompts(300), Sampling(max_tokens=1), "'p0' has 300 tokens, more than the model's context of 256"),
        (_prompts(0), Sampling(), "'p0' has no tokens"),
        ([replace(_prompt(0, 2), token_ids=(3, VOCABULARY))], Sampling(), "token ids from 3 to 96, the model's vocabulary is 0 to 95"),
        (_prompts(4), Sampling(stop=("",)), "stop string is empty"),
        (_prompts(4), Sampling(stop=("<end>",)), "stop string '<end>' is a special token"),
    ]
    for prompts, sampling, message in cases:
        with pytest.raises(ValueError, match=message):
            engine.generate(prompts, replace(sampling, max_tokens=min(sampling.max_tokens, 100)))
    assert engine.health()["cache_pages"] == 0
    with pytest.raises(ValueError, match="sequence 1 has 257 tokens"):
        engine.score([[3], [3] * 257])
    for changes, message in (({"max_sequences": 0}, "max_sequences"), ({"max_cache_tokens": 63}, "at least one page of 64 tokens")):
        with pytest.raises(ValueError, match=message):
            _engine(**changes)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA GPU"):
            _engine(device="cuda")


def test_a_full_cache_serves_every_request_one_after_the_other():
    model, sampling = _model(), Sampling(max_tokens=60, group_size=3)
    prompts = _prompts(70, 3, 64)
    expected = list(_engine(model, max_sequences=64).generate(prompts, sampling))
    _equal_tokens(list(_engine(model, max_cache_tokens=5 * 64, max_sequences=64).generate(prompts, sampling)), expected)


@pytest.mark.parametrize("seed", range(5))
def test_scheduler_starts_every_sample_within_its_pages_and_rows(seed: int):
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    for _ in range(40):
        counts = PageCounts(page_size=integer(1, 9), max_tokens=integer(1, 30))
        group_size, max_sequences = integer(1, 9), integer(1, 20)
        prompts = [_prompt(i, integer(1, 40)) for i in range(integer(1, 8))]
        least = max(counts.least(len(prompt.token_ids), group_size) for prompt in prompts)
        num_pages = least + integer(0, 60)
        scheduler = Scheduler(prompts, group_size=group_size, counts=counts, max_sequences=max_sequences, num_pages=num_pages)
        free, running, started = num_pages, [], 0
        while scheduler.num_to_start or running:
            for group, count in scheduler.admit(max_sequences - len(running), free):
                length = len(group.prompt.token_ids)
                first = group.num_started - count
                if first == 0:
                    free -= counts.prompt(length)
                for index in range(first, group.num_started):
                    last = index == group_size - 1
                    free -= counts.sample(length, takes_over=last)
                    # The prompt's full pages are shared; counted as freed with the last sample, which is late at worst.
                    running.append(counts.sample(length, takes_over=last) + (counts.prompt(length) if last else 0))
                    started += 1
            assert free >= 0
            assert len(running) <= max_sequences
            assert running, "nothing runs and something waits"
            free += running.pop(integer(0, len(running) - 1))
        assert started == group_size * len(prompts)
        assert free == num_pages
    with pytest.raises(ValueError, match="raise max_cache_tokens"):
        Scheduler(prompts, group_size=group_size, counts=counts, max_sequences=1, num_pages=least - 1)


def test_sleep_frees_the_cache_wake_takes_it_again_and_close_ends():
    engine, prompts, sampling = _engine(), _prompts(20), Sampling(max_tokens=5)
    before = list(engine.generate(prompts, sampling))
    engine.sleep()
    assert engine.health()["cache_pages"] == 0
    assert len(engine.score([[3, 4]])[0]) == 2
    with pytest.raises(RuntimeError, match="asleep"):
        engine.generate(prompts, sampling)
    engine.load_weights(3, engine.model.state_dict().items())
    engine.wake()
    _equal_tokens(list(engine.generate(prompts, sampling)), before)
    engine.close()
    for call in (engine.health, engine.wake, lambda: engine.generate(prompts, sampling), lambda: engine.score([[3]])):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_every_configured_eos_id_counts():
    model = _model(eos_token_id=7)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [5, 6]
    assert eos_token_ids((model.generation_config, model.config), model.config.vocab_size) == (5, 6, 7)
    model.config.eos_token_id = VOCABULARY
    with pytest.raises(ValueError, match="outside the model's vocabulary of 96"):
        eos_token_ids((model.generation_config, model.config), model.config.vocab_size)


def test_weights_that_are_not_finite_stop_the_request():
    engine = _engine()
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in engine.model.named_parameters()}
    engine.load_weights(1, broken.items())
    with pytest.raises(RuntimeError, match="not finite for prompt 'p0'"):
        list(engine.generate(_prompts(5), Sampling(max_tokens=4)))
    assert engine.health()["cache_pages"] == engine.health()["cache_pages_free"]


def test_bfloat16_logprobs_equal_score():
    engine = _engine(_model(initializer_range=0.1), dtype=torch.bfloat16)
    assert engine.model.lm_head.weight.dtype == torch.bfloat16
    assert engine.model.model.rotary.inv_freq.dtype == torch.float32
    groups = list(engine.generate(_prompts(30, 64), Sampling(max_tokens=20, group_size=2)))
    for group in groups:
        for completion in group.completions:
            (scored,) = engine.score([(*group.prompt.token_ids, *completion.token_ids)])
            difference = scored[len(group.prompt.token_ids) :] - torch.tensor(completion.logprobs)
            assert difference.abs().mean() < 0.05


@pytest.mark.gpu
def test_cuda_graphs_change_nothing():
    prompts = _prompts(3, 64, 20, 90, 41)
    sampling = Sampling(max_tokens=100, group_size=6, record_selection=True, stop=("é",))
    engines = [_engine(_model(), device="cuda", cuda_graphs=graphs, max_sequences=12) for graphs in (False, True)]
    for _ in range(2):
        plain, captured = (list(engine.generate(prompts, sampling)) for engine in engines)
        _equal_tokens(captured, plain)
    scored = engines[1].score([(*g.prompt.token_ids, *c.token_ids) for g in captured for c in g.completions])
    for values, completion in zip(scored, (c for g in captured for c in g.completions), strict=True):
        torch.testing.assert_close(values[-len(completion.token_ids) :], torch.tensor(completion.logprobs), atol=1e-3, rtol=0)
