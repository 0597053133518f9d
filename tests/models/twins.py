"""The family's layers again, one token after the other, with every mask written out: what the layers must give."""

import torch
from torch import Tensor


def attend(queries: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query [b h d] over lists of keys and values [b h d]: [b (h d)]."""
    keys, values = torch.stack(keys, dim=-2), torch.stack(values, dim=-2)
    weights = (keys @ queries[..., None]).squeeze(-1) * queries.shape[-1] ** -0.5
    return (weights.softmax(dim=-1)[..., None] * values).sum(dim=-2).flatten(1)


def heads(layer, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, layer.head))


def key_value(attention, x: Tensor, position: int | None):
    """One token [b d] -> its key and value, [b h d]."""
    key, value = attention.to_keys_values(x).chunk(2, dim=-1)
    key = heads(attention, key)
    return key if position is None else turned(attention, key, position), heads(attention, value)


def turned(attention, x: Tensor, position: int) -> Tensor:
    """Rotary embedding of [b h d]: pairs (2i, 2i+1) by position times their frequency."""
    pairs = x.unflatten(-1, (-1, 2))
    angle = position * attention.positions.freqs
    cos, sin = angle.cos(), angle.sin()
    a, b = pairs.unbind(dim=-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def joined(gate, attended: Tensor, remembered: Tensor, h: Tensor) -> Tensor:
    def normed(x, norm):
        return x / (x.square().mean(dim=-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * norm.weight

    if gate.kind == "normalised":
        out = normed(attended, gate.attended_norm).sigmoid() * normed(remembered, gate.remembered_norm).sigmoid()
    elif gate.kind == "silu":
        out = attended * remembered * remembered.sigmoid()
    elif gate.kind == "convex":
        of_h, of_memory = gate.to_share.weight.chunk(2, dim=1)
        g = 1 / (1 + (-(h @ of_h.T + remembered @ of_memory.T + gate.to_share.bias)).exp())
        out = g * attended + (1 - g) * remembered
    else:
        out = attended * remembered.sigmoid()
    return out @ gate.to_out.weight.T


def window(attention, tokens: list[Tensor], persistent: list[Tensor]) -> list[Tensor]:
    """Sliding window over tokens [b d], the persistent ones [b d] always seen."""
    pairs = [key_value(attention, x, i) for i, x in enumerate(tokens)]
    first = [key_value(attention, p, None) for p in persistent]
    outs = []
    for i, x in enumerate(tokens):
        seen = first + pairs[max(i - attention.window, 0) : i + 1]
        query = turned(attention, heads(attention, attention.to_queries(x)), i)
        outs.append(attend(query, *map(list, zip(*seen, strict=True))))
    return outs


def mag(layer, x: Tensor) -> Tensor:
    tokens = list(layer.norm(x).unbind(dim=1))
    persistent = [p.expand_as(tokens[0]) for p in layer.remember.persistent.tokens]
    remembered, _ = layer.remember.memory(torch.stack(persistent + tokens, dim=1))
    attended = torch.stack(window(layer.attention, tokens, persistent), dim=1)
    return joined(layer.gate, attended, remembered[:, len(persistent) :], torch.stack(tokens, dim=1))


def mal(layer, x: Tensor) -> Tensor:
    persistent = list(layer.remember.persistent.tokens.expand(len(x), -1, -1).unbind(dim=1))
    read, _ = layer.remember.memory(torch.stack([*persistent, *x.unbind(dim=1)], dim=1))
    read = list(layer.norm(read).unbind(dim=1))
    p = len(persistent)
    return torch.stack(window(layer.attention, read[p:], read[:p]), dim=1) @ layer.to_out.weight.T


def lmm(layer, x: Tensor) -> Tensor:
    persistent = layer.remember.persistent.tokens.expand(len(x), -1, -1)
    return layer.remember.memory(torch.cat((persistent, x), dim=1))[0][:, persistent.shape[1] :]


def mac(layer, x: Tensor) -> Tensor:
    """Eq. 21 to 25. Where a segment begins the memory is kept aside for `retrieve`; token i sees what was retrieved for
    tokens up to i; the memory reads y_i, then answers y_i."""
    memory, attention, length = layer.remember.memory, layer.attention, layer.attention.segment
    x = layer.norm(x)
    persistent = [key_value(attention, p.expand(len(x), -1), None) for p in layer.persistent.tokens]
    outs, state = [], None
    for start in range(0, x.shape[1], length):
        weights = memory.init_weights(len(x)) if state is None else dict(state.states[0])
        seen = min(start, layer.looks_back)
        retrieved = memory.retrieve_memories(x[:, start - seen : start + length], weights)[:, seen:]
        pairs_of_retrieved, pairs = [], []
        for i, (token, h) in enumerate(zip(x[:, start : start + length].unbind(1), retrieved.unbind(1), strict=True)):
            pairs_of_retrieved.append(key_value(attention, h, i))
            pairs.append(key_value(attention, token, length + i))
            query = turned(attention, heads(attention, attention.to_queries(token)), length + i)
            y = attend(query, *map(list, zip(*persistent, *pairs_of_retrieved, *pairs, strict=True)))
            read, state = memory(y[:, None], state=state)
            outs.append(joined(layer.gate, y, read[:, 0], token))
    return torch.stack(outs, dim=1)
