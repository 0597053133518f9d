"""Which settings of a ModelConfig each update rule has a place for. Settings are checked without torch."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from titans_pytorch.common.checks import wrong

__all__ = ["RULES", "TITANS_STEP", "Rule", "Takes", "changed_rule", "check_rule", "unfit"]

Rule = Literal[
    "titans",
    "exact",
    "linear_attention",
    "deltanet",
    "gated_deltanet",
    "ttt_linear",
    "ttt_mlp",
    "omeganet",
    "atlas",
    "moneta",
    "yaad",
    "memora",
    "lact",
]


@dataclass(frozen=True)
class Takes:
    """What settings of a model mean to a rule. Switches that are on where a rule has nothing to switch do nothing.

    chunk: the setting of the rule that chunk_size is; None: it writes token by token.
    step: what max_step is: the largest learning rate, or the largest share of its error that a token writes; None: the
        rule's learning rates have no bound that could be set.
    learned_step: whether learning rates are learned.
    momentum, gate: whether the rule has momentum, a forget gate.
    layers: matrices of its network, one after the other; None: any number.
    hidden: whether the width between them may be chosen.
    wraps: whether the network may be wrapped in a LayerNorm and a residual.
    starts: whether its initial weights are chosen as in a trained network.
    unit_keys: whether its steps are bounded for keys of unit norm alone.
    """

    chunk: str | None = "segment"
    step: Literal["rate", "share"] | None = "rate"
    learned_step: bool = True
    momentum: bool = False
    gate: bool = True
    layers: int | None = 2
    hidden: bool = True
    wraps: bool = False
    starts: bool = True
    unit_keys: bool = False


_DELTA = Takes(chunk=None, step="share", gate=False, layers=1, hidden=False, starts=False, unit_keys=True)

#: Of every rule but "titans", whose memory takes all settings. A new name of `NeuralMemory.preset` becomes a rule of
#: the models by a name in `Rule` and a line here.
RULES: dict[str, Takes] = {
    "exact": Takes(chunk=None, step="share", layers=1, hidden=False, unit_keys=True),
    "linear_attention": Takes(
        chunk=None, step=None, learned_step=False, gate=False, layers=1, hidden=False, starts=False
    ),
    "deltanet": _DELTA,
    "gated_deltanet": Takes(chunk=None, step="share", layers=1, hidden=False, starts=False, unit_keys=True),
    "ttt_linear": Takes(gate=False, layers=1, hidden=False),
    "ttt_mlp": Takes(gate=False),
    "omeganet": Takes(layers=1, hidden=False, wraps=True),
    "atlas": Takes(layers=None, wraps=True, momentum=True),
    "moneta": Takes(starts=False),
    "yaad": Takes(),
    "memora": Takes(starts=False),
    "lact": Takes(chunk="chunk", step=None, momentum=True, gate=False),
}
TITANS_STEP = 0.1  # the largest learning rate of "titans" where none is given


def unfit(rule: str, settings: Any) -> Iterator[tuple[str, str]]:
    """The settings that a rule has no place for, each with what the rule is like, as (name, reason).

    Args:
        rule: a name of `Rule`.
        settings: a ModelConfig. Settings at their defaults fit every rule.
    """
    takes = RULES.get(rule)
    if takes is None:
        return
    given = {f.name for f in dataclasses.fields(settings) if getattr(settings, f.name) != f.default}
    lacks = {
        "chunk_size": takes.chunk is None and "writes token by token",
        "max_step": takes.step is None and "has no bound of its learning rates",
        "mem_layers": takes.layers not in (None, settings.mem_layers) and f"has a network of {takes.layers} layer(s)",
        "d_hidden": not takes.hidden and "has a network of one matrix",
        "mem_norm": not takes.wraps and "has a network of its own",
        "mem_init": not takes.starts and "has initial weights of its own",
        "mem_init_scale": not takes.starts and "has initial weights of its own",
        "qk_norm": takes.unit_keys and "is bounded for queries and keys of unit norm, l2",
        "init_step_bias": not takes.learned_step and "has no learned learning rate",
        "init_momentum_bias": not takes.momentum and "has no momentum",
        "init_decay_bias": not takes.gate and "has no forget gate",
        "memory_loss_weight": takes.chunk == "chunk" and "has no inner loss before a chunk is complete",
    }
    for name, reason in lacks.items():
        if reason and name in given:
            yield name, reason


def check_rule(settings: Any) -> None:
    """Refuse settings of a ModelConfig that its rule has no place for, with a ValueError that names them."""
    for name, reason in unfit(settings.rule, settings):
        raise ValueError(
            f"{name} {getattr(settings, name)} cannot be combined with rule {settings.rule}, which {reason}"
        )
    takes = RULES.get(settings.rule)
    if takes is not None and takes.step == "share" and settings.max_step is not None and settings.max_step > 1:
        raise wrong("max_step", settings.max_step, f"at most 1 with rule {settings.rule}: a share of a token's error")


def changed_rule(model: Any, settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What `settings` with another rule change beside: (settings that return to their defaults, lines that say so).

    Args:
        model: the ModelConfig whose settings are replaced.
        settings: the settings that are given; what is among them is left as it is.
    """
    rule = settings.get("rule", model.rule)
    if not isinstance(rule, str) or rule.lower() == model.rule:  # of another type: refused later
        return {}, []
    rule = rule.lower()
    reasons = dict(unfit(rule, model)) | ({} if model.max_step is None else {"max_step": "has its own"})
    defaults = {field.name: field.default for field in dataclasses.fields(model)}
    back = {name: defaults[name] for name in reasons if name not in settings}
    lines = [f"rule {rule}: {name} {getattr(model, name)} is not used: it {reasons[name]}" for name in back]
    return back, lines
