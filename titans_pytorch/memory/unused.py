"""Gives the parameters that a call does not use a gradient of zero.

DistributedDataParallel waits for the gradient of every parameter. Without this a sequence shorter than a chunk fails,
or waits forever if other processes read longer sequences.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch.common.switches import stores


def with_unused(x: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Return x, bit for bit, with a graph that includes the parameters. With gradients off, return x itself.

    Tensor subclasses (DTensor, quantised weights) are skipped: they do not mix with plain tensors.
    """
    if not torch.is_grad_enabled():
        return x
    # no value of a parameter is read, so one that is not finite does no harm
    none = [p.flatten()[:0].to(x) for p in parameters if p.requires_grad and type(p) in (nn.Parameter, Tensor)]
    return x - torch.cat(none).sum() if none else x


def unused_parameters(memory: Any, first: int, read: int, boundary: int | None, carried: bool, residual: bool):
    """Return the parameters of a NeuralMemory that a call may not have used.

    Args:
        memory: the NeuralMemory.
        first: chunks written before the call.
        read: chunks that its last query reads.
        boundary: chunks of a mini-batch; None: all chunks are one.
        carried: whether the state held fast weights in place of the initial ones.
        residual: whether an earlier memory's fast weights were used.
    """
    if read <= first or not stores(memory):  # no chunk that the call wrote was read
        return memory.parameters()
    if not memory.engine.rule.has_closed_form:  # a rule of the user may skip any parameter
        return memory.parameters()
    return _unused_of_some(memory, first, read, boundary, carried, residual)


def _unused_of_some(memory, first, read, boundary, carried, residual) -> Iterator[Tensor]:
    if memory.predictor is not None:  # it learns from `auxiliary_loss` alone
        yield from memory.predictor.parameters()
    if memory.rates.to_momentum is not None and read - first < 2:  # the first chunk has no momentum yet
        yield from memory.rates.to_momentum.parameters()
    if memory.rates.to_decay_factor is None:  # no rate of the pooled chunk may be used
        yield from memory.rates.reduce_to_chunk_rep.parameters()
    if memory.rates.to_learned_weight_residual_mix is not None and not residual:
        yield from memory.rates.to_learned_weight_residual_mix.parameters()
    if memory.transition_gate is not None and (boundary is None or read // boundary == first // boundary):
        yield memory.transition_gate
    if carried:
        yield from memory.memory_model_parameters.parameters()
