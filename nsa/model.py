"""The Hugging Face model: NSAForCausalLM over packed sequences, padded batches and a paged cache.

Three ways in, one set of layers: `NSAModel.forward_packed` (training, scoring), `NSAModel.forward_cached` and
`decode_step` (engines), and `NSAForCausalLM.forward` (Hugging Face's calling convention: padded batches are packed
first, so padding on either side never moves a block boundary). Leaves out sampling and losses other than `labels=`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from nsa.attention import LayerCache, plan_batch, resolve_backend
from nsa.cache import NSACache, plan_write
from nsa.config import NSAConfig
from nsa.layers import Compressor, DecoderLayer, NSAAttention, RMSNorm, RotaryEmbedding, StepContext, linear
from nsa.packing import Packing, SharedPrefix, pad_all, padded_waste, uniform_packing, unpad_all

if TYPE_CHECKING:
    from nsa.kernels.tiles import KernelPlan

AUTO_MAP = {
    "AutoConfig": "configuration_nsa_grpo.NSAConfig",
    "AutoModel": "modeling_nsa_grpo.NSAModel",
    "AutoModelForCausalLM": "modeling_nsa_grpo.NSAForCausalLM",
}
MAX_PADDED_WASTE = 0.15
"""Sequences of nearly one length run padded through all layers: that many dummy rows cost less than gathering in each."""
SHIMS = {
    "configuration_nsa_grpo.py": "from nsa.config import NSAConfig\n\n__all__ = ['NSAConfig']\n",
    "modeling_nsa_grpo.py": "from nsa.model import NSAForCausalLM, NSAModel\n\n__all__ = ['NSAForCausalLM', 'NSAModel']\n",
}


@dataclass(frozen=True, slots=True)
class PackedOutput:
    """hidden_TE: fp32 `[T, E]` after the final norm; selection: `[T, layers, Hkv, n]` where it was asked for."""

    hidden_TE: torch.Tensor
    selection: torch.Tensor | None = None


class GenerationCache:
    """What `generate` carries from step to step: a paged cache that grows, and the rows' sequences in it."""

    is_compileable = False

    def __init__(self, config: NSAConfig, num_rows: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.pages = NSACache(config, num_pages=num_rows, device=device, dtype=dtype)
        self.rows = [self.pages.add_sequence() for _ in range(num_rows)]
        self.num_seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the padded batch seen so far (padding counted, as `generate` counts)."""
        return self.num_seen

    def extend(self, counts: Sequence[int], num_columns: int) -> None:
        """Reserve each row's new tokens, growing the cache where needed."""
        pages = self.pages
        need = sum(pages.pages_for(pages.length(row) + count) - len(pages.pages(row)) for row, count in zip(self.rows, counts, strict=True))
        if need > pages.num_free_pages:
            pages.grow(max(need - pages.num_free_pages, pages.num_pages))
        pages.reserve(self.rows, counts)
        self.num_seen += num_columns

    def reorder_cache(self, beam_index: torch.Tensor) -> None:
        """Row i goes on from what row `beam_index[i]` was."""
        if len(self.rows) > self.pages.num_free_pages:
            self.pages.grow(len(self.rows))
        rows = [self.pages.fork(self.rows[int(index)])[0] for index in beam_index]
        for row in self.rows:
            self.pages.release(row)
        self.rows = rows


CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""What Transformers calls the cache of keys and values, in outputs and as an argument: `cache` from 5.24 on. `forward` takes both names."""


class NSAPreTrainedModel(PreTrainedModel):
    """Initialisation, checkpoint layout and capability flags shared by the models."""

    config: NSAConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = NSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 (the base class declares it so)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies()[0])
        elif isinstance(module, Compressor):
            init.zeros_(module.position)
            init.zeros_(module.down.weight)
        elif isinstance(module, NSAAttention) and self.config.gate == "blend":
            init.zeros_(module.branch_mix)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Hugging Face's, plus the `auto_map` shim that lets `trust_remote_code=True` load it without `import nsa`."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)
        for name, text in SHIMS.items():
            (Path(save_directory) / name).write_text(text, encoding="utf-8")


class NSAModel(NSAPreTrainedModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: NSAConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def _run(self, hidden_TE: torch.Tensor, step: StepContext, caches: Sequence[LayerCache] | None, selection: torch.Tensor | None) -> PackedOutput:
        hidden = hidden_TE.to(torch.promote_types(hidden_TE.dtype, torch.float32))
        chosen = []
        for index, layer in enumerate(self.layers):
            arguments = (hidden, step, caches[index] if caches else None, None if selection is None else selection[:, index])
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                result = checkpoint(layer, *arguments, use_reentrant=False)
                assert isinstance(result, tuple)
                hidden, blocks = result
            else:
                hidden, blocks = layer(*arguments)
            if step.return_selection:
                chosen.append(blocks)
        return PackedOutput(self.norm(hidden), torch.stack(chosen, dim=1) if step.return_selection else None)

    def forward_packed(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        cu_seqlens_N1: torch.Tensor,
        *,
        selection: torch.Tensor | None = None,
        return_selection: bool = False,
        inputs_embeds_TE: torch.Tensor | None = None,
        shared_prefix: SharedPrefix | None = None,
        rows_R: torch.Tensor | None = None,
    ) -> PackedOutput:
        """Whole sequences, one after the other, without a cache.

        Args:
            token_ids_T: int `[T]`. positions_T: int `[T]`, from 0 in each sequence. cu_seqlens_N1: int `[N+1]`.
            selection: `[T, layers, Hkv, n]` block choices to replay (a row that begins with −2 is chosen anew).
            shared_prefix: plan of this batch by `plan_shared_prefix`: common prompts are computed once, with the same
                results up to rounding.
            rows_R: return the hidden states of these packed rows only, `[R, E]`.
        Raises:
            ValueError: lengths that do not fit together.
        """
        if token_ids_T.shape != positions_T.shape or int(cu_seqlens_N1[-1]) != len(token_ids_T):
            raise ValueError(f"{tuple(token_ids_T.shape)} tokens, {tuple(positions_T.shape)} positions, cu_seqlens to {int(cu_seqlens_N1[-1])}")
        device = self.embed_tokens.weight.device
        hidden = self.embed_tokens(token_ids_T.to(device)) if inputs_embeds_TE is None else inputs_embeds_TE
        cos, sin = self.rotary(positions_T.to(device))
        selection = None if selection is None else selection.to(device)
        if shared_prefix is None:
            out = self._run_packed(hidden, cos, sin, self._plan(cu_seqlens_N1, None), selection, return_selection)
            return out if rows_R is None else replace(out, hidden_TE=out.hidden_TE.index_select(0, rows_R))
        rows_U, places_T = shared_prefix.rows_U.to(device), shared_prefix.places_T.to(device)
        packing = self._plan(shared_prefix.query_ends, shared_prefix.key_ends, shared_prefix.key_rows)
        selection = None if selection is None else selection[rows_U]
        out = self._run_packed(hidden[rows_U], cos[rows_U], sin[rows_U], packing, selection, return_selection)
        wanted = places_T if rows_R is None else places_T[rows_R]
        return PackedOutput(out.hidden_TE[wanted], None if out.selection is None else out.selection[places_T])

    def _plan(self, ends: torch.Tensor, key_ends: torch.Tensor | None, key_index: torch.Tensor | None = None) -> Packing | KernelPlan:
        config, device = self.config, self.embed_tokens.weight.device
        return plan_batch(
            ends, key_ends, config=config.sparsity, num_heads=config.num_attention_heads, device=device,
            backend=config.attention_backend, key_index=key_index,
        )  # fmt: skip

    def _run_packed(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        packing: Packing | KernelPlan,
        selection: torch.Tensor | None,
        return_selection: bool,
    ) -> PackedOutput:
        """All layers over packed rows; in the padded layout throughout where that costs few dummy rows."""
        if not isinstance(packing, Packing) or padded_waste(packing) > MAX_PADDED_WASTE:
            return self._run(hidden, StepContext(cos=cos, sin=sin, packing=packing, return_selection=return_selection), None, selection)
        rows = packing.groups[0].query_rows
        step = StepContext(cos=cos[rows], sin=sin[rows], packing=uniform_packing(packing), return_selection=return_selection)
        padded = self._run(pad_all(hidden, packing, keys=False)[0].flatten(0, 1), step, None, None if selection is None else selection[rows])
        shape = (packing.groups[0].num_sequences, -1)
        return PackedOutput(
            unpad_all([padded.hidden_TE.unflatten(0, shape)], packing),
            None if padded.selection is None else unpad_all([padded.selection.unflatten(0, shape)], packing),
        )

    def forward_cached(
        self,
        token_ids_T: torch.Tensor,
        cu_seqlens_N1: torch.Tensor,
        block_table_NP: torch.Tensor,
        seq_lens_N: torch.Tensor,
        cache: NSACache,
        *,
        selection: torch.Tensor | None = None,
        return_selection: bool = False,
    ) -> PackedOutput:
        """The new tokens of N sequences (prefill, chunked prefill, or a mixture with single tokens), written to the cache.

        Args:
            token_ids_T: int `[T]`; cu_seqlens_N1: int `[N+1]`, each at least one token.
            block_table_NP: int `[N, P]`; seq_lens_N: int `[N]`, tokens of each sequence with the new ones, whose pages
                are reserved.
        """
        device = self.embed_tokens.weight.device
        ends, lengths = cu_seqlens_N1.cpu().long(), seq_lens_N.cpu().long()
        counts = ends.diff()
        if bool((counts == 1).all()):
            return self.decode_step(
                token_ids_T, block_table_NP, seq_lens_N, cache.layers, dynamic=True, selection=selection, return_selection=return_selection
            )
        if bool((counts < 1).any()) or bool((lengths < counts).any()):
            raise ValueError(
                f"each sequence needs new tokens counted in its length, got counts {counts.tolist()[:8]}, lengths {lengths.tolist()[:8]}"
            )
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        positions = torch.arange(len(rows)) - ends[:-1][rows] + (lengths - counts)[rows]
        table = block_table_NP.to(device).long()
        write = plan_write(table, rows.to(device), positions.to(device), page_size=cache.page_size, config=self.config.sparsity, dynamic=True)
        key_ends, key_slots = None, None
        if bool((lengths > counts).any()):
            key_ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
            key_rows = torch.arange(len(counts)).repeat_interleave(lengths).to(device)
            key_positions = (torch.arange(int(key_ends[-1])) - key_ends[:-1].repeat_interleave(lengths)).to(device)
            key_slots = table[key_rows, key_positions // cache.page_size] * cache.page_size + key_positions % cache.page_size
        cos, sin = self.rotary(positions.to(device))
        packing = self._plan(ends, key_ends)
        step = StepContext(cos=cos, sin=sin, packing=packing, write=write, key_slots=key_slots, return_selection=return_selection)
        return self._run(self.embed_tokens(token_ids_T.to(device)), step, cache.layers, None if selection is None else selection.to(device))

    def decode_step(
        self,
        token_ids_B: torch.Tensor,
        block_table_BP: torch.Tensor,
        seq_lens_B: torch.Tensor,
        caches: Sequence[LayerCache],
        *,
        dynamic: bool = False,
        selection: torch.Tensor | None = None,
        return_selection: bool = False,
    ) -> PackedOutput:
        """One new token of each of B sequences. With `dynamic=False` nothing synchronises with the host and all shapes
        depend on B and P alone, so that the step can be captured in a CUDA graph. A row with `seq_lens_B == 0` is padding."""
        device = self.embed_tokens.weight.device
        table, lengths = block_table_BP.to(device), seq_lens_B.to(device)
        positions = lengths.long() - 1
        rows = torch.arange(len(lengths), device=device)
        write = None
        if resolve_backend(self.config.attention_backend, device) != "triton":  # the kernels find out for themselves where tokens go
            write = plan_write(table, rows, positions, page_size=caches[0].page_size, config=self.config.sparsity, dynamic=dynamic)
        cos, sin = self.rotary(positions.clamp(min=0))
        step = StepContext(cos=cos, sin=sin, write=write, decode=True, block_table=table, seq_lens=lengths, return_selection=return_selection)
        return self._run(self.embed_tokens(token_ids_B.to(device)), step, caches, None if selection is None else selection.to(device))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: GenerationCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cache: GenerationCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """A padded batch `[B, S]` (padding on either side, given by `attention_mask` `[B, S]`), or one packed row `[1, T]`
        with `cu_seqlens`. `position_ids` are accepted and ignored: positions count from each sequence's own start.
        `past_key_values`, or `cache` as newer versions of Transformers say, is what an earlier call returned.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds, a mask that is not `[B, S]`, embeddings with a cache.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        source = input_ids if input_ids is not None else inputs_embeds
        assert source is not None
        rows, columns = source.shape[:2]
        device = self.embed_tokens.weight.device
        if cu_seqlens is not None:
            ends = cu_seqlens.cpu().long()
            if rows != 1 or past_key_values is not None:
                raise ValueError("cu_seqlens goes with one packed row [1, T] and no cache")
            valid = torch.ones(1, columns, dtype=torch.bool, device=device)
        else:
            if attention_mask is None:
                valid = torch.ones(rows, columns, dtype=torch.bool, device=device)
            elif attention_mask.ndim == 2 and attention_mask.shape[1] >= columns:
                valid = attention_mask[:, -columns:].to(device).bool()
            else:
                raise ValueError(
                    f"attention_mask must be [B, S] of 0 and 1 over at least the {columns} input columns, got {tuple(attention_mask.shape)}"
                )
            ends = torch.cat([torch.zeros(1, dtype=torch.long), valid.sum(1).cpu().cumsum(0)])
        flat = source.to(device)[valid]
        if past_key_values is not None and not isinstance(past_key_values, GenerationCache):
            raise ValueError(f"past_key_values must come from an earlier call of this model, got {type(past_key_values).__name__}")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and not (self.training and torch.is_grad_enabled()) and cu_seqlens is None:
            if inputs_embeds is not None:
                raise ValueError("the cache takes input_ids; pass use_cache=False with inputs_embeds")
            if past_key_values is None:
                past_key_values = GenerationCache(self.config, rows, device=device, dtype=self.embed_tokens.weight.dtype)
            counts = ends.diff().tolist()
            past_key_values.extend(counts, columns)
            live = [i for i, count in enumerate(counts) if count]
            sequences = [past_key_values.rows[i] for i in live]
            lengths = torch.tensor([past_key_values.pages.length(s) for s in sequences])
            live_ends = torch.cat([ends[:1], ends[1:][live]])
            table = past_key_values.pages.block_table(sequences)
            packed = self.forward_cached(flat, live_ends, table, lengths, past_key_values.pages).hidden_TE
        else:
            positions = torch.arange(len(flat)) - ends[:-1].repeat_interleave(ends.diff())
            ids = flat if inputs_embeds is None else torch.zeros(len(flat), dtype=torch.long, device=device)
            packed = self.forward_packed(ids, positions, ends, inputs_embeds_TE=None if inputs_embeds is None else flat).hidden_TE
            past_key_values = None
        if packed.shape[0] == rows * columns:
            hidden = packed.view(rows, columns, -1)
        else:
            hidden = packed.new_zeros(rows, columns, packed.shape[-1]).masked_scatter(valid[..., None], packed)
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE: past_key_values})  # type: ignore[arg-type]


class NSAForCausalLM(NSAPreTrainedModel, GenerationMixin):
    """The language model. `model.forward_packed` and `lm_head.weight` are what trainers and engines use."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (the base class declares it so)

    def __init__(self, config: NSAConfig) -> None:
        super().__init__(config)
        self.model = NSAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: GenerationCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cu_seqlens: torch.Tensor | None = None,
        cache: GenerationCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """See `NSAModel.forward`. `labels` `[B, S]` (−100 = ignored) are shifted inside, as Hugging Face does; with
        `cu_seqlens` the last label of a sequence never meets the next sequence's first token.

        Returns:
            logits `[B, S, V]` (or the last `logits_to_keep` columns; zeros-derived where padded), loss, the cache.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache if labels is None else False,
            cu_seqlens=cu_seqlens,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        hidden = hidden[:, logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else kept]
        logits = linear(hidden, self.lm_head)
        loss = None
        if labels is not None:
            if cu_seqlens is not None:
                labels = labels.clone()
                labels[:, cu_seqlens[:-1].long()] = -100
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: outputs.get(CACHE)})  # type: ignore[arg-type]
