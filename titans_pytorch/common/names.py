"""Names that are not known, and the known name that was meant: of settings, options, keywords and commands."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

__all__ = ["UnknownKeyword", "known_keywords", "nearest", "unknown"]

F = TypeVar("F", bound=Callable[..., Any])

#: Words that other programs use for one thing. A name is looked for here before it is compared letter by letter.
SAME = [
    words.replace("_", "").split()
    for words in (
        "lr learning_rate max_lr step_size",
        "default_step_transform_max_lr max_step memory_lr inner_lr lr learning_rate",
        "steps max_steps num_steps iterations iters max_iters train_steps training_steps epochs max_epochs num_epochs",
        "batch_size batch bs train_batch_size per_device_train_batch_size mini_batch_size",
        "neural_memory_batch_size memory_batch mini_batch",
        "grad_accum gradient_accumulation_steps accumulate_grad_batches accumulation_steps",
        "seq_len length sequence_length context context_length block_size max_seq_len n_ctx max_position_embeddings",
        "chunk_size chunk_len chunk_length mem_chunk_size neural_memory_segment_len",
        "window segment_len segment_size segment window_size sliding_window attention_window",
        "d_model dim hidden_dim hidden_size width embed_dim embedding_dim n_embd model_dim",
        "n_layers depth num_layers layers num_hidden_layers n_layer",
        "n_heads heads num_heads num_attention_heads n_head",
        "mem_layers memory_layers memory_depth mem_depth",
        "mem_heads memory_heads num_memory_heads",
        "n_persistent num_persist_mem_tokens persistent_tokens num_persistent_tokens persistent_memory_size",
        "vocab_size num_tokens n_vocab vocabulary_size",
        "variant architecture arch model_type kind",
        "use_momentum momentum",
        "clip max_grad_norm grad_clip gradient_clip_val gradient_clipping clip_grad_norm",
        "warmup_steps warmup num_warmup_steps",
        "weight_decay wd",
        "precision dtype mixed_precision amp",
        "seed random_seed manual_seed random_state rng_seed",
        "threads num_threads n_threads nproc num_workers workers jobs cpus cores",
        "device accelerator gpu cuda",
        "out output output_dir out_dir save_dir run_dir",
        "output_json json",
        "output_png png",
        "data text file dataset corpus train_file data_path",
        "config settings config_file",
        "resume continue resume_from_checkpoint",
        "new_bytes length max_new_tokens num_tokens max_length max_tokens new_tokens n_tokens seq_len",
        "prompt text start prefix prime",
        "top_k topk",
        "top_p topp nucleus",
        "min_p minp",
        "temperature temp",
        "no_storing no_memory storing_off no_writes",
        "rows num_samples samples num_rows",
        "validate_every eval_every eval_interval eval_steps val_every",
        "checkpoint_every save_every save_steps save_interval",
        "quick fast smoke",
        "state past_state past_key_values cache mem_state",
    )
]


class UnknownKeyword(TypeError, ValueError):
    """A call with a keyword that the function does not take; a TypeError as Python's own."""


def unknown(what: str, name: Any, known: Iterable[str], where: str = "") -> ValueError:
    """Return the error for a name that is not among the `known`.

    Args:
        what: the kind of name, with a space behind it: "setting ".
        name: as it was given.
        known: the names that there are.
        where: what takes them, with a space before it: " of the copy task".
    """
    text = " ".join(str(name)[:60].split())
    return ValueError(f"unknown {what}{text}{where}{nearest(text, known)}")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "; the nearest is NAME", by meaning or else by letters; nothing where no name is near.

    Args:
        name: as it was given.
        known: the names that there are.
        cutoff: how alike the letters must be, 0 to 1.
    """
    plain = {plain_name(one): one for one in known}
    word = plain_name(name)
    same = [one for words in SAME if word in words for one in words if one in plain]
    close = [word] if word in plain else same or difflib.get_close_matches(word, plain, n=1, cutoff=cutoff)
    return f"; the nearest is {plain[close[0]]}" if close else ""


def plain_name(name: str) -> str:
    """Return `--Learning-Rate` and `training.learning_rate` as `learningrate`."""
    return name.rpartition(".")[2].replace("-", "").replace("_", "").lower()


def known_keywords(function: F) -> F:
    """Decorate a function, or a class for its constructor. Its calls refuse an unknown keyword and name the nearest,
    with an UnknownKeyword, which is both a TypeError and a ValueError.
    """
    if isinstance(function, type):
        function.__init__ = _checking(function.__init__, function.__name__)  # type: ignore[misc]
        return function
    return _checking(function, function.__qualname__)


def _checking(function: Any, called: str) -> Any:
    parameters = inspect.signature(function).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        raise TypeError(f"{called} takes every keyword")
    known = [name for name in parameters if name not in ("self", "cls")]

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in parameters:
                raise UnknownKeyword(unknown("argument ", name, known, f" of {called}"))
        return function(*args, **kwargs)

    return checked
