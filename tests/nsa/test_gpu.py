"""On a GPU, for both backends: the model agrees with the CPU, and cached decoding with packed forwards, in fp32 and bf16."""

import pytest
import torch

from nsa import NSACache, NSAConfig, NSAForCausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", ["torch", "triton"])]


def make_model(backend: str) -> NSAForCausalLM:
    torch.manual_seed(0)
    config = NSAConfig(
        vocab_size=211, hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=16,
        attention_backend=backend,
    )  # fmt: skip
    model = NSAForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.phi_k.down.weight, std=0.1)
    return model


def packed(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    counts = torch.tensor(lengths)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    ids = torch.randint(0, 211, (int(ends[-1]),), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(len(ids)) - ends[:-1].repeat_interleave(counts), ends


@torch.inference_mode()
def test_packed_forward_on_the_gpu_equals_the_cpu(backend: str) -> None:
    model, batch = make_model("torch"), packed([1, 63, 111, 300])
    expected = model.model.forward_packed(*batch).hidden_TE
    model.config.attention_backend = backend
    out = model.cuda().model.forward_packed(*batch).hidden_TE.cpu()
    assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 6e-2)])
@torch.inference_mode()
def test_decode_steps_equal_the_packed_forward_with_the_same_selection(backend: str, dtype: torch.dtype, bound: float) -> None:
    model, (ids, positions, ends) = make_model(backend).cuda().to(dtype), packed([120, 97])
    whole = model.model.forward_packed(ids, positions, ends, return_selection=True)
    assert whole.selection is not None
    cache = NSACache(model.config, num_pages=16, device="cuda", dtype=dtype)
    rows = [cache.add_sequence(), cache.add_sequence()]
    cache.reserve(rows, 120)
    table, lengths = cache.block_table(rows), ends.diff()
    worst = torch.zeros((), device="cuda")
    for step in range(97):
        index = (ends[:-1] + step).cuda()
        out = model.model.decode_step(ids.cuda()[index], table, torch.full_like(lengths, step + 1), cache.layers, selection=whole.selection[index])
        worst = torch.maximum(worst, (out.hidden_TE - whole.hidden_TE[index]).abs().max())
    assert worst <= bound * whole.hidden_TE.abs().max()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_on_the_gpu_equal_the_cpu(backend: str, checkpointing: bool) -> None:
    batch = packed([40, 150, 77])
    gradients = []
    for device in ("cpu", "cuda"):
        model = make_model(backend if device == "cuda" else "torch").to(device)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        model.model.forward_packed(*batch).hidden_TE.square().mean().backward()
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-3 * gradient.norm() + 1e-7, name
