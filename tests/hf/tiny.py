import torch

from titans_pytorch.hf import TitansForCausalLM, TitansHFConfig

SETTINGS = {"vocab_size": 20, "d_model": 16, "n_layers": 2, "n_heads": 2, "mem_heads": 2, "window": 4, "chunk_size": 4}
IDS = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(1))


def tiny(variant="mac", **settings):
    torch.manual_seed(0)
    return TitansForCausalLM(TitansHFConfig(variant=variant, **SETTINGS | settings)).eval()
