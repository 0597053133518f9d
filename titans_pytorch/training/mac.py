"""Settings of the memory-as-context transformer on bytes, and the model they describe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from titans_pytorch.common.names import known_keywords
from titans_pytorch.training.config import at_most, positive, setting, typed
from titans_pytorch.training.errors import TrainingError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["MacConfig", "build_mac"]

# settings that are keywords of the same name
OF_TRANSFORMER = (
    *("dim", "depth", "dim_head", "heads", "ff_mult", "num_residual_streams", "segment_len", "sliding_window_attn"),
    *("num_persist_mem_tokens", "num_longterm_mem_tokens", "neural_memory_segment_len"),
)
WITH_MEMORY = (
    *("neural_memory_layers", "neural_memory_batch_size", "neural_mem_gate_attn_output", "neural_mem_weight_residual"),
    *("neural_memory_qkv_receives_diff_views", "memory_loss_weight"),
)
OF_MEMORY = (
    *("attn_pool_chunks", "qk_rmsnorm", "momentum", "momentum_order", "default_step_transform_max_lr"),
    *("per_parameter_lr_modulation", "spectral_norm_surprises", "use_accelerated_scan"),
    *("init_adaptive_step_bias", "init_momentum_bias", "init_decay_bias"),
)
OF_GATES = ("use_symplectic_gating", "num_pages", "symplectic_page_threshold")


@known_keywords
@dataclass(frozen=True)
class MacConfig:
    """MemoryAsContextTransformer and its NeuralMemory layers; the defaults are the published settings for enwik8."""

    dim: int = setting(384, "width")
    depth: int = setting(8, "layers")
    dim_head: int = setting(64, "width of an attention head")
    heads: int = setting(8, "attention heads")
    ff_mult: float = setting(4.0, "feed-forward width as a multiple of dim")
    num_residual_streams: int = setting(4, "residual streams (hyper-connections; 1: a plain residual)")
    segment_len: int = setting(32, "bytes of a segment, or of the attention window where attention slides")
    sliding_window_attn: bool = setting(True, "attend to a sliding window instead of segments")
    use_flex_attn: bool = setting(True, "use flex attention (on CUDA only)")
    num_persist_mem_tokens: int = setting(4, "persistent memory tokens")
    num_longterm_mem_tokens: int = setting(4, "long-term memory tokens")
    memory: bool = setting(True, "use neural memory layers; without them the model is otherwise the same")
    neural_memory_layers: tuple[int, ...] | None = setting(
        (2, 4, 6), "layers that have a memory, counted from 1 (none: all)"
    )
    neural_memory_segment_len: int | None = setting(4, "bytes of a chunk of the memory")
    neural_memory_batch_size: int | None = setting(
        128, "bytes of a mini-batch, whose gradients are taken at the same fast weights"
    )
    neural_mem_gate_attn_output: bool = setting(
        False, "multiply the attention's output by the sigmoid of the memory's output"
    )
    neural_mem_weight_residual: bool = setting(
        True, "take gradients at fast weights to which those of the previous memory layer are added"
    )
    neural_memory_qkv_receives_diff_views: bool = setting(
        True, "mix query, key and value of a memory from the activations of earlier layers"
    )
    memory_dim_head: int = setting(64, "width of a memory head")
    use_mem_attention_model: bool = setting(
        False, "use a layer of causal attention as the memory network, in place of the MLP"
    )
    memory_heads: int = setting(4, "memory heads")
    memory_depth: int = setting(2, "layers of the memory network (an MLP)")
    memory_expansion_factor: float = setting(2.0, "hidden width of the memory network as a multiple of its input")
    attn_pool_chunks: bool = setting(True, "pool a chunk by attention for its momentum and forget gate")
    qk_rmsnorm: bool = setting(True, "normalise the memory's queries and keys")
    momentum: bool = setting(True, "use momentum in the memory's updates")
    momentum_order: int = setting(1, "order of the memory's momentum")
    default_step_transform_max_lr: float = setting(0.1, "largest learning rate of the memory")
    per_parameter_lr_modulation: bool = setting(
        True, "learn a factor of the learning rate for each parameter of the memory network"
    )
    spectral_norm_surprises: bool = setting(True, "orthogonalise the memory's updates")
    use_accelerated_scan: bool = setting(True, "use the accelerated-scan kernel where it is installed (CUDA only)")
    init_adaptive_step_bias: float | None = setting(None, "initial learning rate of the memory, before its sigmoid")
    init_momentum_bias: float | None = setting(None, "initial momentum of the memory, before its sigmoid")
    init_decay_bias: float | None = setting(None, "initial forget gate of the memory, before its sigmoid")
    memory_max_grad_norm: float | None = setting(None, "soft limit on the norm of the memory's gradients")
    memory_loss_weight: float = setting(0.0, "weight of the memories' inner loss in the training loss")
    use_symplectic_gating: bool = setting(False, "scale the memory's forget gate by a symplectic gate")
    num_pages: int = setting(1, "pages of memory")
    symplectic_page_threshold: float = setting(0.5, "complexity above which the memory switches to another page")

    def __post_init__(self):
        typed(self)
        positive(self, "dim", "depth", "dim_head", "heads", "ff_mult", "num_residual_streams", "segment_len")
        positive(self, "memory_dim_head", "memory_heads", "memory_depth", "memory_expansion_factor", "num_pages")
        positive(self, "neural_memory_segment_len", "neural_memory_batch_size", "momentum_order")
        positive(self, "num_persist_mem_tokens", "num_longterm_mem_tokens", "memory_loss_weight", zero=True)

        at_most(self, depth=1000, memory_depth=100, momentum_order=100)

    def least_parameters(self) -> float:
        """Return the parameters of the embedding and the large matrices, a lower bound."""
        inner = 1.0 * self.heads * self.dim_head
        block = 4 * inner * self.dim + 2.0 * self.ff_mult * self.dim * self.dim
        block += 2.0 * self.num_persist_mem_tokens * inner
        return 512.0 * self.dim + self.depth * block

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.dim

    @property
    def vocab_size(self) -> int:
        """Values of a byte."""
        return 256

    def memory_kwargs(self) -> dict[str, Any]:
        """Return the keywords of NeuralMemory."""
        gated = self.use_symplectic_gating or self.num_pages > 1
        return {
            "dim_head": self.memory_dim_head,
            "heads": self.memory_heads,
            "max_grad_norm": self.memory_max_grad_norm,
            **named(self, OF_MEMORY),
            **(named(self, OF_GATES) if gated else {}),
        }


def named(config: MacConfig, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def build_mac(config: MacConfig, device: torch.device) -> nn.Module:
    """Build the transformer over 256 byte values. Without memory the settings of the memory are ignored.

    Args:
        config: a MacConfig.
        device: device of the model.

    Raises:
        TrainingError: for settings that do not go together.
    """
    from titans_pytorch.mac_transformer import MemoryAsContextTransformer
    from titans_pytorch.memory_models import MemoryAttention, MemoryMLP

    try:
        with_memory: dict[str, Any] = {"neural_memory_layers": ()}
        if config.memory:
            width, factor = config.memory_dim_head, config.memory_expansion_factor
            with_memory = {
                "neural_memory_model": MemoryAttention(width, expansion_factor=factor)
                if config.use_mem_attention_model
                else MemoryMLP(width, config.memory_depth, expansion_factor=factor),
                "neural_memory_kwargs": config.memory_kwargs(),
                **named(config, WITH_MEMORY),
            }
        flex = config.use_flex_attn and device.type == "cuda"
        settings = named(config, OF_TRANSFORMER) | with_memory
        model = MemoryAsContextTransformer(num_tokens=config.vocab_size, use_flex_attn=flex, **settings)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise TrainingError(f"the model cannot be built: {error}") from error
    return model.to(device)
