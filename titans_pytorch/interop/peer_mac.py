"""Names of the released package `titans-pytorch` 0.5.5 for the parts of MemoryAsContextTransformer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:  # not at run time: it loads the transformer
    from titans_pytorch.mac_transformer import MemoryAsContextTransformer

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


def translate_mac_keys(module: "MemoryAsContextTransformer", state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the keys of the released MemoryAsContextTransformer to ours, without those that have no effect.

    `module` is our transformer of the same arguments. Unknown keys, and keys of missing layers or memories, stay as
    they are, so that loading names them as left over."""
    from titans_pytorch.interop.peer import translate_memory_keys

    memories: dict[int | None, Any] = {index: layer.memory for index, layer in enumerate(module.layers)}
    of_memory: dict[int | None, dict[str, Tensor]] = {}
    translated: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        index, rest = _layer_key(key)
        part = next((part for part in _PARTS if rest.startswith(part)), None)
        if memories.get(index) is not None and rest.startswith(_MEMORY):
            of_memory.setdefault(index, {})[rest.removeprefix(_MEMORY)] = tensor
        elif index in memories and part is not None:
            translated[f"layers.{index}.{_PARTS[part]}{rest.removeprefix(part)}"] = tensor
        else:
            translated[key] = tensor

    for index, keys in of_memory.items():
        for key, tensor in translate_memory_keys(memories[index], keys).items():
            translated[f"layers.{index}.memory.{key}"] = tensor
    return translated


def _layer_key(key: str) -> tuple[int | None, str]:
    """'layers.3.5.to_out.weight' -> (3, '5.to_out.weight'); (None, key) outside the layers."""
    head, _, rest = key.partition(".")
    index, _, rest = rest.partition(".")
    return (int(index), rest) if head == "layers" and index.isdigit() else (None, key)
