import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import random
import shutil
import zipfile
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titans_pytorch.training import data as data_module
from titans_pytorch.training.config import DataConfig
from titans_pytorch.training.data import Windows, load_data
from titans_pytorch.training.download import Unreachable
from titans_pytorch.training.errors import TrainingError

TEXT = bytes(range(256)) * 8


def load(tmp_path, source, **settings):
    return load_data(DataConfig(data=str(source), data_dir=str(tmp_path / "data"), **settings))


def joined(found):
    return bytes(found.train.tolist()) + bytes(found.held_out.tolist())


def test_the_end_is_held_out(tmp_path):
    (tmp_path / "f").write_bytes(TEXT)
    found = load(tmp_path, tmp_path / "f")
    assert joined(found) == TEXT
    assert len(found.held_out) == int(len(TEXT) * 0.05)
    assert found.sha256 == hashlib.sha256(TEXT).hexdigest()


def test_a_limit_uses_the_first_bytes(tmp_path):
    (tmp_path / "f").write_bytes(TEXT)
    found = load(tmp_path, tmp_path / "f", data_limit=1000, held_out=0.1)
    assert joined(found) == TEXT[:1000]
    assert (len(found.held_out), found.file_bytes) == (100, len(TEXT))
    assert found.sha256 == hashlib.sha256(TEXT[:1000]).hexdigest()


def pack(path, content=TEXT):
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    if path.suffix in packers:
        path.write_bytes(packers[path.suffix](content))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("text", content)
    return path


def cached(tmp_path):
    return [p for p in (tmp_path / "data").rglob("*") if p.is_file()]


SUFFIXES = ["gz", "bz2", "xz", "zip"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_packed_files(tmp_path, suffix):
    path = pack(tmp_path / f"f.{suffix}")
    assert joined(load(tmp_path, path)) == TEXT
    assert joined(load(tmp_path, path)) == TEXT  # from the cache
    pack(path, TEXT[::-1])
    assert joined(load(tmp_path, path)) == TEXT[::-1]  # another content is not taken from the cache


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_packed_file_that_is_cut_off(tmp_path, suffix):
    path = pack(tmp_path / f"f.{suffix}")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TrainingError, match=rf"f\.{suffix} cannot be unpacked"):
        load(tmp_path, path)
    assert cached(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_archives_give_one_error(tmp_path, suffix):
    """Whatever byte is wrong: the same text, or a TrainingError."""
    path, rng = pack(tmp_path / f"f.{suffix}", bytes(random.Random(0).choices(b"abcdef", k=600))), random.Random(1)
    whole = path.read_bytes()
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        with contextlib.suppress(TrainingError):  # and no other error
            load(tmp_path, path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_is_unpacked_no_further_than_the_limit(tmp_path, suffix):
    path = pack(tmp_path / f"f.{suffix}", TEXT + bytes(20_000_000))
    assert path.stat().st_size < 50_000
    assert joined(load(tmp_path, path, data_limit=1000)) == TEXT[:1000]
    assert [p.stat().st_size for p in cached(tmp_path)] == [1000]
    assert len(joined(load(tmp_path, path, data_limit=1500))) == 1500


def test_an_archive_of_more_than_the_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "LARGEST_UNPACKED", len(TEXT) - 1)
    with pytest.raises(TrainingError, match="f.gz holds more than 2,047 bytes; set data_limit to take the first"):
        load(tmp_path, pack(tmp_path / "f.gz"))
    assert cached(tmp_path) == []


def test_an_archive_for_which_the_disk_has_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(TrainingError, match="the disk of .*cache has no room for .*f.zip unpacked"):
        load(tmp_path, pack(tmp_path / "f.zip"))
    assert cached(tmp_path) == []


def test_an_encrypted_zip(tmp_path):
    path = pack(tmp_path / "f.zip")
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(TrainingError, match="f.zip is encrypted"):
        load(tmp_path, path)


@pytest.mark.parametrize("name", ["f.tar", "f.tar.gz", "f.tgz", "f.7z", "f.zst"])
def test_archives_that_are_not_read(tmp_path, name):
    (tmp_path / name).write_bytes(TEXT)
    with pytest.raises(TrainingError, match="data must be a plain file, .gz, .bz2, .xz or a .zip of one file, got "):
        load(tmp_path, tmp_path / name)


def test_a_file_that_is_written_to_is_seen(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(TEXT)
    found = load(tmp_path, path)
    found.check()
    os.replace(pack(tmp_path / "g.gz"), path)  # another file under the name: the bytes read stay
    found.check()
    assert joined(found) == TEXT
    found = load(tmp_path, path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(TrainingError, match="f has changed since the run began"):
        found.check()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "f")
    with pytest.raises(TrainingError, match="is not a file"):
        load(tmp_path, tmp_path / "f")


def test_a_zip_of_two_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "f.zip", "w") as archive:
        archive.writestr("a", TEXT)
        archive.writestr("b", TEXT)
    with pytest.raises(TrainingError, match="must be a .zip of one file"):
        load(tmp_path, tmp_path / "f.zip")


@pytest.mark.parametrize("content", [b"", b"x", b"xy"])
def test_files_too_small(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(TrainingError, match=f"has {len(content)} bytes, too few"):
        load(tmp_path, tmp_path / "f")


def test_no_file(tmp_path):
    with pytest.raises(TrainingError, match="nowhere does not exist"):
        load(tmp_path, tmp_path / "nowhere")
    with pytest.raises(TrainingError, match="is not a file"):
        load(tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["enwik8", "enwik8.gz", "enwik8.bz2", "enwik8.zip"])
def test_auto_takes_what_is_there(tmp_path, name, monkeypatch):
    monkeypatch.setattr(data_module, "download_enwik8", lambda target: pytest.fail("no download is needed"))
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / name
    if path.suffix:
        pack(path)
    else:
        path.write_bytes(TEXT)
    assert joined(load(tmp_path, "auto")) == TEXT


def test_auto_downloads(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "download_enwik8", pack)
    (tmp_path / "data").mkdir()
    assert joined(load(tmp_path, "auto")) == TEXT


def test_auto_without_a_network_takes_the_standard_library(tmp_path, monkeypatch):
    def unreachable(target):
        raise Unreachable("no route")

    monkeypatch.setattr(data_module, "download_enwik8", unreachable)
    said = []
    found = load_data(DataConfig(data_dir=str(tmp_path)), said.append)
    assert len(said) == 1
    assert "no route" in said[0]
    text = joined(found)
    assert b"def namedtuple(" in text
    assert b"class OrderedDict" in text
    assert "standard library" in found.name
    assert load_data(DataConfig(data="stdlib", data_dir=str(tmp_path))).sha256 == found.sha256


@given(n=st.integers(12, 200), seq_len=st.integers(1, 11), seed=st.integers(0, 9), size=st.integers(1, 5))
def test_windows_visit_each_place_once_in_an_epoch(n, seq_len, seed, size):
    data = torch.arange(n).to(torch.uint8)
    windows = Windows(data, seq_len, seed)
    rows = torch.cat([windows.batch(i, 1) for i in range(windows.per_epoch)])
    assert torch.equal(rows, rows[:, :1] + torch.arange(seq_len + 1))  # contiguous, so within the data
    predicted = rows[:, 1:].flatten().tolist()
    assert len(set(predicted)) == len(predicted) > (n - 1) - 2 * seq_len
    position = 3 * windows.per_epoch - 2
    again = Windows(data, seq_len, seed)  # the same windows without what came before
    assert torch.equal(windows.batch(position, size), again.batch(position, size))


def test_windows_differ_by_seed_and_epoch():
    data = torch.arange(256).to(torch.uint8).repeat(4)
    one = Windows(data, 4, seed=0)
    first = one.batch(0, one.per_epoch)
    assert not torch.equal(first, one.batch(one.per_epoch, one.per_epoch))
    assert not torch.equal(first, Windows(data, 4, seed=1).batch(0, one.per_epoch))


def test_too_few_bytes_for_a_window():
    with pytest.raises(TrainingError, match=r"at least seq_len \+ 1 = 11 bytes to train on, got 9"):
        Windows(torch.zeros(9, dtype=torch.uint8), 10, 0)
