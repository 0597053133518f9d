"""TitansConfig: all settings of a run of one of the paper's models, as strict nested dataclasses.

Reads and writes YAML and JSON. An unknown key, a wrong type or an impossible value raises ValueError; for an unknown
key it names the nearest known one.
"""

import dataclasses
import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from titans_pytorch.common.checks import of_kind, wrong
from titans_pytorch.common.files import parse_json, write_text
from titans_pytorch.common.names import known_keywords, unknown
from titans_pytorch.models.other_settings import is_other, log_readings, translated
from titans_pytorch.models.rule_settings import Rule, changed_rule, check_rule
from titans_pytorch.training.config import (
    DataConfig,
    ReportConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    at_most,
    checked,
    from_dict,
    positive,
    setting,
    settings_of,
    typed,
)

__all__ = ["ModelConfig", "TitansConfig", "VARIANTS"]

Variant = Literal["mac", "mag", "mal", "lmm", "baseline"]
VARIANTS: tuple[str, ...] = typing.get_args(Variant)


@known_keywords
@dataclass(frozen=True)
class ModelConfig:
    """Settings of a language model. They follow the paper (arXiv 2501.00663) where it gives them. It publishes neither
    widths nor numbers of heads, chunk, segment and window lengths, nor initial values."""

    variant: Variant = setting(
        "mac", "memory as context, as gate, as layer, memory alone, or a plain transformer (baseline)"
    )
    rule: Rule = setting(
        "titans",
        "update rule of the memory, docs/rules.md; settings that a rule has no place for must be at their defaults; "
        "the number of parameters differs by rule, docs/models.md",
    )
    vocab_size: int = setting(256, "token ids are below this")
    d_model: int = setting(128, "features of a token")
    n_layers: int = setting(4, "blocks")
    n_heads: int = setting(4, "attention heads")
    ffn_mult: float = setting(4.0, "feed-forward width as a multiple of d_model; two thirds of it, for SwiGLU")
    n_persistent: int = setting(4, "persistent memory tokens of each block, eq. 19")
    window: int = setting(128, "mac: tokens of a segment; mag, mal: earlier tokens a query sees; not in lmm, baseline")
    mem_layers: int = setting(2, "matrices of the memory network (the paper's L_M), in titans and atlas")
    d_hidden: int | None = setting(
        None,
        "hidden features of the memory network per head (none: 4 d_model / mem_heads, in lact d_model / mem_heads)",
    )
    mem_heads: int = setting(4, "memory heads of a block, each of d_model / mem_heads features")
    chunk_size: int = setting(
        64,
        "tokens of a mini-batch, whose gradients are taken at the same fast weights, eq. 16; in lact of a chunk; "
        "exact, deltanet, gated_deltanet and linear_attention write token by token",
    )
    use_momentum: bool = setting(True, "use momentum, eq. 9 and 10, where the rule has it")
    use_decay: bool = setting(True, "use a forget gate, eq. 13, where the rule has one")
    max_step: float | None = setting(
        None,
        "largest learning rate theta, a sigmoid times this (none: the rule's own, titans 0.1); with qk_norm rms, "
        "1 / chunk_size or less cannot overshoot; in exact, deltanet and gated_deltanet the largest share of its error "
        "that a token writes",
    )
    surprise_threshold: float | None = setting(None, "a token with a smaller inner loss is not written (none: all are)")
    surprise_source: Literal["memory", "prediction"] = setting(
        "memory",
        "measure of surprise: the inner loss, or the error of a predictor (whose loss must be trained)",
    )
    conv_kernel: int = setting(4, "tokens of the causal convolution on queries, keys and values (0: none)")
    qk_norm: Literal["l2", "rms", "none"] = setting("l2", "norm of the memory's queries and keys")
    gate: Literal["normalised", "silu", "sigmoid", "convex"] = setting(
        "normalised",
        "how mac and mag combine attention and memory: the paper's gate; attention times this function of memory; "
        "or a learned share of each, which adds up to 1",
    )
    init_gate_bias: float | None = setting(
        None, "convex gate only: its initial bias (none: 0); attention's share starts about its sigmoid"
    )
    mem_norm: bool = setting(
        False,
        "wrap the memory network in a LayerNorm and a residual; rounding errors grow where the fast weights shrink",
    )
    init: Literal["default", "xavier", "normal", "orthogonal"] = setting(
        "default", "initial weights of linear maps (default: PyTorch's own; with the others their biases start at 0)"
    )
    init_std: float = setting(0.02, "standard deviation of the initial embedding, and of weights that start normal")
    mem_init: Literal["xavier", "normal", "orthogonal"] = setting("xavier", "initial fast weights")
    mem_init_scale: float = setting(1.0, "factor of the initial fast weights")
    init_step_bias: float | None = setting(
        None, "initial learning rate before its sigmoid (none: random, or the rule's own)"
    )
    init_momentum_bias: float | None = setting(None, "initial momentum before its sigmoid (none: random)")
    init_decay_bias: float | None = setting(
        -6.0, "initial forget gate before its sigmoid (none: random, about a half: the memory soon forgets)"
    )
    memory_loss_weight: float = setting(0.0, "weight of the memory's inner loss in the training loss")
    tie_embeddings: bool = setting(False, "use the embedding as the output map")

    def __post_init__(self):
        typed(self)
        positive(self, "vocab_size", "d_model", "n_layers", "n_heads", "ffn_mult", "window", "mem_layers", "d_hidden")
        positive(self, "mem_heads", "chunk_size", "max_step", "mem_init_scale", "init_std")
        positive(self, "n_persistent", "conv_kernel", "surprise_threshold", "memory_loss_weight", zero=True)
        at_most(self, n_layers=1000, mem_layers=100, conv_kernel=1000)
        head, left = divmod(self.d_model, self.n_heads)
        if left or head % 2 or head < 4:
            takes = f"a divisor of d_model = {self.d_model} that leaves heads of an even width of at least 4"
            raise wrong("n_heads", self.n_heads, takes)
        if self.d_model % self.mem_heads:
            raise wrong("mem_heads", self.mem_heads, f"a divisor of d_model = {self.d_model}")
        if self.init_gate_bias is not None and self.gate != "convex":
            raise ValueError("init_gate_bias needs gate convex")
        check_rule(self)

    def least_parameters(self) -> float:
        """Return the parameters of the embedding and the large matrices, a lower bound."""
        d, layers, head = self.d_model, self.n_layers, self.d_model // self.mem_heads
        block = 2.0 * self.ffn_mult * d * d + self.n_persistent * d
        if self.variant != "baseline":
            own = 4 * head if self.rule == "titans" else head
            hidden = head if self.mem_layers == 1 else self.d_hidden or own
            block += self.mem_heads * 1.0 * head * hidden + 3.0 * self.conv_kernel * d
        return self.vocab_size * 1.0 * d + layers * block

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.d_model


@dataclass(frozen=True, init=False)
class TitansConfig(RunConfig):
    """All settings of a run of one of the paper's models. Give settings by name alone; no two sections share a name:

        config = TitansConfig(variant="mag", d_model=256, lr=3e-4)
        config = TitansConfig.small(variant="mag", window=256)
        config = config.replace(steps=10)

    Names of other implementations (hidden_dim, memory_layers, learning_rate, ...) and variants in capitals are read by
    the table in `models/other_settings.py`, here and in files; a logged line says how each was read. Unknown names,
    wrong types and impossible values raise ValueError.

    Args:
        model: a ModelConfig.
        data: a DataConfig (text), or a TaskConfig.
        training: a TrainConfig.
        report: a ReportConfig.
        name: name of the preset or the file that the settings started from.
        settings: any setting by its name, in place of sections.
    """

    model: ModelConfig = ModelConfig()

    def __init__(
        self,
        model: ModelConfig = ModelConfig(),  # noqa: B008  (frozen)
        data: DataConfig | TaskConfig | str = DataConfig(),  # noqa: B008
        training: TrainConfig = TrainConfig(),  # noqa: B008
        report: ReportConfig = ReportConfig(),  # noqa: B008
        name: str = "",
        **settings: Any,
    ):
        if isinstance(data, str):
            settings["data"], data = data, DataConfig()
        sections = {"model": model, "data": data, "training": training, "report": report, "name": name}
        for key, value in sections.items():
            object.__setattr__(self, key, value)
        of_kind(model, ModelConfig, "model", "a ModelConfig; settings are given by name: TitansConfig(d_model=64)")
        self.__post_init__()
        if settings:
            made = _read(self, settings)
            for key in sections:
                object.__setattr__(self, key, getattr(made, key))

    def replace(self, **settings) -> "TitansConfig":
        """Return a copy with `settings` replaced. They are given by name alone, whatever section they are in.

        With another `rule`, the settings that it has no place for return to their defaults, and max_step to the rule's
        own, unless they are given too. A logged line names them.

        Raises:
            ValueError: for unknown names and wrong values.
        """
        back, lines = changed_rule(self.model, settings)
        replaced = super().replace(**back | settings)
        log_readings(lines)
        return replaced

    @classmethod
    def of(cls, **settings) -> "TitansConfig":
        """Return the defaults with the given `settings`."""
        return cls().replace(**settings)

    @classmethod
    def preset(cls, name: str, **settings) -> "TitansConfig":
        """Return the preset `name` with the given `settings`.

        Presets: tiny, small (170M parameters), medium (340M), large (760M).
        """
        from titans_pytorch.models.presets import PRESETS, preset

        if name not in PRESETS:
            raise ValueError(f"{unknown('preset ', name, PRESETS)}; there are {', '.join(PRESETS)}")
        variant = checked("variant", settings.pop("variant", "mac"), Variant)
        return preset(name, variant).replace(**settings)

    @classmethod
    def tiny(cls, **settings) -> "TitansConfig":
        """Return the preset that trains in minutes on two CPU cores, with the given `settings`."""
        return cls.preset("tiny", **settings)

    @classmethod
    def small(cls, **settings) -> "TitansConfig":
        """Return the preset of 170M parameters, with the given `settings`."""
        return cls.preset("small", **settings)

    @classmethod
    def medium(cls, **settings) -> "TitansConfig":
        """Return the preset of 340M parameters, with the given `settings`."""
        return cls.preset("medium", **settings)

    @classmethod
    def large(cls, **settings) -> "TitansConfig":
        """Return the preset of 760M parameters, with the given `settings`."""
        return cls.preset("large", **settings)

    # files

    @classmethod
    def from_dict(cls, sections: dict[str, dict[str, Any]]) -> "TitansConfig":
        """Read `sections`, as `to_dict` returns them, or settings of another implementation. Missing settings keep
        their defaults; unknown names raise ValueError.
        """
        if isinstance(sections, dict) and is_other(sections, _known()):
            return _read(cls(), sections)
        return from_dict(cls(), sections)

    @classmethod
    def from_json(cls, text: str) -> "TitansConfig":
        """Read JSON `text`. ValueError where it is not JSON, or not a configuration."""
        return cls.from_dict(parse_json(text))

    def to_yaml(self) -> str:
        """Return the settings as YAML text."""
        from titans_pytorch.models.yaml_text import write_yaml

        return write_yaml(_lists(self.to_dict()))

    @classmethod
    def from_yaml(cls, text: str) -> "TitansConfig":
        """Read YAML `text`. ValueError where it is not YAML, or not a configuration."""
        from titans_pytorch.models.yaml_text import read_yaml

        found = read_yaml(text)
        return cls.from_dict({} if found is None else found)

    def save(self, path: str | os.PathLike) -> None:
        """Write the settings to `path` (.yaml, .yml or .json), atomically. ValueError for another ending."""
        path = Path(path)
        text = self.to_json() if _format(path) == "json" else self.to_yaml()
        write_text(path, text)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TitansConfig":
        """Read settings from `path` (.yaml, .yml or .json). ValueError names the file and the mistake in it."""
        path = Path(path)
        read = cls.from_json if _format(path) == "json" else cls.from_yaml
        try:
            return read(_decoded(path.read_bytes()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _known() -> dict[str, Any]:
    """Every setting by its name, of text and of tasks, with its default."""
    base = TitansConfig()
    both = (base, dataclasses.replace(base, data=TaskConfig()))
    return {name: field.default for run in both for name, (_, field, _) in settings_of(run).items()}


def _read(base: TitansConfig, given: dict[str, Any]) -> TitansConfig:
    """`base` with `given`, settings by name or in sections, of ours or of another implementation."""
    settings, lines = translated(given, _known())
    name = settings.pop("name", base.name)
    if settings.keys() & {f.name for f in dataclasses.fields(TaskConfig)} and not isinstance(base.data, TaskConfig):
        base = dataclasses.replace(base, data=TaskConfig())
    read = dataclasses.replace(base.replace(**settings), name=checked("name", name, str))
    log_readings(lines)
    return read


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"line {content[: error.start].count(10) + 1}: not UTF-8") from error


def _lists(value: Any) -> Any:
    """Replace tuples by lists: YAML has no tuples."""
    if isinstance(value, dict):
        return {name: _lists(part) for name, part in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _format(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".json"):
        raise wrong("path", str(path), "a name that ends in .yaml, .yml or .json")
    return suffix.removeprefix(".")
