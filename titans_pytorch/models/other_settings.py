"""Settings of other Titans implementations, read as ours by one table: `TABLE`.

titans-memory (Neuranox), Titans_LTMM (AmayaGS) and the Titans model of consciousness (r-baldridge) name the same things
differently. `translated` takes their names, flat or in sections, beside our own, and says in a line how it read each.
A setting without a meaning here raises ValueError, in a line that says what replaces it; one that changes nothing here
(logging, workers) is left out, with a line. What is not given keeps this package's default.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from titans_pytorch.common.checks import wrong
from titans_pytorch.common.names import unknown

__all__ = ["DEFAULT_CONFIG", "TABLE", "VARIANT_CONFIGS", "is_other", "log_readings", "translated"]

logger = logging.getLogger(__name__)

#: A configuration with the names of r-baldridge/consciousness: `TitansConfig(**DEFAULT_CONFIG)`.
DEFAULT_CONFIG: dict[str, Any] = {
    "hidden_dim": 2048,
    "num_layers": 24,
    "num_heads": 16,
    "head_dim": 128,
    "memory_dim": 256,
    "memory_layers": 2,
    "memory_lr": 0.01,
    "surprise_threshold": 0.1,
    "variant": "MAG",
    "base_lr": 1e-4,
    "memory_loss_weight": 0.1,
}
#: What each of its variants changes: `TitansConfig(**DEFAULT_CONFIG | VARIANT_CONFIGS["MAG"])`.
VARIANT_CONFIGS: dict[str, dict[str, Any]] = {
    "MAC": {"variant": "MAC"},
    "MAG": {"variant": "MAG", "gate_activation": "sigmoid", "gate_init_bias": -2.0},
    "MAL": {"variant": "MAL"},
}

TRAIN_SHARE = 0.8  # of num_samples, where train_ratio is not given
PRESETS = ("mac", "mag", "mal", "small", "large", "long_context")


@dataclass(frozen=True)
class As:
    """Read a name as our `name`, its value through `value`. note: what else there is to say."""

    name: str
    value: Callable[[Any], Any] | None = None
    note: str = ""


@dataclass(frozen=True)
class Unused:
    """Leave a name out, with a line that says why. only: the values for which that is right, None for all."""

    why: str
    only: tuple | None = None


@dataclass(frozen=True)
class Replaced:
    """Refuse a name, with a line that says what replaces it."""

    by: str


Reading = As | Unused | Replaced

PRECISIONS = {"bf16": "bfloat16", "fp32": "float32", "no": "float32"}


def precision(value: Any) -> str:
    if value not in PRECISIONS:
        raise wrong("mixed_precision", value, "bf16 or fp32; float16 is not trained in here")
    return PRECISIONS[value]


TABLE: dict[str, Reading] = {
    # model
    "hidden_dim": As("d_model"),
    "num_layers": As("n_layers"),
    "num_heads": As("n_heads"),
    "memory_layers": As("mem_layers"),
    "memory_depth": As("mem_layers"),
    "memory_dim": As("d_hidden", note="hidden features of the one memory of a block (mem_heads 1)"),
    "memory_lr": As("max_step", note="the largest learning rate; each token's is a learned share of it"),
    "persistent_memory_size": As("n_persistent"),
    "mlp_expansion": As("ffn_mult"),
    "initializer_range": As("init_std", note="init normal"),
    "gate_init_bias": As("init_gate_bias", note="attention's share starts about its sigmoid"),
    "segment_size": As("window", note="of mac"),
    "window_size": As("window", note="of mag and mal"),
    "gate_activation": Unused("gate convex has a sigmoid", ("sigmoid",)),
    "description": Unused("a text"),
    "dropout": Unused("there is none here; weight_decay regularises", (0, 0.0)),
    "layer_norm_eps": Unused("norms add the epsilon of their dtype"),
    "use_bias": Unused("the feed-forward and the rates have a bias, attention has none"),
    "memory_key_dim": Replaced("mem_heads: keys have d_model / mem_heads features"),
    "memory_value_dim": Replaced("mem_heads: values have d_model / mem_heads features"),
    "num_memory_slots": Replaced("window: mac retrieves one token for each token of a segment"),
    "memory_ffn_dim": Replaced("d_hidden, hidden features of the memory network"),
    "residual_memory": Replaced("variant: mal adds attention over the memory's output to its input"),
    # lengths and rows
    "max_seq_len": As("seq_len", note="a model has no longest sequence; rows of training have this length"),
    "context_length": As("seq_len", note="a model has no longest sequence; rows of training have this length"),
    "max_length": As("seq_len"),
    # training
    "learning_rate": As("lr"),
    "base_lr": As("lr"),
    "gradient_clip": As("clip"),
    "grad_clip": As("clip"),
    "max_grad_norm": As("clip"),
    "max_steps": As("steps"),
    "gradient_accumulation_steps": As("grad_accum"),
    "mixed_precision": As("precision", precision),
    "eval_interval": As("validate_every"),
    "save_interval": As("checkpoint_every"),
    "stage1_steps": As("core_steps"),
    "max_eval_samples": As("validate_sequences"),
    "model_name": As("name"),
    "eps": Unused("that of AdamW is 1e-8", (1e-8,)),
    "lr_scheduler": Unused("the learning rate always follows a cosine down to min_lr_ratio", ("cosine",)),
    "scheduler": Unused("the learning rate always follows a cosine down to min_lr_ratio", ("cosine",)),
    "gradient_checkpointing": Unused("it changes no number; set model.gradient_checkpointing in a loop of your own"),
    "run_comparison": Unused("all variants: python benchmarks/benchmark_lengths.py --config FILE", (False,)),
    "compile_model": Unused("it changes no number; call torch.compile in a loop of your own"),
    "num_gpus": Unused("several: torchrun --nproc-per-node N -m titans_pytorch.cli train", (1,)),
    "tokenizer": Replaced("vocab_size: titans train reads bytes, and build_model's models read any ids"),
    "max_update_steps": Unused("a write is one step", (1,)),
    "reset_memory_on_new_doc": Unused("a call without a cache starts with the initial fast weights", (True,)),
    **dict.fromkeys(("log_interval", "log_level", "log_every", "save_every"), Unused("metrics.jsonl has every step")),
    **dict.fromkeys(("project", "entity", "log_to_wandb"), Unused("a run writes files, and to no service")),
    **dict.fromkeys(("log_dir", "results_dir"), Unused("--out names the folder of a run")),
    **dict.fromkeys(("num_workers", "prefetch_factor"), Unused("data is read in the process that trains")),
}
# read together with other names, in `translated`
JOINT = (
    *("head_dim", "min_lr", "train_tokens", "stage2_steps"),
    *("dataset", "num_samples", "train_ratio", "max_epochs"),
)

# read here, before a configuration checks them
NUMBERS = (
    *("seq_len", "max_seq_len", "max_length", "context_length", "vocab_size", "batch_size", "chunk_size"),
    *("d_model", "hidden_dim", "num_heads", "n_heads", "head_dim", "lr", "learning_rate", "surprise_threshold"),
    *("min_lr", "train_tokens", "stage1_steps", "stage2_steps", "num_samples", "train_ratio", "max_epochs"),
)


def is_other(given: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether a configuration has a name of another implementation, or our names without sections. known: our settings
    by name."""
    names = {name for _, name, _ in flat(given)}
    loose = {name for name, value in given.items() if not isinstance(value, Mapping)} - {"name", "preset"}
    written = capital(given)
    return bool(written or names & {*TABLE, *JOINT} or loose & {*known, "dataset"})


def capital(given: Mapping[str, Any]) -> bool:
    return any(name == "variant" and isinstance(value, str) and value.isupper() for _, name, value in flat(given))


def flat(given: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, str, Any]]:
    """(section, name, value) of every setting; presets and a task's own settings are not taken apart."""
    for name, value in given.items():
        if isinstance(value, Mapping) and name != "settings" and not (section == "" and name in PRESETS):
            yield from flat(value, f"{section}.{name}".lstrip("."))
        else:
            yield section, name, value


class Translation:
    """What was found: settings by our names, the lines that say how, and what cannot be read."""

    def __init__(self, known: Mapping[str, Any]):
        self.known = known
        self.settings: dict[str, Any] = {}
        self.joint: dict[str, Any] = {}
        self.lines: list[str] = []
        self.refused: list[str] = []

    def put(self, name: str, value: Any, source: str, note: str = "") -> None:
        if self.settings.get(name, value) != value:
            raise ValueError(f"{source} cannot be combined with another {name}: {self.settings[name]!r} and {value!r}")
        self.settings[name] = value
        self.lines.append(f"{source}: {name} {value!r}{f' ({note})' if note else ''}")

    def set_with(self, source: str, **settings: Any) -> None:
        """Set what `source` says beside; another value that is given is refused."""
        for name, value in settings.items():
            if self.settings.setdefault(name, value) != value:
                got = self.settings[name]
                raise ValueError(f"{source} cannot be combined with another {name}: {got!r} and {value!r}")

    def drop(self, source: str, why: str) -> None:
        self.lines.append(f"{source}: not used ({why})")

    def take(self, section: str, name: str, value: Any) -> None:
        source = f"{name} {value!r}"
        if section == "" and name in PRESETS and isinstance(value, Mapping):
            self.drop(name, "a preset of that file: copy its settings into the sections above")
        elif section == "evaluation" and name == "batch_size":
            self.put("eval_batch_size", value, f"evaluation.{source}")
        elif section == "paths" or section.startswith("logging"):
            self.drop(f"{section}.{name}", "--out names the folder of a run, which holds its metrics")
        elif name in JOINT:
            self.joint[name] = value
        elif name in TABLE:
            self.read(TABLE[name], name, value, source)
        elif name in (*self.known, "name", "task", "settings"):
            if self.settings.setdefault(name, value) != value:
                raise ValueError(f"{name} cannot be combined with another: {self.settings[name]!r} and {value!r}")
        else:
            raise unknown("setting ", name, [*self.known, *TABLE, *JOINT])

    def read(self, reading: Reading, name: str, value: Any, source: str) -> None:
        if isinstance(reading, Replaced):
            self.refused.append(f"{name} is replaced by {reading.by}")
        elif isinstance(reading, Unused):
            if reading.only is not None and value not in reading.only:
                self.refused.append(f"{name} must be {reading.only[0]}: {reading.why}")
            self.drop(source, reading.why)
        else:
            self.put(reading.name, value if reading.value is None else reading.value(value), source, reading.note)


def translated(given: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings by our names, flat (a task as `task` and `settings`), and the lines that say how each was read.

    Args:
        given: settings of another implementation, or our own, flat or in sections.
        known: our settings by name.

    Raises:
        ValueError: for unknown names, naming the nearest, and for settings that something else replaces.
    """
    found = Translation(known)
    flattened = list(flat(given))
    for _, name, value in flattened:
        if name in NUMBERS and value is not None and type(value) not in (int, float):
            raise wrong(name, value, "a number")
    variant = next((value for _, name, value in flattened if name == "variant"), None)
    convex = any(name == "gate" and value == "convex" for _, name, value in flattened)
    given_length = {"seq_len", "max_length"} & {name for _, name, _ in flattened}
    for section, name, value in flattened:
        if name in ("max_seq_len", "context_length") and given_length:
            found.drop(f"{name} {value!r}", f"a model has no longest sequence; rows have {min(given_length)}")
        elif isinstance(variant, str) and name == {"mac": "window_size"}.get(variant.lower(), "segment_size"):
            found.drop(f"{name} {value!r}", f"{variant} does not use it")
        elif name == "gate_init_bias" and str(variant).lower() != "mag" and not convex:
            found.drop(f"{name} {value!r}", "it is of MAG, or of gate convex")
        else:
            found.take(section, name, value)
    names = {name for _, name, _ in flattened}
    _of_model(found, names, variant)
    _of_rows(found, names)
    _of_task(found)
    if found.joint:
        found.refused.append(f"{next(iter(found.joint))} needs num_samples and dataset; otherwise give steps")
    if found.refused:
        raise ValueError("; ".join(found.refused))
    return found.settings, found.lines


def _of_model(found: Translation, names: set[str], variant: Any) -> None:
    settings = found.settings
    if capital({"variant": variant}):
        settings["variant"] = variant.lower()
        if variant == "MAC" and "chunk_size" in names and "window" not in settings:
            chunk = settings["chunk_size"]
            found.put("window", chunk, f"chunk_size {chunk!r}", "chunk_size too: with MAC it is also the segment")
    width, heads = settings.get("d_model"), settings.get("n_heads")
    head = found.joint.pop("head_dim", None)
    if head is not None and (width is None or heads is None or head * heads != width):
        takes = f"hidden_dim / num_heads, here {width} / {heads}"
        raise wrong("head_dim", head, takes)
    if "initializer_range" in names:
        found.set_with("initializer_range", init="normal")
    if settings.get("d_hidden") is not None and ("memory_dim" in names or capital({"variant": variant})):
        settings.setdefault("mem_heads", 1)
    if "hidden_dim" not in names:
        return
    if "surprise_threshold" in settings and settings["surprise_threshold"] is not None:
        theirs = settings.pop("surprise_threshold")
        note = f"surprise_source prediction, whose error is a mean over {width} features here and a sum there"
        found.put("surprise_threshold", theirs / width, f"surprise_threshold {theirs!r}", note)
        found.set_with(f"surprise_threshold {theirs!r} beside hidden_dim", surprise_source="prediction")
        if "memory_loss_weight" not in settings:
            found.put("memory_loss_weight", 0.1, "surprise_threshold", "trains the predictor; 0.1 is the default there")
    if settings.get("variant") == "mag" and "gate" not in settings:
        found.put("gate", "convex", "variant MAG", "of hidden_dim's implementation")


def _of_rows(found: Translation, names: set[str]) -> None:
    """Learning rates that are given whole, and batches and lengths that are given in tokens."""
    settings, joint = found.settings, found.joint
    if "min_lr" in joint:
        least, most = joint.pop("min_lr"), settings.get("lr", found.known["lr"])
        found.put("min_lr_ratio", least / most, f"min_lr {least!r}", f"of lr {most!r}")
    length, batch = settings.get("seq_len"), settings.get("batch_size")
    if "max_seq_len" in names and batch is not None and length and batch >= length:
        if batch % length:
            raise wrong("batch_size", batch, f"a multiple of max_seq_len = {length} where it counts tokens")
        settings["batch_size"] = batch // length
        found.lines.append(f"batch_size {batch!r}: batch_size {batch // length} (in sequences; there in tokens)")
    if "train_tokens" in joint:
        tokens = joint.pop("train_tokens")
        if length is None or batch is None:
            found.refused.append("train_tokens needs batch_size and max_seq_len; otherwise give steps")
        else:
            step = settings["batch_size"] * length * settings.get("grad_accum", 1)
            found.put("steps", max(1, round(tokens / step)), f"train_tokens {tokens!r}", f"{step} tokens a step")
    if "stage2_steps" in joint:
        total = settings.get("core_steps", 0) + joint.pop("stage2_steps")
        found.put("steps", total, "stage1_steps and stage2_steps", "together; core_steps is the first stage")


def copy_of(length: int, symbols: int) -> tuple[str, dict, int, str]:
    payload = (length - 1) // 2
    note = "while it copies, a model is given the token before; a mark and a pause are two more ids"
    return "copy", {"payload": payload, "symbols": symbols - 1}, 2 * payload + 1, note


def patterns_of(length: int, symbols: int) -> tuple[str, dict, int, str]:
    settings = {"shortest_period": 2, "longest_period": 4, "symbols": symbols - 1}
    return "patterns", settings, length - 1, "a mark between the rounds is one more id"


def needle_of(length: int, symbols: int) -> tuple[str, dict, int, str]:
    settings = {"kind": "position", "hay": max(symbols - 2, 1)}
    return "needle", settings, length - 1, "asked is which of 8 sections holds the needle, not which token"


DATASETS = {
    **dict.fromkeys(("copy", "copy_task"), copy_of),
    **dict.fromkeys(("pattern", "patterns", "language_modeling"), patterns_of),
    **dict.fromkeys(("needle", "needle_haystack", "needle_in_haystack"), needle_of),
}


def _of_task(found: Translation) -> None:
    """dataset, num_samples, train_ratio, max_epochs: a task, its rows, and steps."""
    settings, joint = found.settings, found.joint
    name = joint.pop("dataset", None)
    if name is None:
        return
    if name not in DATASETS:
        found.refused.append(f"dataset {name} is replaced by data: a text file, or by a task: {', '.join(DATASETS)}")
        return
    length, symbols = settings.get("seq_len", found.known["seq_len"]), settings.get("vocab_size", 10)
    task, of_task, length, note = DATASETS[name](length, symbols)
    found.set_with(f"dataset {name!r}", task=task, settings=of_task)
    given = ", ".join(f"{key} {value}" for key, value in of_task.items())
    found.lines.append(f"dataset {name!r}: task {task!r} with {given}; seq_len {length} ({note})")
    from titans_pytorch.tasks.registry import build_task

    settings["seq_len"], ids = length, build_task(task, of_task | {"length": length}).vocab_size
    if ids != symbols:
        settings["vocab_size"] = ids
        found.lines.append(f"vocab_size {symbols!r}: vocab_size {ids} (the task's)")
    samples, share = joint.pop("num_samples", None), joint.pop("train_ratio", TRAIN_SHARE)
    if samples is None:
        return
    rows = int(samples * share)
    found.set_with(f"num_samples {samples!r}", test_rows=max(1, samples - rows))
    found.lines.append(f"num_samples {samples!r}: test_rows {settings['test_rows']} (training rows never repeat)")
    if "max_epochs" in joint:
        epochs, batch = joint.pop("max_epochs"), settings.get("batch_size", found.known["batch_size"])
        steps = epochs * -(-rows // batch)
        found.put("steps", steps, f"max_epochs {epochs!r}", f"of {rows} rows in batches of {batch}")


def log_readings(lines: list[str]) -> None:
    """Log how settings were read, one line each, as warnings: they are seen where no logging is set up."""
    for line in lines:
        logger.warning("%s", line)
