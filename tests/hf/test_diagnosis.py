"""A Hugging Face model is diagnosed as any other, with its own loss."""

import math

import pytest
import torch

from titans_pytorch import diagnose
from titans_pytorch.hf import TitansForCausalLM, TitansHFConfig


@pytest.mark.parametrize("labels", [True, False])
def test_the_bias_of_a_rate(labels):
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "d_model": 8, "n_layers": 1, "n_heads": 2, "mem_heads": 2, "window": 8, "chunk_size": 4}
    model, ids = TitansForCausalLM(TitansHFConfig(variant="mag", **sizes)), torch.arange(16).view(2, 8)
    inputs = {"input_ids": ids} | ({"labels": ids} if labels else {})
    report = diagnose(model, inputs)
    assert report.finite
    assert report.backward
    name = "model.blocks.0.layer.remember.memory"
    model.get_submodule(name).rates.to_momentum.bias.data[1] = math.nan
    report = diagnose(model, inputs)
    assert (report.found.module, report.found.what) == (f"{name}.rates.to_momentum", "parameter bias")
    assert (report.memory.what, report.memory.head) == ("momentum", 1)
