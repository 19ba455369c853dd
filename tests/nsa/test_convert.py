"""convert: tiny random Llama, Qwen2 and Qwen3 models become NSA models with the same logits; faults give one clear line."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import nsa.convert
from nsa.convert import TOLERANCE, convert, nsa_config, parse_overrides
from nsa.model import NSAForCausalLM

SMALL = {"compress_block_size": 8, "compress_stride": 4, "select_block_size": 8, "num_selected_blocks": 8, "window_size": 16}
SHAPE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
DENSE = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama-tied-bias-head_dim": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=12),
    "llama-rope-llama3": lambda: LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "llama-one-group": lambda: LlamaConfig(**{**SHAPE, "num_key_value_heads": 6}),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2-yarn": lambda: Qwen2Config(**SHAPE, rope_parameters=YARN_ROPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "qwen3-bias-tied": lambda: Qwen3Config(**SHAPE, head_dim=16, attention_bias=True, tie_word_embeddings=True),
}


def save_dense(folder: Path, config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight", "layernorm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.to(dtype).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, *, chat_template: str | None = None) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789+=-*/.,"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", DENSE)
def test_converted_model_gives_the_dense_logits(name: str, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", DENSE[name]())
    report = convert(source, tmp_path / "nsa", **SMALL)
    assert report.dense_length == 64
    assert [check.num_tokens for check in report.checks] == [21, 64]
    dense = AutoModelForCausalLM.from_pretrained(source).eval()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nsa").eval()
    assert isinstance(model, NSAForCausalLM)
    ids = torch.randint(3, 131, (2, 63), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = dense(input_ids=ids).logits, model(input_ids=ids).logits
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    "options", [{"kv": "separate"}, {"compressor": "mean"}, {"gate": "fixed"}, {"kv": "separate", "compressor": "mean"}], ids=str
)
@pytest.mark.parametrize("name", ["llama-tied-bias-head_dim", "qwen2"])
def test_every_form_of_kv_gate_and_compressor_converts(name: str, options: dict[str, str], tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", DENSE[name]())
    report = convert(source, tmp_path / "nsa", **SMALL, **options)
    assert max(check.error for check in report.checks) <= TOLERANCE
    config = json.loads((tmp_path / "nsa" / "config.json").read_text())
    assert {key: config[key] for key in options} == options


def test_separate_projections_are_copies_of_the_dense_ones(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", DENSE["qwen2"]())
    report = convert(source, tmp_path / "nsa", **SMALL, kv="separate")
    weights = NSAForCausalLM.from_pretrained(tmp_path / "nsa").state_dict()
    dense = AutoModelForCausalLM.from_pretrained(source).state_dict()
    for projection in ("k_proj", "v_proj"):
        for kind in ("weight", "bias"):
            original = dense[f"model.layers.1.self_attn.{projection}.{kind}"]
            for branch in ("", "cmp_", "win_"):
                torch.testing.assert_close(weights[f"model.layers.1.self_attn.{branch}{projection}.{kind}"], original, rtol=0, atol=0)
    assert report.num_new_parameters == report.num_parameters - sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).parameters())


def test_gates_start_at_selection_only_and_receive_gradient(tmp_path: Path) -> None:
    convert(save_dense(tmp_path / "dense", DENSE["llama"]()), tmp_path / "nsa", **SMALL)
    model = NSAForCausalLM.from_pretrained(tmp_path / "nsa")
    mixes = [parameter for name, parameter in model.named_parameters() if name.endswith("branch_mix")]
    assert len(mixes) == 2
    assert all(bool((mix == 0).all()) for mix in mixes)
    ids = torch.randint(3, 131, (1, 100), generator=torch.Generator().manual_seed(2))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(float(mix.grad.abs().max()) > 0 for mix in mixes if mix.grad is not None)


def test_converting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", DENSE["llama"]())
    for name in ("one", "two"):
        torch.rand(3)
        convert(source, tmp_path / name, **SMALL)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("source_dtype", "asked", "written"),
    [(torch.bfloat16, None, "bfloat16"), (torch.float32, "bfloat16", "bfloat16"), (torch.bfloat16, "float32", "float32")],
)
def test_dtype_is_the_sources_unless_asked_for(source_dtype: torch.dtype, asked: str | None, written: str, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", DENSE["llama"](), dtype=source_dtype)
    report = convert(source, tmp_path / "nsa", **SMALL, **({"dtype": asked} if asked else {}))
    assert report.dtype == written
    assert max(check.error for check in report.checks) <= TOLERANCE
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nsa", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, written)}


def test_tokenizer_chat_template_and_every_eos_id_come_along(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", LlamaConfig(**{**SHAPE, "eos_token_id": [7, 9]}))
    save_tokenizer(source, chat_template="{{ messages[0]['content'] }}!")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 5], "temperature": 0.7, "do_sample": True}))
    report = convert(source, tmp_path / "nsa", **SMALL)
    assert report.has_tokenizer
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "nsa")
    assert tokenizer("ab1").input_ids == AutoTokenizer.from_pretrained(source)("ab1").input_ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nsa")
    assert model.config.eos_token_id == [9, 5, 7, 2]
    assert model.generation_config.eos_token_id == [9, 5, 7, 2]
    assert model.generation_config.temperature == 0.7


def test_odd_generation_settings_of_the_source_do_not_stop_it(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", DENSE["llama"]())
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "do_sample": False, "temperature": 0.6, "top_p": 0.9}))
    convert(source, tmp_path / "nsa", **SMALL)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "nsa").generation_config.eos_token_id == 2


def test_a_failed_check_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_dense(tmp_path / "dense", DENSE["llama"]())
    copy = nsa.convert._copy_weights

    def spoil(dense, model):
        count = copy(dense, model)
        with torch.no_grad():
            model.get_parameter("model.layers.0.self_attn.o_proj.weight").mul_(1.01)
        return count

    monkeypatch.setattr(nsa.convert, "_copy_weights", spoil)
    with pytest.raises(ValueError, match=r"differ from the dense model's by .* \(allowed 1e-04\)"):
        convert(source, tmp_path / "nsa", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_destination_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", DENSE["llama"]())
    (tmp_path / "nsa").mkdir()
    (tmp_path / "nsa" / "keep.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        convert(source, tmp_path / "nsa", **SMALL)
    assert (tmp_path / "nsa" / "keep.txt").read_text() == "mine"
    (tmp_path / "nsa" / "keep.txt").unlink()
    convert(source, tmp_path / "nsa", **SMALL)
    assert (tmp_path / "nsa" / "config.json").is_file()


def test_too_small_a_selection_for_the_forced_blocks_is_refused(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", DENSE["llama"]())
    with pytest.raises(ValueError, match="num_selected_blocks must hold"):
        convert(source, tmp_path / "nsa", num_selected_blocks=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windowsize": 16}, "unknown key windowsize; did you mean window_size?"),
        ({"colour": 1}, "unknown key colour; known: compress_block_size"),
        ({"kv": "both"}, "kv must be one of shared, separate, got 'both'"),
        ({"window_size": "wide"}, "window_size must be an integer, got 'wide'"),
        ({"gate": "sigmoid"}, "gate=sigmoid cannot be exactly"),
        ({"dtype": "fp8"}, "dtype must be one of float32, bfloat16, float16, got 'fp8'"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "dense", tmp_path / "nsa", **options)


def test_command_line_pairs() -> None:
    assert parse_overrides(["window_size=64", "kv=separate"]) == {"window_size": 64, "kv": "separate"}
    with pytest.raises(ValueError, match="expected key=value, got 'window_size'"):
        parse_overrides(["window_size"])
    with pytest.raises(ValueError, match=r"window_size must be an integer, got '6\.5'"):
        parse_overrides(["window_size=6.5"])


def write_gguf(path: Path) -> None:
    """A tiny Llama as llama.cpp would write it, with a byte-level tokenizer."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    generator = torch.Generator().manual_seed(0)
    tokens = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789+=-*/.,Ġ", "12", "ab"]
    hidden, inner, heads, kv_heads, dim = 32, 48, 4, 2, 8
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": 1, "context_length": 512, "embedding_length": hidden, "feed_forward_length": inner, "head_count": heads,
        "head_count_kv": kv_heads, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": dim, "rope_freq_base": 1e4, "vocab_size": len(tokens),
        "tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "token_list": tokens, "token_types": [3, 3, 3] + [1] * (len(tokens) - 3),
        "token_merges": ["1 2", "a b"], "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, "add_bos_token": False,
        "chat_template": "{{ messages[0]['content'] }}",
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    shapes = {
        "token_embd": (len(tokens), hidden), "output_norm": (hidden,), "blk.0.attn_norm": (hidden,), "blk.0.ffn_norm": (hidden,),
        "blk.0.attn_q": (heads * dim, hidden), "blk.0.attn_k": (kv_heads * dim, hidden), "blk.0.attn_v": (kv_heads * dim, hidden),
        "blk.0.attn_output": (hidden, heads * dim), "blk.0.ffn_gate": (inner, hidden), "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
    }  # fmt: skip
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator) * 0.3
        data = weight.add(1 if len(shape) == 1 else 0).numpy()
        if len(shape) == 2 and shape[1] % 32 == 0:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q4_1), raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(f"{name}.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_quantised_gguf_file_converts_with_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    write_gguf(tmp_path / "dense" / "model.Q4_1.gguf")
    report = convert(tmp_path / "dense" / "model.Q4_1.gguf", tmp_path / "nsa", **SMALL)
    assert report.dtype == "float32"
    assert report.has_tokenizer
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "nsa")
    assert tokenizer.decode(tokenizer("a 12+ab=c").input_ids) == "a 12+ab=c"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nsa")
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert convert(tmp_path / "dense", tmp_path / "again", **SMALL).num_parameters == report.num_parameters


def unsupported() -> dict[str, tuple[PreTrainedConfig, str]]:
    return {
        "moe": (CONFIG_MAPPING["qwen2_moe"](), "model type 'qwen2_moe'"),
        "sliding": (Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=64, max_window_layers=1), "sliding-window layers"),
        "rope": (LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "RoPE of type 'dynamic'"),
        "activation": (LlamaConfig(**SHAPE, hidden_act="gelu"), "activation 'gelu'"),
        "quantised": (LlamaConfig(**SHAPE, quantization_config={"quant_method": "gptq", "bits": 4}), "quantised weights"),
        "already": (nsa_config(LlamaConfig(**SHAPE), **SMALL), "an NSA model already"),
    }


@pytest.mark.parametrize("name", ["moe", "sliding", "rope", "activation", "quantised", "already"])
def test_unsupported_models_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    config, message = unsupported()[name]
    config.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=message) as caught:
        convert(tmp_path / "dense", tmp_path / "nsa")
    assert "supported are dense Llama, Qwen2 and Qwen3" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint at"):
        convert(tmp_path / "nothing", tmp_path / "nsa")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"not a \.gguf file"):
        convert(tmp_path / "notes.txt", tmp_path / "nsa")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json and 0 \.gguf files"):
        convert(tmp_path / "empty", tmp_path / "nsa")
    with pytest.raises(ValueError, match="cannot read a model config from nobody/nothing"):
        convert("nobody/nothing", tmp_path / "nsa")
    source = save_dense(tmp_path / "dense", DENSE["llama"]())
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot read the weights of"):
        convert(source, tmp_path / "nsa", **SMALL)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ValueError, match="cannot read a model config"):
        convert(tmp_path / "broken.gguf", tmp_path / "nsa")
    assert not (tmp_path / "nsa").exists()
