"""The first module that produces a value that is not finite is found in either pass."""

import math

import pytest
import torch
from torch import nn

from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.analysis.not_finite import first_not_finite


class Breaks(nn.Module):
    """x times 1, with a value or a gradient that is not finite where it is told so."""

    def __init__(self, how: str = ""):
        super().__init__()
        self.how, self.scale = how, nn.Parameter(torch.ones(()))

    def forward(self, x):
        if self.how == "output":
            return x * self.scale * math.nan
        if self.how == "input":  # the root of zero: the value is 0, the gradient is not
            return x * self.scale + (x * 0).square().sum().sqrt()
        if self.how == "parameter":
            return x * self.scale + (self.scale * 0).square().sqrt()
        return x * self.scale


def model_of(how: str, at: int) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), Breaks(how if i == at else ""), nn.Tanh()) for i in range(3)]
    return nn.Sequential(*blocks)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    ("how", "what"),
    [("output", "output"), ("input", "gradient of the input"), ("parameter", "gradient of the parameter scale")],
)
def test_it_is_found(how, what, at):
    model, x = model_of(how, at), torch.randn(2, 4)
    found = first_not_finite(model, lambda: model(x).square().sum())
    assert (found.module, found.kind, found.what, found.dtype) == (f"{at}.1", "Breaks", what, torch.float32)
    assert f"the {what} of {at}.1 (Breaks), in float32" in str(found)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_is_found():
    model, x = model_of("", 0), torch.randn(2, 4)
    assert first_not_finite(model, lambda: model(x).square().sum()) is None
    with torch.no_grad():
        assert first_not_finite(model, lambda: model(x).sum()) is None


def test_a_parameter_and_a_loss():
    model, x = model_of("", 0), torch.randn(2, 4)
    found = first_not_finite(model, lambda: model(x).sum() * math.inf)
    assert (found.module, found.what) == ("", "loss")
    model[1][0].bias.data[2] = math.nan
    found = first_not_finite(model, lambda: model(x).sum())
    assert (found.module, found.what) == ("1.0", "parameter bias")


def test_the_precision_under_autocast():
    model, x = model_of("output", 1), torch.randn(2, 4)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return model[1](model[0](x)).sum()

    assert first_not_finite(model, loss).module == "1.1"
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.data.fill_(3e38)
    with torch.autocast("cpu", torch.bfloat16):
        found = first_not_finite(model, lambda: model(x.abs() + 1).sum())
    assert (found.module, found.dtype) == ("0", torch.bfloat16)


def test_a_memory_that_diverges_is_named_itself():
    """Its submodules are fine: it is the update that overflows."""
    options = {"batch_size": 4, "mem_model_norm_add_residual": False, "default_step_transform_max_lr": 1e30}
    memory = NeuralMemory(4, model=MemoryMLP(4, 2), post_rmsnorm=True, **options)
    model = nn.ModuleDict({"embed": nn.Linear(4, 4), "memory": memory, "out": nn.Linear(4, 4)})
    x = torch.randn(2, 32, 4)
    found = first_not_finite(model, lambda: model["out"](model["memory"](model["embed"](x))[0]).sum())
    assert (found.module, found.kind, found.what) == ("memory", "NeuralMemory", "output")
