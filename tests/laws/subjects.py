"""Every option of the memory, in one list: what joins it is tested by every law.

An axis is (name, values); the first value is the plain one, towards which failing examples shrink. `CONSTRAINTS` say
which combinations are no configuration at all.
"""

from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from torch import nn

from titans_pytorch import (
    FactorizedMemoryMLP,
    GatedResidualMemoryMLP,
    MemoryAttention,
    MemoryMLP,
    MemorySwiGluMLP,
    NeuralMemory,
    ResidualNorm,
)
from titans_pytorch.memory.named.registry import NAMED, preset_kwargs
from titans_pytorch.memory_models import PolynomialMemoryMLP, PositiveMatrix, SwiGLU
from titans_pytorch.rules.base import UpdateRule, like
from titans_pytorch.rules.losses import DotProduct, HuberLoss, LpLoss
from titans_pytorch.rules.optimizers import Momentum, Muon
from titans_pytorch.rules.parts import PartsRule
from titans_pytorch.rules.retentions import ElasticNet, KLSoftmax, LqNorm, NormRescale

from ..helpers import ForeignModel, GhostModel, randomise

DIM = 6

MODELS = {
    "mlp": lambda d: MemoryMLP(d, depth=2, expansion_factor=1.5),
    "linear": lambda d: MemoryMLP(d, depth=1),
    "deep": lambda d: MemoryMLP(d, depth=3),
    "factorized": lambda d: FactorizedMemoryMLP(d, depth=2, k=3),
    "swiglu": lambda d: MemorySwiGluMLP(d, depth=2, expansion_factor=1.0),
    "gated_residual": lambda d: GatedResidualMemoryMLP(d, depth=2, expansion_factor=1.0),
    "attention": lambda d: MemoryAttention(d),
    "plain_norm": lambda d: ResidualNorm(d, MemoryMLP(d, depth=1), gain=False),
    "polynomial": lambda d: PolynomialMemoryMLP(d, depth=2, degree=2, expansion_factor=1.0),
    "positive": PositiveMatrix,
    "gated": lambda d: SwiGLU(d, expansion_factor=1.5),
    "foreign": ForeignModel,
    "ghost": GhostModel,
}


def huber(prediction, target):
    return nn.functional.huber_loss(prediction, target, reduction="none").mean(dim=-1)


def softplus_step(x):
    return nn.functional.softplus(x) * 0.05


GATES = {
    "plain": None,
    "phase": {"phase_mix": 0.5, "phase_pairs": 2, "dim_free": True},
    "quorum": {"quorum_mix": 0.5, "quorum_window": 3, "quorum_threshold": 0.2},
    "budget": {"phase_mix": 0.3, "quorum_mix": 0.6, "budget_topk_ratio": 0.5, "budget_window": 4},
    "soft": {"gated": True, "gate_mode": "soft", "codebook_mix": 0.4, "codebook_size": 4},
    "sparse": {"gated": True, "diag": True, "gate_threshold": -1.0, "top_k": 4},
    "adaptive": {"gated": True, "adaptive_topk_ratio": 0.9, "adaptive_topk_min_k": 3, "gate_threshold": -1.0},
    "codes": {"codebook_mix": 0.7, "codebook_size": 5, "codebook_topk": 2, "quorum_mix": 0.3, "quorum_threshold": 0.1},
    "all": {
        **{"gated": True, "diag": True, "gate_mode": "soft", "top_k": 5, "phase_mix": 0.5, "dim_free": True},
        **{"codebook_mix": 0.3, "quorum_mix": 0.5, "quorum_threshold": 0.2, "budget_topk_ratio": 0.7},
    },
}


class OwnGate(nn.Module):
    """A user's gate, which needs two tokens before, and gives a manifold state where it is asked for one."""

    context = 2

    def forward(self, tokens, return_manifold_state=False):
        before = nn.functional.pad(tokens, (0, 0, 2, 0))[:, : tokens.shape[1]]
        complexity = (tokens * before).mean(dim=-1, keepdim=True).tanh().square()
        angle = torch.atan2(tokens[..., :2], tokens[..., 2:4])
        return (complexity, {"phase_angle": angle}) if return_manifold_state else complexity


class OwnRouter:
    """A user's choice of page, by all that there is."""

    uses_phase = True

    def __call__(self, page, complexity, angle):
        turn = 0 if angle is None else (angle > 0).long()
        return (page + 1 + turn + (complexity > 0.5).long()) % 3


@dataclass(frozen=True)
class AdaGradRule(UpdateRule):
    """A rule that is not linear: surprises divided by the root of the sum of their squares, and a forget gate."""

    @property
    def slots(self):
        return 1

    def update(self, weights, surprise, slots, rates):
        (squares,) = slots
        squares = squares + surprise.square()
        step = surprise / (squares + 0.1).sqrt()
        return like(rates.retention, weights) * weights + 0.1 * step, (squares,)


# what stands for an update rule: a function without arguments
RULES = {
    "adagrad": AdaGradRule,
    "elastic": lambda: PartsRule(optimizer=Momentum(), retention=ElasticNet(1e-3)),
    "lq": lambda: PartsRule(optimizer=Muon(outside=True), retention=LqNorm(3.0), loss_fn=HuberLoss()),
    "kl": lambda: PartsRule(retention=KLSoftmax(2.0), loss_fn=LpLoss(1.5)),
    "norm": lambda: PartsRule(optimizer=Muon(), retention=NormRescale(), max_grad_norm=0.5),
}

# settings of the rules that have names, for sequences of a few tokens
SHORT = {"lact": {"chunk": 3}, "omeganet": {"segment": 2, "window": 3}, "atlas": {"segment": 2, "window": 2}}
SHORT |= {name: {"segment": 3} for name in ("ttt_linear", "ttt_mlp", "titans", "moneta", "yaad", "memora")}


def as_named(options: dict, name: str) -> dict:
    """The options, with those of a named rule in their place; what it leaves open stays as drawn."""
    dim_head = options["dim_head"] or DIM
    kwargs = preset_kwargs(name, DIM, heads=options["heads"], dim_head=dim_head, **SHORT.get(name, {}))
    kwargs["batch_chunks"] = (kwargs.pop("batch_size", None) or 0) // kwargs["chunk_size"] or None
    if kwargs.pop("default_model_kwargs", None) is not None:
        kwargs["model"] = "mlp"
    elif "model" in kwargs:
        MODELS[f"of {name}"] = lambda d: preset_kwargs(name, DIM, dim_head=d, **SHORT.get(name, {}))["model"]
        kwargs["model"] = f"of {name}"
    rule = kwargs.pop("update_rule", None)
    rates = {"init_decay_bias": kwargs.pop("init_decay_bias", None)}
    kwargs.pop("init_adaptive_step_bias", None)  # parameters are randomised
    plain = {key: dict(AXES)[key][0] for key in (*OF_THE_RULE, "adaptive_step_transform", "momentum_order")}
    clear = {"learned_step": True, "forget_gate": True, "decay_first": False, "surprise_window": 1}
    kwargs["update_rule"] = None if rule is None else lambda: rule
    norms = {"qk_rmsnorm": False, "qk_l2norm": False, "activation": None, "momentum": True}
    return options | plain | clear | norms | rates | kwargs


AXES = [
    ("chunk_size", [3, 1, 2, 4, (2, 4), (3, 2), (5, 3)]),
    ("batch_chunks", [None, 1, 2, 3]),  # batch_size in store chunks
    ("heads", [1, 2]),
    ("dim_head", [DIM, 4, None]),
    ("model", list(MODELS)),
    ("mem_model_norm_add_residual", [True, False]),
    ("default_step_transform_max_lr", [0.1, 0.5]),
    ("adaptive_step_transform", [None, softplus_step]),
    ("store_memory_loss_fn", [None, huber, DotProduct(), LpLoss(3.0), HuberLoss()]),
    ("learned_step", [True, False]),
    ("forget_gate", [True, False]),
    ("decay_first", [False, True]),
    ("surprise_window", [1, 2, 4]),
    ("momentum", [True, False]),
    ("momentum_order", [1, 2, 3]),
    ("learned_momentum_combine", [False, True]),
    ("learned_combine_include_zeroth", [False, True]),
    ("num_kv_per_token", [1, 2]),
    ("qkv_receives_diff_views", [False, True]),
    ("pre_rmsnorm", [True, False]),
    ("post_rmsnorm", [False, True]),
    ("qk_rmsnorm", [False, True]),
    ("qk_l2norm", [False, True]),
    ("qkv_conv_kernel", [None, 1, 2, 4]),
    ("output_gate", [None, "sigmoid", "silu"]),
    ("max_grad_norm", [None, 0.5]),
    ("activation", [None, nn.SiLU()]),
    ("per_parameter_lr_modulation", [False, True]),
    ("max_mem_layer_modulation", [1.0, 1.5]),
    ("per_head_learned_parameters", [True, False]),
    ("attn_pool_chunks", [False, True]),
    ("accept_weight_residual", [False, True]),
    ("spectral_norm_surprises", [False, True]),
    ("gated_transition", [False, True]),
    ("store_with_lookahead_value", [False, True]),
    ("init_decay_bias", [None, -4.0, 4.0]),
    ("use_accelerated_scan", [False, True]),
    ("surprise_threshold", [None, 0.5, 1.5]),
    ("surprise_source", ["memory", "prediction"]),
    ("use_symplectic_gating", [False, True]),
    ("symplectic_gate_kwargs", list(GATES)),
    ("use_dmd_gating", [False, True]),
    ("dmd_window", [None, 5]),
    ("kinetics_coupling", [False, True]),
    ("kinetics_mix", [0.5, 0.0, 1.0]),
    ("num_pages", [1, 2, 3, 4]),
    ("manifold_state_keyed_paging", [False, True]),
    ("hierarchical_paging", [False, True]),
    ("hierarchy_mix", [1.0, 0.4]),
    ("page_switch_chunks", [1, 2, None, 3]),  # page_switch_every in store chunks
    ("symplectic_page_threshold", [0.05, 0.2]),
    ("page_threshold_quantile", [None, 0.3]),
    ("page_threshold_window", [64, 8]),
    ("symplectic_gate", [None, OwnGate]),
    ("page_router", [None, OwnRouter]),
    ("read_active_page_only", [False, True]),
    ("update_rule", [None, *RULES.values()]),
]

NEED_A_FORGET_GATE = ("decay_first", "use_symplectic_gating", "use_dmd_gating", "kinetics_coupling")
OF_THE_RULE = ("store_memory_loss_fn", "max_grad_norm", "spectral_norm_surprises", "learned_momentum_combine")


CONSTRAINTS = [
    lambda o: o["learned_step"] or o["adaptive_step_transform"] is None,
    lambda o: o["forget_gate"] or o["init_decay_bias"] is None,
    lambda o: o["forget_gate"] or not any(o[k] for k in NEED_A_FORGET_GATE),
    lambda o: o["surprise_window"] == 1 or not o["store_with_lookahead_value"],
    # a rule of one's own has its own loss, clamp and norm
    lambda o: o["update_rule"] is None or (not any(o[k] for k in OF_THE_RULE) and o["momentum"]),
    lambda o: o["update_rule"] is None or o["momentum_order"] == 1,
    lambda o: not o["store_with_lookahead_value"] or store_chunk(o) * o["num_kv_per_token"] > 1,
    lambda o: not (o["qk_l2norm"] and o["qk_rmsnorm"]),
    lambda o: o["num_pages"] == 1 or o["use_symplectic_gating"] or o["use_dmd_gating"],
    # a quantile needs some chunks before it says anything
    lambda o: o["page_threshold_quantile"] is None or (o["num_pages"] > 1 and store_chunk(o) <= 2),
    lambda o: o["symplectic_gate"] is None or (o["use_symplectic_gating"] and o["symplectic_gate_kwargs"] == "plain"),
]


def paged(options) -> bool:
    return options["num_pages"] > 1


def store_chunk(options) -> int:
    size = options["chunk_size"]
    return size[1] if isinstance(size, tuple) else size


def allowed(options: dict) -> bool:
    return all(holds(options) for holds in CONSTRAINTS)


def of_own_rule(options: dict) -> dict:
    """The options; where an update rule of one's own is drawn, those that it replaces are plain."""
    plain = dict(AXES)
    own = {key: plain[key][0] for key in (*OF_THE_RULE, "momentum", "momentum_order")}
    return options if options["update_rule"] is None else options | own


#: One in four has a name. (Not st.one_of, which drops a strategy that it is given twice.)
named = st.integers(0, 3).flatmap(lambda i: st.none() if i < 3 else st.sampled_from(list(NAMED)))
option_sets = (
    st.tuples(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in AXES}), named)
    .map(lambda drawn: of_own_rule(drawn[0]) if drawn[1] is None else as_named(*drawn))
    .filter(allowed)
)


def tolerance(options) -> float:
    """Newton-Schulz multiplies small singular values, rounding included, by up to 3.4445^5 in every update."""
    return 1e-6 if options["spectral_norm_surprises"] else 1e-9


class Subject:
    """A memory (with an earlier one whose updates it takes, where it accepts a weight residual), fed and read alike."""

    def __init__(self, options: dict, engine: str = "auto", seed: int = 0, dtype=torch.float64):
        torch.manual_seed(seed)
        options = dict(options)
        batch = options.pop("batch_chunks")
        options["batch_size"] = None if batch is None else batch * store_chunk(options)
        every = options.pop("page_switch_chunks")
        options["page_switch_every"] = None if every is None else every * store_chunk(options)
        options["combine_symplectic_and_dmd"] = options["use_symplectic_gating"] and options["use_dmd_gating"]
        options["symplectic_gate_kwargs"] = GATES[options["symplectic_gate_kwargs"]]
        own_gate, own_router = options.pop("symplectic_gate"), options.pop("page_router")
        if (own_rule := options.pop("update_rule")) is not None:
            options["update_rule"] = own_rule()
        if own_gate is not None:
            options |= {"symplectic_gate": own_gate(), "symplectic_gate_kwargs": None}
        options["page_router"] = None if own_router is None else own_router()
        self.diff_views = options["qkv_receives_diff_views"]
        model = MODELS[options.pop("model")](options["dim_head"] or DIM)
        build = {**options, "model": model, "engine": engine}
        self.memory = randomise(NeuralMemory(DIM, **build).to(dtype), seed, 0.2)
        self.earlier = None
        if options["accept_weight_residual"]:
            earlier = NeuralMemory(DIM, **{**build, "accept_weight_residual": False}).to(dtype)
            self.earlier = randomise(earlier, seed + 1, 0.2)

    @property
    def switches(self) -> int:
        """How often pages were turned, over both memories."""
        return sum(int(m.page_switch_events) for m in (self.memory, self.earlier) if m is not None)

    @property
    def parameters(self) -> dict:
        both = nn.ModuleDict({"memory": self.memory} | ({"earlier": self.earlier} if self.earlier else {}))
        return dict(both.named_parameters())

    def sequence(self, batch: int, n: int, seed: int = 3) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        views = (3,) if self.diff_views else ()
        return torch.randn(*views, batch, n, DIM, generator=generator, dtype=torch.float64)

    def __call__(self, seq, state=None, mask=None):
        """(retrieved, state, surprises); the state is that of both memories."""
        before, own = state if state is not None else (None, None)
        updates = None
        if self.earlier is not None:
            _, before = self.earlier(seq, state=before, store_mask=mask)
            updates = before.updates
        out, own, surprises = self.memory(seq, state=own, store_mask=mask, prev_weights=updates, return_surprises=True)
        return out, (before, own), surprises

    def pieces(self, seq, cuts, mask=None):
        """The sequence in the pieces that `cuts` make of it: (retrieved of each, last state, surprises)."""
        state, outs, surprises = None, [], []
        edges = [0, *cuts, seq.shape[-2]]
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            part = None if mask is None else mask[:, start:stop]
            out, state, found = self(seq[..., start:stop, :], state, part)
            outs.append(out), surprises.append(found)
        return torch.cat(outs, dim=1), state, joined(surprises)


def joined(surprises) -> tuple[torch.Tensor, ...]:
    """Those of several calls as of one."""
    return tuple(torch.cat(parts, dim=-1) for parts in zip(*surprises, strict=True))
