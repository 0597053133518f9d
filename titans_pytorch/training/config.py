"""Settings of a run: frozen dataclasses, flattened to command-line options, saved with the run as JSON.

Every field carries its help text. Unknown names raise and name the nearest known one.
"""

import dataclasses
import json
import types
import typing
import unicodedata
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from titans_pytorch.common.checks import Words, of_kind, wrong
from titans_pytorch.common.names import known_keywords, nearest, unknown

__all__ = [
    "DataConfig",
    "ReportConfig",
    "RunConfig",
    "TaskConfig",
    "TrainConfig",
    "from_dict",
    "setting",
    "settings_of",
    "updated",
]


Sections = TypeVar("Sections", bound=Any)  # a frozen dataclass whose fields are dataclasses

FORMER_SECTIONS = {"train": "training", "preset": "name"}  # as runs saved them until version 0.2
LARGEST_SEED = 2**63 - 1  # torch's
LARGEST_INT = 2**63 - 1
LARGEST_FLOAT = 3.4e38  # of float32
LONGEST_TEXT = 4096
MOST_NUMBERS = 1000
MOST_ROWS = MOST_TOKENS = 10_000_000
MOST_THREADS = 4096
TAKES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "whole numbers",
    dict: "names with values",
}


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a default and a line of help for the command line."""
    return field(default=default, metadata={"help": help})


def checked(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the annotated type. An int becomes a float and a list a tuple; other conversions raise."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = [a for a in args if a is not type(None)]
        return _as_type(name, value, hint, " or none")
    return _as_type(name, value, hint)


def _as_type(name: str, value: Any, hint: Any, more: str = "") -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal and isinstance(value, str) and value.lower() in args:
        return value.lower()
    if origin is tuple and isinstance(value, (list, tuple)) and all(type(v) is args[0] for v in value):
        if len(value) > MOST_NUMBERS:
            raise wrong(name, Words(f"{len(value)}"), f"at most {MOST_NUMBERS} numbers")
        return tuple(_in_range(name, v) for v in value)
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return dict(value)
    if hint in (int, float) and type(value) in (int, hint):
        value = _in_range(name, value)
        return value if hint is int else float(value)
    if hint is str and type(value) is str:
        return _sayable(name, value)
    if hint is bool and type(value) is bool:
        return value
    if origin is Literal:
        error = wrong(name, value, f"one of {', '.join(args)}{more}")
        raise ValueError(f"{error}{nearest(value, args) if isinstance(value, str) else ''}")
    takes = TAKES.get(origin or hint, getattr(hint, "__name__", str(hint)))
    raise wrong(name, value, f"{takes}{more}")


def _in_range(name: str, value: float) -> float:
    if type(value) is int and abs(value) > LARGEST_INT:
        raise wrong(name, value, f"at most {LARGEST_INT}" if value > 0 else f"at least {-LARGEST_INT}")
    if value != value:
        raise wrong(name, value, "a number")
    if type(value) is float and abs(value) > LARGEST_FLOAT:
        raise wrong(name, value, f"a number of at most {LARGEST_FLOAT} in size")
    return value


def _sayable(name: str, text: str) -> str:
    """Check a name of a file, device or task: text that a file name and a JSON file can hold."""
    if len(text) > LONGEST_TEXT:
        raise wrong(name, Words(f"{len(text)} characters"), f"at most {LONGEST_TEXT} characters")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise wrong(name, text, "text without control characters")
    return text


def typed(config: Any) -> None:
    """Check every setting of a frozen dataclass against its annotation. ValueError for another type."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        object.__setattr__(config, f.name, checked(f.name, getattr(config, f.name), hints[f.name]))


def positive(config: Any, *names: str, zero: bool = False) -> None:
    """Raise ValueError unless each named number is above zero (or zero, with `zero`). None is left alone."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (value > 0 or (value == 0 and zero)):
            raise ValueError(f"{name} must be a {'number of at least 0' if zero else 'positive number'}, got {value!r}")


def at_most(config: Any, **limits: float) -> None:
    """Raise ValueError where a named number exceeds its limit. Above it a run would take days or all memory."""
    for name, limit in limits.items():
        value = getattr(config, name)
        if value is not None and value > limit:
            raise wrong(name, value, f"at most {limit}")


@known_keywords
@dataclass(frozen=True)
class DataConfig:
    """The text to train on."""

    data: str = setting(
        "auto", "a file (plain, .gz, .bz2, .xz or .zip), 'stdlib', or 'auto': data/enwik8, else download, else stdlib"
    )
    data_dir: str = setting("data", "where auto looks for enwik8, and where downloaded and unpacked bytes are kept")
    data_limit: int = setting(
        0, "use only the first bytes of the data, this many (0: all; of an archive at most 1,000,000,000)"
    )
    held_out: float = setting(0.05, "fraction at the end of the data that is never trained on")

    def __post_init__(self):
        typed(self)
        positive(self, "data_limit", zero=True)
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out must be a fraction between 0 and 1, got {self.held_out!r}")


@known_keywords
@dataclass(frozen=True)
class TaskConfig:
    """A task in place of text; rows of seq_len tokens, generated from the seed."""

    task: str = setting("copy", "copy, patterns, needle, recall, variables or text_passkey")
    settings: dict[str, Any] = field(default_factory=dict, metadata={"help": "settings of the task, by name"})
    first_len: int = setting(0, "length of the first rows, doubled up to seq_len over half the training (0: off)")
    test_times: tuple[int, ...] = setting((1,), "lengths of the final scores, as multiples of seq_len")
    test_rows: int = setting(200, "rows of the final scores")
    test_batch_size: int = setting(16, "rows in one forward pass of the final scores")

    def __post_init__(self):
        typed(self)
        positive(self, "test_rows", "test_batch_size")
        positive(self, "first_len", zero=True)
        at_most(self, test_rows=MOST_ROWS)
        if not self.test_times or min(self.test_times) < 1:
            raise ValueError(f"test_times must be whole numbers of at least 1, got {self.test_times!r}")


@known_keywords
@dataclass(frozen=True)
class TrainConfig:
    """The training loop and its optimizer."""

    steps: int = setting(1000, "optimizer steps")
    batch_size: int = setting(4, "sequences in one forward pass, over all processes")
    grad_accum: int = setting(1, "forward passes for one optimizer step")
    seq_len: int = setting(512, "bytes predicted in one sequence")
    optimizer: Literal["adamw", "muon"] = setting("adamw", "adamw, or muon for hidden matrices and adamw for the rest")
    lr: float = setting(2e-4, "highest learning rate")
    warmup_steps: int = setting(100, "steps of linear warm-up")
    min_lr_ratio: float = setting(0.1, "learning rate at the end, as a fraction of the highest (cosine decay)")
    weight_decay: float = setting(0.1, "weight decay of linear maps; all other parameters have none")
    beta1: float = setting(0.9, "AdamW's decay rate of the mean gradient")
    beta2: float = setting(0.95, "AdamW's decay rate of the mean squared gradient")
    clip: float = setting(0.5, "largest gradient norm (0: no clipping)")
    core_steps: int = setting(0, "number of first steps in which memories are off and all else is trained (0: none)")
    after_core: Literal["memory", "all"] = setting(
        "memory", "what is trained after core_steps: the memories alone, or all"
    )
    seed: int = setting(0, "seed of the weights, the order of the data and the sampled text")
    device: str = setting("auto", "auto (CUDA if there is one, else the CPU), or a device of torch")
    precision: Literal["auto", "float32", "bfloat16"] = setting("auto", "bfloat16: autocast; auto: bfloat16 on CUDA")
    threads: int = setting(0, "CPU threads (0: by the model's width, see docs/threads.md)")
    validate_every: int = setting(100, "steps between validations on some of the held-out bytes (0: none)")
    validate_sequences: int = setting(32, "held-out sequences in one validation")
    checkpoint_every: int = setting(100, "steps between checkpoints (0: only the last)")

    def __post_init__(self):
        typed(self)
        positive(self, "steps", "batch_size", "grad_accum", "seq_len", "lr", "validate_sequences")
        positive(self, "warmup_steps", "min_lr_ratio", "weight_decay", "clip", "seed", "threads", zero=True)
        positive(self, "core_steps", zero=True)
        at_most(self, min_lr_ratio=1.0, validate_sequences=MOST_ROWS, threads=MOST_THREADS)
        if self.seed > LARGEST_SEED:
            raise ValueError(f"seed must be at most {LARGEST_SEED}, got {self.seed!r}")
        positive(self, "validate_every", "checkpoint_every", zero=True)
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be a number from 0 to below 1, got {getattr(self, name)!r}")
        if self.core_steps >= self.steps:
            raise ValueError(f"core_steps must be fewer than steps = {self.steps}, got {self.core_steps!r}")


@known_keywords
@dataclass(frozen=True)
class ReportConfig:
    """Evaluation and sampled text."""

    eval_stride: int = setting(0, "bytes by which the final evaluation moves its window (0: half a sequence)")
    eval_limit: int = setting(100_000, "most held-out bytes in the final evaluation, the first ones (0: all)")
    eval_batch_size: int = setting(16, "windows in one forward pass of an evaluation")
    sample_every: int = setting(0, "steps between samples of text (0: only at the end)")
    sample_len: int = setting(512, "bytes of text to sample")
    prime_len: int = setting(100, "held-out bytes that the sampled text continues")
    temperature: float = setting(0.8, "sampling temperature (0: always the likeliest byte)")

    def __post_init__(self):
        typed(self)
        positive(self, "eval_batch_size", "sample_len", "prime_len")
        positive(self, "eval_stride", "eval_limit", "sample_every", "temperature", zero=True)
        if self.eval_limit == 1:  # its one byte has nothing before it
            raise wrong("eval_limit", 1, "0 (all) or at least 2")
        at_most(self, sample_len=MOST_TOKENS, prime_len=MOST_TOKENS)


@known_keywords
@dataclass(frozen=True)
class RunConfig:
    """All settings of a run, in sections. Read a setting as `config.training.lr`.

    Args:
        model: any frozen dataclass of settings.
        data: which bytes, or which task.
        training: the loop and its optimizer.
        report: evaluation and sampled text.
        name: name of the preset or the file that the settings started from.
    """

    model: Any
    data: DataConfig | TaskConfig = DataConfig()
    training: TrainConfig = TrainConfig()
    report: ReportConfig = ReportConfig()
    name: str = ""

    def __post_init__(self):
        if not dataclasses.is_dataclass(self.model) or isinstance(self.model, type):
            raise wrong("model", Words(type(self.model).__name__), "an object of a dataclass of settings")
        of_kind(self.data, (DataConfig, TaskConfig), "data", "a DataConfig or a TaskConfig")
        of_kind(self.training, TrainConfig, "training", "a TrainConfig")
        of_kind(self.report, ReportConfig, "report", "a ReportConfig")
        of_kind(self.name, str, "name", "a text")

    def replace(self: Sections, **settings) -> Sections:
        """Return a copy with `settings` replaced. They are given by name alone, whatever section they are in.

        Raises:
            ValueError: for unknown names and wrong values.
        """
        return updated(self, settings)

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts: section -> setting -> value."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return the settings as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


def groups_of(run: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(run) if dataclasses.is_dataclass(getattr(run, f.name))]


def settings_of(run: Any) -> dict[str, tuple[str, dataclasses.Field, Any]]:
    """Map the name of every setting of a `run` to (group, field, type). Two groups may not use one name."""
    found: dict[str, tuple[str, dataclasses.Field, Any]] = {}
    for group in groups_of(run):
        config = getattr(run, group)
        hints = typing.get_type_hints(type(config))
        for f in dataclasses.fields(config):
            if f.name in found:
                raise ValueError(f"{f.name}: a setting of both {found[f.name][0]} and {group}, takes one name for each")
            found[f.name] = (group, f, hints[f.name])
    return found


def updated(run: Sections, changes: dict[str, Any]) -> Sections:
    """Return `run` with the settings in `changes` replaced. Unknown names and wrong types raise ValueError."""
    known = settings_of(run)
    by_group: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        if name not in known:
            raise unknown("setting ", name, known)
        group, _, hint = known[name]
        by_group.setdefault(group, {})[name] = checked(name, value, hint)
    replaced = {group: dataclasses.replace(getattr(run, group), **part) for group, part in by_group.items()}
    return dataclasses.replace(run, **replaced)


def from_dict(base: Sections, saved: dict[str, Any]) -> Sections:
    """Read a configuration back from a dict.

    Args:
        base: a configuration with the same sections; what `saved` lacks is taken from it.
        saved: nested dicts, as `to_dict` returns them.

    Raises:
        ValueError: for unknown names (it names the nearest known one) and wrong values.
    """
    sections = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    if not isinstance(saved, dict):
        names = ", ".join(name for name, default in sections.items() if dataclasses.is_dataclass(default))
        raise wrong("configuration", Words(type(saved).__name__), f"sections {names}")
    found: dict[str, Any] = {}
    for name, given in saved.items():
        name = FORMER_SECTIONS.get(name, name)
        if name not in sections:
            raise unknown("section ", name, sections)
        default = sections[name]
        if name == "data" and isinstance(given, dict) and "task" in given:
            default = default if isinstance(default, TaskConfig) else TaskConfig()
        found[name] = section_from(default, name, given) if dataclasses.is_dataclass(default) else _sayable(name, given)
    return dataclasses.replace(base, **found)


def section_from(default: Any, name: str, given: Any) -> Any:
    given = {} if given is None else given  # a section without a line
    if not isinstance(given, dict):
        raise wrong(name, Words(type(given).__name__), "a section of settings")
    hints = typing.get_type_hints(type(default))
    for key in given:
        if key not in hints:
            raise unknown(f"setting {name}.", key, hints)
    return dataclasses.replace(default, **{key: checked(key, value, hints[key]) for key, value in given.items()})
