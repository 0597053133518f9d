"""Reads from one page: every token asks the page that was active when the memory it reads was written.

Letters: b batch, n tokens, h internal heads (page * heads + head), d features of a head, i entries of a run (the memory
before each chunk and after the last, see engines/run.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.common.checks import Words, wrong


class EntryPages(NamedTuple):
    """page long [b i]: the active page at each entry, the first being that before chunk `first`; older [b]: that of the
    unfinished read group, where it reads an older entry."""

    first: int
    page: Tensor
    older: Tensor | None = None

    def at(self, entry: int) -> Tensor:
        """[b]."""
        return self.older if entry < self.first else self.page[:, entry - self.first]

    def read(self, position: int, n: int, group: int, chunk: int) -> Tensor:
        """The page that n tokens from absolute `position` on read: [b n]."""
        slot = torch.arange(position + 1, position + 1 + n, device=self.page.device)
        entry = slot // group * group // chunk - self.first
        if self.older is None:
            return self.page[:, entry]
        return torch.where(entry < 0, self.older.unsqueeze(-1), self.page[:, entry.clamp(min=0)])


def entry_pages(first: int, before: Tensor, written: Tensor | None) -> EntryPages:
    """first: of the chunks stored; before [b]: the page before them; written [b m]: that of each, None without any."""
    page = before.unsqueeze(-1)
    return EntryPages(first, page if written is None else torch.cat((page, written), dim=1))


def of_page(read: Tensor, page: Tensor, heads: int) -> Tensor:
    """What the heads read [b h n d], zero but for those of each token's page [b n]."""
    of_head = torch.arange(read.shape[1], device=read.device) // heads
    other = page.unsqueeze(1) != of_head.unsqueeze(-1)
    return read.masked_fill(other.unsqueeze(-1), 0.0)


def given_page(page, pages: int, batch: int, n: int) -> Tensor:
    """A caller's page, long [b] or [b n], for each token: [b n]."""
    takes = (
        f"the page that is read, an integer tensor of shape {(batch,)} or {(batch, n)}, as the memory reads one page"
    )
    if not isinstance(page, Tensor) or page.is_floating_point() or tuple(page.shape) not in ((batch,), (batch, n)):
        got = Words(f"{page.dtype} {tuple(page.shape)}") if isinstance(page, Tensor) else page
        raise wrong("page", got, takes)
    page = page.long().clamp(0, pages - 1)
    return page.unsqueeze(-1).expand(batch, n) if page.ndim == 1 else page
