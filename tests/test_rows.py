"""Rows of different lengths: padding anywhere and packed texts give what each text gives alone."""

import pytest
import torch
from torch import nn

from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.analysis.overshoot import watch_gains
from titans_pytorch.engines.chunkwise import ChunkwiseEngine

from .helpers import ForeignModel, assert_close, assert_same_gradients, gradients, randomise, refusal

D, N = 6, 150

OPTIONS = {
    "exact": {},
    "momentum": {"momentum": True},
    "orders": {"momentum": True, "momentum_order": 2, "learned_momentum_combine": True},
    "pairs": {"num_kv_per_token": 2, "heads": 2, "dim_head": 3},
    "lookahead": {"num_kv_per_token": 2, "store_with_lookahead_value": True},
    "modulation": {"per_parameter_lr_modulation": True},
    "transition": {"gated_transition": True, "momentum": True},
    "prediction": {"surprise_threshold": 0.9, "surprise_source": "prediction"},
    "threshold": {"surprise_threshold": 0.05},
    "deep": {"model": MemoryMLP(D, 2), "mem_model_norm_add_residual": True, "momentum": True},
    "dual, deep": {"model": MemoryMLP(D, 2), "engine": "dual"},
    "spectral": {"spectral_norm_surprises": True, "default_step_transform_max_lr": 0.1},
    "sequential": {"engine": "sequential", "momentum": True},
    "dual": {"engine": "dual", "momentum": True},
    "matrix": {"engine": "matrix"},
    "foreign": {"model": ForeignModel(D), "momentum": True},
    "deltanet": {"preset": "deltanet"},
    "gated_deltanet": {"preset": "gated_deltanet"},
    "linear_attention": {"preset": "linear_attention"},
    "ttt_linear": {"preset": "ttt_linear", "segment": 1},
    "yaad": {"preset": "yaad", "segment": 1},
    "moneta": {"preset": "moneta", "segment": 1},
    "memora": {"preset": "memora", "segment": 1},
    "one mini-batch": {"batch_size": None, "momentum": True, "default_step_transform_max_lr": 0.1},
}
SHORT = ("threshold", "deep", "dual, deep", "spectral", "sequential", "dual", "matrix", "foreign")
SHORT += ("ttt_linear", "yaad", "moneta", "memora")  # loops over tokens
each = pytest.mark.parametrize("name", OPTIONS)


def built(name):
    torch.manual_seed(0)
    options = dict(OPTIONS[name])
    preset = options.pop("preset", None)
    memory = NeuralMemory.exact(D, **options) if preset is None else NeuralMemory.preset(preset, D, **options)
    return randomise(memory.double(), scale=0.2)


def texts(name, *lengths):
    generator = torch.Generator().manual_seed(1)
    scale = 6 if name in SHORT else 1
    return [torch.randn(-(-n // scale), D, generator=generator, dtype=torch.float64) for n in lengths]


def learned(memory, outs, seqs):
    """Gradients of the parameters and of each text, for the same random projection of what each text reads."""
    leaves = dict(memory.named_parameters()) | {f"text {i}": seq for i, seq in enumerate(seqs)}
    return gradients(outs, leaves)


def alone(memory, rows):
    rows = [row.clone().requires_grad_() for row in rows]
    results = [memory(row.unsqueeze(0), return_surprises=True) for row in rows]
    outs = [out[0] for out, _, _ in results]
    return outs, results, learned(memory, outs, rows)


def laid_out(rows, places, shape):
    """Texts at (row, positions) of a batch of NaN: [b n d], and where tokens are."""
    seq, mask = torch.full((*shape, D), float("nan"), dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
    for text, (row, at) in zip(rows, places, strict=True):
        seq, mask[row, at] = seq.index_put((torch.tensor(row), at), text), True
    return seq, mask


def places_of(kind, lengths, n):
    generator = torch.Generator().manual_seed(2)
    for row, length in enumerate(lengths):
        if kind == "right":
            yield row, torch.arange(length)
        elif kind == "left":
            yield row, torch.arange(n - length, n)
        else:
            yield row, torch.randperm(n, generator=generator)[:length].sort().values


@each
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_padding(name, kind):
    """Values, losses, carried state and gradients; also of what follows."""
    memory, rows = built(name), texts(name, 90, N, 1, 40)
    wanted, results, grads = alone(memory, rows)
    rows = [row.clone().requires_grad_() for row in rows]
    n = max(map(len, rows))
    places = list(places_of(kind, map(len, rows), n))
    seq, mask = laid_out(rows, places, (len(rows), n))
    out, state, (loss, step, *_) = memory(seq, token_mask=mask, return_surprises=True)
    assert (out[~mask] == 0).all()
    outs = [out[row, at] for row, at in places]
    for i, (row, at) in enumerate(places):
        assert_close(outs[i], wanted[i], 1e-9, f"text {i}")
        pairs = loss.shape[-1] // n
        for got, own in zip((loss, step), results[i][2], strict=False):
            got = got[row].unflatten(-1, (n, pairs))
            assert_close(got[:, at].flatten(1), own[0], 1e-9, "surprises")
            assert (got[:, ~mask[row]] == 0).all()
    assert_same_gradients(learned(memory, outs, rows), grads, 1e-8)
    after = texts(name, 20)[0].expand(len(rows), -1, -1)
    following = memory(after, state=state)[0]
    for i, (_, own, _) in enumerate(results):
        assert_close(following[i], memory(after[:1], state=own)[0][0], 1e-9, "what follows")


@each
@pytest.mark.parametrize("cuts", [(), (1, 30, 31, 77)])
def test_packed(name, cuts):
    """Two rows of several texts, some of one token, with padding between; in one call and in several."""
    memory, rows = built(name), texts(name, 40, 1, 80, 6, 90, 30)
    if memory.batch_size is None:
        return
    wanted, _, grads = alone(memory, rows)
    rows = [row.clone().requires_grad_() for row in rows]
    lengths, n = [len(row) for row in rows], max(sum(map(len, rows[:3])), sum(map(len, rows[3:]))) + 8
    places, resets = [], torch.zeros(2, n, dtype=torch.bool)
    for row, (first, *_), begin in ((0, (0,), 0), (1, (3,), 2)):
        for text in range(first, first + 3):
            places.append((row, torch.arange(begin, begin + lengths[text])))
            resets[row, begin] = True
            begin += lengths[text] + text % 2
    seq, mask = laid_out(rows, places, (2, n))
    edges, state, parts = [0, *(c for c in cuts if c < n), n], None, []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        piece = slice(start, stop)
        out, state = memory(seq[:, piece], state=state, token_mask=mask[:, piece], resets=resets[:, piece])
        parts.append(out)
    out = torch.cat(parts, dim=1)
    outs = [out[row, at] for row, at in places]
    for i in range(len(rows)):
        assert_close(outs[i], wanted[i], 1e-9, f"text {i}")
    assert_same_gradients(learned(memory, outs, rows), grads, 1e-8)


def test_bounds_of_texts():
    """cu_seqlens, of the flattened rows, are the same as a mask."""
    memory, seq = built("momentum"), torch.randn(2, 10, D, dtype=torch.float64)
    resets = torch.zeros(2, 10, dtype=torch.bool)
    resets[0, [0, 4]], resets[1, [0, 7]] = True, True
    wanted = memory(seq, resets=resets)[0]
    for kind in (torch.int32, torch.int64):
        assert memory(seq, resets=torch.tensor([0, 4, 10, 17, 20], dtype=kind))[0].equal(wanted)
    assert_close(wanted[1, 7:], memory(seq[1:, 7:])[0][0], 1e-12)


@pytest.mark.parametrize("bound", [-1, 21])
def test_bounds_beyond_the_rows(bound):
    with pytest.raises(ValueError, match=rf"^resets must be .+integers 0 .. 20, got the bound {bound}$"):
        built("exact")(torch.randn(2, 10, D, dtype=torch.float64), resets=torch.tensor([0, bound]))


def test_nothing_is_lost_without_them():
    """A mask of ones and resets at the first token change nothing; neither does the solve form go away."""
    memory, seq = built("momentum"), torch.randn(2, 70, D, dtype=torch.float64)
    ones, first = torch.ones(2, 70, dtype=torch.bool), torch.zeros(2, 70, dtype=torch.bool)
    first[:, 0] = True
    wanted, _ = memory(seq)
    assert_close(memory(seq, token_mask=ones)[0], wanted, 1e-12)
    assert_close(memory(seq, token_mask=ones, resets=first)[0], wanted, 1e-12)
    assert isinstance(memory.engine, ChunkwiseEngine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkwiseEngine, "window", None)
        memory(seq, resets=first)


def test_gains_are_those_of_each_text():
    memory, rows = built("exact"), texts("exact", 60, 60)
    apart = []
    for row in rows:
        with watch_gains(memory) as gains, torch.no_grad():
            memory(row.unsqueeze(0))
        apart.append(gains[""])
    resets = torch.zeros(1, 120, dtype=torch.bool)
    resets[0, 60] = True
    with watch_gains(memory) as gains, torch.no_grad():
        memory(torch.cat(rows).unsqueeze(0), resets=resets)
    assert gains[""] == pytest.approx(max(apart), rel=1e-9)


def packed_example(name):
    memory, seq = built(name), torch.randn(2, 12, D, dtype=torch.float64)
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) > 0.3
    resets = torch.zeros(2, 12, dtype=torch.bool)
    resets[0, 5], resets[1, [3, 8]] = True, True

    def read(seq, mask, resets):
        return memory(seq, token_mask=mask, resets=resets)[0]

    return memory, read, (seq, mask, resets)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["momentum", "transition", "prediction"])
def test_compiled(name):
    _, read, given = packed_example(name)
    assert_close(torch.compile(read, backend="aot_eager")(*given), read(*given), 1e-12)


@pytest.mark.parametrize("name", ["momentum", "transition", "prediction"])
def test_modes(name):
    """Checkpointed, under vmap and without gradients: the same."""
    memory, read, (seq, mask, resets) = packed_example(name)
    wanted = read(seq, mask, resets)
    with torch.inference_mode():
        assert_close(read(seq, mask, resets), wanted, 1e-12)
    assert_close(torch.utils.checkpoint.checkpoint(read, seq, mask, resets, use_reentrant=False), wanted, 1e-12)
    rows = torch.func.vmap(lambda *row: read(*(x.unsqueeze(0) for x in row))[0])(seq, mask, resets)
    assert_close(rows, wanted, 1e-12)
    half = memory.bfloat16()
    assert half(seq.bfloat16(), token_mask=mask, resets=resets)[0].isfinite().all()


MASK = torch.ones(2, 8, dtype=torch.bool)
REFUSED = [
    ({"chunk_size": 2, "batch_size": 2}, {"token_mask": MASK}, "token_mask needs a memory with chunk_size = 1"),
    ({"chunk_size": (2, 1)}, {"token_mask": MASK}, "token_mask needs a memory with chunk_size = 1"),
    ({"batch_size": 4}, {"token_mask": MASK}, "token_mask needs a memory with batch_size = 1, or None"),
    ({"batch_size": 4}, {"resets": MASK}, "resets needs a memory with batch_size = 1: "),
    ({"batch_size": None}, {"resets": MASK, "token_mask": MASK}, "resets needs a memory with batch_size = 1: "),
    ({}, {"resets": MASK, "ttt_batch_size": 2}, "resets needs a memory with batch_size = 1: "),
    ({"use_dmd_gating": True}, {"token_mask": MASK}, "token_mask cannot be combined with gates and pages"),
    ({"surprise_window": 2}, {"token_mask": MASK}, "token_mask cannot be combined with surprise_window"),
    ({}, {"token_mask": MASK[:1]}, r"token_mask must be a bool tensor of shape \(2, 8\), got"),
    ({}, {"token_mask": MASK.float()}, "token_mask must be"),
    ({}, {"resets": MASK[:, :3]}, "resets must be a bool tensor"),
    ({}, {"resets": torch.tensor([0.0, 8.0])}, "resets must be"),
    ({}, {"resets": [0, 8]}, "resets must be a bool tensor .* got list"),
]


@pytest.mark.parametrize(("changes", "given", "message"), REFUSED)
def test_what_needs_common_boundaries_refuses(changes, given, message):
    memory = NeuralMemory.exact(D, **changes)
    with pytest.raises(ValueError, match=message):
        memory(torch.randn(2, 8, D), **given)


def test_resets_and_an_earlier_layer():
    memory = NeuralMemory.exact(D, accept_weight_residual=True, activation=nn.SiLU())
    seq = torch.randn(2, 8, D)
    updates = NeuralMemory.exact(D)(seq)[1].updates
    assert memory(seq, prev_weights=updates, token_mask=MASK)[0].isfinite().all()
    with pytest.raises(ValueError, match=refusal("resets")):
        memory(seq, prev_weights=updates, resets=MASK)
