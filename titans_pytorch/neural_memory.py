"""NeuralMemory: a layer whose fast weights are rewritten by gradient descent while a sequence is read. Start here.

One call, top to bottom: check the arguments, project tokens to keys and values, compute rates, write complete chunks,
read every token, return the state. docs/architecture.md draws it with all shapes.

Titans, arXiv 2501.00663, equations 8 to 18. Letters: b batch, n tokens, h heads (of all pages), d features, c tokens of
a store chunk, m chunks, p key-value pairs of a chunk, o momentum orders, k waiting tokens.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from einops import repeat
from torch import Tensor, nn

from titans_pytorch.common.checks import (
    Words,
    callable_or_none,
    check_flags,
    flags,
    number_or_none,
    of_kind,
    one_of,
    positive_int,
    positive_number,
    threshold_or_none,
    wrong,
)
from titans_pytorch.common.identity import check_identity, identity
from titans_pytorch.common.names import UnknownKeyword, known_keywords, unknown
from titans_pytorch.common.switches import stores, tell
from titans_pytorch.engines.base import Carry, Chunks
from titans_pytorch.engines.lazy import LazyTensors
from titans_pytorch.engines.written import Written, given_entries, nothing_written, write
from titans_pytorch.memory import arguments
from titans_pytorch.memory.config import (
    GATE_ATTRIBUTES,
    GATE_KEYWORDS,
    NOT_OF_A_STATE,
    ChunkConfig,
    check_rate_keywords,
    choose_engine,
    mini_batch_chunks,
)
from titans_pytorch.memory.diverged import warn_if_diverged
from titans_pytorch.memory.earlier_names import rename_earlier
from titans_pytorch.memory.network import InitialWeights, default_model, template_of, wrapped
from titans_pytorch.memory.presets import exact_memory_kwargs, paper_memory_kwargs
from titans_pytorch.memory.projections import ProjectionConfig, Projections
from titans_pytorch.memory.rates import RateConfig, Rates, SigmoidStep
from titans_pytorch.memory.state import NeuralMemState, mem_state_detach
from titans_pytorch.memory.surprise import SOURCES, NextToken, of_pairs, of_rows
from titans_pytorch.memory.unused import unused_parameters, with_unused
from titans_pytorch.memory.window import own_surprises, step_outside, with_window
from titans_pytorch.ops.modes import no_autocast
from titans_pytorch.ops.positions import Reads
from titans_pytorch.ops.scan import AssocScan
from titans_pytorch.rules.base import UpdateRule
from titans_pytorch.rules.losses import checked_loss
from titans_pytorch.rules.rates import WriteRates, skip_below_threshold
from titans_pytorch.rules.titans import TitansRule

__all__ = ["AssocScan", "NeuralMemState", "NeuralMemory", "mem_state_detach"]


class KeyValueViews(NamedTuple):
    """Normalised tokens of complete chunks: keys (which rates and gates see too) and values, each [b m*c d]."""

    keys: Tensor
    values: Tensor


@known_keywords
class NeuralMemory(nn.Module):
    """Writes a sequence [b n d] into the weights of a small network, and reads them at every token: [b n d].

    Two arguments are enough, and there are two ways to begin. `NeuralMemory(dim, chunk_size)` has the defaults of the
    package titans-pytorch. `NeuralMemory.paper(dim, segment)` is the memory as published: it sets the keywords below,
    and takes changes to them. Call it as `retrieved, state = memory(seq, state=state)`.

    Args: What everyone needs
        dim: features of the sequence.
        chunk_size: tokens of a chunk, an int or (retrieve, store). Tokens of a chunk are written together, and momentum
            and forget gate act once per store chunk. Small chunks follow the sequence more closely.

    The rule of Titans (arXiv 2501.00663): the inner loss of a key k and value v is |M(k) - v|^2 (eq. 12), its negative
    gradient is the surprise, S_t = eta S_{t-1} - theta gradient (momentum, eq. 10), M_t = (1 - alpha) M_{t-1} + S_t
    (forget gate, eq. 13), and a read is M(q) (eq. 15). The tokens of a chunk are written together (eq. 16 to 18). Every
    option is causal, and any way of cutting a sequence into calls gives the same outputs (with pages: see
    page_switch_every).

    Args: Size and network
        batch_size: tokens of a mini-batch: gradients are taken at the fast weights at its start. None: at the initial
            weights. A multiple of the store chunk. chunk_size = 1 with a batch size is the paper's rule. The updates of
            a mini-batch add up: with learning rates near 1 the fast weights can diverge, by default within some hundred
            tokens. Long streams need qk_rmsnorm with default_step_transform_max_lr below 1 / batch_size, and an
            init_decay_bias of about -6 with mem_model_norm_add_residual (docs/stability.md).
        heads: memories side by side, each with its own keys, values, queries and fast weights.
        dim_head: features of a head; default dim, with any number of heads.
        model: the memory network, [.. n dim_head] -> [.. n dim_head], a module without buffers; default
            MemoryMLP(dim_head, **default_model_kwargs).
        default_model_kwargs: depth and expansion_factor of that MemoryMLP.
        mem_model_norm_add_residual: wrap the network as LayerNorm(model(x)) (gamma + 1) + x.
        per_head_learned_parameters: learn initial weights for each head.
        num_kv_per_token: keys and values per token.

    Args: Rates
        default_step_transform_max_lr: the largest learning rate theta, which is a sigmoid times this.
        adaptive_step_transform: a function of the learning rate's logits [b n h*u] to use in its place.
        per_parameter_lr_modulation: learn a factor of the surprise per chunk, head and parameter of the network.
        max_mem_layer_modulation: the largest such factor, which is a sigmoid times this.
        momentum: carry momentum eta, eq. 10.
        momentum_order: how often momentum is applied, each time to its own output.
        learned_momentum_combine: mix the orders by a learned softmax per chunk; else the last is used.
        learned_combine_include_zeroth: include the surprise itself in that mixture.
        attn_pool_chunks: pool a chunk's tokens for its rates by a learned softmax instead of the mean.
        learned_step: learn the learning rate of each token; False: it is default_step_transform_max_lr.
        forget_gate: learn a forget gate; False: alpha is 0.
        init_adaptive_step_bias: initial logit of the learning rate, with zero weights; None: as nn.Linear starts.
        init_momentum_bias: the same for momentum.
        init_decay_bias: the same for the forget gate.

    Args: What is written
        store_memory_loss_fn: inner loss (prediction, target) [.. d] -> [..], or a Loss of rules/losses.py; default the
            mean squared error over d.
        max_grad_norm: soft limit of the norm of each chunk's gradient, per parameter.
        spectral_norm_surprises: orthogonalise the update of each matrix by Newton-Schulz, as Muon does.
        decay_first: compute surprises at the mini-batch start weights times the chunk's retention, as gated DeltaNet
            does (arXiv 2412.06464, eq. 10).
        surprise_window: tokens of a surprise window (the Omega rule, arXiv 2505.23735, eq. 9): a chunk also writes the
            surprise_window - 1 tokens before it, each with the chunk's mean learning rate times a learned weight of its
            distance. 1: the chunk alone.
        gated_transition: at the end of each mini-batch the fast weights become start + sigmoid(g) (weights - start),
            with a learned scalar g.
        accept_weight_residual: let forward take `prev_weights`, an earlier memory layer's `updates`, a learned share of
            which is added to the weights at which gradients are taken.
        store_with_lookahead_value: pair each key with the value of the next token of its chunk.
        surprise_threshold: skip pairs whose surprise is below it (their learning rate is 0); a chunk of such pairs
            changes neither fast weights nor momentum. May be set at any time. Masks do not matter to it. Without
            autograd, on the CPU, no gradient is taken in a mini-batch whose chunks are all skipped.
        surprise_source: what the threshold looks at. "memory": the pair's inner loss (eq. 12). "prediction": the mean
            squared error of a learned linear prediction of the normalised token from the one before, for all pairs of
            the token. The predictor is trained by `auxiliary_loss` alone.
        update_rule: an UpdateRule to use in place of the paper's; see rules/base.py. It replaces the keywords momentum,
            momentum_order, spectral_norm_surprises, max_grad_norm and store_memory_loss_fn, which are refused beside
            it, as is learned_momentum_combine unless it is a TitansRule.

    Args: Queries, keys, values, output
        pre_rmsnorm: RMSNorm of the sequence before writes and before reads.
        post_rmsnorm: RMSNorm of what each head reads.
        qk_rmsnorm: RMSNorm of queries and keys. It fixes the size of keys; by itself it keeps no stream finite, see
            batch_size.
        qk_l2norm: give queries and keys unit norm, after the activation (section 4.4). Better without
            mem_model_norm_add_residual, whose LayerNorm magnifies gradients at inputs so small.
        activation: applied after the linear maps of queries, keys and values (and their convolutions).
        qkv_conv_kernel: tokens of a causal depthwise convolution after those linear maps (section 4.4). It sees masked
            tokens too.
        output_gate: "sigmoid" or "silu": RMSNorm of what each head reads, times this function of a linear map of the
            query view, then the output projection, also with one head (section 4.4). Replaces the gate per head.
        qkv_receives_diff_views: seq is [3 b n d]: the query, key and value views.

    Args: Gates of the forget gate (research)
        use_symplectic_gating: multiply a chunk's forget gate by 1 - scale * complexity, the largest complexity of its
            tokens. scale is learned and starts at 0.5.
        symplectic_gate_kwargs: keywords of the SymplecticGating(dim) that gives the complexity.
        symplectic_gate: a module of your own in its place. It is given tokens [b n d], the normalised key view of the
            complete chunks being written behind as many earlier tokens as its attribute `context` says (1), and returns
            [b n 1]. With keyed or hierarchical paging it is called with return_manifold_state = True and returns ([b n
            1], dict(phase_angle = [b n pairs]) or None). It is called once per call that completes a chunk, with a
            batch_size once per mini-batch, unless its attribute `causal` is True (later tokens change no score).
        use_dmd_gating: the same with tanh of the DMD error of the last tokens.
        dmd_window: how many tokens these are (16, or the chunk if longer).
        combine_symplectic_and_dmd: needed with both: uses the mean of the scores and of the scales.
        kinetics_coupling: where learning rates are large beside the forget gate, shrink the forget gate and raise the
            learning rates (gates/kinetics.py).
        kinetics_mix: how much, in [0, 1]; 0 changes nothing.
        kinetics_eps: keeps the ratio of learning rate to learning rate and forget gate finite.

    Args: Pages (research)
        num_pages: copies of the heads. All are read together; each row writes one, starting with page 0, and turns to
            another where a chunk's complexity exceeds a threshold. Nothing changes on the other pages. Needs a gate.
            `page_switch_events`, a tensor, counts the turns; it is 0 without pages.
        symplectic_page_threshold: that threshold (0.5, with DMD 0.4); may be set at any time, see
            `calibrate_page_threshold`.
        page_threshold_quantile: use this quantile of the last chunks' complexities as the threshold.
        page_threshold_window: how many chunks these are.
        page_switch_every: at most one turn in each window of as many tokens, a multiple of the store chunk, counted
            from position 0. None: at most one per call, or mini-batch of it, so that pages depend on how a sequence is
            cut into calls.
        manifold_state_keyed_paging: turn to the page whose share of the circle the gate's phase angle lies in; by
            default, and without a phase, to the next page.
        hierarchical_paging: turn to a coarse page by complexity, and to a fine page within it by the phase.
        coarse_pages: how many; coarse_pages * fine_pages is num_pages. Default: 1, or what fine_pages leaves.
        fine_pages: how many in each. Default: what coarse_pages leaves.
        hierarchy_mix: share of that page in a mixture with the next page, in [0, 1].
        page_router: a function (page, complexity, angle) -> page, elementwise, that selects the page; angle is None
            unless it has `uses_phase = True`.
        read_active_page_only: read only the page that was active when the entry was written; by default all pages are
            read and joined as heads are. Pages that are not read get no gradient there.

    Args: Computation
        engine: "auto" takes the cheapest by counting operations; "solve" (a memory network of one matrix, see
            `exact`), "dual", "matrix" and "sequential" give the same numbers.
        use_accelerated_scan: use the accelerated-scan kernel, where it runs (CUDA, with Triton).

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    label = ""  # its name in the model that holds it, for warnings
    told_diverged = False  # whether the warning of memory/diverged.py was given
    stopped = False  # True in a replica of a memory whose storing was off

    def __init__(
        self,
        dim: int,
        chunk_size: int | tuple[int, int] = 1,
        *,
        batch_size: int | None = None,
        dim_head: int | None = None,
        heads: int = 1,
        model: nn.Module | None = None,
        store_memory_loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        adaptive_step_transform: Callable[[Tensor], Tensor] | None = None,
        default_step_transform_max_lr: float = 1.0,
        per_parameter_lr_modulation: bool = False,
        max_mem_layer_modulation: float = 1.0,
        per_head_learned_parameters: bool = True,
        attn_pool_chunks: bool = False,
        momentum: bool = True,
        momentum_order: int = 1,
        learned_momentum_combine: bool = False,
        learned_combine_include_zeroth: bool = False,
        num_kv_per_token: int = 1,
        qkv_receives_diff_views: bool = False,
        pre_rmsnorm: bool = True,
        post_rmsnorm: bool = False,
        qk_rmsnorm: bool = False,
        max_grad_norm: float | None = None,
        use_accelerated_scan: bool = False,
        activation: nn.Module | None = None,
        learned_step: bool = True,
        forget_gate: bool = True,
        init_adaptive_step_bias: float | None = None,
        init_momentum_bias: float | None = None,
        init_decay_bias: float | None = None,
        accept_weight_residual: bool = False,
        spectral_norm_surprises: bool = False,
        decay_first: bool = False,
        surprise_window: int = 1,
        gated_transition: bool = False,
        mem_model_norm_add_residual: bool = True,
        store_with_lookahead_value: bool = False,
        default_model_kwargs: Mapping = MappingProxyType({"depth": 2, "expansion_factor": 4.0}),
        use_symplectic_gating: bool = False,
        symplectic_gate_kwargs: Mapping | None = None,
        use_dmd_gating: bool = False,
        combine_symplectic_and_dmd: bool = False,
        manifold_state_keyed_paging: bool = False,
        hierarchical_paging: bool = False,
        coarse_pages: int | None = None,
        fine_pages: int | None = None,
        hierarchy_mix: float = 1.0,
        kinetics_coupling: bool = False,
        kinetics_mix: float = 0.0,
        kinetics_eps: float = 1e-6,
        num_pages: int = 1,
        symplectic_page_threshold: float | None = None,
        page_switch_every: int | None = None,
        dmd_window: int | None = None,
        symplectic_gate: nn.Module | None = None,
        page_router: Callable | None = None,
        page_threshold_quantile: float | None = None,
        page_threshold_window: int = 64,
        read_active_page_only: bool = False,
        qkv_conv_kernel: int | None = None,
        qk_l2norm: bool = False,
        output_gate: str | None = None,
        surprise_threshold: float | None = None,
        surprise_source: str = "memory",
        engine: str = "auto",
        update_rule: UpdateRule | None = None,
    ):
        given = dict(locals())
        check_flags(_INIT, given)
        super().__init__()
        self.dim, self.heads = positive_int(dim, "dim"), positive_int(heads, "heads")
        self.dim_head = dim if dim_head is None else positive_int(dim_head, "dim_head")
        self.chunk_config = ChunkConfig(chunk_size, batch_size, num_kv_per_token, store_with_lookahead_value)
        self.diff_views = qkv_receives_diff_views
        self.accept_weight_residual = accept_weight_residual
        self.num_pages = positive_int(num_pages, "num_pages")
        positive_int(momentum_order, "momentum_order")
        check_rate_keywords(given)
        self.decay_first, self.earlier_pairs = decay_first, (surprise_window - 1) * num_kv_per_token
        positive_number(default_step_transform_max_lr, "default_step_transform_max_lr")
        positive_number(max_mem_layer_modulation, "max_mem_layer_modulation")
        new_gates = self._new_gates(given)  # before anything is created: it may refuse

        rule = self._rule(given)
        self.store_memory_loss_fn = rule.loss_fn  # registered as a submodule if it is an nn.Module
        if model is None:
            model = default_model(self.dim_head, default_model_kwargs)
        template = wrapped(template_of(model, self.dim_head), self.dim_head, mem_model_norm_add_residual)
        initial = wrapped(model, self.dim_head, mem_model_norm_add_residual)
        self.memory_model_parameters = InitialWeights(initial, self.internal_heads, per_head_learned_parameters)
        self.tokenwise = getattr(template, "tokenwise", False)
        # not registered: the template has no weights of its own
        self.engine = choose_engine(engine, template, rule, use_accelerated_scan)
        self.projections = Projections(
            ProjectionConfig(
                dim=dim,
                heads=self.internal_heads,
                dim_head=self.dim_head,
                kv_per_token=num_kv_per_token,
                activation=activation,
                pre_rmsnorm=pre_rmsnorm,
                post_rmsnorm=post_rmsnorm,
                qk_rmsnorm=qk_rmsnorm,
                qk_l2norm=qk_l2norm,
                conv_kernel=qkv_conv_kernel,
                output_gate=output_gate,
            )
        )
        self.rates = Rates(
            dim,
            RateConfig(
                heads=self.internal_heads,
                kv_per_token=num_kv_per_token,
                momentum_order=rule.momentum_rates,
                learned_combine=learned_momentum_combine,
                combine_zeroth=learned_combine_include_zeroth,
                modulated_params=len(self.memory_model_parameters) if per_parameter_lr_modulation else 0,
                max_modulation=max_mem_layer_modulation,
                attn_pool=attn_pool_chunks and self.store_chunk_size > 1,  # one token is its own pool
                residual_mix=accept_weight_residual,
                step_transform=callable_or_none(adaptive_step_transform, "adaptive_step_transform")
                or SigmoidStep(default_step_transform_max_lr),
                step_bias=number_or_none(init_adaptive_step_bias, "init_adaptive_step_bias"),
                momentum_bias=number_or_none(init_momentum_bias, "init_momentum_bias"),
                decay_bias=number_or_none(init_decay_bias, "init_decay_bias"),
                fixed_step=None if learned_step else default_step_transform_max_lr,
                forget_gate=forget_gate,
                earlier_pairs=self.earlier_pairs,
                loss_bound=rule.learned_bound,
            ),
        )
        used = gated_transition and batch_size is not None
        self.transition_gate = nn.Parameter(torch.tensor(-5.0)) if used else None
        # optional parameters are created last, so that they do not change how the others are initialised
        self.gates: Any = None if new_gates is None else new_gates()
        self.projections.add_convolutions()
        self.surprise_threshold = threshold_or_none(surprise_threshold, "surprise_threshold")
        self.predictor = NextToken(dim) if one_of(surprise_source, SOURCES, "surprise_source") == "prediction" else None
        self.configuration = self._identity(given, model)
        self.register_load_state_dict_pre_hook(rename_earlier)

    @classmethod
    def paper(cls, dim: int, segment: int = 64, *, dim_head: int | None = None, **changes) -> "NeuralMemory":
        """The memory as the paper describes it.

        Args:
            dim: features of the sequence.
            segment: C, tokens of a mini-batch (eq. 16).
            dim_head: features of a head (default dim).
            changes: keywords of the constructor, or of `paper_memory_kwargs`, that replace or extend its own.
        """
        _refuse_unknown(cls, changes, ("segment", "depth", "expansion_factor", "max_step"), "NeuralMemory.paper")
        return cls(dim, **paper_memory_kwargs(dim if dim_head is None else dim_head, segment, **changes))

    @classmethod
    def exact(cls, dim: int, *, dim_head: int | None = None, max_step: float = 1.0, **changes) -> "NeuralMemory":
        """Return a memory of one matrix that writes every token at the fast weights just before it, in steps that
        cannot overshoot: the exact rule, at the price of a chunk.

        Args:
            dim: features of the sequence.
            dim_head: features of a head (default dim).
            max_step: the largest share of its error that a token writes, in (0, 1].
            changes: keywords of the constructor that replace or extend those of `exact_memory_kwargs`.
        """
        _refuse_unknown(cls, changes, ("max_step",), "NeuralMemory.exact")
        return cls(dim, **exact_memory_kwargs(dim if dim_head is None else dim_head, max_step=max_step, **changes))

    @classmethod
    def preset(cls, name: str, dim: int, **changes) -> "NeuralMemory":
        """A published memory by its name: docs/rules.md has the table.

        Args:
            name: linear_attention, deltanet, gated_deltanet, ttt_linear, ttt_mlp, titans, omeganet, atlas, moneta,
                yaad, memora or lact.
            dim: features of the sequence.
            changes: settings of the rule, such as segment, or keywords of the constructor, in place of its own or
                beside them. heads defaults to 1 (with polynomial features to dim / 16), dim_head to dim / heads.

        Raises:
            ValueError: for an unknown name, or a change that the rule is not defined for.
        """
        from titans_pytorch.memory.named.registry import named_rule, preset_kwargs

        _refuse_unknown(cls, changes, named_rule(name).settings, f"the rule {name}")
        return cls(dim, **preset_kwargs(name, dim, **changes))

    def _rule(self, given: Mapping) -> UpdateRule:
        """The update rule of the keywords."""
        own = {
            "loss_fn": checked_loss(given["store_memory_loss_fn"], "store_memory_loss_fn"),
            "max_grad_norm": given["max_grad_norm"],
            "spectral_norm": given["spectral_norm_surprises"],
            "momentum_order": given["momentum_order"] if given["momentum"] else 0,
        }
        if own["max_grad_norm"] is not None:
            positive_number(own["max_grad_norm"], "max_grad_norm")
        if given["update_rule"] is None:
            return TitansRule(**own)
        rule = of_kind(given["update_rule"], UpdateRule, "update_rule", "an UpdateRule, or None for the paper's")
        replaced = ("momentum", "momentum_order", "spectral_norm_surprises", "max_grad_norm", "store_memory_loss_fn")
        for keyword in replaced:
            if not _at_default(keyword, given[keyword]):
                raise ValueError(f"update_rule cannot be combined with {keyword}: set it on the rule")
        if given["learned_momentum_combine"] and not isinstance(rule, TitansRule):
            raise ValueError(
                "learned_momentum_combine cannot be combined with update_rule: only TitansRule mixes orders"
            )
        return rule

    def _identity(self, given: Mapping, model: nn.Module) -> str:
        """The configuration that states carry. model: the network, also where none was given."""
        return identity(
            _INIT,
            given,
            NOT_OF_A_STATE,
            chunk_size=self.chunk_config.chunk_size,
            dim_head=self.dim_head,
            momentum_order=given["momentum_order"] if given["momentum"] else 1,
            symplectic_gate_kwargs=given["symplectic_gate_kwargs"] or None,
            model=model,
        )

    def check_made_by_this(self, state: NeuralMemState) -> None:
        """Refuse a state that a memory of other settings made, with a ValueError."""
        check_identity(self.configuration, state.configuration, "state", _INIT)

    def _new_gates(self, given: Mapping) -> Callable[[], nn.Module] | None:
        """Builds the gates; None, and no module of the gates package imported, where their keywords are at defaults."""
        keywords = {name: given[name] for name in GATE_KEYWORDS}
        if all(_at_default(name, value) for name, value in keywords.items()):
            return None
        from titans_pytorch.gates.gates import Gates
        from titans_pytorch.gates.options import GateConfig

        config = GateConfig(
            self.dim, self.heads, self.store_chunk_size, given["default_step_transform_max_lr"], **keywords
        )
        return partial(Gates, config)

    def __getattr__(self, name: str):
        """Attributes of the gates are attributes of the memory."""
        if name in GATE_ATTRIBUTES:
            gates = self._modules.get("gates")
            return GATE_ATTRIBUTES[name] if gates is None else getattr(gates, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value) -> None:
        if name in GATE_ATTRIBUTES:
            if self._modules.get("gates") is None:
                raise ValueError(f"{name} needs a memory with gates")
            setattr(self.gates, name, value)
        else:
            super().__setattr__(name, value)

    # what other code asks for

    def _replicate_for_data_parallel(self):  # a replica computes in a thread of its own, for the caller of this one
        replica = super()._replicate_for_data_parallel()
        replica.stopped = not stores(self)
        return replica

    @property
    def internal_heads(self) -> int:
        """Heads of all pages: head index = page * heads + head."""
        return self.num_pages * self.heads

    @property
    def retrieve_chunk_size(self) -> int:
        """Tokens of a read group."""
        return self.chunk_config.chunk_size[0]

    @property
    def store_chunk_size(self) -> int:
        """Tokens of a store chunk."""
        return self.chunk_config.store

    @property
    def batch_size(self) -> int | None:
        """Tokens of a mini-batch."""
        return self.chunk_config.batch_size

    @property
    def kv_per_token(self) -> int:
        """Keys and values per token."""
        return self.chunk_config.kv_per_token

    @property
    def mini_batch(self) -> int | None:
        """Store chunks of a mini-batch."""
        return mini_batch_chunks(self.batch_size, self.store_chunk_size)

    def init_weights(self, batch: int) -> dict[str, Tensor]:
        """The learned initial fast weights for each row of a batch and each head: name -> [(batch h) ...]."""
        start = self.engine.rule.start
        return {name: start(weight) for name, weight in self.memory_model_parameters.for_batch(batch).items()}

    def init_momentum(self, batch: int) -> dict[str, Tensor]:
        """The rule's initial slots, such as zeros of momentum, for each row: name -> [o (batch h) ...], empty
        where it has none."""
        if not self.engine.rule.slots:
            return {}
        return {k: torch.stack(self.engine.rule.init(v)) for k, v in self.init_weights(batch).items()}

    # one call

    def forward(
        self,
        seq: Tensor,
        store_seq: Tensor | None = None,
        state: NeuralMemState | None = None,
        detach_mem_state: bool = False,
        prev_weights: Mapping[str, Tensor] | None = None,
        store_mask: Tensor | None = None,
        return_surprises: bool = False,
        ttt_batch_size: int | None = None,
        token_mask: Tensor | None = None,
        resets: Tensor | None = None,
    ):
        """Write the sequence chunk by chunk, and read at every token.

        A token at absolute position t reads the fast weights after floor((t + 1) / c) complete chunks. Any way of
        cutting a sequence into calls, with the state carried, gives the same outputs.

        Args:
            seq: [b n d], or one token [b d]; [3 b n d] with qkv_receives_diff_views.
            store_seq: what is written instead of seq, of the same length; [2 b n d] with qkv_receives_diff_views.
            state: the state that the call before returned.
            detach_mem_state: detach the returned state from the graph.
            prev_weights: `updates` of an earlier memory layer (accept_weight_residual).
            store_mask: [b n] bool; tokens that are False are not written (their learning rate is 0).
            return_surprises: also return (inner loss, learning rate), each [b h n*u] over the complete chunks written,
                and with surprise_source = "prediction" the predictor's error [b n]. `auxiliary_loss` makes a scalar of
                them.
            ttt_batch_size: batch_size for this call.
            token_mask: [b n] bool, False for padding, anywhere in a row: it is as if it were not there, for fast
                weights, momentum, forget gate and convolutions. What is read there is 0. (A token that `store_mask`
                hides still counts for all but the write.) Needs chunk_size 1 and a batch_size of 1 or None.
            resets: [b n] bool, True where a text begins, with initial fast weights, and nothing of the text before it;
                or the bounds of the texts in the flattened rows, integers 0 .. b n (cu_seqlens). Needs chunk_size and
                batch_size 1 (`NeuralMemory.exact`).

        Returns:
            (retrieved [b n d], next_state), and (loss, learning rate) if asked for.

        Raises:
            ValueError: for another shape or dtype, or a state of another memory, batch size or position.
        """
        flags(detach_mem_state=detach_mem_state, return_surprises=return_surprises)
        query, store = arguments.as_views(seq, store_seq, self.dim, self.diff_views)
        state = arguments.checked_state(self, state, self._expected(store))
        arguments.check_mask(store_mask, query.shape[0], query.shape[1], "store_mask")
        arguments.check_dtype(query, self.projections.to_queries, "seq")
        arguments.check_dtype(store, self.projections.to_keys, "store_seq")
        mini_batch = mini_batch_chunks(ttt_batch_size or self.batch_size, self.store_chunk_size, "ttt_batch_size")
        texts = arguments.texts_of(self, token_mask, resets, query.shape[0], query.shape[1], mini_batch)
        if texts is not None:
            if texts.resets is not None and prev_weights is not None:
                raise ValueError("resets cannot be combined with prev_weights")
            query, store = texts.hide(query), texts.hide(store)
        written, next_state, surprises, pages = self._write(
            store, state, prev_weights, store_mask, ttt_batch_size, texts
        )
        retrieved, next_state = self._read(query, written, state, next_state, pages, texts)
        if torch.is_grad_enabled():
            unused = self._unused(written, state, next_state, query.shape[1], prev_weights, ttt_batch_size)
            retrieved = with_unused(retrieved, unused)
        if detach_mem_state:
            next_state = mem_state_detach(next_state)
        tell(self, "stored", next_state, surprises)
        return (retrieved, next_state, surprises) if return_surprises else (retrieved, next_state)

    def _write(self, tokens: Tensor, state: NeuralMemState, prev_weights, mask, ttt_batch_size, texts=None):
        """Write the complete chunks of the waiting tokens and tokens [(2) b n d].

        Returns what was written, the next state (but for what reads carry), (loss, learning rate), and the pages of the
        entries, where they matter to reads.
        """
        chunk, (b, n) = self.store_chunk_size, tokens.shape[-3:-1]
        warn_if_diverged(self, state, n)
        mini_batch = self.mini_batch
        if ttt_batch_size is not None:
            mini_batch = mini_batch_chunks(ttt_batch_size, chunk, "ttt_batch_size")
        mask = arguments.join_masks(mask, state, b, n)
        if state.cache_store_segment is not None:
            tokens = torch.cat((state.cache_store_segment, tokens), dim=-2)
        first, count = state.seq_index // chunk, tokens.shape[-2] // chunk
        complete, waiting = tokens.split([count * chunk, tokens.shape[-2] - count * chunk], dim=-2)
        residual = self._residual(prev_weights, complete, first, count)

        views = self.chunk_views(complete)
        rates = self.rates_of(views.keys, residual is not None) if count else None
        gate_fields, pages = {}, None
        if self.gates is not None:
            rates, gate_fields, pages = self.gates(views.keys, rates, state, first, mini_batch)
        carry = self._carry(state, b)
        if rates is not None:
            allowed = None if mask is None else mask[:, : count * chunk]
            chunks, chunk_fields, errors = self._chunks(views, rates, allowed, residual, first, state, texts)
            share = None if self.transition_gate is None else self.transition_gate.sigmoid()
            with no_autocast(tokens.device):
                written = write(self.engine, chunks, carry, mini_batch, share)
            surprises = tuple(of_rows(x, b) for x in own_surprises(written, chunks, self.chunk_config.pairs))
            if texts is not None:
                surprises = tuple(texts.of_pairs(x, self.chunk_config.pairs) for x in surprises)
        else:
            written = nothing_written(self.engine, first, carry)
            chunk_fields = {name: getattr(state, name) for name in ("store_conv", "last_token", "earlier_pairs")}
            surprises = (tokens.new_zeros(b, self.internal_heads, 0),) * 2
            errors = None if self.predictor is None else tokens.new_zeros(b, 0)

        slots = self._slots(written) if count or state.states is None else state.states[1]
        next_state = NeuralMemState(
            seq_index=state.seq_index + count * chunk,
            weights=written.final.start,
            cache_store_segment=waiting.clone(),
            states=(written.final.weights, slots),
            updates=written.updates(),
            cache_store_mask=None if mask is None else mask[:, count * chunk :].clone(),
            configuration=self.configuration,
            **gate_fields,
            **chunk_fields,
        )
        return written, next_state, surprises if errors is None else (*surprises, errors), pages

    def _read(
        self, query: Tensor, written: Written, state: NeuralMemState, next_state: NeuralMemState, pages, texts=None
    ):
        """Read at tokens [b n d] that follow `state`: (retrieved [b n d], next_state with what later reads need)."""
        reads, position = self.chunk_config.reads, state.position
        entry = reads.entry(position)
        if entry < written.first:  # the unfinished read group reads an entry from before this call
            written.before = self.engine.still(entry, arguments.older_weights(state, entry))
            pages = pages and pages._replace(older=arguments.older_page(state))
        hidden = None if pages is None else pages.hidden(position, query.shape[1], reads)
        earlier = arguments.EarlierQueries(state.query_group, state.query_conv)
        retrieved, earlier = self._retrieve(query, written, position, reads, earlier, hidden, texts)
        entry = reads.entry(next_state.position)
        older = older_page = None
        if entry < written.last:
            older, older_page = written.entry(entry), pages and pages.at(entry)
        return retrieved, next_state._replace(**earlier._asdict(), read_weights=older, read_page=older_page)

    def _unused(self, written: Written, state, next_state, n: int, prev_weights, ttt_batch_size) -> Iterable[Tensor]:
        """Parameters that a call of n tokens did not need; they get zero gradients."""
        read = self.chunk_config.reads.entry(next_state.position - 1) if n else written.first
        mini_batch = mini_batch_chunks(ttt_batch_size or self.batch_size, self.store_chunk_size)
        carried = state.weights is not None or state.states is not None
        return unused_parameters(self, written.first, read, mini_batch, carried, prev_weights is not None)

    # the parts of a call

    def chunk_views(self, complete: Tensor) -> KeyValueViews:
        """Normalised views of complete chunks [(2) b m*c d]."""
        if complete.shape[-2]:
            complete = self.projections.store_norm(complete)
        return KeyValueViews(*complete) if self.diff_views else KeyValueViews(complete, complete)

    def rates_of(self, tokens: Tensor, with_residual: bool) -> WriteRates:
        """Rates of complete chunks, tokens [b m*c d] normalised; where storing is off, rates that change nothing.
        with_residual: also of an earlier layer's weights."""
        rates = self.rates(tokens, self.store_chunk_size, with_residual)
        if not stores(self) or self.stopped:
            rates = rates.still(self.engine.rule.has_closed_form)
        tell(self, "rates", rates)
        return rates.pairs(self.chunk_config.pairs) if self.chunk_config.lookahead else rates

    def _chunks(self, views: KeyValueViews, rates: WriteRates, mask, residual, first: int, state, texts):
        """What the engine writes; what the next call's chunks need, as fields of its state; the predictor's error
        [b m*c], where there is a predictor. mask [b m*c] bool, or None."""
        config, h = self.chunk_config, self.internal_heads
        before = None if texts is None else texts.earlier(self.projections.looks_back)
        keys, values, tail = self.projections.keys_and_values(*views, config.store, state.store_conv, before)
        if config.lookahead:
            keys, values = keys[:, :, :-1], values[:, :, 1:]
        if mask is not None:
            allowed = repeat(mask, "b (m c) -> (b h) m (c u)", c=config.store, h=h, u=config.kv_per_token)
            rates = rates.masked(allowed[:, :, : config.pairs])
        if texts is not None:
            rates = texts.applied(rates, h, config.pairs)
        threshold, errors, last = self.surprise_threshold, None, None
        if self.predictor is not None:
            errors, last = self.predictor(views.keys, state.last_token, texts and texts.earlier(1))
            if texts is not None:
                errors = texts.of_pairs(errors.unsqueeze(1), 1).squeeze(1)
            of_pair = of_pairs(errors, config.store, h, config.kv_per_token, config.pairs)
            rates, threshold = skip_below_threshold(rates, of_pair, threshold), None
        if self.decay_first:
            rates = replace(rates, start_scale=rates.retention)
        initial = None if rates.resets is None else self.init_weights(views.keys.shape[0])
        chunks, pairs = Chunks(keys, values, rates, first, residual, threshold, initial), None
        if self.engine.rule.step_outside:
            chunks = step_outside(chunks)
        if self.earlier_pairs:
            chunks, pairs = with_window(chunks, state.earlier_pairs, self.earlier_pairs, self.internal_heads)
        return chunks, {"store_conv": tail, "last_token": last, "earlier_pairs": pairs}, errors

    def _residual(self, prev_weights, complete: Tensor, first: int, count: int):
        """The earlier layer's fast weights for chunks first .. first + count - 1."""
        if prev_weights is None:
            return None
        if not self.accept_weight_residual:
            raise ValueError("prev_weights needs a memory built with accept_weight_residual = True")
        return arguments.earlier_layer(prev_weights, self._expected(complete), first, count) if count else None

    def _carry(self, state: NeuralMemState, batch: int) -> Carry:
        """What the first chunk continues from."""
        start = self.init_weights(batch) if state.weights is None else state.weights
        if state.states is None:
            return Carry(start, start, None)
        weights, momentum = state.states
        slots = LazyTensors(weights, lambda name: momentum[name].unbind(0)) if self.engine.rule.slots else None
        return Carry(start, weights, slots)

    def _slots(self, written: Written) -> Mapping[str, Tensor]:
        """The rule's carried tensors after a call (momentum): name -> [o (b h) ...]."""
        if not self.engine.rule.slots:
            return {}
        slots = written.final.slots
        if slots is None:
            weights, init = written.final.weights, self.engine.rule.init
            return LazyTensors(written.shapes, lambda name: torch.stack(init(weights[name])))
        return LazyTensors(written.shapes, lambda name: torch.stack(tuple(slots[name])))

    def _retrieve(
        self, seq: Tensor, written: Written, position: int, reads: Reads, earlier, hidden: Tensor | None, texts=None
    ):
        """Read at tokens [b n d] from `position` on: (retrieved [b n d], what later reads need).

        earlier: the EarlierQueries of these. hidden: bool [b h n], heads that a token does not read; None: all are.
        texts: where tokens are and texts begin; None: everywhere, and nowhere.
        """
        b, n, _ = seq.shape
        if n == 0:
            return seq, earlier
        tokens = self.projections.retrieve_norm(seq)
        before = None if texts is None else texts.earlier(self.projections.looks_back)
        queries, tail = self.projections.queries(tokens, earlier.query_conv, before)
        if not self.tokenwise:
            queries, position = arguments.with_earlier_queries(queries, earlier.query_group, position, reads)
        with no_autocast(seq.device):
            out = written.read(queries.flatten(0, 1), position, reads).unflatten(0, (b, -1))[:, :, -n:]
        group = None
        if not self.tokenwise:
            group = queries[:, :, queries.shape[2] - reads.earlier(position + queries.shape[2]) :]
        out = self.projections.output(out, tokens, hidden)
        return out if texts is None else texts.hide(out), arguments.EarlierQueries(group, tail)

    @property
    def dtype(self) -> torch.dtype:
        """Of the slow parameters."""
        return self.memory_model_parameters[0].dtype

    def _expected(self, tokens: Tensor) -> arguments.StateShape:
        """What a state or weights must look like to go with tokens [(2) b n d]."""
        width = (*tokens.shape[:-2], tokens.shape[-1])
        shapes = self.memory_model_parameters.shapes(tokens.shape[-3])
        tails: dict[str, tuple[int, ...]] = dict(self.projections.conv_tails())
        carried = 2 * self.dim_head + 1 + self.engine.rule.learned_bound
        tails["earlier_pairs"] = (self.internal_heads, self.earlier_pairs, carried) if self.earlier_pairs else (0, 0, 0)
        return arguments.StateShape(self.store_chunk_size, shapes, self.engine.rule.slots, self.dtype, width, tails)

    # writing without reading, reading without writing

    def store_memories(
        self,
        seq: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        past_state: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
        seq_index: int = 0,
        prev_weights: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
        return_surprises: bool = True,
    ):
        """Write complete chunks without reading.

        Args:
            seq: [b n d] ([2 b n d] with diff views), which begins at token `seq_index`.
            weights: the mini-batch start weights, name -> [(b h) ...]; None: the initial weights.
            past_state: (fast weights, momentum), as `states` of a NeuralMemState; None: the fast weights are `weights`.
            seq_index: a multiple of the store chunk.
            prev_weights: as in forward.
            mask: [b n] bool, as store_mask in forward.
            return_surprises: return (inner loss, learning rate) too, as in forward.

        Returns:
            (updates, next_state), and (loss, learning rate) if asked for. updates: name -> [(b h) (chunks + 1) ...],
            the fast weights before each chunk and after the last.

        Raises:
            ValueError: for another shape, dtype or position.
        """
        if not isinstance(seq_index, int) or seq_index < 0 or seq_index % self.store_chunk_size:
            raise wrong("seq_index", seq_index, f"a multiple of the store chunk size, {self.store_chunk_size}")
        flags(return_surprises=return_surprises)
        view = arguments.as_store_view(seq, self.dim, self.diff_views, "seq")
        arguments.check_dtype(view, self.projections.to_keys, "seq")
        expected = self._expected(view)
        if weights is not None:
            expected.check_weights(weights, "weights")
            arguments.check_for_rule(self.engine.rule, weights, "weights")
        if past_state is not None:
            expected.check_states(past_state, "past_state")
            arguments.check_for_rule(self.engine.rule, past_state[0], "past_state[0]")
        arguments.check_mask(mask, view.shape[-3], view.shape[-2], "mask")
        state = NeuralMemState(seq_index, weights, states=past_state)
        _, next_state, surprises, _ = self._write(view, state, prev_weights, mask, None)
        return (next_state.updates, next_state, surprises) if return_surprises else (next_state.updates, next_state)

    def retrieve_memories(self, seq: Tensor, weights: Mapping[str, Tensor], page: Tensor | None = None) -> Tensor:
        """Read from given weights.

        Args:
            seq: [b n d].
            weights: name -> [(b h) ...], the same for every token, or `updates` [(b h) (chunks + 1) ...], seq then
                beginning at their first chunk.
            page: the page that is read, long [b] or [b n] (read_active_page_only, which needs it).

        Returns:
            [b n d].

        Raises:
            ValueError: for other shapes, or updates that lack what these tokens read.
        """
        seq = arguments.as_query_view(seq, self.dim)
        arguments.check_dtype(seq, self.projections.to_queries, "seq")
        expected = self._expected(seq)
        hidden = None if self.gates is None else self.gates.hidden(page, seq.shape[0], seq.shape[1])
        has_entries = expected.has_entries(weights, "weights")
        expected.check_weights(weights, "weights", has_entries)
        none = arguments.EarlierQueries()
        if not has_entries:
            reads = Reads(*(seq.shape[1] + 1,) * 2)  # all tokens are one read group of entry 0
            written = nothing_written(self.engine, 0, Carry(weights, weights, None))
            return self._retrieve(seq, written, 0, reads, none, hidden)[0]
        first = getattr(weights, "first_chunk", None) or 0
        written = given_entries({name: weights[name] for name in expected.shapes}, first, self.engine)
        reads, position = self.chunk_config.reads, first * self.store_chunk_size
        needed = reads.entry(position), reads.stop(position, max(seq.shape[1], 1)) - 1
        if needed[0] < first or needed[1] > written.last:
            got = Words(f"the memory before chunks {first} to {written.last}")
            raise wrong("weights", got, f"the memory before chunks {needed[0]} to {needed[1]}, which these tokens read")
        if first and (not self.tokenwise or self.projections.looks_back):
            takes = "updates from chunk 0 on: this memory's reads depend on the queries before"
            raise wrong("weights", Words(f"the memory from chunk {first} on"), takes)
        return self._retrieve(seq, written, position, reads, none, hidden)[0]


_INIT = NeuralMemory.__init__  # for its signature, also where somebody wraps the method
_PARAMETERS = inspect.signature(_INIT).parameters


def _refuse_unknown(kind: type, changes: Mapping, own: Iterable[str], where: str) -> None:
    """Refuse a change that is neither among `own` nor a keyword of the constructor, also of a subclass."""
    known = [*own, *list(_PARAMETERS)[2:], *list(inspect.signature(kind).parameters)[1:]]
    for change in changes:
        if change not in known:
            raise UnknownKeyword(unknown("argument ", change, known, f" of {where}"))


def _at_default(keyword: str, value: Any) -> bool:
    default = _PARAMETERS[keyword].default
    return value is default or value == default
