"""TitansForCausalLM: the paper's models behind transformers' interface.

Letters: b batch, n positions of a call, d features, v tokens of the vocabulary, r rows of tokens, m the longest of them
"""

import dataclasses
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from titans_pytorch.common.checks import Words, wrong
from titans_pytorch.decoding.sampling import check_ids
from titans_pytorch.hf.cache import TitansCache
from titans_pytorch.hf.configuration import TitansHFConfig
from titans_pytorch.hf.layout import Layout, lay_out
from titans_pytorch.hf.offload import load_whole
from titans_pytorch.layers.attention import RotaryPositions
from titans_pytorch.models.family import build_model
from titans_pytorch.models.language_model import Surprises
from titans_pytorch.models.state import ModelState

IGNORE = -100  # label of tokens that are left out, as in torch's cross entropy
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
OF_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")


class TitansOutput(CausalLMOutputWithPast):
    """transformers' output of a language model. The cache has both names that transformers' versions give it, `cache`
    and `past_key_values`."""


CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
if CACHE == "past_key_values":
    # type checkers see the newest release, where it is a field
    TitansOutput.cache = property(lambda self: self.past_key_values)  # type: ignore[assignment]


class TitansPreTrainedModel(PreTrainedModel):
    """Loading, saving and device placement by transformers.

    Args:
        config: a TitansHFConfig.
        inputs, kwargs: transformers' own.
    """

    config_class = TitansHFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "Decoder"]
    _is_stateful = True  # a memory cannot undo tokens: no speculative decoding

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def initialize_weights(self) -> None:
        """Initialise parameters that were not loaded, as `build_model` does."""
        self._fill_missing()
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a resized embedding, and buffers that are not saved."""
        if type(module) is nn.Embedding and not getattr(module.weight, "_is_hf_initialized", False):
            nn.init.normal_(module.weight, std=self.config.init_std)
        elif isinstance(module, RotaryPositions) and module.dummy.device.type != "meta":
            module.dummy.zero_(), module.cached_freqs.zero_()

    @torch.no_grad()
    def _fill_missing(self) -> None:
        """Copy parameters and buffers that were not loaded from a new model."""
        unsaved = {f"model.{name}" for name in _unsaved_buffers(self.model)}
        missing = {
            name: tensor
            for name, tensor in chain(self.named_parameters(), self.named_buffers())
            if name not in unsaved and tensor.device.type != "meta" and not getattr(tensor, "_is_hf_initialized", False)
        }
        if not missing:
            return
        new = build_model(self.config.to_model())
        values = dict(chain(new.named_parameters(remove_duplicate=False), new.named_buffers()))
        for name, tensor in missing.items():
            value = values[name.removeprefix("model.")]
            tensor.copy_(value).requires_grad_(value.requires_grad)
            vars(tensor)["_is_hf_initialized"] = True


def _unsaved_buffers(model: nn.Module) -> set[str]:
    saved = model.state_dict().keys()
    return {name for name, _ in model.named_buffers()} - saved


class TitansForCausalLM(TitansPreTrainedModel, GenerationMixin):
    """MAC, MAG, MAL, LMM (arXiv 2501.00663, section 4) or the plain transformer, as config.variant says.

    A text has the same logits alone, in a padded row, and in a row with other texts (position_ids restart at each text,
    as in DataCollatorWithFlattening). With a cache, all rows must hold equally many tokens: prompts of several lengths
    need `generate(use_cache=False)`.

    Args:
        config: a TitansHFConfig.
    """

    _tied_weights_keys = {"model.to_logits.weight": "model.token_emb.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: TitansHFConfig):
        super().__init__(config)
        self.model = build_model(config.to_model())
        for tensor in chain(self.model.parameters(), self.model.buffers()):
            tensor._is_hf_initialized = tensor.device.type != "meta"
        self.post_init()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _register(cls)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.model.token_emb

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Puts the module `value` in its place."""
        self.model.token_emb = value

    def get_output_embeddings(self) -> nn.Module:
        """The map to logits."""
        return self.model.to_logits

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Puts the module `value` in its place."""
        self.model.to_logits = value

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """As in transformers (`missing_keys`, `recompute_mapping`), but config.tie_embeddings holds also over a
        checkpoint with two different weights: the embedding's is taken."""
        if missing_keys is not None:
            tied = self.get_expanded_tied_weights_keys()
            missing_keys.update(target for target, source in tied.items() if source not in missing_keys)
        super().tie_weights(missing_keys, recompute_mapping)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers (`args`, `kwargs`), for both configurations. Returns the embedding."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        vocab_size = self.config.vocab_size
        self.model.config = dataclasses.replace(self.model.config, vocab_size=vocab_size)
        self.model.to_logits.out_features = vocab_size  # older versions leave it where tied
        return embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        cache: TitansCache | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Return logits of ids. With a cache they follow the ids that were already read.

        Args:
            input_ids: integers [b n].
            attention_mask: [b n], with a cache [b, positions it has read + n]: 1 for tokens, 0 for padding, anywhere.
                Padding is not read; its logits are 0 and it is in no loss.
            past_key_values: the TitansCache that the call before returned.
            inputs_embeds: embedded tokens [b n d] in place of input_ids.
            labels: long [b n]; the loss is the mean cross entropy (nats) of each text's labels but its first, shifted
                here, -100 left out. In training `memory_loss` of the tokens whose next label counts is added.
            use_cache: return a cache. Default: config.use_cache outside training, without labels, where all rows hold
                equally many tokens.
            return_dict: False: return a tuple of loss, logits, cache and hidden states, without those that are None.
                Default: as in config.
            logits_to_keep: the last so many (0: all), or which; not with labels.
            position_ids: [b n] or [1 n]: 0, 1, ... or, with a cache, the positions that follow; from 0 again where a
                text begins.
            cache: the same as past_key_values, by its name in newer versions of transformers.
            output_hidden_states: return x [b n d] before each block and after the last, there behind the norm; 0 at
                padding. Default: as in config.
            output_attentions: raises where True: a memory has none.
            cache_position: [n], the positions that follow what the cache has read.
            kwargs: num_items_in_batch (what both losses are divided by in place of the number of labels), ignore_index
                (-100), shift_labels ([b n], labels already shifted); and, as of DataCollatorWithFlattening,
                cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx.

        Returns:
            CausalLMOutputWithPast: loss, logits [b n v], the cache as `past_key_values` and `cache`, hidden_states.

        Raises:
            ValueError: for both or neither of input_ids and inputs_embeds, another cache, a cache of rows with
                different numbers of tokens, masks and positions that say something else than the above, or memories'
                loss without labels (Trainer's label_smoothing_factor takes them away).
            TypeError: for unknown keywords.
        """
        packing, of_loss = self._sorted(kwargs)
        past = _one_cache(past_key_values, cache)
        x = self._embedded(input_ids, inputs_embeds)
        _check_cache_position(cache_position, past, x.shape[1])
        layout = lay_out((x.shape[0], x.shape[1]), past, attention_mask, position_ids, packing)
        targets = self._targets(layout, labels, of_loss)
        self._check_request(output_attentions, targets, of_loss, logits_to_keep)
        use_cache = self._use_cache(layout, past, use_cache, targets is not None)
        state = None if past is None else past.state
        self.model._check_cache(x, state)
        if hasattr(self, "_hf_hook"):
            load_whole(self.model.blocks)
        wants_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hiddens: list[Tensor] = []
        by_steps = layout.one_token and targets is None and not wants_hidden
        x, layers, surprises = self._run(layout.take(x), state, by_steps, hiddens if wants_hidden else None)
        x = self.model.norm(layout.put(x))
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.to_logits(x[:, keep])
        loss = None if targets is None else self._loss(logits, labels, targets, layout, surprises, of_loss)
        new = self._next_cache(past, layout, layers) if use_cache else None
        hidden = (*map(layout.put, hiddens[:-1]), x) if wants_hidden else None
        return_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        if not return_dict:
            return tuple(part for part in (loss, logits, new, hidden) if part is not None)
        named: dict[str, Any] = {CACHE: new}
        return TitansOutput(loss=loss, logits=logits, hidden_states=hidden, **named)

    def _run(
        self, x: Tensor, state: ModelState | None, by_steps: bool, hiddens: list[Tensor] | None
    ) -> tuple[Tensor, tuple, Surprises]:
        """Run tokens [r m d] through the blocks; with `by_steps` one token of each row, without its surprises."""
        if by_steps and state is not None:
            return *self.model.run_token(x, state.layers), []
        return self.model.run(x, None if state is None else state.layers, hiddens)

    def _next_cache(self, past: TitansCache | None, layout: Layout, layers: tuple) -> TitansCache:
        """Return the cache after a call that left the states `layers`."""
        tokens, positions = (0, 0) if past is None else (past.tokens, past.positions)
        state = ModelState(tokens + layout.rows[1], layers, self.model.configuration)
        return TitansCache(state, positions + layout.shape[1])

    def _sorted(self, kwargs: dict) -> tuple[dict, dict]:
        """Keywords of packed rows, and of the loss."""
        unknown = [name for name in kwargs if name not in PACKING + OF_LOSS]
        if unknown:
            raise TypeError(f"forward() got an unexpected keyword argument {unknown[0]!r}")
        given = {name: value for name, value in kwargs.items() if value is not None}
        return ({k: v for k, v in given.items() if k in PACKING}, {k: v for k, v in given.items() if k in OF_LOSS})

    def _embedded(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        if (ids is None) == (embeds is None):
            raise wrong("input_ids or inputs_embeds", Words("both" if ids is not None else "neither"), "one of them")
        if ids is not None:
            check_ids("input_ids", ids, self.model.config.vocab_size)
            return self.model.token_emb(ids.long())
        d = self.config.d_model
        if not isinstance(embeds, Tensor) or embeds.ndim != 3 or embeds.shape[-1] != d or not embeds.numel():
            got = tuple(embeds.shape) if isinstance(embeds, Tensor) else Words(type(embeds).__name__)
            raise wrong("inputs_embeds", got, f"embedded tokens [b n {d}], n >= 1")
        return embeds

    def _targets(self, layout: Layout, labels: Tensor | None, of_loss: dict) -> Tensor | None:
        """Return the label of each token's next token, [r m], -100 where it does not count."""
        ignore = of_loss.get("ignore_index", IGNORE)
        shifted = of_loss.get("shift_labels")
        for name, given in (("labels", labels), ("shift_labels", shifted)):
            if given is not None and (not isinstance(given, Tensor) or tuple(given.shape) != layout.shape):
                got = tuple(given.shape) if isinstance(given, Tensor) else Words(type(given).__name__)
                raise wrong(name, got, f"of shape [b n] = {layout.shape}")
        if shifted is not None:
            targets = layout.take(shifted, ignore)
        elif labels is not None:
            targets = nn.functional.pad(layout.take(labels, ignore)[:, 1:], (0, 1), value=ignore)
        else:
            return None
        return targets.long().masked_fill(targets == ignore, IGNORE)

    def _check_request(
        self, output_attentions: bool | None, targets: Tensor | None, of_loss: dict, logits_to_keep: int | Tensor
    ) -> None:
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if attentions:
            raise wrong("output_attentions", True, "False: a memory has no attention weights")
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise wrong("logits_to_keep", logits_to_keep, "at least 0, or the positions to keep")
        if targets is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("logits_to_keep cannot be combined with labels")
        counted_without_labels = targets is None and "num_items_in_batch" in of_loss
        if counted_without_labels and self.training and self.model.config.memory_loss_weight:
            raise ValueError(
                "memory_loss_weight needs labels; Trainer removes them for label_smoothing_factor and compute_loss_func"
            )

    def _use_cache(self, layout: Layout, past: TitansCache | None, asked: bool | None, has_labels: bool) -> bool:
        if layout.streams:
            return self.config.use_cache and not self.training and not has_labels if asked is None else bool(asked)
        if asked:
            raise ValueError(
                "use_cache=True needs rows with equally many tokens (attention_mask), of one text (position_ids)"
            )
        if past is not None and past.is_initialized:
            raise ValueError("a cache needs rows with equally many tokens (attention_mask), of one text (position_ids)")
        return False

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        targets: Tensor,
        layout: Layout,
        surprises: Surprises,
        of_loss: dict,
    ) -> Tensor:
        """Return the cross entropy plus the memories' loss of the same tokens, divided by the same number."""
        items = of_loss.get("num_items_in_batch")
        shifted = layout.put(targets, IGNORE)
        labels = shifted if labels is None else labels
        loss = self.loss_function(
            logits, labels, self.config.vocab_size, num_items_in_batch=items, shift_labels=shifted
        )
        if not (self.training and self.model.config.memory_loss_weight):
            return loss
        counted = targets != IGNORE
        items = counted.sum().clamp(min=1) if items is None else items
        items = items.to(loss.device) if isinstance(items, Tensor) else items
        of_counted = [_only(of_one, counted) for of_one in surprises]
        return loss + self.model.memory_loss(of_counted) * (counted.numel() / items)

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_config.cache_implementation is not None:
            takes = "None: the model has a cache of its own"
            raise wrong("cache_implementation", generation_config.cache_implementation, takes)
        # transformers' protocol of the self argument does not fit its own classes
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)  # type: ignore[misc]


def _register(cls: type) -> None:
    """Trainer shifts labels for label smoothing where it finds a model's name among those of causal models."""
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(f"titans.{cls.__name__}", cls.__name__)


_register(TitansForCausalLM)


def _only(of_one: tuple[Tensor, ...], counted: Tensor) -> tuple[Tensor, ...]:
    """Set a memory's surprises to 0 at tokens that do not count. counted: bool [r m]."""
    loss, step, *errors = of_one
    return (loss, step.masked_fill(~counted[:, None], 0.0), *(error.masked_fill(~counted, 0.0) for error in errors))


def _one_cache(past_key_values: TitansCache | None, cache: TitansCache | None) -> TitansCache | None:
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values cannot be combined with cache: they are two names of one argument")
    name, given = ("cache", cache) if past_key_values is None else ("past_key_values", past_key_values)
    if given is not None and not isinstance(given, TitansCache):
        raise wrong(name, Words(type(given).__name__), "the TitansCache that an earlier call returned")
    return given


def _check_cache_position(given: Tensor | None, past: TitansCache | None, n: int) -> None:
    if given is None:
        return
    start = 0 if past is None else past.positions
    if (
        not isinstance(given, Tensor)
        or given.shape != (n,)
        or (given != torch.arange(start, start + n).to(given)).any()
    ):
        got = given.tolist() if isinstance(given, Tensor) else Words(type(given).__name__)
        raise wrong("cache_position", got, f"the positions from {start} to {start + n - 1}")
