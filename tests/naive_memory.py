"""NeuralMemory as its rule reads, one row, head, chunk and token after the other: no engine, no batching, no state.

It takes the parameters of a built memory (without gates) and nothing else of it. Letters as in the package.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.func import functional_call


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def rms_norm(x, weight=1.0):
    """torch's default: the eps of the dtype."""
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * weight


def newton_schulz(x):
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.T if tall else x


@dataclass
class Row:
    """What one row's head went through: memories after 0, 1, .. chunks, losses and steps per pair."""

    memories: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    steps: list = field(default_factory=list)
    momentum: list = field(default_factory=list)


class NaiveMemory:
    """memory: the built one; model: its network, fresh; options: the constructor's keywords, with batch_size."""

    def __init__(self, memory, model, options):
        self.o, self.model = options, model
        self.p = {name.removeprefix("projections."): p for name, p in memory.named_parameters()}
        self.names = [f"model.{k}" for k, _ in model.named_parameters()]
        if options["mem_model_norm_add_residual"]:
            self.names = ["norm.gamma", *self.names]
        self.h, self.d, self.u = memory.heads, memory.dim_head, options["num_kv_per_token"]
        size = options["chunk_size"]
        self.r, self.c = size if isinstance(size, tuple) else (size, size)

    def linear(self, name, x):
        bias = self.p.get(f"{name}.bias")
        return x @ self.p[f"{name}.weight"].T + (0.0 if bias is None else bias)

    def predict(self, weights, x):
        y = functional_call(
            self.model, {k.removeprefix("model."): v for k, v in weights.items() if k != "norm.gamma"}, x
        )
        if "norm.gamma" not in weights:
            return y
        return F.layer_norm(y, y.shape[-1:], eps=1e-5) * (weights["norm.gamma"] + 1) + x

    def start(self, h):
        values = [self.p[f"memory_model_parameters.{i}"] for i in range(len(self.names))]
        return {
            k: v[h] if self.o["per_head_learned_parameters"] else v for k, v in zip(self.names, values, strict=True)
        }

    def head_norm(self, name, x, h):
        if self.o["qk_l2norm"] and name in ("q_norm", "k_norm"):
            return x / (x.square().sum(-1, keepdim=True) + 1e-12).sqrt()
        return rms_norm(x) * (self.p[f"{name}.gamma"][h, 0] + 1) if f"{name}.gamma" in self.p else x

    def project(self, name, x, h, u=1):
        """x [n d] -> [(n u) d] of head h; the layout of the projection is (h u d)."""
        y = self.linear(name, x)
        weight = self.p.get(f"{name.removeprefix('to_')}_conv.weight")
        if weight is not None:  # the last row of the kernel meets the token itself, the one before it the token before
            past = [torch.cat((y.new_zeros(k, y.shape[1]), y))[: len(y)] for k in range(len(weight))]
            y = sum(w * shifted for w, shifted in zip(weight.flip(0), past, strict=True))
        if self.o["activation"] is not None:
            y = self.o["activation"](y)
        return y.view(len(x), self.h, u, self.d)[:, h].flatten(0, 1)

    def rate(self, name, x, h, k=1):
        """Logits of head h [k]; the layout is (h k)."""
        return self.linear(f"rates.{name}", x).view(*x.shape[:-1], self.h, k)[..., h, :]

    def store(self, keys, values, mask, h, earlier) -> Row:
        """keys and values [n d], normed views of one row; mask [n] or None; earlier: the earlier layer's memories."""
        o, c = self.o, self.c
        batch, order = o["batch_size"], o["momentum_order"] * o["momentum"]
        memory = anchor = self.start(h)
        momenta = [{k: torch.zeros_like(v) for k, v in memory.items()} for _ in range(order)]
        row = Row([memory])
        all_keys = self.head_norm("k_norm", self.project("to_keys", keys, h, self.u), h).unflatten(0, (-1, self.u))
        all_values = self.project("to_values", values, h, self.u).unflatten(0, (-1, self.u))
        errors = self.prediction_errors(keys)
        self.pairs = []
        for i in range(len(keys) // c):
            tokens = slice(i * c, (i + 1) * c)
            step, loss, grads = self.surprise(
                keys[tokens],
                all_keys[tokens].flatten(0, 1),
                all_values[tokens].flatten(0, 1),
                mask,
                tokens,
                h,
                anchor,
                earlier and earlier[i],
                errors,
            )
            row.losses.append(loss), row.steps.append(step)
            still = o["surprise_threshold"] is not None and not self.surprises(self.all_losses, errors, tokens).any()
            pooled = self.pool(keys[tokens])
            update = {}
            for index, (name, grad) in enumerate(grads.items()):
                if o["max_grad_norm"] is not None and (norm := grad.norm()) > 0:
                    half = o["max_grad_norm"] / 2
                    grad = grad * (half * (norm / half).tanh() + half) / norm
                if o["per_parameter_lr_modulation"]:
                    logit = self.rate("to_layer_modulation", pooled, h, len(self.names))[index]
                    grad = grad * sigmoid(logit) * o["max_mem_layer_modulation"]
                update[name] = self.momentum(-grad, [m[name] for m in momenta], pooled, h)
                for m, value in zip(momenta, update[name][1], strict=True):
                    m[name] = m[name] if still else value
            keep = self.keep(pooled, h)
            after = {}
            for name, (change, _) in update.items():
                if o["spectral_norm_surprises"] and change.ndim == 2:
                    change = newton_schulz(change)
                after[name] = keep * memory[name] + change
            memory = memory if still else after
            if batch is not None and (i + 1) * c % batch == 0:
                if o["gated_transition"]:
                    share = sigmoid(self.p["transition_gate"])
                    memory = {k: anchor[k] + share * (memory[k] - anchor[k]) for k in memory}
                anchor = memory
            row.memories.append(memory)
        row.momentum = momenta
        return row

    def keep(self, pooled, h):
        return 1 - sigmoid(self.rate("to_decay_factor", pooled, h)[0]) if self.o["forget_gate"] else 1.0

    def prediction_errors(self, x):
        """What the linear prediction from the token before misses of each: x [n d] -> [n], or None without."""
        if "predictor.predict.weight" not in self.p:
            return None
        before = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
        return (self.linear("predictor.predict", before.detach()) - x.detach()).square().mean(-1)

    def surprises(self, loss, errors, tokens):
        """Which pairs of a chunk surprise."""
        surprise = loss if errors is None else errors[tokens].repeat_interleave(self.u)[: len(loss)]
        return surprise >= self.o["surprise_threshold"]

    def surprise(self, x, keys, values, mask, tokens, h, anchor, earlier, errors):
        """x [c d], keys and values [c*u d] of one chunk."""
        o = self.o
        transform, most = o["adaptive_step_transform"], o["default_step_transform_max_lr"]
        if o["learned_step"]:
            logits = self.rate("to_adaptive_step", x, h, self.u)  # [c u]
            step = transform(logits) if transform else sigmoid(logits) * most
        else:
            step = x.new_full((len(x), self.u), most)
        if mask is not None:
            step = step * mask[tokens, None]
        step = step.flatten()
        if o["store_with_lookahead_value"]:
            keys, values, step = keys[:-1], values[1:], step[:-1]
        if o["surprise_threshold"] is not None and errors is not None:
            step = step * self.surprises(step, errors, tokens)
        own, written = len(step), step != 0
        bound = None
        if getattr(o["store_memory_loss_fn"], "learned_bound", False):
            bound = F.softplus(self.rate("to_loss_bound", x, h, self.u)).flatten()[:own]
        if o["surprise_window"] > 1:
            of_chunk = list(zip(keys, values, written, [None] * own if bound is None else bound, strict=True))
            keys, values, step, bound = self.windowed(of_chunk, step, self.pool(x), h)
        scale = self.keep(self.pool(x), h) if o["decay_first"] else 1.0
        weights = {k: scale * v for k, v in anchor.items()}
        if earlier is not None:
            mix = sigmoid(self.rate("to_learned_weight_residual_mix", self.pool(x), h)[0])
            weights = {k: v + mix * earlier[k] for k, v in weights.items()}
        weights = {k: v if v.requires_grad else v.requires_grad_() for k, v in weights.items()}
        error = self.predict(weights, keys)
        loss_fn = o["store_memory_loss_fn"] or (lambda a, b: (a - b).square().mean(-1))
        loss = loss_fn(error, values) if bound is None else loss_fn(error, values, bound)
        if o["surprise_threshold"] is not None and errors is None:
            step = step * (loss >= o["surprise_threshold"])
        grads = torch.autograd.grad(
            (step * loss).sum(), list(weights.values()), create_graph=True, materialize_grads=True
        )
        self.all_losses = loss
        return step[len(step) - own :], loss[len(loss) - own :], dict(zip(weights, grads, strict=True))

    def windowed(self, of_chunk, step, pooled, h):
        """The pairs of a chunk behind those before it: (keys, values, steps, bounds)."""
        earlier = (self.o["surprise_window"] - 1) * self.u
        shares = sigmoid(self.rate("to_window_weights", pooled, h, earlier)) * step.mean()
        zero = (torch.zeros_like(of_chunk[0][0]), torch.zeros_like(of_chunk[0][1]), False)
        none = (*zero, None if of_chunk[0][3] is None else torch.zeros_like(of_chunk[0][3]))
        before = ([none] * earlier + self.pairs)[-earlier:]  # before the stream: zeros, never written
        steps = [s if pair[2] else 0.0 * s for s, pair in zip(shares, before, strict=True)]
        pairs = before + of_chunk
        self.pairs = self.pairs + of_chunk
        bounds = None if pairs[0][3] is None else torch.stack([p[3] for p in pairs])
        keys, values = (torch.stack([p[i] for p in pairs]) for i in (0, 1))
        return keys, values, torch.stack([*steps, *step]), bounds

    def pool(self, x):
        if not self.o["attn_pool_chunks"] or self.c == 1:
            return x.mean(0)
        return (self.linear("rates.reduce_to_chunk_rep.to_attn_logits", x).softmax(0) * x).sum(0)

    def momentum(self, surprise, carried, pooled, h):
        """(the combined update, each order's momentum)."""
        order, outs = len(carried), [surprise]
        for k in range(order):
            eta = sigmoid(self.rate("to_momentum", pooled, h, order)[k])
            outs.append(eta * carried[k] + outs[-1])
        zeroth = self.o["learned_combine_include_zeroth"]
        members = outs if zeroth else outs[1:]
        if not order or not self.o["learned_momentum_combine"] or len(members) == 1:
            return outs[-1], outs[1:]
        weights = self.rate("to_learned_momentum_combine", pooled, h, len(members)).softmax(0)
        return sum(w * member for w, member in zip(weights, members, strict=True)), outs[1:]

    def retrieve(self, x, row: Row, h):
        """x [n d], the normed query view: each query reads with the earlier ones of its read group before it."""
        queries = self.head_norm("q_norm", self.project("to_queries", x, h), h)
        outs = []
        for t in range(len(x)):
            group = (t + 1) // self.r
            first = max(group * self.r - 1, 0)
            weights = row.memories[group * self.r // self.c]
            outs.append(self.predict(weights, queries[first : t + 1])[-1])
        return torch.stack(outs)

    def __call__(self, seq, mask=None, earlier=None):
        """seq [b n d] ([3 b n d] with views) -> (retrieved [b n d], rows[b][h]); earlier: those of an earlier layer."""
        views = seq if self.o["qkv_receives_diff_views"] else torch.stack((seq, seq, seq))
        outs, rows = [], []
        for b in range(views.shape[1]):
            queries, keys, values = views[:, b]
            if self.o["pre_rmsnorm"]:
                queries = rms_norm(queries, self.p["retrieve_norm.weight"])
                keys, values = (rms_norm(x, self.p["store_norm.weight"]) for x in (keys, values))
            heads, of_heads = [], []
            for h in range(self.h):
                before = earlier and earlier[b][h].memories
                row = self.store(keys, values, None if mask is None else mask[b], h, before)
                out = self.head_norm("multihead_rmsnorm", self.retrieve(queries, row, h), h)
                if self.o["output_gate"] is not None:
                    gate = self.linear("retrieve_gate", queries).unflatten(-1, (self.h, -1))[:, h]
                    out = out * (sigmoid(gate) if self.o["output_gate"] == "sigmoid" else gate * sigmoid(gate))
                elif self.h > 1:
                    out = out * sigmoid(self.linear("retrieve_gate", queries)[:, h : h + 1])
                heads.append(out), of_heads.append(row)
            out = torch.cat(heads, dim=-1)
            outs.append(self.linear("combine_heads", out) if "combine_heads.weight" in self.p else out)
            rows.append(of_heads)
        return torch.stack(outs), rows
