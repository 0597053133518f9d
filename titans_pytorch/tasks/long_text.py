"""Long contexts from any text file: next-byte prediction in long windows, and a passkey hidden in the text."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.common.checks import positive_int, wrong
from titans_pytorch.common.switches import evaluating
from titans_pytorch.tasks.task import Task, nothing_asked, pick
from titans_pytorch.training.config import DataConfig
from titans_pytorch.training.data import ByteData, load_data

__all__ = ["LongText", "PasskeyInText"]

SAYS = "\nThe pass key is {key}. Remember it: {key} is the pass key.\n"
ASKS = "\nWhat is the pass key? The pass key is "


def loaded(data: str, data_dir: str) -> ByteData:
    return load_data(DataConfig(data=data, data_dir=data_dir), say=lambda line: None)


@dataclass(frozen=True)
class LongText:
    """Long windows of a text.

    Args:
        data: a file, plain or packed; 'stdlib': the source of Python's own library.
        length: bytes of a window.
        data_dir: where unpacked copies are kept.

    Raises:
        ValueError: for a length that leaves no window.
    """

    data: str
    length: int = 4096
    data_dir: str = "data"
    vocab_size = 256

    def __post_init__(self):
        positive_int(self.length, "length")
        if len(self.text.held_out) <= self.length:
            raise wrong("length", self.length, f"less than the text's held-out part, {len(self.text.held_out)} bytes")

    @cached_property
    def text(self) -> ByteData:
        """The bytes of the text, loaded."""
        return loaded(self.data, self.data_dir)

    def windows(self, count: int) -> Tensor:
        """Return uint8 [count, length + 1], spread evenly over the held-out text: the same ones at every call."""
        held_out, span = self.text.held_out, self.length + 1
        room = len(held_out) - span
        starts = [round(i * room / max(1, count - 1)) for i in range(count)]
        return torch.stack([held_out[start : start + span] for start in starts])

    @torch.no_grad()
    def bits_by_position(self, model: nn.Module, windows: int = 8, parts: int = 8, device="cpu") -> list[float]:
        """Return mean bits per byte in equal parts of the windows. It falls along a window if a model uses its context.

        Args:
            model: ids [b n] -> logits [b n 256].
            windows: number of windows to read.
            parts: number of parts of a window.
            device: device of the model.
        """
        total = torch.zeros(self.length, dtype=torch.float64)
        with evaluating(model):
            for window in self.windows(windows).long():
                ids = window[None].to(device)
                loss = F.cross_entropy(model(ids[:, :-1])[0].float(), ids[0, 1:], reduction="none")
                total += loss.double().cpu() / windows / math.log(2)
        return [float(part.mean()) for part in total.tensor_split(parts)]


@dataclass(frozen=True)
class PasskeyInText(Task):
    """A sentence with a random number somewhere in a long piece of text, and the question for it at the end.

    Tokens are bytes. The answer is the digits, one after the other.
    """

    name = "text_passkey"
    data: str = field(default="stdlib", metadata={"help": "the text: a file (plain or packed), or 'stdlib'"})
    data_dir: str = field(default="data", metadata={"help": "where unpacked copies of texts are kept"})
    digits: int = field(default=5, metadata={"help": "digits of the passkey"})
    vocab_size = 256

    def __post_init__(self):
        positive_int(self.digits, "digits")
        if self.digits > positive_int(self.length, "length"):
            raise wrong("digits", self.digits, f"at most length = {self.length}")
        super().__post_init__()
        _ = self.text  # a text that cannot be loaded is an error now

    @cached_property
    def text(self) -> ByteData:
        """The bytes of the text, loaded."""
        return loaded(self.data, self.data_dir)

    @property
    def shortest(self) -> int:
        return len(SAYS.format(key="0" * self.digits)) + len(ASKS) + self.digits - 1

    @property
    def answer_ids(self) -> range:
        return range(ord("0"), ord("9") + 1)

    def row_at(self, index: int, length: int, held_out: bool) -> tuple[Tensor, Tensor]:
        self.text.check()
        rng, text = self._rng(index, length, held_out), self.text.held_out if held_out else self.text.train
        count = length - self.shortest
        if len(text) <= count:
            raise wrong("length", length, f"less than {len(text) + self.shortest} with this text")
        key = "".join(map(str, pick(rng, self.digits, 0, 10).tolist()))
        said, asked = (torch.tensor(list(words.encode())) for words in (SAYS.format(key=key), ASKS + key))
        start, at = int(pick(rng, 1, 0, len(text) - count + 1)), int(pick(rng, 1, 0, count + 1))
        around = text[start : start + count].long()
        stream = torch.cat((around[:at], said, around[at:], asked))
        targets = nothing_asked(length)
        targets[-self.digits :] = stream[-self.digits :]
        return stream[:-1], targets

    def solve(self, ids: list[int]) -> dict[int, int]:
        text = bytes(ids).decode("latin-1")
        said = re.escape(SAYS.format(key="KEY")).replace("KEY", "(\\d+)", 1).replace("KEY", "\\1")
        found = re.search(said, text)
        assert found is not None  # every row contains the key
        first = len(ids) - self.digits
        return {first + i: ord(digit) for i, digit in enumerate(found.group(1))}
