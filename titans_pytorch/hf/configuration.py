"""TitansHFConfig: ModelConfig as a configuration of transformers. The settings keep their names."""

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from titans_pytorch.common.checks import Words, wrong
from titans_pytorch.common.names import nearest, unknown
from titans_pytorch.models.config import ModelConfig, TitansConfig

FIELDS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}


class TitansHFConfig(PreTrainedConfig):
    """ModelConfig as a configuration of transformers. The names that transformers uses for width, blocks and heads are
    read from ours (hidden_size is d_model).

    Args:
        kwargs: any setting of ModelConfig by its name, and transformers' own. tie_word_embeddings is tie_embeddings.

    Raises:
        ValueError: for settings that ModelConfig does not take, and for names that resemble one of its settings.
    """

    model_type = "titans"
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "tie_word_embeddings": "tie_embeddings",
    }
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(self, **kwargs: Any):
        tied, theirs = kwargs.get("tie_embeddings"), kwargs.get("tie_word_embeddings")
        if None not in (tied, theirs) and tied != theirs:
            raise ValueError("tie_embeddings cannot be combined with another tie_word_embeddings")
        for name in FIELDS.keys() & {self.attribute_map.get(name, name) for name in kwargs}:
            theirs = next((k for k, v in self.attribute_map.items() if v == name and k in kwargs), name)
            kwargs[name] = kwargs.pop(theirs)
        for name, default in FIELDS.items():  # before the base class, which reads some of them
            setattr(self, name, kwargs.pop(name, default))
        for name in kwargs:
            known = [*FIELDS, *self.attribute_map]
            if nearest(name, known, cutoff=0.8) and not hasattr(PreTrainedConfig, name):
                raise unknown("setting ", name, known)
        self.use_cache = kwargs.pop("use_cache", True)
        self.loss_type = kwargs.pop("loss_type", "ForCausalLM")
        kwargs["tie_word_embeddings"] = self.tie_embeddings
        super().__init__(**kwargs)
        for name, value in vars(self.to_model()).items():  # wrong settings raise here
            setattr(self, name, value)

    @classmethod
    def of(cls, config: ModelConfig | TitansConfig, **kwargs: Any) -> "TitansHFConfig":
        """From the library's own `config`, a TitansConfig or its model section; `kwargs` are transformers' own."""
        config = config.model if isinstance(config, TitansConfig) else config
        if not isinstance(config, ModelConfig):
            raise wrong("config", Words(type(config).__name__), "a TitansConfig or its model section")
        return cls(**dataclasses.asdict(config), **kwargs)

    def to_model(self) -> ModelConfig:
        """The library's own; raises ValueError on what it does not take."""
        return ModelConfig(**{name: getattr(self, name) for name in FIELDS})
