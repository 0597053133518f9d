"""Taking an inner gradient whatever mode the caller is in."""

from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def enable_inner_grad():
    """Autograd works inside, also under no_grad and inference_mode (pass inputs through `ordinary`)."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def ordinary(x: Tensor) -> Tensor:
    """x as a tensor that autograd accepts: inference tensors are cloned. Call it inside `enable_inner_grad`."""
    return x.clone() if x.is_inference() else x
