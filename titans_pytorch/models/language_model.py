"""LanguageModel: token ids to logits through blocks. The base of the paper's models and the plain transformer.

All have the interface of MemoryAsContextTransformer:

    logits = model(ids)                                         # [b n] -> [b n v]
    loss = model(ids, return_loss=True)                         # next-token cross entropy, nats
    logits, cache = model(ids, return_cache=True)               # a stream: the cache is a ModelState
    logits, cache = model(more, cache=cache, return_cache=True)
    written = model.sample(prompt, length, use_cache=True)

The logits do not depend on how a sequence is cut into calls.

Letters: b batch, n tokens, d features, v tokens of the vocabulary, h heads of a memory
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from titans_pytorch.common.checks import Words, flags, of_kind, wrong
from titans_pytorch.common.identity import check_identity, identity
from titans_pytorch.common.switches import with_switches_of_now
from titans_pytorch.decoding.sampling import check_ids, min_p_filter, sample
from titans_pytorch.decoding.steps import STEPS, CacheDecoder, silent, step, steps_apply
from titans_pytorch.layers.memory_as_context import feed_forward
from titans_pytorch.layers.norms import RMSNorm
from titans_pytorch.memory.diverged import label_memories
from titans_pytorch.memory.surprise import auxiliary_loss
from titans_pytorch.models.config import ModelConfig
from titans_pytorch.models.initial import initialise
from titans_pytorch.models.rule_settings import TITANS_STEP
from titans_pytorch.models.state import ModelState

# settings that do not change the meaning of a cache: initial values, settings that may change at any time, training
NOT_OF_A_CACHE = (
    *("init", "init_std", "mem_init", "mem_init_scale", "init_gate_bias"),
    *("init_step_bias", "init_momentum_bias", "init_decay_bias"),
    *("surprise_threshold", "memory_loss_weight", "tie_embeddings"),
)

Surprises = list[tuple[Tensor, ...]]


class Block(nn.Module):
    """x + layer(x), then x + feed-forward(x)."""

    def __init__(self, layer: nn.Module, dim: int, ffn_mult: float):
        super().__init__()
        self.layer = layer
        self.feed_forward = feed_forward(dim, ffn_mult)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any, tuple[Tensor, ...]]:
        """Return (x [b n d], the layer's state, (inner loss, learning rate) [b h n])."""
        out, state, surprises = self.layer(x, state, return_surprises=True)
        x = x + out
        return x + self.feed_forward(x), state, surprises


def block_step(block: Block, x: Tensor, state: Any = None):
    """Run one token, without surprises."""
    if not isinstance(block.feed_forward._modules.get("1"), nn.Linear):
        return None  # quantised maps make more of other rounding
    out, state, _ = step(block.layer, x, state, return_surprises=True)
    x = x + out
    return x + step(block.feed_forward, x), state, ()


STEPS[Block] = block_step


class LanguageModel(nn.Module):
    """Token ids [b n] -> logits [b n v]. A subclass defines `new_layer(config)`.

    If the attribute `gradient_checkpointing` (default False) is set, the backward pass recomputes each block's
    activations.

    Args:
        config: a ModelConfig.
    """

    variant: str | None = None  # the `variant` of a configuration that names this class

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = of_kind(config, ModelConfig, "config", "a ModelConfig")
        made = {name: getattr(config, name) for name in inspect.signature(ModelConfig).parameters}
        own: dict[str, Any] = {"variant": self.variant} if self.variant else {}
        if config.rule == "titans" and config.max_step == TITANS_STEP:
            own["max_step"] = None  # the same, unnamed
        self.configuration = identity(ModelConfig, made, NOT_OF_A_CACHE, **own)
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable = checkpoint
        self.token_emb = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.token_emb.weight, std=config.init_std)
        self.blocks: Any = self.new_blocks(config)  # an nn.ModuleList; of the baseline one module
        self.norm = RMSNorm(config.d_model)
        self.to_logits = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.to_logits.weight = self.token_emb.weight
        initialise(self, config.init, config.init_std)
        label_memories(self)

    def new_blocks(self, config: ModelConfig) -> nn.Module:
        """Make the `config.n_layers` blocks."""
        blocks = (Block(self.new_layer(config), config.d_model, config.ffn_mult) for _ in range(config.n_layers))
        return nn.ModuleList(blocks)

    def new_layer(self, config: ModelConfig) -> nn.Module:
        """Make the layer of one block: [b n d] -> [b n d], with a state. `config`: the ModelConfig."""
        raise NotImplementedError

    def forward(
        self,
        ids: Tensor,
        return_loss: bool = False,
        cache: ModelState | None = None,
        return_cache: bool = False,
        return_surprises: bool = False,
    ):
        """Return logits [b n v] of token ids [b n], n >= 1. With a cache the ids follow those already read.

        Args:
            ids: integers [b n].
            return_loss: return the mean next-token cross entropy (a scalar, nats) in place of logits. In training mode
                `memory_loss` of the tokens that predict one is added. Needs at least two tokens and no cache.
            cache: the cache that the call before returned.
            return_cache: also return the cache for the tokens that follow.
            return_surprises: also return, last, (inner loss, learning rate) for each block, each [b h n]; with
                surprise_source = "prediction" also the predictor's error [b n]. [] without memories. With rule = "lact"
                those of the tokens of complete chunks.

        Raises:
            ValueError: for ids of another shape or dtype, out of range (seen on CPU), or another model's cache.
        """
        check_ids("ids", ids, self.config.vocab_size)
        self._check_cache(ids, cache)
        flags(return_loss=return_loss, return_cache=return_cache, return_surprises=return_surprises)
        if return_loss:
            if cache is not None or return_cache or return_surprises or ids.shape[1] < 2:
                raise ValueError("return_loss=True needs at least two tokens, and no cache or surprises")
            return self._loss(ids.long())
        x, layers, surprises = self.run(self.token_emb(ids.long()), None if cache is None else cache.layers)
        out: tuple = (self.to_logits(self.norm(x)),)
        if return_cache:
            out += (ModelState(ids.shape[1] + (0 if cache is None else cache.tokens), layers, self.configuration),)
        if return_surprises:
            out += (surprises,)
        return out if len(out) > 1 else out[0]

    def run(
        self, x: Tensor, states: tuple | None, hiddens: list[Tensor] | None = None
    ) -> tuple[Tensor, tuple, Surprises]:
        """Run embedded tokens through the blocks.

        Args:
            x: [b n d].
            states: a state for each block, or None where a sequence begins.
            hiddens: a list to which x before each block and after the last is appended.

        Returns:
            x [b n d] after the last block, the states, and the surprises of each block.
        """
        states = (None,) * len(self.blocks) if states is None else states
        after, surprises = [], []
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for block, state in zip(self.blocks, states, strict=True):
            if hiddens is not None:
                hiddens.append(x)
            if again:
                block = block if torch.compiler.is_compiling() else with_switches_of_now(block)
                x, state, surprise = self._gradient_checkpointing_func(block, x, state, use_reentrant=False)
            else:
                x, state, surprise = block(x, state)
            after.append(state)
            surprises.append(surprise)
        if hiddens is not None:
            hiddens.append(x)
        return x, tuple(after), surprises

    def run_token(self, x: Tensor, states: tuple) -> tuple[Tensor, tuple]:
        """Run one embedded token of each row through the blocks, by steps (decoding/steps.py) where they apply.

        Args:
            x: [b 1 d].
            states: a state for each block.

        Returns:
            x [b 1 d] after the last block, and the states.
        """
        if not (steps_apply(x) and type(self).run is LanguageModel.run and "run" not in vars(self)):
            return self.run(x, states)[:2]
        after = []
        for block, state in zip(self.blocks, states, strict=True):
            x, state, _ = step(block, x, state)
            after.append(state)
        return x, tuple(after)

    def decoder(self, cache: ModelState) -> CacheDecoder:
        """Return an object that reads the tokens after `cache` one at a time: `step(ids [b 1])` returns logits [b v],
        `cache()` the cache after them. It computes the numbers of the model's calls, at less cost by steps
        (decoding/steps.py), where they apply: without gradients, in float32 or float64, on a CPU."""
        self._check_cache(None, cache)
        return CacheDecoder(self._next_logits, cache)

    def _next_logits(self, ids: Tensor, cache: ModelState) -> tuple[Tensor, ModelState]:
        """Read ids [b 1] after the cache: (logits [b v], the next cache)."""
        if type(self).forward is not LanguageModel.forward or not silent(self):
            logits, cache = self(ids, cache=cache, return_cache=True)
            return logits[:, -1], cache
        check_ids("ids", ids, self.config.vocab_size)
        self._check_cache(ids, cache)
        x, layers = self.run_token(self.token_emb(ids.long()), cache.layers)
        return self.to_logits(step(self.norm, x))[:, -1], ModelState(
            cache.tokens + ids.shape[1], layers, self.configuration
        )

    def sample(
        self,
        prompt: Tensor,
        seq_len: int,
        temperature: float = 1.0,
        filter_fn: Callable | None = min_p_filter,
        filter_kwargs: dict | None = None,
        show_progress: bool = False,
        use_cache: bool = True,
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
            use_cache: carry the state instead of reading earlier tokens again: constant cost per token (growing in the
                plain transformer).
            generator: random number generator on the prompt's device; None: torch's default, which all threads share.

        Returns:
            The ids after the prompts [b seq_len - n].

        Raises:
            ValueError: for a prompt that is not integers [b n] below the vocabulary, or a temperature below 0.
        """
        check_ids("prompt", prompt, self.config.vocab_size)
        return sample(self, prompt, seq_len, temperature, filter_fn, filter_kwargs, show_progress, use_cache, generator)

    def _loss(self, ids: Tensor) -> Tensor:
        x, _, surprises = self.run(self.token_emb(ids[:, :-1]), None)
        logits = self.to_logits(self.norm(x))
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return loss + self.memory_loss(surprises)

    def memory_loss(self, surprises: Surprises) -> Tensor | float:
        """Return the memories' part of the training loss: `memory_loss_weight` times the mean over memories of
        `auxiliary_loss`. The latter is divided by all pairs, written or not, so it adds up over micro-batches. 0 in
        eval mode. surprises: as a call with return_surprises=True returns them.
        """
        weight = self.config.memory_loss_weight
        if not (weight and self.training and surprises):
            return 0.0
        return weight * torch.stack([auxiliary_loss(of_one, every_pair=True) for of_one in surprises]).mean()

    def _check_cache(self, ids: Tensor | None, cache: ModelState | None) -> None:
        """Raise ValueError for a cache of a model of other settings, or with another number of rows than the ids."""
        if cache is None:
            return
        if not isinstance(cache, ModelState):
            raise wrong("cache", Words(type(cache).__name__), "what an earlier call of this model returned")
        check_identity(self.configuration, cache.configuration, "cache", ModelConfig)
        if len(cache.layers) != self.config.n_layers:
            raise wrong("cache", Words(f"{len(cache.layers)} layers"), f"one of {self.config.n_layers} layers")
        if ids is not None and cache.batch != ids.shape[0]:
            raise wrong("cache", Words(f"one of {cache.batch} rows"), f"one of {ids.shape[0]}, as the ids")
