"""Traces of gates and pages, their picture, and calibrated thresholds."""

import pytest
import torch

from titans_pytorch import NeuralMemory, calibrate_page_threshold, gate_trace, plot_gate_trace

from .helpers import assert_close, randomise, refusal

DIM = 6
OPTIONS = {
    "plain": {"use_symplectic_gating": True},
    "dmd": {"use_dmd_gating": True},
    "both": {"use_symplectic_gating": True, "use_dmd_gating": True, "combine_symplectic_and_dmd": True},
    "kinetics": {"use_symplectic_gating": True, "kinetics_coupling": True, "kinetics_mix": 0.5},
    "views": {"use_symplectic_gating": True, "qkv_receives_diff_views": True},
    "quantile": {"use_symplectic_gating": True, "page_threshold_quantile": 0.5},
}
each = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def build(seed=0, **options):
    options = {"num_pages": 3, "page_switch_every": 4, "symplectic_page_threshold": 0.2, **options}
    torch.manual_seed(seed)
    return randomise(NeuralMemory(DIM, 2, **options).double(), seed, 0.2)


def sequence(memory, n, b=2):
    views = (3,) if memory.diff_views else ()
    return torch.randn(*views, b, n, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@each
def test_the_trace_is_what_a_call_does(options):
    memory = build(**options)
    seq = sequence(memory, 41)
    trace = gate_trace(memory, seq)
    assert int(memory.page_switch_events) == 0, "a trace is no use of the memory"
    _, state, (_, step) = memory(seq, return_surprises=True)
    written = (step.unflatten(-1, (-1, 2)) != 0).all(dim=-1)  # [b p m]
    assert torch.equal(written.long().argmax(dim=1), trace.page)
    assert torch.equal(trace.page[:, -1], state.active_page_indices)
    assert int(memory.page_switch_events) == int(trace.switched.sum()) > 0
    assert torch.equal(trace.switched, trace.switched & (trace.complexity > trace.limit))

    assert trace.complexity_tokens.shape == (2, 40)
    assert torch.equal(trace.complexity_tokens.unflatten(1, (-1, 2)).amax(dim=-1), trace.complexity)
    scales = [s for s in (memory.symplectic_complexity_scale, memory.dmd_complexity_scale) if s is not None]
    factor = 1 - sum(scales) / len(scales) * trace.complexity
    if "kinetics_mix" not in options:
        assert_close(trace.decay_after, trace.decay_before * factor.unsqueeze(1), 1e-12)
    else:
        assert (trace.decay_after < trace.decay_before * factor.unsqueeze(1)).all()
    counts = torch.stack([(trace.page == page).sum(dim=1) for page in range(3)], dim=1)
    assert_close(trace.occupancy, counts.double() / 20, 1e-12)
    assert trace.switch_rate == trace.switched.sum().item() / (2 * 10)


def test_a_trace_goes_on_from_a_state():
    memory = build(use_symplectic_gating=True)
    seq = sequence(memory, 41)
    whole = gate_trace(memory, seq)
    _, state = memory(seq[:, :15])
    rest = gate_trace(memory, seq[:, 15:], state)
    assert_close(rest.complexity, whole.complexity[:, 7:], 1e-12)
    assert torch.equal(rest.page, whole.page[:, 7:])
    assert torch.equal(rest.windows, whole.windows[7:])
    assert_close(rest.decay_after, whole.decay_after[..., 7:], 1e-12)


def test_a_trace_without_pages_or_without_a_gate():
    memory = build(num_pages=1, use_symplectic_gating=True)
    trace = gate_trace(memory, sequence(memory, 9))
    assert trace.pages == 1
    assert trace.page.tolist() == [[0] * 4] * 2
    assert trace.occupancy.tolist() == [[1.0]] * 2
    assert trace.switch_rate == 0
    memory = build(num_pages=1, kinetics_coupling=True, kinetics_mix=0.5)
    trace = gate_trace(memory, sequence(memory, 9))
    assert trace.complexity is None
    assert (trace.decay_after < trace.decay_before).all()


def rate_of(memory, seq):
    """From the counter of the memory itself."""
    memory.page_switch_events.zero_()
    memory(seq)
    return int(memory.page_switch_events) / (seq.shape[0] * 20)


@pytest.mark.parametrize("target", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["dmd"]], ids=["plain", "dmd"])
def test_a_calibrated_threshold_gives_the_rate(options, target):
    memory = build(**options)
    seq = torch.randn(4, 80, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before = memory.symplectic_page_threshold
    threshold = calibrate_page_threshold(memory, seq, target)
    assert memory.symplectic_page_threshold == before
    memory.symplectic_page_threshold = threshold
    assert abs(rate_of(memory, seq) - target) <= 0.5 / 80
    assert calibrate_page_threshold(memory, seq, 1 - target, set_threshold=True) == memory.symplectic_page_threshold
    assert abs(rate_of(memory, seq) - (1 - target)) <= 0.5 / 80
    assert abs(gate_trace(memory, seq).switch_rate - (1 - target)) <= 0.5 / 80


def test_calibration_counts_the_windows_of_a_call():
    memory = build(page_switch_every=None, batch_size=20, use_symplectic_gating=True)
    seq = sequence(memory, 80, b=5)
    calibrate_page_threshold(memory, seq, 0.5, set_threshold=True)
    memory(seq)
    assert int(memory.page_switch_events) == 10  # of five rows with four windows each


def test_calibration_where_all_is_alike():
    memory = build(use_symplectic_gating=True)
    seq = torch.ones(2, 40, DIM, dtype=torch.float64)
    calibrate_page_threshold(memory, seq, 0.0, set_threshold=True)
    assert rate_of(memory, seq) == 0
    calibrate_page_threshold(memory, seq, 1.0, set_threshold=True)
    assert gate_trace(memory, seq).switch_rate == 1


def test_a_picture(tmp_path):
    from matplotlib.image import imread

    memory = build(**OPTIONS["quantile"])
    trace = gate_trace(memory, sequence(memory, 60))
    path = plot_gate_trace(trace, tmp_path / "trace.png", row=1)
    assert path == tmp_path / "trace.png"
    assert [p.name for p in tmp_path.iterdir()] == ["trace.png"]
    image = imread(path)
    assert image.shape[0] > 300
    assert image[..., :3].std() > 0.05
    other = plot_gate_trace(trace, tmp_path / "other.png", row=0)
    assert not (imread(other) == image).all(), "the other row"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m, s: gate_trace(NeuralMemory(DIM), s), "memory"),
        (lambda m, s: gate_trace(torch.nn.Linear(2, 2), s), "memory"),
        (lambda m, s: gate_trace(m, s[:, :1]), "seq"),
        (lambda m, s: gate_trace(m, s[..., 1:]), "seq"),
        (lambda m, s: calibrate_page_threshold(m, s, 1.5), "target_switch_rate"),
        (lambda m, s: calibrate_page_threshold(build(num_pages=1, use_dmd_gating=True), s, 0.5), "memory"),
        (lambda m, s: calibrate_page_threshold(build(**OPTIONS["quantile"]), s, 0.5), "memory"),
        (lambda m, s: plot_gate_trace(gate_trace(m, s), "trace.png", row=2), "row"),
        (lambda m, s: plot_gate_trace(gate_trace(kinetics_only(), s), "trace.png"), "trace"),
    ],
)
def test_wrong_arguments_are_named(call, name):
    memory = build(use_symplectic_gating=True)
    with pytest.raises(ValueError, match=refusal(name)):
        call(memory, sequence(memory, 20))


def kinetics_only():
    return build(num_pages=1, kinetics_coupling=True, kinetics_mix=0.5)
