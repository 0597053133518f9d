"""Bytes to learn from: found, unpacked, memory-mapped, and split into a training and a held-out part."""

import gzip
import hashlib
import lzma
import os
import platform
import shutil
import sysconfig
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from titans_pytorch.training.config import DataConfig
from titans_pytorch.training.download import Unreachable, download_enwik8
from titans_pytorch.training.errors import TrainingError

__all__ = ["ByteData", "Windows", "load_data"]

NOT_OF_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


@dataclass(frozen=True)
class ByteData:
    """`train` and `held_out` are uint8 [bytes], views of a memory-mapped file."""

    name: str
    path: Path
    sha256: str  # of the bytes used: train and held out together
    file_bytes: int
    train: Tensor
    held_out: Tensor

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            "sha256": self.sha256,
            "file_bytes": self.file_bytes,
            "train_bytes": len(self.train),
            "held_out_bytes": len(self.held_out),
        }


def load_data(config: DataConfig, say: Callable[[str], None] = print) -> ByteData:
    """The bytes that `config.data` names. `say` gets a line where the user should know what was chosen."""
    name, path = find(config, say)
    size = path.stat().st_size
    used = min(size, config.data_limit) if config.data_limit else size
    held_out = int(used * config.held_out)
    if held_out < 2 or used - held_out < 2:
        raise TrainingError(
            f"data: {name} has {used} bytes, too few to hold out {config.held_out:.0%} and train on the rest"
        )
    mapped = torch.from_file(str(path), shared=False, size=used, dtype=torch.uint8)
    split = used - held_out
    return ByteData(name, path, sha256_of(path, used), size, mapped[:split], mapped[split:])


def find(config: DataConfig, say: Callable[[str], None]) -> tuple[str, Path]:
    """(a name for the reader, a plain file)."""
    folder = Path(config.data_dir)
    if config.data == "stdlib":
        return standard_library(folder)
    if config.data != "auto":
        return config.data, plain(Path(config.data), folder)
    for name in ("enwik8", "enwik8.gz", "enwik8.zip"):
        if (folder / name).is_file():
            return str(folder / name), plain(folder / name, folder)
    try:
        return "enwik8", plain(download_enwik8(folder / "enwik8.zip"), folder)
    except Unreachable as why:
        say(
            f"data: no {folder / 'enwik8'} and no download ({why}); taking the source text of Python's standard library"
        )
        return standard_library(folder)


def plain(path: Path, folder: Path) -> Path:
    """`path` itself, or for .gz and .zip an unpacked copy in the cache under `folder`."""
    if not path.exists():
        raise TrainingError(f"data: {path} does not exist")
    if not path.is_file():
        raise TrainingError(f"data: {path} is not a file")
    if path.suffix not in (".gz", ".zip"):
        return path
    target = folder / "cache" / f"{path.stem}-{sha256_of(path)[:12]}"
    if not target.is_file():
        try:
            with unpacked(path) as source, written_whole(target) as out:
                shutil.copyfileobj(source, out, 1 << 20)
        except (
            EOFError,
            zlib.error,
            lzma.LZMAError,
            gzip.BadGzipFile,
            zipfile.BadZipFile,
            NotImplementedError,
        ) as error:
            raise TrainingError(f"data: {path} cannot be unpacked ({error})") from error
    return target


@contextmanager
def unpacked(path: Path) -> Iterator[BinaryIO]:
    if path.suffix == ".gz":
        with gzip.open(path) as source:
            yield source
        return
    with zipfile.ZipFile(path) as archive:
        files = [entry for entry in archive.infolist() if not entry.is_dir()]
        if len(files) != 1:
            raise TrainingError(f"data must be a .zip of one file, {path} holds {len(files)}")
        with archive.open(files[0]) as source:
            yield source


@contextmanager
def written_whole(target: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as out:
            yield out
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


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
    with written_whole(target) as out:
        for path in files:
            out.write(path.read_bytes())
    return f"source text of Python {version}'s standard library ({len(files)} files)", target


def sha256_of(path: Path, size: int | None = None) -> str:
    """Of the first `size` bytes (all by default)."""
    digest = hashlib.sha256()
    left = path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


class Windows:
    """Which windows of n + 1 bytes make up each batch, as a function of the seed and the number of windows before.

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
        """Windows `position` to `position + size` of the endless sequence of epochs: int64 [size seq_len + 1]."""
        rows = []
        for index in range(position, position + size):
            epoch, place = divmod(index, self.per_epoch)
            if epoch != self.epoch:
                self.shuffle(epoch)
            start = int(self.starts[place])
            rows.append(self.data[start : start + self.seq_len + 1])
        return torch.stack(rows).long()
