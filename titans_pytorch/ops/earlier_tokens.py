"""Which tokens stand before a token, where rows have padding and hold several texts.

Letters: b rows, n tokens of a call, k tokens that are looked back on, w features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EarlierTokens:
    """The k tokens of its text before each token of a call, padding left out.

    index: their places, nearest first, in the k tokens carried from the call before and the n of this one: long
    [b n+1 k], the last row being of the token after the call. valid: False where there is none, bool [b n+1 k].
    """

    index: Tensor
    valid: Tensor

    def shifted(self, x: Tensor, back: int) -> Tensor:
        """Return the tokens `back` before each of a call, x [b k+n w] -> [b n w]; zeros where there is none."""
        return self._taken(x, slice(None, -1), back - 1)

    def tail(self, x: Tensor) -> Tensor:
        """Return what the next call looks back on, the oldest first: x [b k+n w] -> [b k w]."""
        k = self.index.shape[2]
        return torch.cat([self._taken(x, slice(-1, None), i) for i in reversed(range(k))], dim=1) if k else x[:, :0]

    def _taken(self, x: Tensor, rows: slice, i: int) -> Tensor:
        index, valid = (t[:, rows, i, None] for t in (self.index, self.valid))
        return x.gather(1, index.expand(-1, -1, x.shape[2])) * valid


def naive_earlier_tokens(present: Tensor, resets: Tensor, back: int) -> EarlierTokens:
    """Find them by walking back from each token: present, resets bool [b n]."""
    b, n = present.shape
    index = torch.zeros(b, n + 1, back, dtype=torch.long)
    valid = torch.zeros(b, n + 1, back, dtype=torch.bool)
    for row in range(b):
        for token in range(n + 1):
            found, at = 0, token
            while found < back and at > -back and not (at < n and at >= 0 and resets[row, at]):
                at -= 1
                if at < 0 or present[row, at]:
                    index[row, token, found], valid[row, token, found] = at + back, True
                    found += 1
    return EarlierTokens(index, valid)


def earlier_tokens(present: Tensor, resets: Tensor, back: int) -> EarlierTokens:
    """Find the `back` tokens before each token. What the call before carried are tokens of the first text.

    present: bool [b n], False for padding. resets: bool [b n], True where a text begins.
    """
    b, n = present.shape
    there = torch.cat((present.new_ones(b, back), present), dim=1)
    text = torch.cat((resets.new_zeros(b, back), resets), dim=1).long().cumsum(dim=1)
    before = torch.nn.functional.pad(there.long().cumsum(dim=1), (1, 0))  # tokens in front of each place
    # the place of the i-th token of a row; padding writes to a place that nobody reads
    places = torch.arange(back + n, device=present.device).expand(b, -1)
    rank = torch.where(there, before[:, :-1], back + n)
    place = places.new_zeros(b, back + n + 1).scatter(1, rank, places)
    wanted = before[:, back:, None] - 1 - torch.arange(back, device=present.device)
    index = place.gather(1, wanted.flatten(1)).view(b, n + 1, back)
    own = torch.cat((text[:, back:], text[:, -1:]), dim=1) if n + back else text.new_zeros(b, 1)
    return EarlierTokens(index, text.gather(1, index.flatten(1)).view_as(index) == own.unsqueeze(-1))
