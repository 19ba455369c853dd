"""What users put around the kernels: torch.compile, autocast, gradient checkpointing; and what the first call of a process costs."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.jit import JITFunction

from nsa.attention import BranchKV, nsa_attention, plan_batch
from nsa.cache import NSACache
from nsa.config import SparsityConfig
from nsa.model import NSAForCausalLM
from nsa.testing import AttentionInputs, make_inputs, relative_rms, tiny_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=3, window_size=6)
PAPER = SparsityConfig()


def compiled_against_eager(inputs: AttentionInputs, compiler: str, allowed: float = 0.0) -> None:
    """One graph without breaks gives the eager bits, output and every gradient. The plan is made outside: lengths are data.

    allowed: relative error of φ's own gradients, whose last steps are plain matrix products outside of our operators."""
    num_heads = inputs.q.shape[1]
    plan = plan_batch(inputs.cu_seqlens, inputs.cu_seqlens_k, config=inputs.config, num_heads=num_heads, device=inputs.q.device, backend="triton")

    def attend(q: torch.Tensor, kv: BranchKV, gates: torch.Tensor, phi: object) -> torch.Tensor:
        out = nsa_attention(q * 1.0, kv, gates, phi=phi, config=inputs.config, cu_seqlens=plan, backend="triton")  # type: ignore[arg-type]
        assert isinstance(out, torch.Tensor)
        return out + 1.0

    results = []
    torch.compiler.reset()
    for call in (attend, torch.compile(attend, fullgraph=True, backend=compiler)):
        x = inputs.to()
        out = call(x.q, x.kv, x.gates, x.phi)
        out.square().sum().backward()
        results.append({"out": out} | {name: leaf.grad for name, leaf in x.leaves.items()})
    for name, value in results[0].items():
        error = relative_rms(results[1][name], value)
        assert error <= (allowed if name.startswith("phi") else 0.0), f"{name}: {error:.1e}"


@pytest.mark.parametrize("compressor", ["mlp", "mean"])
def test_torch_compile_traces_attention_as_one_graph(compressor: str) -> None:
    config = SparsityConfig(
        compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=3, window_size=6, compressor=compressor
    )
    compiled_against_eager(make_inputs(config, lengths=[11, 1], num_kv_heads=1, group_size=1, device=DEVICE), "aot_eager")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_compile_with_inductor() -> None:
    from torch._inductor import config as inductor

    options = {"num_kv_heads": 1, "group_size": 4, "key_dim": 64, "value_dim": 64, "dtype": torch.bfloat16, "device": "cuda"}
    with inductor.patch(compile_threads=1):
        compiled_against_eager(make_inputs(PAPER, lengths=[300, 90], **options), "inductor", allowed=5e-3)


def test_autocast_changes_nothing_inside_and_takes_keys_of_another_dtype() -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    inputs = make_inputs(SMALL, lengths=[19], num_kv_heads=1, group_size=1, dtype=dtype, device=DEVICE)
    plain = nsa_attention(inputs.q, inputs.kv, inputs.gates, **inputs.options, backend="triton")
    wide = inputs.to(dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=dtype):
        same = nsa_attention(inputs.q, inputs.kv, inputs.gates, **inputs.options, backend="triton")
        mixed = nsa_attention(inputs.q, wide.kv, inputs.gates, **(inputs.options | {"phi": wide.phi}), backend="triton")
    assert isinstance(plain, torch.Tensor) and isinstance(mixed, torch.Tensor)
    assert torch.equal(plain, same)
    assert torch.equal(plain, mixed), "keys, values and φ are taken in the dtype of q"
    mixed.sum().backward()
    assert wide.kv.slc[0].grad is not None and wide.kv.slc[0].grad.dtype == torch.float32


def test_gradient_checkpointing_of_the_model_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = NSAForCausalLM(tiny_config(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, attention_backend="triton")).to(DEVICE)
    model.train()
    ids, ends = torch.randint(0, 61, (22,), generator=torch.Generator().manual_seed(1)), torch.tensor([0, 21, 22])
    positions = torch.cat([torch.arange(21), torch.arange(1)])
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model.model.forward_packed(ids, positions, ends).hidden_TE.square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("phi" in name for name in found[0])
    for name, gradient in found[0].items():
        assert relative_rms(found[1][name], gradient) <= 1e-6, name


@pytest.mark.parametrize(("kv", "compressor"), [("separate", "mlp"), ("shared", "mean")])
def test_generation_on_the_kernels_is_that_of_the_torch_backend(kv: str, compressor: str) -> None:
    """Prefill, then single tokens whose K, V and compressed tokens the kernels write; a padded row among them."""
    torch.manual_seed(0)
    options = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "kv": kv, "compressor": compressor}
    plain = NSAForCausalLM(tiny_config(**options, attention_backend="torch")).to(DEVICE).eval()
    on_kernels = NSAForCausalLM(tiny_config(**options, attention_backend="triton")).to(DEVICE).eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    on_kernels.load_state_dict(plain.state_dict())
    prompts, seen = torch.randint(0, 61, (30,), generator=torch.Generator().manual_seed(1)), []
    for model in (plain, on_kernels):
        cache = NSACache(model.config, num_pages=12, device=DEVICE)
        rows = [cache.add_sequence() for _ in range(2)]
        cache.reserve(rows, [21 + 12, 9 + 12])
        table = cache.block_table(rows).to(DEVICE)
        table = torch.cat([table, torch.zeros_like(table[:1])])
        with torch.no_grad():
            hidden = model.model.forward_cached(prompts, torch.tensor([0, 21, 30]), table[:2], torch.tensor([21, 9]), cache).hidden_TE
            states = [hidden]
            for step in range(12):
                lengths = torch.tensor([22 + step, 10 + step, 0], device=DEVICE)
                tokens = torch.tensor([step, 2 * step, 0], device=DEVICE)
                states.append(model.model.decode_step(tokens, table, lengths, cache.layers).hidden_TE[:2])
        seen.append((torch.cat(states), [layer.cmp[1:] for layer in cache.layers]))
    assert relative_rms(seen[1][0], seen[0][0]) <= 1e-5
    for ours, theirs in zip(seen[1][1], seen[0][1], strict=True):
        assert relative_rms(ours, theirs) <= 1e-5


@pytest.mark.gpu
def test_other_lengths_compile_nothing_new() -> None:
    """Training packs sequences of other lengths at every step; each kernel that Triton compiled anew for them would cost seconds."""
    names = (
        "banded_kernels",
        "banded_hopper",
        "banded_hopper_dq",
        "banded_hopper_dkdv",
        "compress",
        "gathered",
        "gating",
        "inverse",
        "scoring",
        "selected",
        "selected_dq_hopper",
        "selected_hopper",
        "selected_keys",
        "selected_keys_hopper",
        "unions",
    )
    modules = [importlib.import_module(f"nsa.kernels.{name}") for name in names]
    kernels = [kernel for module in modules for kernel in vars(module).values() if isinstance(kernel, JITFunction)]
    counts = []
    for lengths in ([5000], [1900, 2600], [64] * 70, [4100, 1, 17, 300], [2049] * 3, [33, 4097]):
        options = {"num_kv_heads": 3, "group_size": 3, "key_dim": 64, "value_dim": 64, "dtype": torch.bfloat16, "device": DEVICE}
        inputs = make_inputs(PAPER, lengths=lengths, **options)
        out = nsa_attention(inputs.q, inputs.kv, inputs.gates, **inputs.options, backend="triton")
        assert isinstance(out, torch.Tensor)
        out.backward(torch.ones_like(out))
        counts.append(sum(len(kernel.device_caches[inputs.q.device.index or 0][0]) for kernel in kernels))
    assert counts[0] > 10
    assert counts[-1] == counts[2], counts  # what differs: tiles of the block choice, by the longest sequence's blocks (a power of two)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["training", "decode"])
@pytest.mark.parametrize("layout", ["a", "b"])
def test_the_first_call_of_a_process_takes_less_than_20_seconds(layout: str, kind: str, tmp_path: Path) -> None:
    """8,192 tokens, forward and backward or a decode step, with nothing compiled before. By the clock: run it on an idle machine."""
    command = [sys.executable, "-m", "scripts.bench.attention.first_call", layout, kind]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=Path(__file__).parents[3], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    busy, clock = map(float, done.stdout.splitlines()[-2:])
    print(f"{layout}, {kind}: {clock:.1f} s, {busy:.1f} processor seconds")
    assert clock <= 20
