"""Shared by the tests: parameters moved off their start values, relative errors, foreign memory models."""

import re

import torch
from torch import Tensor, nn

from titans_pytorch.rules.titans import TitansRule


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.05) -> nn.Module:
    """Every parameter off its start value, so that a gate at zero or a norm at one hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * scale)
    return module


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value; 0 where both are empty."""
    assert got.shape == wanted.shape, f"{tuple(got.shape)} instead of {tuple(wanted.shape)}"
    if wanted.numel() == 0:
        return 0.0
    got, wanted = got.detach().double(), wanted.detach().double()
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)).item()


def assert_close(got: Tensor, wanted: Tensor, tolerance: float = 1e-9, what: str = ""):
    error = relative_error(got, wanted)
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"


def assert_same_tensors(got, wanted, tolerance: float = 1e-9, what: str = ""):
    assert set(got) == set(wanted), f"{what}: {sorted(got)} instead of {sorted(wanted)}"
    for name in wanted:
        assert_close(got[name], wanted[name], tolerance, f"{what} {name}")


def gradient_errors(got, wanted) -> dict[str, float]:
    """Each against its own size, or a 1e-5th of the largest: where a gradient is zero by symmetry, rounding is left."""
    floor = 1e-5 * max((grad.abs().max().item() for grad in wanted.values() if grad.numel()), default=0.0)
    sizes = {name: max(grad.abs().max().item(), floor, 1e-12) for name, grad in wanted.items() if grad.numel()}
    return {name: (got[name] - wanted[name]).abs().max().item() / size for name, size in sizes.items()}


def assert_same_gradients(got, wanted, tolerance: float = 1e-8, what: str = ""):
    for name, error in gradient_errors(got, wanted).items():
        assert error <= tolerance, f"{what} gradient of {name}: relative error {error:.2e}"


def gradients(outputs: list[Tensor], leaves: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Of a random projection of the outputs, zeros where a leaf is not reached."""
    generator = torch.Generator().manual_seed(seed)
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)).sum() for o in outputs)
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(leaves.items(), grads, strict=True)}


class FrozenRule(TitansRule):
    """A subclass that changes the update, and writes nothing."""

    def update(self, weights, surprise, slots, rates):
        return weights, slots


# A model of the family, as keywords of ModelConfig.
SMALL = {"vocab_size": 11, "d_model": 8, "n_layers": 2, "n_heads": 2, "mem_heads": 2, "n_persistent": 2, "window": 4}


class ForeignModel(nn.Module):
    """A user's memory model that says nothing of itself: running mean over the tokens, tanh, bias."""

    def __init__(self, dim: int):
        super().__init__()
        self.up = nn.Linear(dim, dim + 1)
        self.down = nn.Parameter(torch.randn(dim + 1, dim) * 0.3)

    def forward(self, x):
        counts = torch.arange(1, x.shape[-2] + 1, dtype=x.dtype, device=x.device).unsqueeze(-1)
        return self.up(x.cumsum(dim=-2) / counts).tanh() @ self.down


class GhostModel(nn.Module):
    """A user's model in the documented form, forward only, one weight used twice."""

    tokenwise = True

    def __init__(self, dim: int):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(dim, dim) * 0.3)
        self.scale = nn.Parameter(torch.randn(dim))

    def with_weights(self, x, weights):
        hidden = weights.mul(weights.matmul(x, "mix").sin(), "scale")
        return x + weights.matmul(hidden, "mix")

    def forward(self, x):
        return x + ((x @ self.mix).sin() * self.scale) @ self.mix


def message(text: str) -> str:
    """The regular expression of a message in which "..." stands for anything."""
    return re.escape(text).replace(re.escape("..."), ".*")


def refusal(name: str) -> str:
    """The regular expression of the messages that refuse the argument `name`, in either of their shapes."""
    conflict = "(needs|cannot be combined with)"
    name = re.escape(name)
    return rf"^({name}\S* must be .+, got |[^:\n]*\b{name}\b.* {conflict} |[^:\n]* {conflict} .*\b{name}\b)"
