"""The surprise threshold by what it promises, and the auxiliary loss. (The rule law covers the numbers.)"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from titans_pytorch import MemoryAsContextTransformer, NeuralMemory, auxiliary_loss
from titans_pytorch.engines import chunkwise
from titans_pytorch.engines.chunkwise import stands_still as chunkwise_stands_still

from .helpers import assert_close, assert_same_tensors, gradients, randomise

DIM = 6


def build(chunk=1, **options):
    torch.manual_seed(0)
    return randomise(NeuralMemory(DIM, chunk, default_step_transform_max_lr=0.3, **options).double(), scale=0.2)


def tokens(n=24, b=1, seed=0):
    return torch.randn(b, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def carried(state):
    return {f"{i}.{k}": v for i, part in enumerate(state.states) for k, v in part.items()}


ENGINES = pytest.mark.parametrize("engine", ["auto", "dual", "matrix", "reference"])


@ENGINES
@pytest.mark.parametrize("source", ["memory", "prediction"])
def test_what_does_not_surprise_might_as_well_not_be_there(engine, source):
    """One token per chunk, one anchor: the memory is that of the surprising tokens alone."""
    memory, seq = build(engine=engine, surprise_source=source), tokens()
    _, _, surprises = memory(seq, return_surprises=True)
    surprise = surprises[0][0, 0] if source == "memory" else surprises[2][0]
    memory.surprise_threshold = surprise.median().item()
    above = surprise >= memory.surprise_threshold
    assert 8 < above.sum() < 16
    _, state, (_, step, *_) = memory(seq, return_surprises=True)
    assert torch.equal(step[0, 0] > 0, above)
    memory.surprise_threshold = None
    _, wanted = memory(seq[:, above])
    assert_same_tensors(carried(state), carried(wanted), 1e-12)


@ENGINES
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_threshold_that_nothing_reaches_or_everything(engine, chunk):
    """Above all surprise nothing moves to the last bit; at 0 everything is as without."""
    seq = tokens(b=2)
    plain, never = build(chunk, engine=engine), build(chunk, engine=engine, surprise_threshold=math.inf)
    always = build(chunk, engine=engine, surprise_threshold=0.0, batch_size=6)
    out, state, (_, step) = never(seq, return_surprises=True)
    assert (step == 0).all()
    assert_same_tensors(
        carried(state),
        {f"0.{k}": v for k, v in never.init_weights(2).items()}
        | {f"1.{k}": v for k, v in never.init_momentum(2).items()},
        0.0,
    )
    assert (plain(seq)[0] - out).abs().max() > 1e-3
    with_anchors = build(chunk, engine=engine, batch_size=6)
    assert_close(always(seq)[0], with_anchors(seq)[0], 1e-12)


@ENGINES
def test_what_is_not_a_number_is_not_skipped(engine):
    """It would hide in an unchanged memory."""
    seq = tokens()
    seq[:, 3] = float("nan")
    memory = build(surprise_threshold=0.1, engine=engine)
    assert memory(seq)[1].states[0]["norm.gamma"].isnan().any()


@pytest.mark.parametrize("source", ["memory", "prediction"])
def test_no_loop_over_tokens(source):
    """As many operations for 256 tokens as for 64, within one window."""

    class CountOps(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    memory = build(engine="dual", surprise_threshold=1.0, surprise_source=source)
    counts = []
    for n in (32, 64):
        with torch.no_grad(), CountOps() as ops:
            memory(tokens(n))
        counts.append(ops.count)
    assert counts[0] == counts[1] < 400


def test_the_predictor_learns_from_its_error_alone():
    """A rotation is learned, so that its tokens surprise no longer."""
    turn = torch.linalg.qr(tokens(DIM, seed=3)[0])[0]
    memory = build(surprise_source="prediction", pre_rmsnorm=False)
    seq = [tokens(1, 8)]
    for _ in range(20):
        seq.append(seq[-1] @ turn)
    seq = torch.cat(seq, dim=1).requires_grad_()
    leaves = dict(memory.named_parameters()) | {"seq": seq}
    out, _, surprises = memory(seq, return_surprises=True)
    reached = {name for name, grad in gradients([surprises[2]], leaves).items() if (grad != 0).any()}
    assert reached == {"predictor.predict.weight", "predictor.predict.bias"}
    assert not (gradients([out], leaves)["predictor.predict.weight"] != 0).any()
    before = surprises[2][:, 1:].mean().item()
    optimizer = torch.optim.Adam(memory.predictor.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        auxiliary_loss(memory(seq, return_surprises=True)[2]).backward()
        optimizer.step()
    after = memory(seq, return_surprises=True)[2][2][:, 1:].mean().item()
    assert after < 0.02 * before
    memory.surprise_threshold = before / 4
    _, _, (_, step, _) = memory(seq, return_surprises=True)
    assert (step[:, :, 1:] > 0).double().mean() < 0.05


def test_auxiliary_loss():
    memory, seq = build(2, heads=2, dim_head=3), tokens(9, b=3)
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) > 0.4
    _, _, (loss, step) = memory(seq, return_surprises=True, store_mask=mask)
    values = [loss[b, h, t] for b in range(3) for h in range(2) for t in range(8) if mask[b, t]]
    assert 10 < len(values) < 48
    got = auxiliary_loss((loss, step))
    assert_close(got, sum(values) / len(values), 1e-12)
    grads = gradients([got], dict(memory.named_parameters()))
    reached = {name for name, grad in grads.items() if (grad != 0).any()}
    assert {"projections.to_keys.weight", "projections.to_values.weight", "memory_model_parameters.1"} <= reached
    error = torch.tensor([[1.0, 3.0]]).double()
    assert_close(auxiliary_loss((loss, step, error)), got + 2.0, 1e-12)
    assert auxiliary_loss((loss, step * 0)) == 0
    _, _, nothing = memory(seq[:, :1], return_surprises=True)
    assert auxiliary_loss(nothing) == 0
    with pytest.raises(ValueError, match="^surprises must be .*, got Tensor"):
        auxiliary_loss(loss)


def test_the_transformer_adds_the_mean_over_its_memories():
    torch.manual_seed(0)
    model = MemoryAsContextTransformer(
        num_tokens=16,
        dim=16,
        depth=3,
        segment_len=8,
        heads=2,
        dim_head=8,
        neural_memory_layers=(1, 3),
        neural_memory_segment_len=4,
        neural_memory_kwargs={"surprise_source": "prediction"},
        memory_loss_weight=0.25,
    ).eval()
    ids = torch.randint(0, 16, (2, 25))
    seen = []
    for layer in (model.layers[0], model.layers[2]):
        layer.memory.register_forward_hook(lambda module, args, out: seen.append(auxiliary_loss(out[2])))
    plain, more = model(ids, return_loss=True), model(ids, return_loss=True, memory_loss_weight=0.5)
    assert_close(more, plain + 0.5 * (seen[0] + seen[1]) / 2, 1e-6)
    assert_close(model.train()(ids, return_loss=True), plain + 0.25 * (seen[0] + seen[1]) / 2, 1e-6)
    assert_close(model(ids, return_loss=True, memory_loss_weight=0.0), plain, 1e-6)
    assert model(ids).shape == (2, 25, 16)
    more.backward()
    assert all((layer.memory.predictor.predict.weight.grad != 0).any() for layer in (model.layers[0], model.layers[2]))
    with pytest.raises(ValueError, match=r"^memory_loss_weight needs return_loss=True"):
        model(ids, memory_loss_weight=0.5)
    with pytest.raises(ValueError, match="^memory_loss_weight must be a finite number of at least 0, got -1"):
        model(ids, return_loss=True, memory_loss_weight=-1)


class Own(torch.nn.Module):
    """A network without `with_vjp`: autograd gives its surprises."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(DIM, DIM) * 0.3)

    def forward(self, x):
        return torch.tanh(x @ self.w)

    def with_weights(self, x, weights):
        return torch.tanh(weights.matmul(x, "w"))


@pytest.mark.parametrize(
    "options",
    [
        {"engine": "dual"},
        {"engine": "matrix", "chunk": 2},
        {"engine": "dual", "momentum_order": 2, "max_grad_norm": 0.1},
        {"engine": "matrix", "spectral_norm_surprises": True, "chunk": 2},
        {"engine": "dual", "surprise_source": "prediction"},
        {"engine": "auto", "momentum": False, "per_parameter_lr_modulation": True},
        {"model": Own, "mem_model_norm_add_residual": False},
    ],
)
@torch.no_grad()
def test_gradients_that_no_pair_needs_are_not_taken(options, monkeypatch):
    """A mini-batch without a surprising token: outputs and state are those of taking its gradients, bit for bit."""
    made = {key: value() if isinstance(value, type) else value for key, value in options.items()}
    memory, seq = build(batch_size=6, heads=2, dim_head=DIM, **made), tokens(b=2)
    kept = []

    def watched(chunks, loss):
        kept.append(chunkwise_stands_still(chunks, loss))
        return kept[-1]

    def run(skips):
        state, outs = None, []
        monkeypatch.setattr(chunkwise, "stands_still", watched if skips else lambda chunks, loss: False)
        for piece, threshold in zip(seq.split(6, dim=1), (None, math.inf, math.inf, 0.0), strict=True):
            memory.surprise_threshold = threshold
            out, state = memory(piece, state=state)
            outs.append(out)
        return torch.cat(outs, dim=1), carried(state)

    (skipped, state), (taken, wanted) = run(True), run(False)
    assert kept == [False, True, True, False]
    assert skipped.equal(taken)
    assert all(state[name].equal(wanted[name]) for name in wanted)


def test_gradients_are_taken_where_training_needs_them():
    """With autograd on, the predictor and the keys get the same gradients whether or not anything surprises."""
    memory, seq = build(surprise_threshold=math.inf, batch_size=6), tokens()
    out, _, surprises = memory(seq, return_surprises=True)
    (out.sum() + surprises[0].sum()).backward()
    assert all(p.grad is not None for p in memory.parameters() if p.requires_grad)
