"""Selection of exactly k largest entries, also among equal values."""

from torch import Tensor


def top_k_mask(values: Tensor, k: int | Tensor) -> Tensor:
    """Return True at the k largest of the last dim. values [.. d], k in [1, d] an int or long [.. 1] -> bool [.. d].

    Of equal values those with lower index are taken, on every device, so exactly k are kept.
    """
    if isinstance(k, int):
        least = values.topk(k, dim=-1).values[..., -1:]
    else:
        least = values.sort(dim=-1, descending=True).values.gather(-1, k - 1)
    above, tied = values > least, values == least
    room = k - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= room))


def adaptive_k(values: Tensor, ratio: float, least: int) -> Tensor:
    """Return ceil(tanh(mean |values|) * ratio * d) in [least, d] for each token. values [.. d] -> long [.. 1]."""
    d = values.shape[-1]
    k = (values.detach().abs().mean(dim=-1, keepdim=True).tanh() * (ratio * d)).ceil()
    return k.nan_to_num(least).clamp(least, d).long()
