"""Loading of weights saved by the package `titans-pytorch` (the peer), or by its fork with gates and pages."""

from collections.abc import Mapping

from torch import Tensor, nn

from titans_pytorch.common.checks import Words, of_kind, wrong
from titans_pytorch.memory.earlier_names import present_name
from titans_pytorch.neural_memory import NeuralMemory

RATES = (
    *("reduce_to_chunk_rep", "to_adaptive_step", "to_decay_factor", "to_momentum", "to_learned_momentum_combine"),
    *("to_layer_modulation", "to_learned_weight_residual_mix"),
)
SCALES = ("gates.symplectic_complexity_scale", "gates.dmd_complexity_scale")  # of shape (1,) in the fork
IN_SEQUENCE = (*RATES[1:], "retrieve_gate", "to_queries", "to_keys", "to_values")  # a Linear, then a rearrangement


def load_peer_state_dict(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights that the package titans-pytorch, or displague's fork of it, saved.

    Args:
        module: a NeuralMemory or a MemoryAsContextTransformer, built with the same arguments as the one that was saved.
        state_dict: its state dict. The fork's count of page switches is not loaded: it starts at 0.

    Raises:
        ValueError: for keys that are missing, left over, or of another shape; it names them.
    """
    of_kind(state_dict, Mapping, "state_dict", "a mapping from names to tensors")
    if isinstance(module, NeuralMemory):
        translated = translate_memory_keys(module, state_dict)
    else:
        from titans_pytorch.interop.peer_mac import translate_mac_keys
        from titans_pytorch.mac_transformer import MemoryAsContextTransformer

        if not isinstance(module, MemoryAsContextTransformer):
            raise wrong("module", Words(type(module).__name__), "a NeuralMemory or a MemoryAsContextTransformer")
        translated = translate_mac_keys(module, state_dict)
    own = module.state_dict()
    problems = [f"missing {key}" for key in own if key not in translated]
    problems += [f"left over {key}" for key in translated if key not in own]
    problems += [
        f"{key} of shape {tuple(value.shape)} for {tuple(own[key].shape)}"
        for key, value in translated.items()
        if key in own and value.shape != own[key].shape
    ]
    if problems:
        raise ValueError(f"state_dict: does not fit this {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(translated)


def translate_memory_keys(memory: NeuralMemory, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the peer's keys to ours, without those that have no effect; the fork's scales become scalars."""
    translated = {_our_key(key): value for key, value in state_dict.items() if not _without_effect(memory, key)}
    for scale in map(present_name, SCALES):
        if scale in translated and translated[scale].shape == (1,):
            translated[scale] = translated[scale].squeeze(0)
    return translated


def _our_key(key: str) -> str:
    head, _, rest = key.partition(".")
    if head in IN_SEQUENCE and rest.startswith("0."):
        rest = rest[2:]
    key = f"{head}.{rest}" if rest else head
    return f"rates.{key}" if head in RATES else present_name(key)


def _without_effect(memory: NeuralMemory, key: str) -> bool:
    if key.startswith("memory_model."):  # a template; the learned weights are memory_model_parameters
        return True
    if key == "page_switch_events":  # a count, not a weight
        return True
    if key == "transition_gate":  # the peer keeps it without a batch size, too
        return memory.transition_gate is None
    if key.startswith("to_learned_momentum_combine."):  # the peer keeps it for a mixture of one, too
        return memory.rates.to_learned_momentum_combine is None
    if key == "reduce_to_chunk_rep.to_attn_logits.weight":  # the peer keeps it for chunks of one token, too
        return memory.store_chunk_size == 1
    return key == "reduce_to_chunk_rep.to_attn_logits.bias"  # cancels in the softmax over tokens
