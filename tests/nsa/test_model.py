"""NSAForCausalLM: against dense Transformers models, against itself by every way in, checkpoints and generate."""

import subprocess
import sys
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import nsa
from nsa.cache import NSACache
from nsa.config import NSAConfig
from nsa.model import CACHE, NSAForCausalLM
from nsa.reference import reference_attention
from nsa.testing import AttentionInputs, assert_same_selection, clear_choices, cumulative, tiny_config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_SET = YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}

VARIANTS = {
    "paper": {},
    "shared": {"kv": "shared"},
    "mean": {"compressor": "mean"},
    "blend": {"gate": "blend"},
    "fixed": {"gate": "fixed", "fixed_gates": [0.3, 0.9, 0.5]},
    "qwen2": {"attention_bias": True, "kv": "shared", "tie_word_embeddings": True},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "values_wider": {"value_head_dim": 12},
    "group_of_three": {"num_attention_heads": 6},
    "group_of_one": {"num_key_value_heads": 4},
    "llama3_rope": {"rope_parameters": LLAMA3 | {"rope_theta": 1e4}},
    "yarn_rope": {"rope_parameters": YARN | {"rope_theta": 1e4}},
}


def make_model(seed: int = 0, **changes) -> NSAForCausalLM:
    """A tiny model whose every parameter matters: those that start at zero or one are drawn too."""
    torch.manual_seed(seed)
    model = NSAForCausalLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("branch_mix"):
                parameter.uniform_(0.2, 0.8)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in name or ".phi_" in name:
                parameter.normal_(std=0.2)
    return model


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 61, (length,), generator=torch.Generator().manual_seed(seed))


def positions(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


@torch.no_grad()
def packed(model: NSAForCausalLM, sequences: list[torch.Tensor], **options):
    """Logits `[T, V]` and selection `[T, layers, Hkv, n]` of a packed batch."""
    lengths = [len(s) for s in sequences]
    out = model.model.forward_packed(torch.cat(sequences), positions(lengths), cumulative(lengths), return_selection=True, **options)
    return out.hidden_TE @ model.lm_head.weight.T, out.selection


@torch.no_grad()
def packed_by_oracle(model: NSAForCausalLM, sequences: list[torch.Tensor]):
    """As `packed`, with the oracle in place of the backend; also where its choices are clear, bool `[T, layers, Hkv]`."""
    ends = cumulative([len(s) for s in sequences])
    clear = []

    def attend(q, kv, gates, *, phi, config, cu_seqlens, selection, return_selection, backend):
        inputs = AttentionInputs(q=q, kv=kv, gates=gates, phi=phi, config=config, cu_seqlens=ends, cu_seqlens_k=None)
        clear.append(clear_choices(inputs))
        return reference_attention(q, kv, gates, **inputs.options, return_selection=True)

    with patch("nsa.layers.nsa_attention", attend):
        logits, selection = packed(model, sequences)
    return logits, selection, torch.stack(clear, dim=1)


class CachedRun:
    """Feeds sequences to `forward_cached`, some tokens at a time, and keeps each token's logits and selection."""

    def __init__(self, model: NSAForCausalLM, sequences: list[torch.Tensor]) -> None:
        self.model, self.sequences = model, sequences
        self.cache = NSACache(model.config, num_pages=30)
        self.ids = [self.cache.add_sequence() for _ in sequences]
        self.logits = [torch.zeros(0, model.config.vocab_size) for _ in sequences]
        self.selection: list[list[torch.Tensor]] = [[] for _ in sequences]

    @torch.no_grad()
    def feed(self, counts: list[int], **options) -> None:
        """The next `counts[i]` tokens of sequence i, for all with a count."""
        live = [i for i, count in enumerate(counts) if count]
        ids, counts = [self.ids[i] for i in live], [counts[i] for i in live]
        starts = [self.cache.length(s) for s in ids]
        self.cache.reserve(ids, counts)
        new = [self.sequences[i][start : start + count] for i, start, count in zip(live, starts, counts, strict=True)]
        lengths = torch.tensor([self.cache.length(s) for s in ids], dtype=torch.int32)
        out = self.model.model.forward_cached(
            torch.cat(new), cumulative(counts), self.cache.block_table(ids), lengths, self.cache, return_selection=True, **options
        )
        logits = out.hidden_TE @ self.model.lm_head.weight.T
        for i, part, chosen in zip(live, logits.split(counts), out.selection.split(counts), strict=True):
            self.logits[i] = torch.cat([self.logits[i], part])
            self.selection[i].append(chosen)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5) -> None:
    """Within `bound` of the largest entry (logits of these models are some tens)."""
    assert (actual - expected).abs().max() <= bound * expected.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_oracle_prefill_decode_packed_and_single_agree(changes):
    model = make_model(**changes)
    sequences = [tokens(length, length) for length in (75, 3, 130)]
    ends = cumulative([75, 3, 130]).tolist()
    expected, chosen, clear = packed_by_oracle(model, sequences)
    assert clear.all(), "draw other tokens: with a near-tie in one layer all later layers may differ"
    logits, selection = packed(model, sequences)
    assert_same_selection(selection, chosen)
    assert_close(logits, expected)
    run = CachedRun(model, sequences)
    run.feed([60, 1, 110])
    for _ in range(2):
        run.feed([1, 1, 1])
    for _ in range(13):
        run.feed([1, 0, 1])
    run.feed([0, 0, 5])
    for i, (a, b) in enumerate(pairwise(ends)):
        alone, alone_chosen = packed(model, [sequences[i]])
        assert_same_selection(alone_chosen, chosen[a:b])
        assert_close(alone, expected[a:b])
        assert_same_selection(torch.cat(run.selection[i]), chosen[a:b])
        assert_close(run.logits[i], expected[a:b])
        with torch.no_grad():
            assert_close(model(sequences[i][None]).logits[0], expected[a:b])
            assert_close(model(sequences[i][None], use_cache=False).logits[0], expected[a:b])


def test_chunked_prefill_equals_prefill():
    model = make_model()
    sequences = [tokens(150, 1), tokens(67, 2)]
    logits, selection = packed(model, sequences)
    run = CachedRun(model, sequences)
    for counts in ([7, 30], [1, 2], [90, 0], [52, 35]):
        run.feed(counts)
    assert_same_selection(torch.cat([*run.selection[0], *run.selection[1]]), selection)
    assert_close(torch.cat(run.logits), logits)


def test_a_whole_sequence_token_by_token_equals_prefill():
    model = make_model(num_selected_blocks=3, num_local_blocks=1)
    sequence = tokens(111)
    logits, selection = packed(model, [sequence])
    run = CachedRun(model, [sequence])
    for _ in range(111):
        run.feed([1])
    assert_same_selection(torch.cat(run.selection[0]), selection)
    assert_close(run.logits[0], logits)


@pytest.mark.parametrize("prefix", [64, 90])
def test_forks_of_a_cached_prompt_equal_whole_sequences(prefix):
    model = make_model()
    prompt = tokens(prefix)
    sequences = [torch.cat([prompt, tokens(30, seed)]) for seed in (1, 2, 3)]
    logits, _ = packed(model, sequences)
    run = CachedRun(model, sequences)
    run.feed([prefix, 0, 0])
    for i in (1, 2):
        run.cache.release(run.ids[i])
        run.ids[i] = run.cache.fork(run.ids[0])[0]
        run.logits[i] = run.logits[0]
    for _ in range(30):
        run.feed([1, 1, 1])
    assert_close(torch.cat(run.logits), logits)


def test_recorded_selections_replay_to_the_same_logits():
    model = make_model()
    sequences = [tokens(90, 1), tokens(70, 2)]
    logits, selection = packed(model, sequences)
    replayed, used = packed(model, sequences, selection=selection)
    assert torch.equal(used, selection)
    assert torch.equal(replayed, logits)
    other = selection.clone()
    other[80:90] = torch.tensor([0, 4, 6, -1])
    other[85, 1] = torch.tensor([-2, -1, -1, -1])
    changed, used = packed(model, sequences, selection=other)
    assert torch.equal(used[80:85], other[80:85])
    assert (used[85, 1, :, 0] == 0).all()
    assert not torch.equal(changed[80:90], logits[80:90])
    run = CachedRun(model, sequences)
    run.feed([88, 70], selection=torch.cat([other[:88], other[90:]]))
    run.feed([1, 0], selection=other[88:89])
    run.feed([1, 0], selection=other[89:90])
    assert_close(torch.cat(run.logits), changed)


@pytest.mark.parametrize("changed", [1, 40, 64, 99])
def test_changing_a_token_leaves_earlier_logits_bit_equal(changed):
    model = make_model()
    sequence = tokens(100)
    before, chosen = packed(model, [sequence])
    sequence[changed] = (sequence[changed] + 7) % 61
    after, chosen_after = packed(model, [sequence])
    assert torch.equal(after[:changed], before[:changed])
    assert torch.equal(chosen_after[:changed], chosen[:changed])
    assert not torch.equal(after[changed], before[changed])


def test_packing_never_mixes_sequences():
    model = make_model()
    own = tokens(50)
    first, _ = packed(model, [tokens(30, 1), own, tokens(20, 2)])
    second, _ = packed(model, [tokens(30, 3), own, tokens(20, 4)])
    assert torch.equal(first[30:80], second[30:80])


@pytest.mark.parametrize(
    "changes", [{}, {"kv": "shared", "compressor": "mean"}, {"gate": "blend", "qk_norm": True, "attention_bias": True, "tie_word_embeddings": True}]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gradient_reaches_every_parameter(changes, checkpointing):
    model = make_model(**changes).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.stack([tokens(60, 1), tokens(60, 2)])
    loss = model(ids, labels=ids).loss
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not without


def test_at_initialisation_blend_gates_are_exactly_the_selection_branch_and_learn():
    torch.manual_seed(0)
    model = NSAForCausalLM(tiny_config(gate="blend"))
    ids = tokens(60)[None]
    fixed = NSAForCausalLM(tiny_config(gate="fixed", fixed_gates=[0.0, 1.0, 0.0]))
    missing = fixed.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    out = model(ids, labels=ids, use_cache=False)
    assert torch.equal(out.logits, fixed(ids, use_cache=False).logits)
    out.loss.backward()
    assert all(layer.self_attn.branch_mix.grad.any() for layer in model.model.layers)


def test_labels_are_shifted_and_masked_as_hugging_face_does():
    model = make_model()
    ids = tokens(40)[None]
    labels = ids.clone()
    labels[:, :10] = -100
    out = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[0, 9:-1], ids[0, 10:])
    torch.testing.assert_close(out.loss, expected)
    both = torch.cat([ids, tokens(25, 3)[None]], dim=1)
    ends = torch.tensor([0, 40, 65])
    joint = model(both, labels=both, cu_seqlens=ends)
    parts = [torch.nn.functional.cross_entropy(joint.logits[0, a : b - 1], both[0, a + 1 : b], reduction="sum") for a, b in ((0, 40), (40, 65))]
    torch.testing.assert_close(joint.loss, sum(parts) / 63)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side):
    model = make_model()
    rows = [tokens(90, 1), tokens(41, 2), tokens(1, 3)]
    ids, mask = torch.zeros(3, 90, dtype=torch.long), torch.zeros(3, 90, dtype=torch.long)
    places = [slice(90 - len(row), 90) if side == "left" else slice(0, len(row)) for row in rows]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[i, place], mask[i, place] = row, 1
    with torch.no_grad():
        for use_cache in (False, True):
            logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
            for i, (row, place) in enumerate(zip(rows, places, strict=True)):
                assert_close(logits[i, place], packed(model, [row])[0])


def dense_pair(kind: str, rope: dict | None, *, num_tokens: int) -> tuple[torch.nn.Module, NSAForCausalLM]:
    """A random dense model of Transformers and the NSA model with the same weights and gates (0, 1, 0), n·l' ≥ num_tokens."""
    classes = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config_class, model_class = classes[kind]
    shape = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "initializer_range": 0.3, "rms_norm_eps": 1e-6, "tie_word_embeddings": kind == "qwen2",
    }  # fmt: skip
    if kind != "qwen2":
        shape["head_dim"] = 16
    own = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen2": {}, "qwen3": {}}[kind]
    rope_parameters = {"rope_type": "default", "rope_theta": 10000.0} | (rope or {})
    torch.manual_seed(0)
    dense = model_class(config_class(**shape, **own, rope_parameters=rope_parameters, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in name:
                parameter.normal_(std=0.3)
    ours = {
        "llama": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
        "qwen2": {"attention_bias": True},
        "qwen3": {"qk_norm": True},
    }[kind]
    blocks = -(-num_tokens // 8)
    config = NSAConfig(
        **shape, **ours, rope_parameters=rope_parameters, kv="shared", gate="fixed", fixed_gates=[0.0, 1.0, 0.0], compressor="mean",
        compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=blocks, window_size=16,
    )  # fmt: skip
    sparse = NSAForCausalLM(config).eval()
    sparse.load_state_dict(dense.state_dict())
    return dense, sparse


@pytest.mark.parametrize(
    ("kind", "rope"),
    [("llama", None), ("qwen2", None), ("qwen3", None), ("llama", LLAMA3), ("llama", YARN), ("qwen3", YARN_SET), ("qwen2", {"rope_theta": 1e6})],
)
def test_with_gates_0_1_0_and_n_blocks_enough_it_is_the_dense_model(kind, rope):
    dense, sparse = dense_pair(kind, rope, num_tokens=150)
    ids = tokens(150)[None]
    with torch.no_grad():
        expected = dense(ids).logits
        assert_close(sparse(ids).logits, expected)
        assert_close(sparse(ids, use_cache=False).logits, expected)
        greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(sparse.generate(ids[:, :100], **greedy), dense.generate(ids[:, :100], **greedy))


@pytest.mark.parametrize("rope", [LLAMA3, YARN, YARN_SET])
def test_cos_and_sin_are_those_of_transformers(rope):
    dense, sparse = dense_pair("llama", rope, num_tokens=24)
    where = torch.arange(0, 512, 7)
    expected = dense.model.rotary_emb(torch.zeros(1), where[None])
    for found, wanted in zip(sparse.model.rotary(where), expected, strict=True):
        torch.testing.assert_close(found[:, 0], wanted[0])


def test_an_unknown_rope_type_is_refused():
    with pytest.raises(ValueError, match="rope_type"):
        NSAForCausalLM(tiny_config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_saved_model_loads_with_the_same_logits(changes, tmp_path):
    model = make_model(eos_token_id=[1, 2], **changes)
    model.save_pretrained(tmp_path)
    ids = tokens(50)[None]
    for loader in (NSAForCausalLM, AutoModelForCausalLM):
        loaded, report = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is NSAForCausalLM
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert loaded.config.eos_token_id == [1, 2]
        assert loaded.config.sparsity == model.config.sparsity
        with torch.no_grad():
            assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    tied = model.config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_a_saved_model_loads_in_bf16_with_fp32_rope(tmp_path):
    model = make_model(rope_parameters=LLAMA3 | {"rope_theta": 1e4})
    model.save_pretrained(tmp_path)
    loaded = NSAForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.model.rotary(torch.arange(300))[0], model.model.rotary(torch.arange(300))[0])


@pytest.mark.parametrize("changes", [{}, {"gate": "blend", "qk_norm": True, "attention_bias": True}])
def test_a_bf16_copy_computes_what_the_fp32_master_computes_under_autocast(changes):
    master = make_model(**changes).bfloat16().float()
    copy = make_model(**changes).bfloat16()
    for model in (master, copy):
        assert torch.equal(model.model.rotary.inv_freq, make_model().model.rotary.inv_freq)
    sequence = tokens(100)
    batch = (sequence, torch.arange(100), torch.tensor([0, 100]))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            expected = master.model.forward_packed(*batch, return_selection=True)
        found = copy.model.forward_packed(*batch, return_selection=True)
    assert found.hidden_TE.dtype == torch.float32
    assert torch.equal(found.hidden_TE, expected.hidden_TE)
    assert torch.equal(found.selection, expected.selection)


def test_the_config_survives_a_round_trip(tmp_path):
    config = tiny_config(gate="fixed", fixed_gates=[0.0, 1.0, 0.5], value_head_dim=12, rope_parameters=YARN | {"rope_theta": 5e5})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is NSAConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


LOAD_WITHOUT_IMPORT = """
import sys, torch
from transformers import AutoModelForCausalLM
assert not any(name == "nsa" or name.startswith("nsa.") for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
torch.save(model(torch.arange(3, 53)[None]).logits.detach(), sys.argv[2])
"""


def test_a_saved_model_loads_with_trust_remote_code_where_nsa_was_not_imported(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    environment = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD_WITHOUT_IMPORT, str(tmp_path / "model"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), model(torch.arange(3, 53)[None]).logits)


def test_parameter_names_are_the_documented_ones():
    names = {
        name.removeprefix("model.layers.0.self_attn.")
        for name, _ in make_model(gate="blend", qk_norm=True).named_parameters()
        if ".0.self_attn." in name
    }
    projections = {f"{branch}{x}_proj.weight" for branch in ("", "cmp_", "win_") for x in "kv"} | {"q_proj.weight", "o_proj.weight"}
    phi = {f"phi_{x}.{part}" for x in "kv" for part in ("position", "up.weight", "down.weight")}
    assert names == projections | phi | {"branch_gate.weight", "branch_gate.bias", "branch_mix", "q_norm.weight", "k_norm.weight"}


def argmax_loop(model: NSAForCausalLM, prompt: torch.Tensor, num_new: int, stop: tuple[int, ...] = ()) -> torch.Tensor:
    sequence = prompt
    for _ in range(num_new):
        sequence = torch.cat([sequence, packed(model, [sequence])[0][-1:].argmax(-1)])
        if int(sequence[-1]) in stop:
            break
    return sequence


@pytest.mark.parametrize("changes", [{}, {"kv": "shared", "compressor": "mean", "tie_word_embeddings": True}])
def test_greedy_generate_is_the_argmax_loop(changes):
    model = make_model(**changes)
    prompt = tokens(58)
    expected = argmax_loop(model, prompt, 30)
    out = model.generate(prompt[None], max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert torch.equal(out[0], expected)
    uncached = model.generate(prompt[None], max_new_tokens=30, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(uncached[0], expected)


def test_generate_in_training_mode_is_the_same():
    model = make_model()
    expected = argmax_loop(model, tokens(30), 8)
    model.train()
    assert torch.equal(model.generate(tokens(30)[None], max_new_tokens=8, do_sample=False, pad_token_id=0)[0], expected)


def test_a_cached_forward_gives_the_gradients_of_an_uncached_one():
    found = []
    for use_cache in (True, False):
        model = make_model()
        model(tokens(70)[None], use_cache=use_cache).logits.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[1].items():
        assert_close(found[0][name], gradient)


def test_left_padded_generate_is_each_prompt_alone():
    model = make_model()
    prompts = [tokens(length, length) for length in (70, 9, 33, 1)]
    ids = torch.stack([torch.cat([torch.zeros(70 - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.cat([torch.zeros(70 - len(p), dtype=torch.long), torch.ones(len(p), dtype=torch.long)]) for p in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    for row, prompt in zip(out, prompts, strict=True):
        assert torch.equal(row[70:], argmax_loop(model, prompt, 20)[len(prompt) :])


def test_generate_stops_at_any_of_several_eos_ids():
    model = make_model()
    prompts = [tokens(40, seed) for seed in (1, 2)]
    free = [argmax_loop(model, prompt, 12)[40:].tolist() for prompt in prompts]
    eos = (free[0][4], free[1][7])
    model.generation_config.eos_token_id = list(eos)
    out = model.generate(torch.stack(prompts), max_new_tokens=12, do_sample=False, pad_token_id=0)
    for row, prompt in zip(out, prompts, strict=True):
        expected = argmax_loop(model, prompt, 12, stop=eos)[40:].tolist()
        assert row[40:].tolist() == expected + [0] * (len(row) - 40 - len(expected))
        assert expected[-1] in eos


def test_eos_ids_of_the_config_reach_generate(tmp_path):
    model = make_model(eos_token_id=[1, 2], pad_token_id=0)
    assert model.generation_config.eos_token_id == [1, 2]
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [1, 2]


def test_sampling_and_beams_run():
    model = make_model()
    torch.manual_seed(0)
    sampled = model.generate(tokens(40)[None], max_new_tokens=6, do_sample=True, temperature=1.2, top_p=0.9, num_return_sequences=3, pad_token_id=0)
    assert sampled.shape == (3, 46)
    beams = model.generate(tokens(40)[None], max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)
    uncached = model.generate(tokens(40)[None], max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(beams, uncached)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_can_be_carried_on_by_hand(name):
    model = make_model()
    ids = tokens(80)[None]
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :70], use_cache=True)
        second = model(ids[:, 70:], **{name: first[CACHE]}, use_cache=True)
        assert_close(torch.cat([first.logits, second.logits], dim=1), whole)
        assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:])


def test_wrong_calls_are_named():
    model = make_model()
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens(8)[None], attention_mask=torch.ones(1, 1, 8, 8))
    with pytest.raises(ValueError, match="past_key_values"):
        model(tokens(8)[None], past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="cu_seqlens"):
        model.model.forward_packed(tokens(8), torch.arange(8), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="multiple of num_key_value_heads"):
        tiny_config(num_attention_heads=3)
    with pytest.raises(ValueError, match="fixed_gates"):
        tiny_config(gate="fixed")
    with pytest.raises(ValueError, match="compress_stride"):
        tiny_config(compress_stride=3)


def test_the_package_exports_its_public_names():
    for name in nsa.__all__:
        assert hasattr(nsa, name)
