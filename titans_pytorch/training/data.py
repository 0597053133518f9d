"""Training data: finds, unpacks and memory-maps bytes, and splits them into a training and a held-out part."""

import bz2
import gzip
import lzma
import os
import platform
import shutil
import struct
import sysconfig
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor

from titans_pytorch.common.files import replacing
from titans_pytorch.training.checkpoint import sha256_of
from titans_pytorch.training.config import DataConfig
from titans_pytorch.training.download import Unreachable, download_enwik8
from titans_pytorch.training.errors import TrainingError

__all__ = ["ByteData", "Windows", "load_data", "load_text"]

ARCHIVES = (".gz", ".bz2", ".xz", ".zip")
OPEN: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
OTHER_ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tbz2", ".txz", ".zst", ".7z", ".rar")
UNREADABLE = (  # errors of a broken archive; a wrong offset in a .zip is an OSError
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    ValueError,
)
LARGEST_UNPACKED = 1_000_000_000  # bytes, ten times enwik8
TOO_LARGE = {"data": "set data_limit to take the first", "text": "unpack it first"}
DISK_RESERVE = 16 << 20  # bytes of the disk that unpacking leaves free
NOT_OF_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


@dataclass(frozen=True)
class ByteData:
    """`train` and `held_out` are uint8 [bytes]; `train` is a view of a memory-mapped file."""

    name: str
    path: Path | None  # the file that is mapped
    sha256: str  # of the bytes used: train and held out together
    file_bytes: int
    train: Tensor
    held_out: Tensor
    file: BinaryIO | None = None  # the same file, open
    mark: tuple[int, ...] = ()  # of the file when it was read

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            "sha256": self.sha256,
            "file_bytes": self.file_bytes,
            "train_bytes": len(self.train),
            "held_out_bytes": len(self.held_out),
        }

    def check(self) -> None:
        """Raise TrainingError if the file was written to since it was read. Another file under its name does not
        matter.
        """
        if self.file is not None and self.mark != mark_of(self.file):
            raise TrainingError(f"data: {self.path} has changed since the run began")


def mark_of(file: BinaryIO) -> tuple[int, ...]:
    """Return the size and the time of the last write, which change with the file."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def load_data(config: DataConfig, say: Callable[[str], None] = print) -> ByteData:
    """Load the bytes that `config.data` names. `say` is called with a line that names the choice of `auto`."""
    name, path = find(config, say)
    file = path.open("rb")
    mark = mark_of(file)
    size = mark[0]
    used = min(size, config.data_limit) if config.data_limit else size
    held_out = int(used * config.held_out)
    if held_out < 2 or used - held_out < 2:
        raise TrainingError(
            f"data: {name} has {used} bytes, too few to hold out {config.held_out:.0%} and train on the rest"
        )
    mapped = torch.from_file(str(path), shared=False, size=used, dtype=torch.uint8)
    split = used - held_out
    sha256 = sha256_of(path, used)
    found = ByteData(name, path, sha256, size, mapped[:split], mapped[split:].clone(), file, mark)
    found.check()
    return found


def load_text(file: str, limit: int = 0) -> Tensor:
    """Load all bytes of a file, plain or an archive, as uint8 [bytes]; with a limit the first so many."""
    path = plain(Path(file), DataConfig(data=file, data_limit=limit), "text")
    used = min(path.stat().st_size, limit or path.stat().st_size)
    if not used:
        raise TrainingError(f"text: {file} is empty")
    return torch.from_file(str(path), shared=False, size=used, dtype=torch.uint8)


def find(config: DataConfig, say: Callable[[str], None]) -> tuple[str, Path]:
    """Return (a name for the reader, a plain file)."""
    folder = Path(config.data_dir)
    if config.data == "stdlib":
        return standard_library(folder)
    if config.data != "auto":
        return config.data, plain(Path(config.data), config)
    for name in ("enwik8", *(f"enwik8{suffix}" for suffix in ARCHIVES)):
        if (folder / name).is_file():
            return str(folder / name), plain(folder / name, config)
    try:
        return "enwik8", plain(download_enwik8(folder / "enwik8.zip"), config)
    except Unreachable as why:
        say(
            f"data: no {folder / 'enwik8'} and no download ({why}); taking the source text of Python's standard library"
        )
        return standard_library(folder)


def plain(path: Path, config: DataConfig, name: str = "data") -> Path:
    """Return `path` itself, or the file of an archive's unpacked bytes (those that are used) under `data_dir`.

    name: the option that gave the path, for messages.
    """
    if not path.exists():
        raise TrainingError(f"{name}: {path} does not exist")
    if not path.is_file():
        raise TrainingError(f"{name}: {path} is not a file")
    lower = path.name.lower()
    if lower.endswith(OTHER_ARCHIVES):
        raise TrainingError(f"{name} must be a plain file, .gz, .bz2, .xz or a .zip of one file, got {path}")
    if not lower.endswith(ARCHIVES):
        return path
    target = Path(config.data_dir) / "cache" / f"{path.stem}-{sha256_of(path)[:12]}"
    if target.is_file():
        return target
    if config.data_limit:
        target = target.with_name(f"{target.name}-first-{config.data_limit}")
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            unpack(path, part, config.data_limit, name)
    return target


def unpack(path: Path, part: Path, limit: int, name: str = "data") -> None:
    """Write the first `limit` bytes of an archive to `part`; with 0 all, up to `LARGEST_UNPACKED`. TrainingError if
    there are more, if the disk has no room for them, or if they cannot be unpacked.
    """
    most, done = limit or LARGEST_UNPACKED, 0
    with part.open("wb") as out:
        for block in blocks(path, name):
            if not limit and done + len(block) > most:
                raise TrainingError(f"{name}: {path} holds more than {most:,} bytes; {TOO_LARGE[name]}")
            block = block[: most - done]
            if shutil.disk_usage(part.parent).free < len(block) + DISK_RESERVE:
                raise TrainingError(f"{name}: the disk of {part.parent} has no room for {path} unpacked")
            out.write(block)
            done += len(block)
            if limit and done == most:
                return


def blocks(path: Path, name: str = "data") -> Iterator[bytes]:
    """Yield the bytes in an archive, block by block. TrainingError if they cannot be unpacked."""
    try:
        with opened(path, name) as source:
            while block := source.read(1 << 20):
                yield block
    except UNREADABLE as error:
        raise TrainingError(f"{name}: {path} cannot be unpacked ({' '.join(str(error).split())})") from error


@contextmanager
def opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    suffix = path.suffix.lower()
    if suffix != ".zip":
        with OPEN[suffix](path) as source:
            yield source
        return
    with zipfile.ZipFile(path) as archive:
        files = [entry for entry in archive.infolist() if not entry.is_dir()]
        if len(files) != 1:
            raise TrainingError(f"{name} must be a .zip of one file, {path} holds {len(files)}")
        if files[0].flag_bits & 1:
            raise TrainingError(f"{name}: {path} is encrypted")
        with archive.open(files[0]) as source:
            yield source


def standard_library(folder: Path) -> tuple[str, Path]:
    """The .py files of this Python's standard library, without tests and idlelib, sorted by path, one after another."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path for path in root.rglob("*.py") if not NOT_OF_THE_LIBRARY.intersection(path.relative_to(root).parts[:-1])
    )
    if not files:
        raise TrainingError(f"data: no source text under {root}; give a file with --data")
    version = platform.python_version()
    target = folder / "cache" / f"stdlib-{version}"
    with replacing(target) as part, part.open("wb") as out:
        for path in files:
            out.write(path.read_bytes())
    return f"source text of Python {version}'s standard library ({len(files)} files)", target


class Windows:
    """The order of training windows, each n + 1 bytes: a function of the seed and of the number of windows before.

    Every epoch lays windows side by side from a random offset (each starts on the byte that the one before ends on, so
    that every byte is predicted once) and visits them in a random order. Nothing but the position needs to be saved.
    """

    def __init__(self, data: Tensor, seq_len: int, seed: int):
        if len(data) < seq_len + 1:
            raise TrainingError(
                f"data must have at least seq_len + 1 = {seq_len + 1} bytes to train on, got {len(data)}"
            )
        self.data, self.seq_len, self.seed = data, seq_len, seed
        self.per_epoch = max(1, (len(data) - 1) // seq_len - 1)
        self.epoch = -1
        self.starts = torch.empty(0, dtype=torch.long)

    def shuffle(self, epoch: int) -> None:
        rng = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
        room = len(self.data) - 1 - self.per_epoch * self.seq_len
        offset = int(torch.randint(room + 1, (1,), generator=rng))
        self.starts = torch.randperm(self.per_epoch, generator=rng) * self.seq_len + offset
        self.epoch = epoch

    def batch(self, position: int, size: int) -> Tensor:
        """Return windows `position` to `position + size` of the endless sequence of epochs: int64 [size seq_len +
        1].
        """
        rows = []
        for index in range(position, position + size):
            epoch, place = divmod(index, self.per_epoch)
            if epoch != self.epoch:
                self.shuffle(epoch)
            start = int(self.starts[place])
            rows.append(self.data[start : start + self.seq_len + 1])
        return torch.stack(rows).long()
