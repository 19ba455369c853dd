"""The built-in sampler: continuous batching of an NSA model over its paged cache, on CPU and CUDA.

    prompts → Scheduler.admit → prefill (packed, once per group) → fork G samples → DecodeBatch.step × K
            → read flags: EOS, length, stop strings → completions leave, rows are compacted, new groups start → Group

The host looks at the batch every K steps; results do not depend on K, on `max_sequences` or on what else runs. The cache
is taken at the first request, as large as that needs, and grows with later ones (`max_cache_tokens` sets its size).
Leaves out preemption (a sample reserves its pages when it starts), prefix sharing between groups, chunked prefill.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from grpo.data_types import Group, Prompt
from grpo.logprobs import token_logprobs
from grpo.rollout.decode_batch import DecodeBatch
from grpo.rollout.engine import Sampling
from grpo.rollout.generation import PACKED_TOKENS, Generation, token_parts
from grpo.rollout.requests import check_prompts, check_sequence, eos_token_ids
from grpo.rollout.scheduler import PageCounts, Scheduler
from grpo.rollout.stops import StopStrings, TokenPieces
from grpo.rollout.weights import load_named
from grpo.weight_sync import checksum
from nsa.blocks import selection_dtype
from nsa.cache import NSACache
from nsa.config import NSAConfig
from nsa.model import NSAForCausalLM

if TYPE_CHECKING:
    from grpo.transfer import GroupAddress, TensorInfo, WeightGroup

log = logging.getLogger(__name__)

_STEPS_PER_LOOK = {"cpu": 4, "cuda": 8}  # K
_CACHE_SHARE = 0.8  # of the free GPU memory, at most


class TorchEngine:
    """The `Engine` protocol on an `NSAForCausalLM`.

    Args:
        model: used as it is (moved to `device` and `dtype`, set to eval mode); its weights change by `load_weights`.
        tokenizer: turns completions into text.
        max_sequences: rows decoded at the same time.
        max_cache_tokens: size of the cache; None: what a request needs, on CUDA at most 80 % of the free memory.
        cuda_graphs: replay decode steps as CUDA graphs where the device is CUDA.
        version: stamped on completions until `load_weights`.

    Raises:
        ValueError: sizes below 1; no GPU where one is asked for.
    """

    def __init__(
        self, model: NSAForCausalLM, tokenizer: PreTrainedTokenizerBase, *, max_sequences: int, max_cache_tokens: int | None = None,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, cuda_graphs: bool = True, version: int = 0,
    ) -> None:  # fmt: skip
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {device!r} was asked for, but torch sees no CUDA GPU; use device cpu")
        if max_sequences < 1:
            raise ValueError(f"max_sequences must be >= 1, got {max_sequences}")
        if max_cache_tokens is not None and max_cache_tokens < model.config.page_size:
            raise ValueError(f"max_cache_tokens must be at least one page of {model.config.page_size} tokens, got {max_cache_tokens}")
        self.model = model.eval()
        self.model.to(self.device)  # type: ignore[call-overload]
        for parameter in self.model.parameters():  # buffers (rotary frequencies) keep fp32
            parameter.data = parameter.data.to(dtype)
        self.tokenizer = tokenizer
        assert isinstance(model.config, NSAConfig)
        self.config = model.config
        self._max_sequences, self._max_cache_tokens, self._dtype, self._cuda_graphs = max_sequences, max_cache_tokens, dtype, cuda_graphs
        self._version = version
        self._eos_ids = eos_token_ids((model.generation_config, model.config), model.config.vocab_size)
        self._steps_per_look = _STEPS_PER_LOOK.get(self.device.type, 8)
        self._pieces: TokenPieces | None = None
        self._cache: NSACache | None = None
        self._batch: DecodeBatch | None = None
        self._running: Generation | None = None
        self._asleep = self._closed = False
        self._fault: str | None = None
        self._group: WeightGroup | None = None
        self._tokens_made = self._steps_made = 0

    # Sampling

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        """See `Engine.generate`. Everything is checked before the first token.

        Raises:
            ValueError: an empty prompt, one that leaves no room in the context or the cache for max_tokens, ids outside the
                vocabulary, an unusable stop string.
            RuntimeError: a request is in progress, or the engine is asleep, closed or half loaded.
        """
        self._check_ready()
        check_prompts(prompts, max_tokens=sampling.max_tokens, context=self.config.max_position_embeddings, vocabulary=self.config.vocab_size)
        if self._pieces is None and sampling.stop:
            self._pieces = TokenPieces(self.tokenizer, self.config.vocab_size)
        stops = StopStrings(sampling.stop, self._pieces)
        num_pages = self._pages_wanted(prompts, sampling)
        scheduler = Scheduler(
            prompts,
            group_size=sampling.group_size,
            counts=PageCounts(self.config.page_size, sampling.max_tokens),
            max_sequences=self._max_sequences,
            num_pages=num_pages,
        )
        longest = max((len(prompt.token_ids) for prompt in prompts), default=0) + sampling.max_tokens
        return self._groups(scheduler, stops, sampling, num_pages, longest)

    def _groups(self, scheduler: Scheduler, stops: StopStrings, sampling: Sampling, num_pages: int, longest: int) -> Iterator[Group]:
        self._check_ready()
        cache, batch = self._prepare(sampling, num_pages, longest)
        batch.configure(sampling, stops.candidate_ids(self.config.vocab_size))
        running = Generation(
            self.model,
            self.tokenizer,
            cache,
            batch,
            scheduler,
            stops,
            sampling,
            eos_ids=self._eos_ids,
            version=self._version,
            steps_per_look=self._steps_per_look,
        )
        self._running = running
        try:
            while not running.finished:
                yield from running.advance()
                self._check_alive()
        finally:
            running.release()
            self._tokens_made += running.tokens_made
            self._steps_made += running.steps_made
            self._running = None

    def _pages_wanted(self, prompts: Sequence[Prompt], sampling: Sampling) -> int:
        """Pages of the cache during this request: the configured number, else what keeps all rows busy."""
        if self._max_cache_tokens is not None:
            return self._max_cache_tokens // self.config.page_size
        counts = PageCounts(self.config.page_size, sampling.max_tokens)
        most, least = 1, 1
        for prompt in prompts:
            length = len(prompt.token_ids)
            at_once = min(self._max_sequences, sampling.group_size)
            groups = min(len(prompts), -(-self._max_sequences // sampling.group_size) + 1)
            least = max(least, counts.least(length, sampling.group_size))
            most = max(most, groups * (counts.whole(length, at_once) + 1))
        have = self._cache.num_pages if self._cache is not None else 0
        if self.device.type == "cuda" and most > have:
            free = torch.cuda.mem_get_info(self.device)[0] * _CACHE_SHARE
            room = have + int(free // page_bytes(self.config, self._dtype))
            if most > room:
                log.warning("the cache gets %d pages: memory for the %d that would keep all rows busy is not free", max(room, least), most)
            most = min(most, max(room, least))
        return max(most, have)

    def _prepare(self, sampling: Sampling, num_pages: int, longest: int) -> tuple[NSACache, DecodeBatch]:
        """A cache of `num_pages` and a batch with room for the request: those of the last one where they are large enough."""
        if self._cache is None or self._cache.num_pages < num_pages:
            self._cache = self._batch = None
            self._cache = NSACache(self.config, num_pages=num_pages, device=self.device, dtype=self._dtype)
        batch, columns = self._batch, self._cache.pages_for(longest)
        if batch is not None and batch.has_room(sampling, columns):
            return self._cache, batch
        assert self.config.num_key_value_heads is not None
        self._batch = None
        self._batch = DecodeBatch(
            self.model,
            self._cache,
            max_sequences=self._max_sequences,
            max_tokens=max(sampling.max_tokens, batch.max_tokens if batch else 0),
            num_columns=max(columns, batch.num_columns if batch else 0),
            selection_shape=(self.config.num_hidden_layers, self.config.num_key_value_heads, self.config.num_selected_blocks),
            selection_dtype=selection_dtype(self.config.max_position_embeddings, self.config.sparsity),
            eos_ids=self._eos_ids,
            graphs=self._cuda_graphs and self.device.type == "cuda",
        )
        return self._cache, self._batch

    # Scoring, weights, life cycle

    def score(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """See `Engine.score`; works while the engine is asleep too.

        Raises:
            ValueError: a sequence longer than the context, or ids outside the vocabulary.
        """
        self._check_alive()
        for number, sequence in enumerate(sequences):
            check_sequence(sequence, f"sequence {number}", context=self.config.max_position_embeddings, vocabulary=self.config.vocab_size)
        results = [torch.zeros(len(sequence)) for sequence in sequences]
        filled = [i for i, sequence in enumerate(sequences) if len(sequence) > 1]
        for part in token_parts([len(sequences[i]) for i in filled], PACKED_TOKENS):
            members = [filled[i] for i in part]
            lengths = torch.tensor([len(sequences[i]) for i in members])
            ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            token_ids = torch.tensor([token for i in members for token in sequences[i]])
            positions = torch.arange(len(token_ids)) - ends[:-1].repeat_interleave(lengths)
            targets = positions.nonzero().flatten()
            with torch.no_grad():  # inference tensors would not be the caller's to keep
                hidden_TE = self.model.model.forward_packed(token_ids, positions, ends).hidden_TE[(targets - 1).to(self.device)]
                targets_T = token_ids[targets].to(self.device)
                logprobs_T, _ = token_logprobs(hidden_TE, self.model.lm_head.weight, targets_T, compute_dtype=self._dtype)
            for i, values in zip(members, logprobs_T.float().cpu().split((lengths - 1).tolist()), strict=True):
                results[i][1:] = values
        return results

    def load_weights(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See `Engine.load_weights`. Tied weights may be left out.

        Raises:
            ValueError: unknown or missing names, other shapes. The engine then refuses to work until a load succeeds.
            RuntimeError: a request is in progress.
        """
        self._check_idle("load_weights")
        self._fault = "its weights were loaded in part"
        load_named(self.model, named_tensors)
        self._fault = None
        self._version = version

    def join_group(self, address: GroupAddress) -> None:
        """Join the group that weights are broadcast in, as rank 1; all its members do so at the same time."""
        from grpo.transfer import WeightGroup

        self._group = WeightGroup(address, 1, self.device)

    def receive_weights(self, version: int, infos: Sequence[TensorInfo]) -> None:
        """As `load_weights`, with what the group's rank 0 sends at the same time."""
        if self._group is None:
            raise RuntimeError("receive_weights before join_group")
        self.load_weights(version, self._group.receive(infos))

    def records_selection(self) -> bool:
        """Whether a request may ask for block choices: any may."""
        return True

    def on_hang(self, rescue: Callable[[], None]) -> None:
        """Nothing: no call of this engine can hang."""

    def checksum(self) -> int:
        """`weight_sync.checksum` of the weights in use."""
        return checksum(self.model.named_parameters())

    def sleep(self) -> None:
        """Free the cache. Raises RuntimeError while a request is in progress."""
        self._check_idle("sleep")
        self._drop_memory()
        self._asleep = True

    def wake(self) -> None:
        """Allow requests again; the next one takes the cache."""
        self._check_idle("wake")
        self._asleep = False

    def health(self) -> dict[str, float]:
        """Version, cache pages, rows and totals. Raises RuntimeError where the engine can no longer work."""
        self._check_alive()
        return {
            "version": float(self._version),
            "cache_pages": float(self._cache.num_pages if self._cache else 0),
            "cache_pages_free": float(self._cache.num_free_pages if self._cache else 0),
            "max_sequences": float(self._max_sequences),
            "running_sequences": float(self._running.num_running if self._running else 0),
            "tokens_made": float(self._tokens_made),
            "steps_made": float(self._steps_made),
            "asleep": float(self._asleep),
        }

    def close(self) -> None:
        """Free the cache for good; a request in progress ends with an error when it is asked for its next group."""
        self._drop_memory()
        self._closed = True

    def _drop_memory(self) -> None:
        self._cache = self._batch = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_alive(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")
        if self._fault is not None:
            raise RuntimeError(f"the engine cannot work: {self._fault}; call load_weights with all of them")

    def _check_idle(self, action: str) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")
        if self._running is not None:
            raise RuntimeError(f"{action} while a request is in progress: finish or close its iterator first")

    def _check_ready(self) -> None:
        self._check_alive()
        self._check_idle("generate")
        if self._asleep:
            raise RuntimeError("the engine is asleep: call wake() first")


def page_bytes(config: NSAConfig, dtype: torch.dtype) -> int:
    """Bytes of one cache page over all layers."""
    assert config.head_dim and config.value_head_dim and config.num_key_value_heads
    raw = 2 * config.page_size * (3 if config.kv == "separate" else 1) * max(config.head_dim, config.value_head_dim)
    compressed = config.page_size // config.compress_stride * (config.head_dim + config.value_head_dim)
    return (raw + compressed) * config.num_key_value_heads * config.num_hidden_layers * dtype.itemsize
