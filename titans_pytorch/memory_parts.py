"""What a NeuralMemory is made of: the keywords of its constructor, checked and turned into modules and objects."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .checks import (
    callable_or_none,
    check_flags,
    number_or_none,
    one_of,
    positive_int,
    positive_number,
    threshold_or_none,
)
from .engines.update_rule import UpdateRule
from .gating.options import GateOptions
from .identity import check_identity, identity
from .memory_options import (
    batch_chunks,
    choose_engine,
    chunk_sizes,
    default_model,
    initial_weights,
    memory_template,
    wrap,
)
from .memory_state import NeuralMemState
from .norms import MultiheadRMSNorm, RMSNorm
from .ops.modes import at_least_float32
from .projections import GATES, CausalConv, ProjectionOptions, UnitNorm
from .rates import RateOptions, Rates, SigmoidStep
from .surprise import SOURCES, NextToken

# what changes nothing in what a state means: how it is computed, where parameters start, what may be set at any time
NOT_OF_A_STATE = (
    *("engine", "use_accelerated_scan", "init_adaptive_step_bias", "init_momentum_bias", "init_decay_bias"),
    *("surprise_threshold", "symplectic_page_threshold", "default_model_kwargs"),
)


def memory_identity(given: Mapping, model: nn.Module) -> str:
    """What a memory's states carry. given: the constructor's arguments; model: the network, also where none was."""
    dim, heads = given["dim"], given["dim_head"]
    return identity(
        MemoryParts.__init__,
        given,
        NOT_OF_A_STATE,
        chunk_size=chunk_sizes(given["chunk_size"]),
        dim_head=dim if heads is None else heads,
        momentum_order=given["momentum_order"] if given["momentum"] else 1,
        symplectic_gate_kwargs=given["symplectic_gate_kwargs"] or None,
        model=model,
    )


class MemoryParts(nn.Module):
    """The constructor of NeuralMemory (its docstring says what each keyword means), and what it starts from."""

    label = ""  # its name in the model that holds it, where that says so: for warnings
    told_diverged = False  # whether the warning of diverged.py has been given

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
        init_adaptive_step_bias: float | None = None,
        init_momentum_bias: float | None = None,
        init_decay_bias: float | None = None,
        accept_weight_residual: bool = False,
        spectral_norm_surprises: bool = False,
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
    ):
        given = dict(locals())
        check_flags(MemoryParts.__init__, given)
        super().__init__()
        self.dim, self.heads = positive_int(dim, "dim"), positive_int(heads, "heads")
        self.dim_head = dim if dim_head is None else positive_int(dim_head, "dim_head")
        self.retrieve_chunk_size, self.store_chunk_size = chunk_sizes(chunk_size)
        batch_chunks(batch_size, self.store_chunk_size)
        self.batch_size = batch_size
        self.kv_per_token = positive_int(num_kv_per_token, "num_kv_per_token")
        if store_with_lookahead_value and self.store_chunk_size * num_kv_per_token == 1:
            takes = "chunks of at least two pairs (chunk_size * num_kv_per_token)"
            raise ValueError(f"store_with_lookahead_value needs {takes}")
        self.lookahead = store_with_lookahead_value
        self.diff_views = qkv_receives_diff_views
        self.accept_weight_residual = accept_weight_residual
        positive_int(momentum_order, "momentum_order")
        positive_number(default_step_transform_max_lr, "default_step_transform_max_lr")
        positive_number(max_mem_layer_modulation, "max_mem_layer_modulation")
        gates = GateOptions(
            dim=dim,
            heads=heads,
            store_chunk=self.store_chunk_size,
            max_step=default_step_transform_max_lr,
            use_symplectic_gating=use_symplectic_gating,
            symplectic_gate=symplectic_gate,
            symplectic_gate_kwargs=symplectic_gate_kwargs,
            use_dmd_gating=use_dmd_gating,
            dmd_window=dmd_window,
            combine_symplectic_and_dmd=combine_symplectic_and_dmd,
            kinetics_coupling=kinetics_coupling,
            kinetics_mix=kinetics_mix,
            kinetics_eps=kinetics_eps,
            num_pages=num_pages,
            symplectic_page_threshold=symplectic_page_threshold,
            page_threshold_quantile=page_threshold_quantile,
            page_threshold_window=page_threshold_window,
            page_switch_every=page_switch_every,
            page_router=page_router,
            manifold_state_keyed_paging=manifold_state_keyed_paging,
            hierarchical_paging=hierarchical_paging,
            coarse_pages=coarse_pages,
            fine_pages=fine_pages,
            hierarchy_mix=hierarchy_mix,
        )
        self.gating = gates.stages()
        self.num_pages = num_pages
        self.reads_one_page = bool(read_active_page_only) and num_pages > 1

        rule = UpdateRule(
            callable_or_none(store_memory_loss_fn, "store_memory_loss_fn"),
            None if max_grad_norm is None else positive_number(max_grad_norm, "max_grad_norm"),
            spectral_norm_surprises,
        )
        self.store_memory_loss_fn = rule.loss_fn  # a module among ours, where it is one
        if model is None:
            model = default_model(self.dim_head, default_model_kwargs)
        template = self._add_network(model, mem_model_norm_add_residual, per_head_learned_parameters)
        # not registered: the engine's template has no weights of its own
        self.engine = choose_engine(engine, template, rule, use_accelerated_scan)
        projections = ProjectionOptions(
            activation=activation,
            pre_rmsnorm=pre_rmsnorm,
            post_rmsnorm=post_rmsnorm,
            qk_rmsnorm=qk_rmsnorm,
            qk_l2norm=qk_l2norm,
            conv_kernel=qkv_conv_kernel,
            output_gate=output_gate,
        )
        self._add_projections(projections)
        self.momentum_order = momentum_order if momentum else 0
        self.rates = Rates(
            dim,
            RateOptions(
                heads=self.internal_heads,
                kv_per_token=num_kv_per_token,
                momentum_order=self.momentum_order,
                learned_combine=learned_momentum_combine,
                combine_zeroth=learned_combine_include_zeroth,
                modulated_params=len(self.parameter_names) if per_parameter_lr_modulation else 0,
                max_modulation=max_mem_layer_modulation,
                attn_pool=attn_pool_chunks and self.store_chunk_size > 1,  # one token is its own pool
                residual_mix=accept_weight_residual,
                step_transform=callable_or_none(adaptive_step_transform, "adaptive_step_transform")
                or SigmoidStep(default_step_transform_max_lr),
                step_bias=number_or_none(init_adaptive_step_bias, "init_adaptive_step_bias"),
                momentum_bias=number_or_none(init_momentum_bias, "init_momentum_bias"),
                decay_bias=number_or_none(init_decay_bias, "init_decay_bias"),
            ),
        )
        used = gated_transition and batch_size is not None
        self.transition_gate = nn.Parameter(torch.tensor(-5.0)) if used else None
        # what is optional comes last, so that all else starts as it does without
        self._add_gates(gates)
        self._add_convolutions(qkv_conv_kernel)
        self.surprise_threshold = threshold_or_none(surprise_threshold, "surprise_threshold")
        self.predictor = NextToken(dim) if one_of(surprise_source, SOURCES, "surprise_source") == "prediction" else None
        self.configuration = memory_identity(given, model)

    def _add_network(self, model: nn.Module, norm_residual: bool, per_head: bool) -> nn.Module:
        """The memory network's learned initial weights; returns its template."""
        template = wrap(memory_template(model, self.dim_head), self.dim_head, norm_residual)
        model = wrap(model, self.dim_head, norm_residual)
        self.memory_model_parameters = initial_weights(model, self.internal_heads, per_head)
        self.per_head_learned_parameters = per_head
        self.parameter_names = tuple(name for name, _ in template.named_parameters())
        self.tokenwise = getattr(template, "tokenwise", False)
        return template

    def _add_projections(self, o: ProjectionOptions) -> None:
        dim, inner, heads = self.dim, self.internal_heads * self.dim_head, self.internal_heads
        self.activation = nn.Identity() if o.activation is None else callable_or_none(o.activation, "activation")
        self.to_queries = nn.Linear(dim, inner, bias=False)
        self.to_keys = nn.Linear(dim, inner * self.kv_per_token, bias=False)
        self.to_values = nn.Linear(dim, inner * self.kv_per_token, bias=False)
        self.retrieve_norm = RMSNorm(dim) if o.pre_rmsnorm else nn.Identity()
        self.store_norm = RMSNorm(dim) if o.pre_rmsnorm else nn.Identity()

        def head_norm(used):
            return MultiheadRMSNorm(self.dim_head, heads) if used else nn.Identity()

        self.q_norm, self.k_norm = (UnitNorm() if o.qk_l2norm else head_norm(o.qk_rmsnorm) for _ in range(2))
        gated = o.output_gate is not None
        self.multihead_rmsnorm = head_norm(o.post_rmsnorm or gated)
        gates = inner if gated else heads if heads > 1 else 0
        self.retrieve_gate = nn.Linear(dim, gates, bias=False) if gates else None
        self.gate_activation = GATES[o.output_gate or "sigmoid"]
        mapped = gates or inner != dim
        self.combine_heads = nn.Linear(inner, dim, bias=False) if mapped else nn.Identity()

    def _add_convolutions(self, kernel: int | None) -> None:
        self.conv_kernel = kernel
        for name in ("queries", "keys", "values"):
            width = getattr(self, f"to_{name}").out_features
            setattr(self, f"{name}_conv", None if kernel is None else CausalConv(width, kernel))

    def _add_gates(self, gates: GateOptions) -> None:
        """Gates and pages: what `gating` finds in the memory."""
        self.symplectic_gate = gates.gate()
        self.symplectic_complexity_scale = gates.scale(gates.use_symplectic_gating)
        self.dmd_complexity_scale = gates.scale(gates.use_dmd_gating)
        self.symplectic_page_threshold = gates.threshold
        if gates.num_pages > 1:
            self.register_buffer("page_switch_events", torch.tensor(0), persistent=False)
        else:
            self.page_switch_events = torch.tensor(0, device="cpu")  # never counts: no buffer for DDP to broadcast

    def check_made_by_this(self, state: NeuralMemState) -> None:
        """Refuses a state that a memory of other settings made."""
        check_identity(self.configuration, state.configuration, "state", MemoryParts.__init__)

    @property
    def internal_heads(self) -> int:
        """Heads of all pages: head index = page * heads + head."""
        return self.num_pages * self.heads

    # state

    def init_weights(self, batch: int) -> dict[str, Tensor]:
        """The learned initial weights for each row of a batch and each head: name -> [(batch h) ...]."""
        h, batch = self.internal_heads, positive_int(batch, "batch")
        out = {}
        for name, p in zip(self.parameter_names, self.memory_model_parameters, strict=True):
            # a copy: what is built later must not see an optimizer's step in between
            p = at_least_float32(p.clone())
            p = p if self.per_head_learned_parameters else p.expand(h, *p.shape)
            out[name] = p.expand(batch, *p.shape).flatten(0, 1)
        return out

    def init_momentum(self, batch: int) -> dict[str, Tensor]:
        """Zeros for each row of a batch: name -> [o (batch h) ...]; empty without momentum."""
        if not self.momentum_order:
            return {}
        zeros = self.init_weights(batch)
        return {k: torch.zeros_like(v).expand(self.momentum_order, *v.shape) for k, v in zeros.items()}

    def _shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter of the memory: name -> ((b h), ...)."""
        rows, own = batch * self.internal_heads, int(self.per_head_learned_parameters)
        params = zip(self.parameter_names, self.memory_model_parameters, strict=True)
        return {name: (rows, *p.shape[own:]) for name, p in params}
