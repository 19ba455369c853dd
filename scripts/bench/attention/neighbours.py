"""How many different blocks neighbouring queries of a real model choose together, which is what the selected branch's kernels live on.

    python -m scripts.bench.attention.neighbours models/smollm2-nsa math_train.jsonl.gz --tokens 8192

Reads the text fields of a JSONL file one after the other as one sequence, runs the model over it (fp32, on the GPU if there is one) and
looks at the second half of the queries, where all blocks of the first half are candidates. The kernel bench's inputs are made to
resemble SmolLM2 in this (workload.py). Leaves out how alike the attention weights are.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from nsa.model import NSAForCausalLM


def read_text(path: Path, characters: int) -> str:
    """All strings of the rows of a JSONL file (.gz too), until there are so many characters."""
    text = ""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for line in file:
            text += " ".join(value for value in json.loads(line).values() if isinstance(value, str)) + "\n\n"
            if len(text) >= characters:
                break
    return text


def union_sizes(selection: Tensor, neighbours: int) -> Tensor:
    """Different blocks that `neighbours` neighbouring queries of `selection` `[T, layers, Hkv, n]` choose: `[T // neighbours, layers, Hkv]`."""
    num_rows = len(selection) // neighbours * neighbours
    chosen = torch.zeros(*selection.shape[:3], int(selection.max()) + 2, dtype=torch.bool)
    chosen.scatter_(-1, selection.long() + 1, True)  # −1, none, goes to column 0
    return chosen[:num_rows, ..., 1:].unflatten(0, (-1, neighbours)).any(1).sum(-1)


def main() -> None:
    """Prints the mean over queries, layers and KV heads, and the lowest and highest layer's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="an NSA checkpoint, as nsa-grpo convert writes it")
    parser.add_argument("text", type=Path, help="JSONL, or JSONL.gz")
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    for path in (args.checkpoint, args.text):
        if not path.exists():
            parser.error(f"{path} does not exist")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = NSAForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    model.to(device)  # pyright: ignore[reportArgumentType]
    ids = torch.tensor(AutoTokenizer.from_pretrained(args.checkpoint)(read_text(args.text, 6 * args.tokens)).input_ids[: args.tokens])
    if len(ids) < args.tokens:
        parser.error(f"{args.text} holds {len(ids)} tokens, --tokens asks for {args.tokens}")
    with torch.no_grad():
        selection = model.model.forward_packed(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)]), return_selection=True).selection
    assert selection is not None
    later = selection.cpu()[len(ids) // 2 :]
    print(f"{len(ids)} tokens, {-(-len(ids) // model.config.select_block_size)} blocks, {selection.shape[-1]} to a query")
    for neighbours in (2, 4, 8, 16, 32):
        sizes = union_sizes(later, neighbours).float()
        layers = sizes.mean((0, 2))
        print(f"{neighbours:2d} neighbours: {sizes.mean():.1f} different blocks (layers {layers.min():.1f} to {layers.max():.1f})")


if __name__ == "__main__":
    main()
