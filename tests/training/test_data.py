import gzip
import hashlib
import zipfile

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
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("text", content)
    return path


@pytest.mark.parametrize("suffix", ["gz", "zip"])
def test_packed_files(tmp_path, suffix):
    path = pack(tmp_path / f"f.{suffix}")
    assert joined(load(tmp_path, path)) == TEXT
    assert joined(load(tmp_path, path)) == TEXT  # from the cache
    pack(path, TEXT[::-1])
    assert joined(load(tmp_path, path)) == TEXT[::-1]  # another content is not taken from the cache


@pytest.mark.parametrize("suffix", ["gz", "zip"])
def test_a_packed_file_that_is_cut_off(tmp_path, suffix):
    path = pack(tmp_path / f"f.{suffix}")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(TrainingError, match=rf"f\.{suffix} cannot be unpacked"):
        load(tmp_path, path)
    assert [p for p in (tmp_path / "data").rglob("*") if p.is_file()] == []


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


@pytest.mark.parametrize("name", ["enwik8", "enwik8.gz", "enwik8.zip"])
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
