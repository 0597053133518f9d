"""TitansForCausalLM: a language model of the family behind transformers' interface.

Its cache is a ModelState, whose size does not grow with what was read (but for the variant "baseline").

Letters: b batch, n tokens, v tokens of the vocabulary, r rows chosen
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from titans_pytorch.checks import Words, wrong
from titans_pytorch.models.family import build_model
from titans_pytorch.models.state import ModelState

from .configuration import TitansHFConfig


class TitansCache:
    """A ModelState as `generate` wants it: past_key_values.

    Args:
        state: what the model returned.
    """

    is_compileable = False

    def __init__(self, state: ModelState):
        self.state = state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read; the same in every layer, whatever `layer_idx`."""
        return self.state.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows `beam_idx` [r], in the order that beam search goes on with."""
        self.state = self.state.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Takes the rows `indices` [r]."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after the other."""
        rows = next(tensor for tensor in _tensors(self.state.layers))
        self.reorder_cache(torch.arange(self.state.batch, device=rows.device).repeat_interleave(repeats))


def _tensors(value: Any):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


class TitansPreTrainedModel(PreTrainedModel):
    """What transformers needs to know for loading, saving and placing.

    Args:
        config: a TitansHFConfig.
        inputs, kwargs: transformers' own.
    """

    config_class = TitansHFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _is_stateful = True  # what was read cannot be taken back: no speculative decoding

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """The model has set its own."""


class TitansForCausalLM(TitansPreTrainedModel, GenerationMixin):
    """MAC, MAG, MAL, LMM (arXiv 2501.00663, section 4) or the plain transformer, as config.variant says.

    `generate` reads prompts of one length: a memory would read padding, too. Padding behind a row is fine in training,
    where labels of -100 leave it out of the loss.

    Args:
        config: a TitansHFConfig.
    """

    _tied_weights_keys = {"model.to_logits.weight": "model.token_emb.weight"}

    def __init__(self, config: TitansHFConfig):
        super().__init__(config)
        self.model = build_model(config.to_model())
        self.post_init()

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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of ids which, with past_key_values, follow those it has read.

        Args:
            input_ids: long [b n].
            attention_mask: [b n]; may hide padding at the end of rows, not before it, nor any where a cache is asked
                for.
            past_key_values: the TitansCache that the call before returned.
            inputs_embeds: embedded tokens [b n d] in place of input_ids.
            labels: long [b n]; the loss is the mean cross entropy (nats) of labels[:, 1:], shifted here, -100 left out.
                With `memory_loss_weight` the memories' loss joins in training.
            use_cache: return past_key_values; by default outside training, where there are no labels.
            return_dict: False: a tuple of what there is of loss, logits, past_key_values.
            logits_to_keep: the last so many (0: all), or which.
            kwargs: of the loss function.

        Returns:
            CausalLMOutputWithPast: loss, logits [b n v], past_key_values.

        Raises:
            ValueError: for both or neither of input_ids and inputs_embeds, another cache, or a mask that hides padding
                where it would be read.
        """
        if (input_ids is None) == (inputs_embeds is None):
            got = Words("both" if input_ids is not None else "neither")
            raise wrong("input_ids or inputs_embeds", got, "one of them")
        if past_key_values is not None and not isinstance(past_key_values, TitansCache):
            takes = "the TitansCache that an earlier call returned"
            raise wrong("past_key_values", Words(type(past_key_values).__name__), takes)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if past_key_values is None:
            _check_mask(attention_mask, use_cache)
        x = self.model.token_emb(input_ids) if inputs_embeds is None else inputs_embeds
        state = None if past_key_values is None else past_key_values.state
        tokens = x.shape[1] + (0 if state is None else state.tokens)
        x, layers, surprises = self.model.run(x, None if state is None else state.layers)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.to_logits(self.model.norm(x[:, keep]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            loss = loss + self.model.memory_loss(surprises)
        cache = TitansCache(ModelState(tokens, layers)) if use_cache else None
        if return_dict is False:
            return tuple(part for part in (loss, logits, cache) if part is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)


def _check_mask(mask: Tensor | None, use_cache: bool) -> None:
    """Padding that would be read before a token is refused."""
    if mask is None or mask.ndim != 2:
        return
    mask = mask.bool()
    if use_cache and not mask.all():
        raise wrong("attention_mask", Words("padding"), "prompts of one length, without padding, where a cache is used")
    if not mask[:, 0].all():
        raise wrong("attention_mask", Words("padding before a row's tokens"), "padding at the end alone")
