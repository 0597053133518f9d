"""TitansMAC, TitansMAG, TitansMAL, TitansLMM: the paper's language models; `build_model` makes the one that a
configuration names."""

import torch

from titans_pytorch.common.checks import Words, wrong
from titans_pytorch.models.baseline import TransformerBaseline
from titans_pytorch.models.config import ModelConfig, TitansConfig
from titans_pytorch.models.language_model import LanguageModel
from titans_pytorch.models.lmm import LMMLayer
from titans_pytorch.models.mac import MACLayer
from titans_pytorch.models.mag import MAGLayer
from titans_pytorch.models.mal import MALLayer
from titans_pytorch.models.memory import titans_memory
from titans_pytorch.models.rule_memory import rule_memory
from titans_pytorch.models.rule_settings import TITANS_STEP
from titans_pytorch.neural_memory import NeuralMemory

__all__ = ["MODELS", "TitansLMM", "TitansMAC", "TitansMAG", "TitansMAL", "TransformerBaseline", "build_model"]


def memory_of(config: ModelConfig) -> NeuralMemory:
    """Make the memory of one block."""
    if config.rule != "titans":
        return rule_memory(config)
    return titans_memory(
        config.d_model,
        heads=config.mem_heads,
        depth=config.mem_layers,
        hidden=config.d_hidden,
        chunk_size=config.chunk_size,
        momentum=config.use_momentum,
        decay=config.use_decay,
        max_step=TITANS_STEP if config.max_step is None else config.max_step,
        conv_kernel=config.conv_kernel,
        qk_norm=config.qk_norm,
        init=config.mem_init,
        init_std=config.init_std,
        init_scale=config.mem_init_scale,
        norm=config.mem_norm,
        surprise_threshold=config.surprise_threshold,
        surprise_source=config.surprise_source,
        init_adaptive_step_bias=config.init_step_bias,
        init_momentum_bias=config.init_momentum_bias,
        init_decay_bias=config.init_decay_bias,
    )


class TitansMAC(LanguageModel):
    """Memory as context, a language model of `MACLayer` blocks (arXiv 2501.00663, section 4.1).

    Args:
        config: a ModelConfig.
    """

    variant = "mac"

    def new_layer(self, config: ModelConfig) -> MACLayer:
        c = config
        return MACLayer(c.d_model, c.n_heads, c.window, c.n_persistent, c.gate, memory_of(c), c.init_gate_bias)


class TitansMAG(LanguageModel):
    """Memory as a gate, a language model of `MAGLayer` blocks (arXiv 2501.00663, section 4.2).

    Args:
        config: a ModelConfig.
    """

    variant = "mag"

    def new_layer(self, config: ModelConfig) -> MAGLayer:
        c = config
        return MAGLayer(c.d_model, c.n_heads, c.window, c.n_persistent, c.gate, memory_of(c), c.init_gate_bias)


class TitansMAL(LanguageModel):
    """Memory as a layer, a language model of `MALLayer` blocks (arXiv 2501.00663, section 4.3).

    Args:
        config: a ModelConfig.
    """

    variant = "mal"

    def new_layer(self, config: ModelConfig) -> MALLayer:
        c = config
        return MALLayer(c.d_model, c.n_heads, c.window, c.n_persistent, memory_of(c))


class TitansLMM(LanguageModel):
    """The memory alone, a language model of `LMMLayer` blocks (arXiv 2501.00663, section 4.3).

    Args:
        config: a ModelConfig.
    """

    variant = "lmm"

    def new_layer(self, config: ModelConfig) -> LMMLayer:
        return LMMLayer(config.d_model, config.mem_heads, config.n_persistent, memory_of(config))


MODELS: dict[str, type[LanguageModel]] = {
    "mac": TitansMAC,
    "mag": TitansMAG,
    "mal": TitansMAL,
    "lmm": TitansLMM,
    "baseline": TransformerBaseline,
}


def build_model(config: TitansConfig | ModelConfig, device: torch.device | str | None = None) -> LanguageModel:
    """Make the language model that a configuration names, with new weights.

    Args:
        config: a TitansConfig, or its model section.
        device: where to put it; "meta" allocates nothing.

    Raises:
        ValueError: for anything but a configuration, settings that cannot be combined, or a device that is not there.
    """
    if isinstance(config, TitansConfig):
        config = config.model
    if not isinstance(config, ModelConfig):
        raise wrong("config", Words(type(config).__name__), "a TitansConfig or its model section")
    try:
        place = None if device is None else torch.device(device)
        torch.empty(0, device=place)
    except Exception as error:  # each kind of device that is absent has another
        raise wrong("device", device, "a torch.device that is there, its name, or None") from error
    if place is not None and place.type == "meta":
        with torch.device("meta"):
            return MODELS[config.variant](config)
    return MODELS[config.variant](config).to(device)
