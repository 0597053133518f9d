"""A plain transformer to compare with (x-transformers: rotary positions, SwiGLU, RMSNorm), with the same interface.

Its state holds the keys and values of all tokens, so state and cost per token grow with the tokens read.

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
    """Full causal attention, no memory, from x-transformers: rotary positions (arXiv 2104.09864), SwiGLU (arXiv
    2002.05202), RMSNorm. Its state grows with the tokens read.

    Args:
        config: a ModelConfig.
    """

    variant = "baseline"

    def new_blocks(self, config: ModelConfig) -> nn.Module:
        """Make the decoder of x-transformers that `config` describes."""
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
        """Run embedded tokens x [b n d], which follow those in `states`. Returns (x, states, []). `hiddens`: a list to
        which x before each block and after the last is appended."""
        from x_transformers.attend import Intermediates
        from x_transformers.x_transformers import LayerIntermediates

        before, n, cache = 0, x.shape[1], None
        if states is not None:
            before = states[0].keys.shape[-2]
            layers = [Intermediates(cached_kv=tuple(state)) for state in states]
            cache = LayerIntermediates(attn_intermediates=layers, cache_length=before)
        x, done = self.blocks(x, cache=cache, cache_age=n, seq_pos_offset=before, return_hiddens=True)
        if hiddens is not None:  # attention and feed-forward alternate; last comes the output
            hiddens += [*done.layer_hiddens[:-1:2], x]
        return x, tuple(PlainState(*layer.cached_kv) for layer in done.attn_intermediates), []
