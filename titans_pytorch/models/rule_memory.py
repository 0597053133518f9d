"""The memory of a block under another rule than Titans': a preset with the settings of a model."""

from typing import Any

import torch
from torch import nn

from titans_pytorch.memory.named.registry import preset_kwargs
from titans_pytorch.memory.presets import exact_memory_kwargs
from titans_pytorch.memory_models import MemoryMLP
from titans_pytorch.models.config import ModelConfig
from titans_pytorch.models.initial import fill
from titans_pytorch.models.memory import NEVER, freeze
from titans_pytorch.models.rule_settings import RULES, Takes
from titans_pytorch.neural_memory import NeuralMemory

__all__ = ["rule_memory"]


def rule_memory(config: ModelConfig) -> NeuralMemory:
    """Make `NeuralMemory.exact`, or the `NeuralMemory.preset` that config.rule names, with the settings of a model that
    the rule has a place for. Convolution, norm of queries and keys, and the first forget gate are the model's, so that
    models differ in the rule alone.

    Args:
        config: a ModelConfig, whose settings fit its rule.
    """
    takes, head = RULES[config.rule], config.d_model // config.mem_heads
    changes = _projections(config) | _rates(config, takes, head)
    if takes.chunk is not None:
        changes[takes.chunk] = config.chunk_size
    if takes.layers is None:
        changes["depth"] = config.mem_layers
    if config.d_hidden is not None:
        changes["expansion_factor"] = (config.d_hidden + 0.5) / head
    if takes.wraps:
        changes["mem_model_norm_add_residual"] = config.mem_norm
    changes |= {"heads": config.mem_heads, "dim_head": head}
    if config.rule == "exact":
        del changes["dim_head"]
        keywords = exact_memory_kwargs(head, **changes) | {"model": MemoryMLP(head, depth=1)}
    else:
        keywords = preset_kwargs(config.rule, config.d_model, **changes)
    if takes.starts:
        _start(keywords["model"], config)
    memory = NeuralMemory(config.d_model, **keywords)
    if takes.gate and not config.use_decay:
        freeze(memory.rates.to_decay_factor)
    if takes.momentum and not config.use_momentum:
        freeze(memory.rates.to_momentum)
    return memory


def _projections(config: ModelConfig) -> dict[str, Any]:
    return {
        "qkv_conv_kernel": config.conv_kernel if config.conv_kernel > 1 else None,
        "qk_l2norm": config.qk_norm == "l2",
        "qk_rmsnorm": config.qk_norm == "rms",
        "surprise_threshold": config.surprise_threshold,
        "surprise_source": config.surprise_source,
    }


def _rates(config: ModelConfig, takes: Takes, head: int) -> dict[str, Any]:
    """Keywords of learning rate, momentum and forget gate, as far as the rule has them."""
    changes: dict[str, Any] = {}
    if config.max_step is not None:
        share = config.max_step * head / 2  # of a mean squared error over `head` features, whose slope is 2 / head
        changes["default_step_transform_max_lr"] = share if takes.step == "share" else config.max_step
    if config.init_step_bias is not None:
        changes["init_adaptive_step_bias"] = config.init_step_bias
    if takes.momentum:
        changes["init_momentum_bias"] = config.init_momentum_bias if config.use_momentum else NEVER
    if takes.gate:
        changes["init_decay_bias"] = config.init_decay_bias if config.use_decay else NEVER
    return changes


@torch.no_grad()
def _start(network: nn.Module, config: ModelConfig) -> None:
    """Give the matrices of a network, which start Xavier-uniform, the initial values of `mem_init`."""
    for weight in network.parameters():
        if config.mem_init != "xavier":
            fill(weight, config.mem_init, config.init_std)
        weight.mul_(config.mem_init_scale)
