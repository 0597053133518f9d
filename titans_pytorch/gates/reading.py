"""Reads of one page: every token reads the page that was active when its entry was written.

Letters: b batch, n tokens, h heads of all pages (page * heads + head), d features of a head, i entries (fast weights
before each chunk and after the last, see engines/written.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.common.checks import Words, wrong
from titans_pytorch.ops.positions import Reads


class EntryPages(NamedTuple):
    """The active page at each entry.

    first: the first entry. page: long [b i]. older: long [b], the page of the unfinished read group's older entry; None
    without one. heads: heads of one page. pages: number of pages.
    """

    first: int
    page: Tensor
    heads: int
    pages: int
    older: Tensor | None = None

    def at(self, entry: int) -> Tensor:
        """Return the page of one entry [b]."""
        return self.older if self.older is not None and entry < self.first else self.page[:, entry - self.first]

    def hidden(self, position: int, n: int, reads: Reads) -> Tensor:
        """Return the heads that n tokens from `position` on do not read: bool [b h n]."""
        entry = reads.entries(position, n, self.page.device) - self.first
        page = self.page[:, entry.clamp(min=0)]
        if self.older is not None:
            page = torch.where(entry < 0, self.older.unsqueeze(-1), page)
        return hidden_heads(page, self.heads, self.pages)


def hidden_heads(page: Tensor, heads: int, pages: int) -> Tensor:
    """Return the heads of all pages except each token's. page: long [b n]. -> bool [b h n]."""
    of_head = torch.arange(heads * pages, device=page.device) // heads
    return page.unsqueeze(1) != of_head.unsqueeze(-1)


def given_page(page, pages: int, batch: int, n: int) -> Tensor:
    """Return a caller's page, long [b] or [b n], for each token [b n]; ValueError for another shape or dtype."""
    if not isinstance(page, Tensor) or page.is_floating_point() or tuple(page.shape) not in ((batch,), (batch, n)):
        takes = f"the page that is read, an integer tensor of shape {(batch,)} or {(batch, n)}"
        takes += ", as the memory reads one page"
        got = Words(f"{page.dtype} {tuple(page.shape)}") if isinstance(page, Tensor) else page
        raise wrong("page", got, takes)
    page = page.long().clamp(0, pages - 1)
    return page.unsqueeze(-1).expand(batch, n) if page.ndim == 1 else page
