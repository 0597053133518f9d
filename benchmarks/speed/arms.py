"""Builds and runs a case, in a worker's own environment. Needs only torch, titans_pytorch and the harness.

A subject has forward() (no gradients), train() (forward and backward), and decode(): tokens one at a time, after
prepare_decode() has read the tokens before them. The sweep's decode begins after all of the case's tokens.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PREFILL = 1024  # tokens read at once before decoding, so that the peer's memory does not decide what can be decoded


@dataclass(frozen=True)
class Setup:
    """How to compute. dtype bfloat16 is autocast, with parameters in float32."""

    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    clock: str = "wall"  # or process (harness/timing.py)
    engine: str | None = None  # of our NeuralMemory; None where it has no such argument

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    def autocast(self):
        if self.dtype != "bfloat16":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16)


def built(kwargs: Mapping[str, Any], engine: str | None) -> dict[str, Any]:
    """Return keyword arguments with memory networks in place of their descriptions, and the engine if there is one."""
    import titans_pytorch

    def value(x):
        if isinstance(x, Mapping) and "model" in x and isinstance(x["model"], (list, tuple)):
            name, arguments = x["model"]
            return getattr(titans_pytorch, name)(**arguments)
        return tuple(x) if isinstance(x, list) else x

    out = {k: value(v) for k, v in kwargs.items()}
    if engine is not None:
        if "neural_memory_kwargs" in out:
            out["neural_memory_kwargs"] = {**out["neural_memory_kwargs"], "engine": engine}
        elif "chunk_size" in out:
            out["engine"] = engine
    return out


def build_module(case: Mapping[str, Any], setup: Setup) -> nn.Module:
    """Build the module of the case with initial values drawn from the seed."""
    torch.manual_seed(setup.seed)
    if case["kind"] == "attention":
        module: nn.Module = FullAttention(**case["kwargs"])
    else:
        import titans_pytorch

        name = {"memory": "NeuralMemory", "transformer": "MemoryAsContextTransformer"}[case["kind"]]
        module = getattr(titans_pytorch, name)(**built(case["kwargs"], setup.engine))
    return module.to(setup.device, setup.parameter_dtype)


def inputs(case: Mapping[str, Any], setup: Setup, batch: int, tokens: int) -> Tensor:
    """Return [b n d], or ids [b n]: the same numbers in every environment."""
    generator = torch.Generator().manual_seed(setup.seed + 1)
    if case["kind"] == "transformer":
        ids = torch.randint(0, case["kwargs"]["num_tokens"], (batch, tokens), generator=generator)
        return ids.to(setup.device)
    x = torch.randn(batch, tokens, case["kwargs"]["dim"], generator=generator, dtype=torch.float64)
    return x.to(setup.device, setup.parameter_dtype)


class FullAttention(nn.Module):
    """One layer of causal attention over all earlier tokens: [b n d] -> [b n d]. decode() keeps keys and values."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, heads * dim_head * 3, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        return self.to_qkv(self.norm(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def out(self, x: Tensor) -> Tensor:
        return self.to_out(x.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(*self.qkv(x), is_causal=True))

    def decode(self, past: Tensor, tokens: Tensor) -> Tensor:
        """Return the last output of `tokens` [b n d], read one at a time after `past` [b m d]."""
        m, n = past.shape[1], tokens.shape[1]
        _, k, v = self.qkv(past)
        k, v = (F.pad(x, (0, 0, 0, n)) for x in (k, v))
        for t in range(n):
            q, k[:, :, m + t : m + t + 1], v[:, :, m + t : m + t + 1] = self.qkv(tokens[:, t : t + 1])
            last = self.out(F.scaled_dot_product_attention(q, k[:, :, : m + t + 1], v[:, :, : m + t + 1]))
        return last


class Subject:
    """A case's module and inputs. The base: a transformer on ids."""

    def __init__(self, case: Mapping[str, Any], setup: Setup):
        self.case, self.setup = case, setup
        self.module = build_module(case, setup)
        self.x = inputs(case, setup, case["batch"], case["tokens"])

    def forward(self) -> Tensor:
        with torch.no_grad(), self.setup.autocast():
            return self.output()

    def output(self) -> Tensor:
        return self.module(self.x)

    def loss(self) -> Tensor:
        return self.module(self.x, return_loss=True)

    def train(self) -> None:
        self.module.zero_grad(set_to_none=True)
        with self.setup.autocast():
            loss = self.loss()
        loss.backward()

    def prepare_decode(self) -> None:
        self.prompt = self.x[:, : self.case["prompt"]]

    @property
    def decoded_tokens(self) -> int:
        return self.case["tokens"] - self.case["prompt"]

    def decode(self) -> None:
        with torch.no_grad(), self.setup.autocast():
            self.module.sample(self.prompt, self.case["tokens"], use_cache=True, show_progress=False)


class MemorySubject(Subject):
    def output(self):
        return self.module(self.x)[0]

    def loss(self):
        return self.output().float().square().mean()

    @property
    def decoded_tokens(self):
        chunk = self.case["kwargs"]["chunk_size"]
        return -(-32 // chunk) * chunk  # whole chunks, so that writes are included

    def prepare_decode(self):
        self.state = None
        piece = max(PREFILL // self.case["kwargs"]["chunk_size"], 1) * self.case["kwargs"]["chunk_size"]
        with torch.no_grad(), self.setup.autocast():
            for part in self.x.split(piece, dim=1):
                self.state = self.module(part, state=self.state)[1]

    def decode(self):
        state, n = self.state, self.x.shape[1]
        with torch.no_grad(), self.setup.autocast():
            for t in range(self.decoded_tokens):
                _, state = self.module(self.x[:, t % n], state=state)


class AttentionSubject(Subject):
    decoded_tokens = 32

    def loss(self):
        return self.output().float().square().mean()

    def prepare_decode(self):
        self.fresh = self.x[:, :1].expand(-1, self.decoded_tokens, -1)

    def decode(self):
        with torch.no_grad(), self.setup.autocast():
            self.module.decode(self.x, self.fresh)


SUBJECTS = {"memory": MemorySubject, "transformer": Subject, "attention": AttentionSubject}


def subject(case: Mapping[str, Any], setup: Setup) -> Subject:
    return SUBJECTS[case["kind"]](case, setup)


def tiny(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tiny version of the case: the same code, little memory. Run before memory is measured, so that code that
    a library loads on first use is not counted."""
    kwargs = dict(case["kwargs"])

    def shrink(model):
        return {"model": [model["model"][0], {**model["model"][1], "dim": 8}]}

    if case["kind"] == "memory":
        kwargs |= {"dim": 8, "dim_head": 8, "chunk_size": 2}
        kwargs["batch_size"] = kwargs.get("batch_size") and 4
        kwargs |= {"model": shrink(kwargs["model"])} if "model" in kwargs else {}
    elif case["kind"] == "transformer":
        kwargs |= {"dim": 8, "dim_head": 8, "heads": 2, "num_tokens": 16}
        if "neural_memory_model" in kwargs:
            kwargs["neural_memory_model"] = shrink(kwargs["neural_memory_model"])
            kwargs["neural_memory_kwargs"] = {**kwargs["neural_memory_kwargs"], "dim_head": 8}
    else:
        kwargs = {"dim": 8, "heads": 2, "dim_head": 4}
    return {**case, "kwargs": kwargs, "batch": 1, "tokens": 9 if case["kind"] == "transformer" else 8}
