"""The rules that `NeuralMemory.preset` knows by name.

Add a rule
----------
Write a function `keywords(dim_head, *, ...settings with defaults...)` that returns keywords of NeuralMemory, in a file
of its own beside this one, and add a line with its place to `NAMED`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from titans_pytorch.common.checks import positive_int, wrong
from titans_pytorch.common.names import unknown


@dataclass(frozen=True)
class NamedRule:
    """A published memory.

    place: "file.function", beside this file.
    squared_matrix: whether the rule is defined for one matrix under squared error alone.
    largest_head: features of a head where none are given, at most.
    """

    place: str
    squared_matrix: bool = False
    largest_head: int | None = None

    @property
    def keywords(self) -> Callable[..., dict]:
        """The function (dim_head, *, settings) -> keywords of NeuralMemory. Its docstring says from which paper and
        equation, and what was chosen where the paper leaves it open."""
        file, _, function = self.place.partition(".")
        return getattr(import_module(f"{__package__}.{file}"), function)

    @property
    def settings(self) -> tuple[str, ...]:
        """Keywords of `keywords` beside dim_head."""
        return tuple(inspect.signature(self.keywords).parameters)[1:]


NAMED: dict[str, NamedRule] = {
    "linear_attention": NamedRule("linear_attention.keywords"),
    "deltanet": NamedRule("delta.deltanet", squared_matrix=True),
    "gated_deltanet": NamedRule("delta.gated_deltanet", squared_matrix=True),
    "ttt_linear": NamedRule("ttt.ttt_linear"),
    "ttt_mlp": NamedRule("ttt.ttt_mlp"),
    "titans": NamedRule("titans.keywords"),
    "omeganet": NamedRule("atlas.omeganet", largest_head=16),
    "atlas": NamedRule("atlas.atlas", largest_head=16),
    "moneta": NamedRule("miras.moneta"),
    "yaad": NamedRule("miras.yaad"),
    "memora": NamedRule("miras.memora"),
    "lact": NamedRule("lact.keywords"),
}

#: Keywords that would make another memory of a matrix under squared error.
OF_THE_MATRIX = ("model", "default_model_kwargs", "mem_model_norm_add_residual", "store_memory_loss_fn", "update_rule")


def named_rule(name: str) -> NamedRule:
    """The rule of a name. ValueError for another, with the nearest known one."""
    if not isinstance(name, str):
        raise wrong("name", name, f"one of {', '.join(NAMED)}")
    if name not in NAMED:
        raise unknown("rule ", name, NAMED)
    return NAMED[name]


def preset_kwargs(name: str, dim: int, **changes: Any) -> dict:
    """Keywords of `NeuralMemory(dim, **preset_kwargs(name, dim))`: a published memory by its name.

    Args:
        name: one of `NAMED`.
        dim: features of the sequence.
        changes: settings of the rule (see its function), or any keywords of NeuralMemory, in place of its own or beside
            them. heads defaults to 1, dim_head to dim / heads; rules with polynomial features take heads of 16.

    Raises:
        ValueError: for an unknown name or setting, or a change that the rule is not defined for.
    """
    rule = named_rule(name)
    positive_int(dim, "dim")
    if rule.squared_matrix:
        for keyword in OF_THE_MATRIX:
            if keyword in changes:
                raise ValueError(
                    f"{keyword} cannot be combined with the rule {name}, which is exact for one matrix under squared"
                    ' error: for other networks and losses take "titans" or "ttt_mlp" with segment=1'
                )
    heads = changes.get("heads")
    if heads is None:
        most = rule.largest_head
        heads = dim // most if most and "dim_head" not in changes and dim % most == 0 else 1
    elif positive_int(heads, "heads") and "dim_head" not in changes and dim % heads:
        raise wrong("heads", heads, f"a divisor of dim, {dim}, or given with dim_head")
    dim_head = changes.get("dim_head")
    dim_head = dim // heads if dim_head is None else positive_int(dim_head, "dim_head")
    settings = {key: changes.pop(key) for key in rule.settings if key in changes}
    own = {"heads": heads, "dim_head": dim_head}
    return rule.keywords(dim_head, **settings) | own | {k: v for k, v in changes.items() if k not in own}
