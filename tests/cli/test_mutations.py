"""Damaged configurations are taken or refused in one line, never with a traceback.

TITANS_MUTATIONS=1000 TITANS_MUTATION_SEED=3 pytest tests/cli/test_mutations.py tries others.
"""

import os

import pytest

from titans_pytorch.cli.main import main

from .mutations import damaged

COUNT = int(os.environ.get("TITANS_MUTATIONS", "60"))
SEED = int(os.environ.get("TITANS_MUTATION_SEED", "0"))
LONGEST = 1000  # characters of a message


def outcome(content: bytes, folder, capsys) -> int:
    """The exit status of `titans train --check`, after a look at what it said."""
    path = folder / "config.yaml"
    path.write_bytes(content)
    try:
        status = main(["train", "--config", str(path), "--out", str(folder / "run"), "--check"])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status in (0, 1, 2)
    assert (said.err == "") == (status == 0), said.err
    if status:
        assert said.err.count("\n") == 1, said.err
        assert len(said.err) < LONGEST, said.err
        assert "Error" not in said.err, said.err
    return status


@pytest.mark.parametrize("part", range(4))
def test_damaged_configurations_are_refused_in_a_line(part, tmp_path, capsys):
    seen = set()
    for number in range(part, COUNT, 4):
        seed = SEED * 1_000_003 + number
        try:
            seen.add(outcome(damaged(seed), tmp_path, capsys))
        except Exception as error:
            raise AssertionError(f"mutation {seed}:\n{damaged(seed)[:3000]!r}") from error
    assert seen <= {0, 1, 2}
    assert 1 in seen
