"""`nsa_attention(deterministic=True)` on the kernels: one sequence's bits do not depend on what is packed beside it."""

import pytest
import torch

from nsa.attention import BranchKV, nsa_attention
from nsa.config import SparsityConfig
from nsa.testing import cumulative, make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOY = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=3, window_size=6)


def results(inputs, rows: slice, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Output, selection and gradients of the packed rows `rows`, which hold sequences of `lengths` tokens."""
    leaves = {name: getattr(inputs, name).detach()[rows].requires_grad_() for name in ("q", "gates")}
    pairs = []
    for branch in ("cmp", "slc", "win"):
        pairs.append(tuple(tensor.detach()[rows].requires_grad_() for tensor in getattr(inputs.kv, branch)))
        leaves |= {f"{branch}.k": pairs[-1][0], f"{branch}.v": pairs[-1][1]}
    options = {"phi": inputs.phi, "config": inputs.options["config"], "cu_seqlens": cumulative(lengths), "backend": "triton", "deterministic": True}
    out, selection = nsa_attention(leaves["q"], BranchKV(*pairs), leaves["gates"], return_selection=True, **options)
    d_out = torch.randn(inputs.q.shape[0], *out.shape[1:], generator=torch.Generator().manual_seed(1))[rows].to(out)
    out.backward(d_out)
    return {"out": out.detach(), "selection": selection} | {name: leaf.grad for name, leaf in leaves.items()}


def compare(config: SparsityConfig, lengths: list[int], which: int, **shape) -> None:
    inputs = make_inputs(config, lengths=lengths, **shape).to(device=DEVICE)
    rows = slice(sum(lengths[:which]), sum(lengths[: which + 1]))
    among = results(inputs, slice(0, sum(lengths)), lengths)
    weights = [tensor.grad.clone() for tensor in (inputs.phi.k.up, inputs.phi.v.down)]
    for tensor in (inputs.phi.k.up, inputs.phi.v.down):
        tensor.grad = None
    again = results(inputs, slice(0, sum(lengths)), lengths)
    for name, value in among.items():
        assert torch.equal(value, again[name]), f"{name} from run to run"
    for tensor, before in zip((inputs.phi.k.up, inputs.phi.v.down), weights, strict=True):
        assert torch.equal(tensor.grad, before)
    alone = results(inputs, rows, [lengths[which]])
    for name, value in alone.items():
        assert torch.equal(value, among[name][rows]), f"{name} alone and among others"


def test_bits_do_not_depend_on_the_other_sequences() -> None:
    compare(TOY, [9, 21, 1, 14], 1, num_kv_heads=1, group_size=3, key_dim=16, value_dim=8)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "group", "dtype"), [(4, 16, torch.bfloat16), (2, 4, torch.bfloat16), (1, 3, torch.float16), (1, 2, torch.float32)])
def test_bits_do_not_depend_on_the_other_sequences_at_real_sizes(heads: int, group: int, dtype: torch.dtype) -> None:
    shape = {"num_kv_heads": heads, "group_size": group, "key_dim": 128, "value_dim": 128, "dtype": dtype}
    compare(SparsityConfig(), [700, 2100, 1, 64, 5000], 1, **shape)
    compare(SparsityConfig(), [700, 2100, 1, 64, 5000], 4, **shape)
