"""CPU threads: one rule for every program, and none for who only imports the package."""

import subprocess
import sys

import pytest
import torch

from titans_pytorch.cli.main import main
from titans_pytorch.common import threads
from titans_pytorch.common.threads import NARROW, choose_threads

OWN = 3  # as if torch had chosen it


@pytest.fixture(autouse=True)
def own_choice(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(OWN)
    threads._choice_of_torch.cache_clear()
    yield
    threads._choice_of_torch.cache_clear()
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("asked", "width", "found"),
    [(0, NARROW - 1, 1), (None, 64, 1), (0, NARROW, OWN), (0, None, OWN), (2, 64, 2), (2, 4 * NARROW, 2)],
)
def test_the_rule(asked, width, found):
    assert choose_threads(asked, width) == torch.get_num_threads() == found


def test_a_narrow_model_does_not_decide_for_the_next():
    assert [choose_threads(0, width) for width in (16, 1024, 16)] == [1, OWN, 1]


def test_the_environment_decides(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads(0, 16) == OWN
    assert choose_threads(1, 16) == 1


def test_the_package_leaves_the_number_alone():
    code = f"""
import torch
torch.set_num_threads({OWN})
import titans_pytorch as t
for name in t.__all__:
    getattr(t, name)
model = t.build_model(t.TitansConfig.tiny())
model(torch.zeros(1, 9).long(), return_loss=True).backward()
t.MemoryAsContextTransformer(num_tokens=8, dim=8, depth=1, segment_len=4)(torch.zeros(1, 9).long())
t.NeuralMemory(8)(torch.randn(1, 4, 8))
assert torch.get_num_threads() == {OWN}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


TINY = """
model: {d_model: 16, n_layers: 1, n_heads: 2, mem_heads: 2, mem_layers: 1, n_persistent: 2, window: 8, chunk_size: 4}
data: {data: FILE, data_limit: 3000}
training: {steps: 1, batch_size: 4, seq_len: 24, device: cpu, validate_every: 0}
report: {sample_len: 4, prime_len: 4}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").write_bytes(b"memory learns at test time " * 100)
    (folder / "tiny.yaml").write_text(TINY.replace("FILE", str(folder / "text")))
    assert main(["train", "--config", str(folder / "tiny.yaml"), "--out", str(folder / "run")]) == 0
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--config", "CONFIG", "--out", "OUT"],
        ["search", "--config", "CONFIG", "--grid", "lr=1e-3", "--out", "OUT"],
        ["sample", "RUN", "--new-bytes", "2"],
        ["eval", "RUN", "--limit", "40"],
        ["analyze", "RUN", "--length", "8", "--out", "OUT"],
        ["memory-check", "RUN", "--rows", "2", "--length", "8"],
    ],
    ids=lambda words: words[0],
)
def test_every_command(words, run, tmp_path):
    places = {"CONFIG": str(run / "tiny.yaml"), "RUN": str(run / "run")}
    for number, (more, found) in enumerate([([], 1), (["--threads", "2"], 2)]):
        torch.set_num_threads(OWN)
        given = [{**places, "OUT": str(tmp_path / str(number))}.get(word, word) for word in words]
        assert main([*given, *more]) == 0
        assert torch.get_num_threads() == found
