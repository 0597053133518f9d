"""Files that are whole or not there, and JSON that every reader takes."""

import json
import math
import os

import pytest

from titans_pytorch.common.files import appending, json_text, parse_json, read_json, replacing, write_json, write_text


def test_files_are_whole_or_not_there(tmp_path):
    target = tmp_path / "deep" / "result.json"
    write_json(target, {"nan": math.nan, "rows": ((1, math.inf), {"x": 0.5})})
    assert json.loads(target.read_text()) == {"nan": None, "rows": [[1, None], {"x": 0.5}]}
    for failure in (OSError("disk full"), KeyboardInterrupt()):

        def fail(failure=failure):
            with replacing(target) as part:
                part.write_text("half")
                raise failure

        with pytest.raises(type(failure)):
            fail()
        assert read_json(target)["nan"] is None
        assert [p.name for p in target.parent.iterdir()] == ["result.json"]


def test_a_full_disk_names_the_file(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")

    def fill():
        with replacing(tmp_path / "f"), open("/dev/full", "w") as full:
            full.write("x")

    with pytest.raises(OSError, match="No space left on device") as raised:
        fill()
    assert raised.value.filename == str(tmp_path / "f")


def test_the_permissions_are_those_of_a_new_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    write_text(tmp_path / "f", "x")
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_is_replaced_and_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("old")
    for name in ("f", "f.part"):
        (tmp_path / name).symlink_to(precious)
    write_text(tmp_path / "f", "new")
    assert precious.read_text() == "old"
    assert not (tmp_path / "f").is_symlink()
    assert (tmp_path / "f").read_text() == "new"
    (tmp_path / "log").symlink_to(precious)
    with pytest.raises(OSError, match="log"):
        appending(tmp_path / "log")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_and_devices_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(OSError, match="Not a regular file"):
            write_text(path, "x")
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "x")


@pytest.mark.parametrize(
    "text", ["NaN", '{"a": -Infinity}', '{"a": 1, "a": 2}', "[" * 200_000, "{", b"\xff\xfe\xfa", ""]
)
def test_what_is_not_json(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_json_comes_back():
    value = {"a": [1, 2.5, None, True, "\N{GREEK SMALL LETTER ALPHA}"], "b": {}}
    assert parse_json(json_text(value)) == value
