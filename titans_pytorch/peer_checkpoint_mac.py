"""Names of the released package `titans-pytorch` 0.5.5 for the parts of MemoryAsContextTransformer."""

from collections.abc import Mapping

from torch import Tensor, nn

# its layers are lists: 0 to 2 the connections, 3 the view selector, 4 the memory, 5 attention, 6 the feed-forward
_MEMORY = "4."
_PARTS = {
    "0.": "memory_connection.",
    "1.": "attention_connection.",
    "2.": "feed_forward_connection.",
    "3.0.": "view_selector.norm.",
    "3.1.": "view_selector.to_weights.",
    "5.to_learned_v_mix.0.": "attention.to_value_mix.",
    "5.": "attention.",
    "6.": "feed_forward.",
}


def translate_mac_keys(module: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the released MemoryAsContextTransformer under our names.

    Args:
        module: a MemoryAsContextTransformer built with the same constructor arguments.
        state_dict: the other's state dict.

    Raises:
        ValueError: naming the keys that fit nothing, are missing, or have another shape.
    """
    from .peer_checkpoint import translate_memory_keys

    translated, memories, unknown = {}, {}, []
    for key, tensor in state_dict.items():
        index, rest = _layer_key(key)
        if index is None:
            translated[key] = tensor
        elif index >= len(module.layers):
            unknown.append(key)
        elif rest.startswith(_MEMORY):
            memories.setdefault(index, {})[rest.removeprefix(_MEMORY)] = tensor
        else:
            part = next((part for part in _PARTS if rest.startswith(part)), None)
            if part is None:
                unknown.append(key)
            else:
                translated[f"layers.{index}.{_PARTS[part]}{rest.removeprefix(part)}"] = tensor

    for index, keys in memories.items():
        memory = module.layers[index].memory
        if memory is None:
            unknown.extend(f"layers.{index}.{_MEMORY}{key}" for key in keys)
        else:
            ours = translate_memory_keys(memory, keys)
            translated.update({f"layers.{index}.memory.{key}": tensor for key, tensor in ours.items()})
    _check(module.state_dict(), translated, unknown)
    return translated


def _layer_key(key: str) -> tuple[int | None, str]:
    """'layers.3.5.to_out.weight' -> (3, '5.to_out.weight'); (None, key) outside the layers."""
    head, _, rest = key.partition(".")
    index, _, rest = rest.partition(".")
    return (int(index), rest) if head == "layers" and index.isdigit() else (None, key)


def _check(ours: Mapping[str, Tensor], translated: Mapping[str, Tensor], unknown: list[str]) -> None:
    faults = {
        "unexpected": sorted({*unknown, *(translated.keys() - ours.keys())}),
        "missing": sorted(ours.keys() - translated.keys()),
        "of another shape": sorted(k for k in ours.keys() & translated.keys() if ours[k].shape != translated[k].shape),
    }
    faults = [f"{what}: {', '.join(keys)}" for what, keys in faults.items() if keys]
    if faults:
        raise ValueError(f"state_dict: does not fit this MemoryAsContextTransformer; {'; '.join(faults)}")
