"""`nsa_attention(backend="triton")` as a whole: against the torch backend, the oracle, and itself packed another way."""

import os
from dataclasses import replace

import pytest
import torch

from nsa import attention
from nsa.attention import nsa_attention, plan_batch, resolve_backend
from nsa.config import SparsityConfig
from nsa.kernels.tiles import KernelPlan
from nsa.packing import plan_shared_prefix
from nsa.testing import assert_same_selection, clear_choices, cumulative, make_inputs, relative_rms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=3, window_size=6, compressor="mean")


def run(inputs, backend, **options):
    """Output, selection and gradients by name, from a fixed output gradient."""
    x = inputs.to(device=DEVICE)
    out, selection = nsa_attention(x.q, x.kv, x.gates, **(x.options | options), return_selection=True, backend=backend)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
    return out, selection, {name: leaf.grad for name, leaf in x.leaves.items()}


def test_the_plans_of_the_last_batches_are_remembered() -> None:
    """Only for the same lengths of queries and keys and the same settings; whoever shares rows gets a plan of their own."""

    def plan(lengths, key_lengths=None, config=CONFIG, **options):
        keys = None if key_lengths is None else cumulative(key_lengths)
        return plan_batch(cumulative(lengths), keys, config=config, num_heads=2, device=torch.device(DEVICE), backend="triton", **options)

    first = plan([5, 7])
    assert plan([5, 7]) is first and plan([5, 7], [5, 7]) is first
    others = [plan([7, 5]), plan([5, 7], [5, 9]), plan([12]), plan([5, 7], config=replace(CONFIG, window_size=7))]
    assert len({id(x) for x in [first, *others]}) == 5
    assert others[1].host_key_ends.tolist() == [0, 5, 14] and others[3].config.window_size == 7
    assert plan([5, 7], key_index=torch.arange(12)) is not first
    with pytest.raises(ValueError, match="non-decreasing"):
        plan_batch(torch.tensor([0, 5, 3]), None, config=CONFIG, num_heads=2, device=torch.device(DEVICE), backend="triton")


@pytest.mark.gpu
def test_a_cuda_graph_takes_a_plan_made_before() -> None:
    inputs = make_inputs(replace(CONFIG, select_block_size=16), lengths=[41, 70], num_kv_heads=1, group_size=4, key_dim=16, value_dim=16)
    x = inputs.to(device=DEVICE, dtype=torch.bfloat16, requires_grad=False)
    options = x.options | {"backend": "triton"}
    ends = options.pop("cu_seqlens")
    plan = plan_batch(ends, None, config=options["config"], num_heads=4, device=x.q.device, backend="triton")
    want = nsa_attention(x.q, x.kv, x.gates, **options, cu_seqlens=plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = nsa_attention(x.q, x.kv, x.gates, **options, cu_seqlens=plan)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        got.zero_()  # torch warns of graphs that are empty
        with pytest.raises(ValueError, match="CUDA graph needs a plan"):
            nsa_attention(x.q, x.kv, x.gates, **options, cu_seqlens=ends)


@pytest.mark.parametrize(("compressor", "kv", "group"), [("mlp", "separate", 3), ("mean", "shared", 2)])
def test_equals_the_torch_backend_forward_and_every_gradient(compressor, kv, group) -> None:
    config = SparsityConfig(
        compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=3, window_size=6, compressor=compressor
    )
    inputs = make_inputs(config, lengths=[41, 1, 9], num_kv_heads=1, group_size=group, key_dim=16, value_dim=8, kv=kv)
    out, selection, gradients = run(inputs, "triton")
    expected, chosen, wanted = run(inputs, "torch")
    assert relative_rms(out, expected) < 1e-5
    assert_same_selection(selection, chosen, clear_choices(inputs))
    for name, gradient in wanted.items():
        assert relative_rms(gradients[name], gradient) < 1e-5, name


def test_chunked_queries_and_replay_equal_the_whole() -> None:
    whole = make_inputs(CONFIG, lengths=[45], num_kv_heads=1, group_size=2).to(device=DEVICE, requires_grad=False)
    out, selection = nsa_attention(whole.q, whole.kv, whole.gates, **whole.options, return_selection=True, backend="triton")
    options = {"phi": whole.phi, "config": CONFIG, "cu_seqlens": cumulative([5]), "cu_seqlens_k": cumulative([45]), "backend": "triton"}
    last = nsa_attention(whole.q[-5:], whole.kv, whole.gates[-5:], **options)
    assert torch.equal(last, out[-5:]), "a query's result may not depend on which queries are computed with it"
    given = selection.clone()
    given[:-2] = given.new_tensor([0, -1, -1])
    given[-2:, :, 0] = -2
    replayed, used = nsa_attention(whole.q, whole.kv, whole.gates, **whole.options, selection=given, return_selection=True, backend="triton")
    assert torch.equal(used[:-2], given[:-2])
    assert torch.equal(used[-2:], selection[-2:]), "rows that begin with -2 are chosen anew"
    assert torch.equal(replayed[-2:], out[-2:])


def test_a_shared_prefix_gives_what_separate_sequences_give() -> None:
    prefix, tails = 12, [5, 9]
    lengths = [prefix + tail for tail in tails]
    full = make_inputs(CONFIG, lengths=lengths, num_kv_heads=1, group_size=2, kv="shared").to(device=DEVICE)
    with torch.no_grad():
        for tensor in (full.q, full.gates, *full.kv.cmp):
            tensor[lengths[0] : lengths[0] + prefix] = tensor[:prefix]
    shared = plan_shared_prefix(cumulative(lengths), [prefix] * 2, [0, 0])
    assert shared is not None
    plan = plan_batch(
        shared.query_ends, shared.key_ends, config=CONFIG, num_heads=2, device=torch.device(DEVICE), backend="triton", key_index=shared.key_rows
    )
    assert isinstance(plan, KernelPlan)
    rows = shared.rows_U.to(DEVICE)
    key, value = full.kv.slc[0][rows], full.kv.slc[1][rows]
    kv = type(full.kv)((key, value), (key, value), (key, value))
    out = nsa_attention(full.q[rows], kv, full.gates[rows], phi=None, config=CONFIG, cu_seqlens=plan, backend="triton")
    expected = nsa_attention(full.q, full.kv, full.gates, **full.options, backend="torch")
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(expected)
    (got,) = torch.autograd.grad((out[shared.places_T.to(DEVICE)] * weights).sum(), full.kv.slc[0])
    (wanted,) = torch.autograd.grad((expected * weights).sum(), full.kv.slc[0])
    assert relative_rms(out[shared.places_T.to(DEVICE)], expected) < 1e-5
    merged = wanted.clone()
    merged[:prefix] += wanted[lengths[0] : lengths[0] + prefix]
    assert relative_rms(got[:prefix], merged[:prefix]) < 1e-5


def test_no_queries_and_wrong_lengths() -> None:
    inputs = make_inputs(CONFIG, lengths=[9], num_kv_heads=1).to(device=DEVICE, requires_grad=False)
    empty = nsa_attention(
        inputs.q[:0], type(inputs.kv)(*[(k[:0], v[:0]) for k, v in (inputs.kv.cmp, inputs.kv.slc, inputs.kv.win)]), inputs.gates[:0],
        phi=None, config=CONFIG, backend="triton",
    )  # fmt: skip
    assert empty.shape == (0, *inputs.q.shape[1:2], inputs.kv.slc[1].shape[2])
    with pytest.raises(ValueError, match="counts 8 queries and 8 keys, got 9 and 9"):
        nsa_attention(inputs.q, inputs.kv, inputs.gates, phi=None, config=CONFIG, cu_seqlens=cumulative([8]), backend="triton")


def test_kernels_are_refused_where_they_cannot_run(monkeypatch) -> None:
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    assert resolve_backend("triton", torch.device("cuda")) == "triton"
    assert resolve_backend("auto", torch.device("cpu")) == "torch"
    with pytest.raises(ValueError, match="need a CUDA GPU, got tensors on cpu"):
        resolve_backend("triton", torch.device("cpu"))
    with pytest.raises(ValueError, match="must be one of auto, reference, torch, triton; got 'flash'"):
        resolve_backend("flash", torch.device("cpu"))


PAPER = SparsityConfig()


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "group", "dims"), [(2, 16, (128, 128)), (3, 3, (64, 64)), (2, 1, (192, 128)), (1, 7, (96, 32))])
def test_bf16_errors_are_at_most_twice_plain_pytorch(heads, group, dims) -> None:
    inputs = make_inputs(PAPER, lengths=[1500, 130, 1], num_kv_heads=heads, group_size=group, key_dim=dims[0], value_dim=dims[1])
    exact = inputs.to(dtype=torch.float64)
    half = inputs.to(dtype=torch.bfloat16)
    expected, selection, wanted = run(exact, "torch")
    plain, _, plain_gradients = run(half, "torch", selection=selection)
    out, _, gradients = run(half, "triton", selection=selection)
    assert relative_rms(out, expected) <= max(5e-3, 2 * relative_rms(plain, expected))
    for name, gradient in wanted.items():
        assert relative_rms(gradients[name], gradient) <= max(5e-3, 2 * relative_rms(plain_gradients[name], gradient)), name


@pytest.mark.gpu
def test_selection_and_fp32_results_at_the_papers_settings() -> None:
    inputs = make_inputs(PAPER, lengths=[1500, 400], num_kv_heads=2, group_size=4, key_dim=64, value_dim=64)
    out, selection, gradients = run(inputs, "triton")
    expected, chosen, wanted = run(inputs.to(dtype=torch.float64), "torch")
    clear = clear_choices(inputs)
    assert_same_selection(selection, chosen, clear)
    out, _, gradients = run(inputs, "triton", selection=chosen)
    assert relative_rms(out, expected) < 1e-5
    for name, gradient in wanted.items():
        assert relative_rms(gradients[name], gradient) < 2e-5, name


@pytest.mark.gpu
def test_runs_are_bit_equal_alone_and_beside_others() -> None:
    inputs = make_inputs(PAPER, lengths=[1200, 700], num_kv_heads=2, group_size=4, key_dim=64, value_dim=64, dtype=torch.bfloat16)
    first, second = run(inputs, "triton"), run(inputs, "triton")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])
    alone = inputs.to(device="cuda", requires_grad=False)
    kv = type(alone.kv)(*[(k[:1200], v[:1200]) for k, v in (alone.kv.cmp, alone.kv.slc, alone.kv.win)])
    out, selection = nsa_attention(alone.q[:1200], kv, alone.gates[:1200], phi=alone.phi, config=PAPER, return_selection=True, backend="triton")
    assert torch.equal(out, first[0][:1200])
    assert torch.equal(selection, first[1][:1200])


def test_fp64_is_refused_in_one_line_and_a_plan_decides_the_backend() -> None:
    inputs = make_inputs(CONFIG, lengths=[20], num_kv_heads=1, dtype=torch.float64).to(device=DEVICE, requires_grad=False)
    with pytest.raises(ValueError, match=r"backend 'triton' takes bfloat16, float16, float32, got q in torch.float64; use 'torch'$"):
        nsa_attention(inputs.q, inputs.kv, inputs.gates, **inputs.options, backend="triton")
    plan = plan_batch(cumulative([20]), None, config=CONFIG, num_heads=inputs.q.shape[1], device=torch.device(DEVICE), backend="torch")
    out = nsa_attention(inputs.q, inputs.kv, inputs.gates, **(inputs.options | {"cu_seqlens": plan}), backend="triton")
    assert isinstance(out, torch.Tensor)
    assert out.dtype == torch.float64


def test_auto_takes_the_kernels_on_a_gpu_with_bf16_and_torch_elsewhere(monkeypatch) -> None:
    assert resolve_backend("auto", torch.device("cpu")) == "torch"
    for capability, name in (((9, 0), "triton"), ((7, 5), "torch")):
        attention._kernels_run.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert resolve_backend("auto", torch.device("cuda", 0)) == name
    attention._kernels_run.cache_clear()
