"""MemoryAsContextTransformer: a language model of segments, long-term tokens and a neural memory (arXiv 2501.00663).

ein letters: b batch, n tokens, d features, v tokens of the vocabulary, p long-term tokens, s residual streams
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import torch
from axial_positional_embedding import ContinuousAxialPositionalEmbedding
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.common.checks import Words, check_flags, flags, number_at_least_0, of_kind, positive_int, wrong
from titans_pytorch.common.identity import check_identity, identity
from titans_pytorch.common.names import known_keywords
from titans_pytorch.decoding.decoder import Decoder, can_decode
from titans_pytorch.decoding.sampling import check_ids, min_p_filter, sample
from titans_pytorch.decoding.steps import CacheDecoder, decoder_by_calls
from titans_pytorch.layers.attention import SegmentedAttention, count, flex_attention
from titans_pytorch.layers.axial_positions import axial_positions
from titans_pytorch.layers.longterm_tokens import insert_longterm, places, remove_longterm
from titans_pytorch.layers.memory_as_context import (
    Earlier,
    LayerCache,
    MemoryAsContextLayer,
    ViewSelector,
    feed_forward,
)
from titans_pytorch.layers.norms import RMSNorm
from titans_pytorch.layers.residual_streams import residual_streams
from titans_pytorch.memory.config import NOT_OF_A_STATE, mini_batch_chunks
from titans_pytorch.memory.diverged import label_memories
from titans_pytorch.memory.surprise import auxiliary_loss
from titans_pytorch.neural_memory import NeuralMemory

__all__ = ["MacCache", "MemoryAsContextTransformer", "SegmentedAttention", "flex_attention"]


class MacCache(NamedTuple):
    """The transformer's state between calls. A call never modifies the cache it is given.

    tokens: tokens read so far.
    layers: a LayerCache for each layer.
    configuration: JSON, the settings of the model that made it; a model of other settings refuses it.
    """

    tokens: int
    layers: tuple[LayerCache, ...]
    configuration: str | None = None


# arguments that do not change the meaning of a cache
NOT_OF_A_CACHE = ("use_flex_attn", "neural_memory_add_value_residual", "memory_loss_weight", "token_emb")


@known_keywords
class MemoryAsContextTransformer(nn.Module):
    """Token ids [b n] -> logits [b n num_tokens]: the language model of titans-pytorch.

    Each layer has a neural memory, attention within segments (or a sliding window) and a feed-forward. It follows
    memory as context of Titans (arXiv 2501.00663, section 4.1) with one difference: the memory's output is added to the
    tokens and is not part of attention's context (`TitansMAC` is the paper's). Residual streams are hyper-connections
    (arXiv 2409.19606). Attention mixes in the first layer's values (arXiv 2410.17897).

    Args: Size
        num_tokens: vocabulary; ids are below it.
        dim: features of a token.
        depth: layers.
        ff_mult: width of the feed-forward as a multiple of dim; two thirds of it, since it is gated.
        num_residual_streams: hyper-connection streams; 1 is a plain residual.
        token_emb: module for the embedding, ids [b n] -> [b n dim]; default nn.Embedding.

    Args: Attention
        segment_len: tokens of a segment.
        num_longterm_mem_tokens: learned tokens after every complete segment.
        num_persist_mem_tokens: learned keys and values in each attention layer (eq. 19).
        dim_head: features of a head.
        heads: number of heads.
        sliding_window_attn: attention sees a sliding window instead of its own segment.
        use_flex_attn: use flex attention on CUDA.

    Args: Memory
        neural_memory_layers: which layers have a memory, counted from 1; default all, () none.
        neural_memory_segment_len: the memory's chunk; default segment_len + num_longterm_mem_tokens.
        neural_memory_batch_size: tokens of a mini-batch, whose gradients are taken at the same fast weights.
        neural_memory_model: the memory network, copied for each layer; default: NeuralMemory's.
        neural_memory_kwargs: further arguments of NeuralMemory; modules among them are copied for each layer.
        neural_memory_qkv_receives_diff_views: the memory's query, key and value views are learned mixtures of its input
            and the earlier layers' branch inputs and outputs (not in layer 1).
        neural_mem_weight_residual: gradients are taken at fast weights to which the previous memory layer's are added.
        neural_mem_gate_attn_output: the sigmoid of the memory's output multiplies attention's output; nothing else uses
            it.
        neural_memory_add_value_residual: accepted for the peer's sake, no effect.
        memory_loss_weight: factor of the memories' `auxiliary_loss` (mean over layers), which in training mode is added
            to the cross entropy of `return_loss`. A predictor (surprise_source) learns from nothing else.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        segment_len: int,
        neural_memory_segment_len: int | None = None,
        neural_mem_gate_attn_output: bool = False,
        neural_memory_add_value_residual: bool = False,
        num_longterm_mem_tokens: int = 0,
        num_persist_mem_tokens: int = 0,
        neural_memory_batch_size: int | None = None,
        neural_memory_qkv_receives_diff_views: bool = False,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: float = 4,
        num_residual_streams: int = 4,
        neural_memory_model: nn.Module | None = None,
        neural_memory_kwargs: Mapping | None = None,
        neural_memory_layers: tuple[int, ...] | None = None,
        use_flex_attn: bool = False,
        sliding_window_attn: bool = False,
        neural_mem_weight_residual: bool = False,
        token_emb: nn.Module | None = None,
        memory_loss_weight: float = 0.0,
    ):
        given = dict(locals())
        check_flags(MemoryAsContextTransformer.__init__, given)
        super().__init__()
        positive_int(num_tokens, "num_tokens")
        positive_int(dim, "dim")
        positive_int(depth, "depth")
        positive_int(segment_len, "segment_len")
        self.memory_loss_weight = _weight(memory_loss_weight)
        count(num_longterm_mem_tokens, "num_longterm_mem_tokens")
        if neural_memory_segment_len is None:
            neural_memory_segment_len = segment_len + num_longterm_mem_tokens
        positive_int(neural_memory_segment_len, "neural_memory_segment_len")
        memory_layers = _memory_layers(neural_memory_layers, depth)
        if memory_layers:
            mini_batch_chunks(neural_memory_batch_size, neural_memory_segment_len, "neural_memory_batch_size")
            of_kind(neural_memory_model, (nn.Module, type(None)), "neural_memory_model", "a torch.nn.Module, or None")
        if token_emb is not None and not callable(token_emb):
            raise wrong("token_emb", token_emb, "a module, ids [b n] -> [b n dim], or None")

        self.segment_len = segment_len
        self.memory_segment_len = neural_memory_segment_len

        self.ids_below = num_tokens if token_emb is None else None  # another embedding has a range of its own
        self.token_emb = nn.Embedding(num_tokens, dim) if token_emb is None else token_emb
        longterm = torch.randn(num_longterm_mem_tokens, dim) * 0.02
        self.longterm_mems = nn.Parameter(longterm, requires_grad=num_longterm_mem_tokens > 0)
        self.axial_pos_emb = ContinuousAxialPositionalEmbedding(dim=dim, num_axial_dims=2)
        new_connection, self.expand_streams, self.reduce_streams = residual_streams(num_residual_streams, dim)

        new_memory = partial(
            NeuralMemory,
            dim=dim,
            chunk_size=neural_memory_segment_len,
            batch_size=neural_memory_batch_size,
        )
        memory_kwargs = _memory_kwargs(neural_memory_kwargs, neural_memory_batch_size, neural_memory_segment_len)
        new_attention = partial(
            SegmentedAttention,
            dim=dim,
            segment_len=segment_len,
            num_persist_mem_tokens=num_persist_mem_tokens,
            num_longterm_mem_tokens=num_longterm_mem_tokens,
            dim_head=dim_head,
            heads=heads,
            sliding=sliding_window_attn,
            use_flex_attn=use_flex_attn,
        )
        self.layers = nn.ModuleList()
        for index in range(depth):
            memory = selector = None
            if index in memory_layers:
                diff_views = neural_memory_qkv_receives_diff_views and index > 0
                memory = new_memory(
                    model=deepcopy(neural_memory_model),
                    qkv_receives_diff_views=diff_views,
                    accept_weight_residual=neural_mem_weight_residual and index > min(memory_layers),
                    **deepcopy(memory_kwargs),
                )
                selector = ViewSelector(dim, earlier_layers=index) if diff_views else None
            layer = MemoryAsContextLayer(
                partial(new_connection, layer_index=index),
                new_attention(accept_value_residual=index > 0),
                feed_forward(dim, ff_mult),
                memory,
                selector,
                gate_attn_output=neural_mem_gate_attn_output,
                leave_updates=neural_mem_weight_residual,
                leave_activations=neural_memory_qkv_receives_diff_views and index < max(memory_layers, default=0),
            )
            self.layers.append(layer)
        self.norm = RMSNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)
        label_memories(self)
        own = {
            "neural_memory_segment_len": neural_memory_segment_len,
            "neural_memory_layers": sorted(layer + 1 for layer in memory_layers),
            "neural_memory_kwargs": {k: v for k, v in memory_kwargs.items() if k not in NOT_OF_A_STATE} or None,
        }
        self.configuration = identity(MemoryAsContextTransformer.__init__, given, NOT_OF_A_CACHE, **own)

    def forward(
        self,
        ids: Tensor,
        return_loss: bool = False,
        disable_flex_attn: bool = False,
        cache: MacCache | None = None,
        return_cache: bool = False,
        memory_loss_weight: float | None = None,
    ) -> Tensor | tuple[Tensor, MacCache]:
        """Return logits [b n num_tokens] of integer token ids [b n], n >= 1.

        Args:
            ids: token ids. With a cache they follow the ids that were already read.
            return_loss: return the mean next-token cross entropy (a scalar, nats) in place of logits. Needs at least
                two tokens and no cache.
            disable_flex_attn: use scaled dot-product attention for this call.
            cache: the MacCache that an earlier call returned.
            return_cache: return (logits, cache for the tokens that follow). Its size does not depend on n.
            memory_loss_weight: replaces the constructor's, in any mode; needs return_loss.

        Raises:
            ValueError: for ids of another shape or dtype, out of range (seen on CPU), or another batch's cache.
        """
        check_ids("ids", ids, self.ids_below)
        flags(return_loss=return_loss, disable_flex_attn=disable_flex_attn, return_cache=return_cache)
        if cache is not None:
            self._check_cache(cache, ids.shape[0])
        ids = ids.long()
        if return_loss:
            if cache is not None or return_cache or ids.shape[1] < 2:
                raise ValueError("return_loss=True needs at least two tokens and no cache")
            own = self.memory_loss_weight if self.training else 0.0
            weight = own if memory_loss_weight is None else _weight(memory_loss_weight)
            logits, memory_loss, _ = self._read(ids[:, :-1], disable_flex_attn, memory_loss=weight != 0)
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            return loss if memory_loss is None else loss + weight * memory_loss
        if memory_loss_weight:
            raise ValueError("memory_loss_weight needs return_loss=True")
        logits, _, layers = self._read(ids, disable_flex_attn, cache, return_cache)
        start = 0 if cache is None else cache.tokens
        if not return_cache:
            return logits
        return logits, MacCache(start + ids.shape[1], tuple(layers), self.configuration)

    def _read(
        self,
        ids: Tensor,
        disable_flex_attn: bool,
        cache: MacCache | None = None,
        keep_caches: bool = False,
        memory_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None, list[LayerCache]]:
        """Return (logits, the memories' mean loss or None, the layers' caches if keep_caches) for ids [b n]."""
        start, n = (0 if cache is None else cache.tokens), ids.shape[1]
        x = insert_longterm(self.token_emb(ids), self.longterm_mems, self.segment_len, start)
        place = places(start, self.segment_len, len(self.longterm_mems))
        own = self.longterm_mems
        x = x + axial_positions(self.axial_pos_emb, place, x.shape[1], self.memory_segment_len, own).to(x.dtype)

        streams, earlier = self.expand_streams(x), Earlier(surprises=() if memory_loss else None)
        caches = [LayerCache()] * len(self.layers) if cache is None else cache.layers
        next_caches = []
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            streams, earlier, next_cache = layer(streams, earlier, layer_cache, disable_flex_attn)
            if keep_caches:
                next_caches.append(next_cache.compact())

        x = remove_longterm(self.reduce_streams(streams), len(self.longterm_mems), self.segment_len, start, n)
        logits = self.to_logits(self.norm(x))
        loss = None
        if memory_loss:
            losses = [auxiliary_loss(surprises) for surprises in earlier.surprises or ()]
            loss = sum(losses, x.new_zeros(())) / max(len(losses), 1)
        return logits, loss, next_caches

    def sample(
        self,
        prompt: Tensor,
        seq_len: int,
        temperature: float = 1.5,
        filter_fn: Callable | None = min_p_filter,
        filter_kwargs: dict | None = None,
        show_progress: bool = True,
        use_cache: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts; see `sampling.sample`.

        Args:
            prompt: token ids [b n], n >= 1.
            seq_len: tokens of prompt and continuation together.
            temperature: temperature of the softmax after the filter; 0 takes the likeliest token.
            filter_fn: logits [b v] -> logits [b v]; None: no filter.
            filter_kwargs: keywords of the filter.
            show_progress: show a progress bar.
            use_cache: carry the state instead of reading earlier tokens again: the same tokens at a constant cost each.
            generator: random number generator on the prompt's device; None: torch's default, which all threads share.

        Returns:
            The ids after the prompts [b seq_len - n].

        Raises:
            ValueError: for a prompt that is not integers [b n] below the vocabulary, or a temperature below 0.
        """
        check_ids("prompt", prompt, self.ids_below)
        return sample(self, prompt, seq_len, temperature, filter_fn, filter_kwargs, show_progress, use_cache, generator)

    def decoder(self, cache: MacCache) -> Decoder | CacheDecoder:
        """Return an object that reads the tokens after `cache` one at a time: `step(ids [b 1])` returns logits [b v],
        `cache()` the cache after them. It computes the numbers of the model's calls, at less cost where it can (see
        `can_decode`), while no parameter changes and gradients are off."""
        self._check_cache(cache)
        return Decoder(self, cache) if can_decode(self, _rows(cache)) else decoder_by_calls(self, cache)

    def _check_cache(self, cache: MacCache, batch: int | None = None) -> None:
        if not isinstance(cache, MacCache):
            raise wrong("cache", Words(type(cache).__name__), "the MacCache that an earlier call returned")
        check_identity(self.configuration, cache.configuration, "cache", MemoryAsContextTransformer.__init__)
        if len(cache.layers) != len(self.layers):
            raise wrong("cache", Words(f"{len(cache.layers)} layers"), f"of {len(self.layers)} layers")
        got = _rows(cache)
        if batch is not None and batch != got:
            raise wrong("cache", Words(f"a batch of {got}"), f"of the batch of the ids, {batch}")


def _rows(cache: MacCache) -> int:
    attention = cache.layers[0].attention
    if attention is None:
        raise wrong("cache", Words("a layer without keys"), "the MacCache that an earlier call returned")
    return attention.keys.shape[0]


def _weight(value: float) -> float:
    return number_at_least_0(value, "memory_loss_weight")


def _memory_layers(layers: Iterable[int] | None, depth: int) -> set[int]:
    """Return the layers that have a memory, counted from 0."""
    if layers is None:
        return set(range(depth))
    if not isinstance(layers, Iterable):
        raise wrong("neural_memory_layers", layers, f"layers from 1 to {depth}")
    layers = tuple(layers)
    for layer in layers:
        if not isinstance(layer, int) or not 1 <= layer <= depth:
            raise wrong("neural_memory_layers", layers, f"layers from 1 to {depth}")
    return {layer - 1 for layer in layers}


def _memory_kwargs(kwargs: Mapping | None, batch_size: int | None, segment_len: int) -> dict:
    """Return the user's arguments of NeuralMemory. With pages, switches are at fixed tokens: training and cached
    sampling agree."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise wrong("neural_memory_kwargs", kwargs, "a dict of NeuralMemory's arguments")
    kwargs = dict(kwargs or {})
    own = {"dim", "chunk_size", "batch_size", "model", "qkv_receives_diff_views", "accept_weight_residual"} & set(
        kwargs
    )
    if own:
        raise ValueError(
            f"neural_memory_kwargs must be without what the transformer's own arguments set, got {sorted(own)}"
        )
    if kwargs.get("num_pages", 1) != 1:
        kwargs.setdefault("page_switch_every", batch_size or segment_len)
    return kwargs
