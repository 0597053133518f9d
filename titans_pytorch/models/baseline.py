"""A plain transformer (x-transformers: rotary positions, SwiGLU, RMSNorm) to compare with, of the same interface.

Its state holds the keys and values of all tokens: alone in the family, it grows, and so does the cost of a token.

Letters: b batch, h heads, n tokens, d features
"""

from typing import NamedTuple

from torch import Tensor, nn

from titans_pytorch.models.config import ModelConfig
from titans_pytorch.models.language_model import LanguageModel, Surprises


class PlainState(NamedTuple):
    """keys, values of a layer, [b h n d]."""

    keys: Tensor
    values: Tensor


class TransformerBaseline(LanguageModel):
    """Full causal attention over everything read; no memory. By x-transformers: rotary positions (arXiv 2104.09864),
    SwiGLU (arXiv 2002.05202), RMSNorm. Its state grows with what was read.

    Args:
        config: a ModelConfig.
    """

    variant = "baseline"

    def new_blocks(self, config: ModelConfig) -> nn.Module:
        """The decoder of x-transformers that a configuration, config, describes."""
        from x_transformers import Decoder

        head = config.d_model // config.n_heads
        return Decoder(
            dim=config.d_model,
            depth=config.n_layers,
            heads=config.n_heads,
            attn_dim_head=head,
            attn_flash=True,
            rotary_pos_emb=True,
            rotary_emb_dim=head,
            ff_mult=config.ffn_mult * 2 / 3,
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
            use_rmsnorm=True,
        )

    def run(
        self, x: Tensor, states: tuple | None, hiddens: list[Tensor] | None = None
    ) -> tuple[Tensor, tuple, Surprises]:
        """Embedded tokens x [b n d] through the blocks, after what `states` holds: (x, states, []). `hiddens`: a list
        that x before each block and after the last is appended to."""
        from x_transformers.attend import Intermediates
        from x_transformers.x_transformers import LayerIntermediates

        before, n, cache = 0, x.shape[1], None
        if states is not None:
            before = states[0].keys.shape[-2]
            layers = [Intermediates(cached_kv=tuple(state)) for state in states]
            cache = LayerIntermediates(attn_intermediates=layers, cache_length=before)
        x, done = self.blocks(x, cache=cache, cache_age=n, seq_pos_offset=before, return_hiddens=True)
        if hiddens is not None:  # of attention and feed-forward in turn, and last what both leave
            hiddens += [*done.layer_hiddens[:-1:2], x]
        return x, tuple(PlainState(*layer.cached_kv) for layer in done.attn_intermediates), []
