"""Every rule that has a name, against a plain loop over its tokens: one row, head and token after the other."""

import pytest
import torch
import torch.nn.functional as F

from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.engines.chunkwise import ChunkwiseEngine
from titans_pytorch.memory.named.registry import NAMED, preset_kwargs
from titans_pytorch.rules.losses import DotProduct

from .helpers import assert_close, assert_same_gradients, gradients, randomise, refusal
from .naive_memory import newton_schulz, rms_norm, sigmoid

DIM, HEADS, D, SEGMENT, WINDOW, CHUNK = 8, 2, 4, 3, 3, 4
SHORT = {name: {"segment": SEGMENT} for name in ("ttt_linear", "ttt_mlp", "titans", "moneta", "yaad", "memora")}
SHORT |= {name: {"segment": SEGMENT, "window": WINDOW} for name in ("omeganet", "atlas")}
SHORT["lact"] = {"chunk": CHUNK}
VARIANTS = {name: (name, SHORT.get(name, {})) for name in NAMED}
VARIANTS["moneta as printed"] = ("moneta", {"segment": SEGMENT, "printed": True, "p": 1.5})
VARIANTS["moneta, q below 2"] = ("moneta", {"segment": SEGMENT, "p": 2.0, "q": 1.5})
VARIANTS["omeganet, deep"] = ("omeganet", {"segment": SEGMENT, "window": WINDOW, "depth": 2})
VARIANTS["omeganet, token by token"] = ("omeganet", {"window": WINDOW})
VARIANTS["atlas, degree 1"] = ("atlas", {"segment": 1, "window": 5, "degree": 1, "depth": 1})


def built(variant, **changes):
    name, settings = VARIANTS[variant]
    torch.manual_seed(0)
    return randomise(NeuralMemory.preset(name, DIM, heads=HEADS, **settings, **changes).double(), scale=0.1)


class Head:
    """What one head's loop needs: queries, keys, values [n d], and its rates [n]."""

    def __init__(self, memory, seq, h):
        self.p = {name.removeprefix("projections.").removeprefix("rates."): p for name, p in memory.named_parameters()}
        self.h = h
        self.x = rms_norm(seq, self.p["store_norm.weight"])
        queries = self.project("queries", rms_norm(seq, self.p["retrieve_norm.weight"]))
        keys = self.project("keys", self.x)
        norm = memory.projections.config.qk_l2norm
        self.q, self.k = (t / (t.square().sum(-1, keepdim=True) + 1e-12).sqrt() if norm else t for t in (queries, keys))
        self.v = self.project("values", self.x)
        self.start = [w[h] for w in memory.memory_model_parameters]

    def project(self, name, x):
        y = x @ self.p[f"to_{name}.weight"].T
        if f"{name}_conv.weight" in self.p:
            kernel = self.p[f"{name}_conv.weight"]
            y = sum(w * F.pad(y, (0, 0, i, 0))[: len(y)] for i, w in enumerate(kernel.flip(0)))
            y = y * sigmoid(y)
        elif self.silu:
            y = y * sigmoid(y)
        return y.unflatten(-1, (HEADS, D))[:, self.h]

    silu = False

    def logit(self, name, width=1):
        y = self.x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]
        return y.unflatten(-1, (HEADS, width))[:, self.h].squeeze(-1)

    @property
    def step(self):
        return sigmoid(self.logit("to_adaptive_step"))

    @property
    def keep(self):
        return 1 - sigmoid(self.logit("to_decay_factor"))


class SiluHead(Head):
    silu = True


def slopes(loss, weights):
    return torch.autograd.grad(loss, weights, create_graph=True)


def leaves(weights):
    return [w if w.requires_grad else w.requires_grad_() for w in weights]


def linear_attention(head):
    def phi(x):
        return torch.where(x > 0, x + 1, x.exp())

    (m,) = head.start
    for q, k, v in zip(head.q, head.k, head.v, strict=True):
        m = m + torch.outer(phi(k), v)
        yield phi(q) @ m


def deltanet(head):
    (m,) = head.start
    for q, k, v, beta in zip(head.q, head.k, head.v, head.step, strict=True):
        m = m + beta * torch.outer(k, v - k @ m)
        yield q @ m


def gated_deltanet(head):
    (m,) = head.start
    for q, k, v, beta, alpha in zip(head.q, head.k, head.v, head.step, head.keep, strict=True):
        m = alpha * (m - beta * torch.outer(k, k) @ m) + beta * torch.outer(k, v)
        yield q @ m


def residual_mlp(weights, x):
    y = x @ weights[0]
    for w in weights[1:]:
        y = F.gelu(y) @ w
    return x + F.layer_norm(y, (D,))


def descent(head, network, loss, retain):
    """Gradients at the weights where a segment starts; retain(t, weights, gradients) -> weights."""
    weights = anchor = head.start
    for t in range(len(head.x)):
        if t % SEGMENT == 0:
            anchor = leaves(weights)
        weights = retain(t, weights, slopes(loss(network(anchor, head.k[t]), head.v[t], t), anchor))
        yield network(weights, head.q[t])


def ttt(base_rate):
    def loop(head):
        def square(y, v, t):
            return base_rate * head.step[t] / D * (y - v).square().sum() / 2

        return descent(head, residual_mlp, square, lambda t, ws, gs: [w - g for w, g in zip(ws, gs, strict=True)])

    return loop


def plain_mlp(weights, x):
    return F.gelu(x @ weights[0]) @ weights[1]


def titans(head):
    eta, momentum = sigmoid(head.logit("to_momentum")), [torch.zeros_like(w) for w in head.start]

    def retain(t, weights, grads):
        momentum[:] = [eta[t] * s - g for s, g in zip(momentum, grads, strict=True)]
        return [head.keep[t] * w + s for w, s in zip(weights, momentum, strict=True)]

    def loss(y, v, t):
        return 4 / SEGMENT * head.step[t] * (y - v).square().sum()

    return descent(head, plain_mlp, loss, retain)


def monomials(x, degree):
    parts = [torch.ones(1, dtype=x.dtype), x]
    if degree == 2:
        parts += [
            (x[i] * x[j] * (0.5 if i == j else 1.0) ** 0.5).view(1) for i in range(len(x)) for j in range(i, len(x))
        ]
    return torch.cat(parts)


def polynomial(weights, x, degree=2):
    y = monomials(x, degree) @ weights[0]
    return F.gelu(y) @ weights[1] if len(weights) > 1 else y


def of_window(head, network, segment, window, own, retain):
    """As `descent`, with the loss of the last `window` tokens, own(t) of the token itself."""
    weights = anchor = head.start
    for t in range(len(head.x)):
        if t % segment == 0:
            anchor = leaves(weights)
        gamma = sigmoid(head.logit("to_window_weights", window - 1)[t])  # the oldest first
        loss = 0.0
        for i in range(max(0, t - window + 1), t + 1):
            weight = own(t) * (1.0 if i == t else gamma[i - (t - window + 1)])
            loss = loss + weight * (network(anchor, head.k[i]) - head.v[i]).square().sum()
        weights = retain(t, weights, slopes(loss, anchor))
        yield network(weights, head.q[t])


def omeganet(segment, most):
    def loop(head):
        def retain(t, weights, grads):
            return [head.keep[t] * w - g for w, g in zip(weights, grads, strict=True)]

        return of_window(head, polynomial, segment, WINDOW, lambda t: most / (segment * WINDOW) * head.step[t], retain)

    return loop


def atlas(segment, window, degree):
    def loop(head):
        eta, momentum = sigmoid(head.logit("to_momentum")), [torch.zeros_like(w) for w in head.start]

        def retain(t, weights, grads):
            momentum[:] = [eta[t] * s + g for s, g in zip(momentum, grads, strict=True)]
            pairs = zip(weights, momentum, strict=True)
            return [head.keep[t] * w - 0.05 * head.step[t] * newton_schulz(s) for w, s in pairs]

        def network(weights, x):
            return polynomial(weights, x, degree)

        return of_window(head, network, segment, window, lambda t: 1 / D, retain)

    return loop


def moneta(p, q, printed):
    def weights_of(a):
        norm = a.abs().pow(q).sum() ** (1 / q)
        return a / norm ** (q - 2) if printed else a.sign() * a.abs().pow(q - 1) / norm ** (q - 2)

    def loop(head):
        sums = list(head.start)
        head.start = [weights_of(a) for a in sums]

        def loss(y, v, t):
            return 0.5 * head.step[t] * ((y - v).square() + 1e-6).pow(p / 2).sum() / D

        def retain(t, weights, grads):
            sums[:] = [head.keep[t] * a - g for a, g in zip(sums, grads, strict=True)]
            return [weights_of(a) for a in sums]

        return descent(head, residual_mlp, loss, retain)

    return loop


def yaad(head):
    delta = F.softplus(head.logit("to_loss_bound"))

    def loss(y, v, t):
        e = y - v
        far = delta[t] * (e.square() + 1e-6).sqrt().sum()
        return 0.5 * head.step[t] / D * (e.square().sum() if e.norm() <= delta[t] else far)

    def retain(t, weights, grads):
        return [head.keep[t] * w - g for w, g in zip(weights, grads, strict=True)]

    return descent(head, residual_mlp, loss, retain)


def memora(head):
    def simplex(logits):
        e = (logits - logits.amax(0)).exp()
        return len(logits) ** 0.5 * e / e.sum(0)

    head.start = [simplex(w) for w in head.start]

    def loss(y, v, t):
        return 0.5 * head.step[t] * (y - v).square().sum() / D

    def retain(t, weights, grads):
        return [simplex(head.keep[t] * w.log() - g) for w, g in zip(weights, grads, strict=True)]

    return descent(head, residual_mlp, loss, retain)


def lact(head):
    def network(weights, x):
        gate = x @ weights[0]
        return (gate * sigmoid(gate) * (x @ weights[2])) @ weights[1]

    weights, momentum = head.start, [torch.zeros_like(w) for w in head.start]
    norms = [w.norm(dim=0) for w in weights]
    for t in range(len(head.x)):
        if (t + 1) % CHUNK == 0:
            chunk, weights = slice(t + 1 - CHUNK, t + 1), leaves(weights)
            rates = 0.01 * F.softplus(head.logit("to_adaptive_step")[chunk])
            scores = (network(weights, head.k[chunk]) * head.v[chunk]).sum(-1)
            grads = slopes((rates * scores).sum(), weights)
            pooled = head.x[chunk].mean(0) @ head.p["to_momentum.weight"].T + head.p["to_momentum.bias"]
            momentum = [sigmoid(pooled[head.h]) * s + g for s, g in zip(momentum, grads, strict=True)]
            weights = [w + newton_schulz(s) for w, s in zip(weights, momentum, strict=True)]
            weights = [w / w.norm(dim=0) * norm for w, norm in zip(weights, norms, strict=True)]
        yield network(weights, head.q[t])


LOOPS = {
    "linear_attention": linear_attention,
    "deltanet": deltanet,
    "gated_deltanet": gated_deltanet,
    "ttt_linear": ttt(1.0),
    "ttt_mlp": ttt(0.1),
    "titans": titans,
    "omeganet": omeganet(SEGMENT, 1 / 5),
    "omeganet, deep": omeganet(SEGMENT, 4),
    "omeganet, token by token": omeganet(1, 1 / 5),
    "atlas": atlas(SEGMENT, WINDOW, 2),
    "moneta": moneta(3.0, 4.0, False),
    "yaad": yaad,
    "memora": memora,
    "lact": lact,
    "moneta as printed": moneta(1.5, 4.0, True),
    "moneta, q below 2": moneta(2.0, 1.5, False),
    "atlas, degree 1": atlas(1, 5, 1),
}


def equations(variant, memory, seq):
    """seq [n d] -> [n d]."""
    outs = []
    for h in range(HEADS):
        head = (SiluHead if variant == "lact" else Head)(memory, seq, h)
        read = rms_norm(torch.stack(list(LOOPS[variant](head))))
        outs.append(read * (head.p["multihead_rmsnorm.gamma"][h, 0] + 1))
    p, out = head.p, torch.cat(outs, dim=-1)
    gate = rms_norm(seq, p["retrieve_norm.weight"]) @ p["retrieve_gate.weight"].T
    if memory.projections.config.output_gate:
        out = out * gate * sigmoid(gate)
    else:
        out = out * sigmoid(gate).repeat_interleave(D, dim=-1)
    return out @ p["combine_heads.weight"].T


@pytest.mark.parametrize("engine", ["auto", "sequential"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_its_loop(variant, engine):
    memory = built(variant, engine=engine)
    seq = torch.randn(10, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    found = dict(memory.named_parameters()) | {"seq": seq}
    wanted, got = equations(variant, memory, seq), memory(seq.unsqueeze(0))[0][0]
    assert_close(got, wanted, 1e-9, "retrieved")
    assert_same_gradients(gradients([got], found), gradients([wanted], found), 1e-7)


def test_every_rule_has_a_loop():
    assert set(LOOPS) == set(VARIANTS) >= set(NAMED)


LINEAR = ("linear_attention", "deltanet", "gated_deltanet", "ttt_linear", "ttt_mlp", "titans", "omeganet", "yaad")


@pytest.mark.parametrize("name", LINEAR)
def test_rules_that_are_linear_have_the_chunkwise_form(name):
    assert isinstance(built(name).engine, ChunkwiseEngine)


@pytest.mark.parametrize("name", NAMED)
def test_says_its_paper(name):
    assert "arXiv" in NAMED[name].keywords.__doc__
    assert "eq." in NAMED[name].keywords.__doc__


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kind", ["random", "constant", "periodic"])
def test_finite_over_a_long_stream(name, kind):
    """As built, over 4,096 tokens."""
    torch.manual_seed(0)
    memory = NeuralMemory.preset(name, 8, **({"chunk": 32} if name == "lact" else {}))
    period = {"random": 512, "constant": 1, "periodic": 8}[kind]
    piece, state = torch.randn(1, period, 8).repeat(1, 512 // period, 1), None
    with torch.no_grad():
        for _ in range(8):
            piece = torch.randn(1, 512, 8) if kind == "random" else piece
            out, state = memory(piece, state=state)
    assert out.isfinite().all()
    assert max(w.abs().max() for w in state.states[0].values()) < (1e6 if name == "linear_attention" else 1e3)


# wrong input


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("delta_net", "deltanet"),
        ("Gated-DeltaNet", "gated_deltanet"),
        ("ttt", "ttt_mlp"),
        ("Lact", "lact"),
        ("monetta", "moneta"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(name, near):
    with pytest.raises(ValueError, match=f"^unknown rule {name}; the nearest is {near}$"):
        NeuralMemory.preset(name, DIM)


@pytest.mark.parametrize("name", [None, 3, ["titans"]])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match=refusal("name")):
        NeuralMemory.preset(name, DIM)


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet"])
@pytest.mark.parametrize(
    "change",
    [
        {"mem_model_norm_add_residual": True},
        {"store_memory_loss_fn": DotProduct()},
        {"model": MemoryMLP(DIM, 2)},
        {"default_model_kwargs": {"depth": 2}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_delta_rule_is_refused_other_networks_and_losses(name, change):
    with pytest.raises(
        ValueError, match=rf"^{next(iter(change))} cannot be combined with the rule {name}, .* segment=1"
    ):
        NeuralMemory.preset(name, DIM, **change)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("moneta", {"p": 0.5}, "p"),
        ("moneta", {"p": float("nan")}, "p"),
        ("moneta", {"q": 1.0}, "q"),
        ("moneta", {"q": 3.0, "printed": True}, "q"),
        ("moneta", {"segment": 0}, "segment"),
        ("omeganet", {"window": 0}, "window"),
        ("omeganet", {"degree": 3}, "degree"),
        ("atlas", {"window": 0}, "window"),
        ("atlas", {"max_step": 0.0}, "max_step"),
        ("lact", {"chunk": 0}, "chunk"),
        ("yaad", {"max_step": -1.0}, "max_step"),
        ("titans", {"heads": 3}, "heads"),
        ("titans", {"dim_head": 0}, "dim_head"),
        ("atlas", {"momentum_order": 2}, "momentum_order"),
        ("memora", {"store_memory_loss_fn": DotProduct()}, "store_memory_loss_fn"),
    ],
)
def test_wrong_settings_are_named(name, changes, named):
    with pytest.raises(ValueError, match=refusal(named)):
        NeuralMemory.preset(name, DIM, **changes)


def test_a_word_that_is_no_keyword_is_refused():
    with pytest.raises(ValueError, match="^unknown argument segmentt of the rule titans; the nearest is segment$"):
        NeuralMemory.preset("titans", DIM, segmentt=4)


def test_changes_replace_and_extend():
    kwargs = preset_kwargs("yaad", 32, heads=4, segment=8, init_decay_bias=-3.0, surprise_threshold=0.1)
    assert (kwargs["heads"], kwargs["dim_head"], kwargs["batch_size"]) == (4, 8, 8)
    assert (kwargs["init_decay_bias"], kwargs["surprise_threshold"]) == (-3.0, 0.1)
    assert preset_kwargs("atlas", 64)["heads"] == 4  # polynomial features of 16
    assert preset_kwargs("atlas", 24)["heads"] == 1
    assert preset_kwargs("deltanet", 32, heads=2, dim_head=8)["dim_head"] == 8
