"""Pages: copies of the heads; each row of the batch writes one page at a time. At a chunk above the limit, the row
switches to the page that a router selects.

A router is a function of (page, complexity, angle), elementwise. A chunk is therefore a table, page before -> page
after, and tables compose: the pages of all chunks take log2(m) gathers, for every router.

Letters: b batch, m chunks, p pages.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pytorch.common.checks import Words, wrong

Router = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class SequentialRouter:
    """Selects the next page: (page + 1) mod p."""

    pages: int
    uses_phase = False

    def __call__(self, page: Tensor, complexity: Tensor, angle: Tensor | None) -> Tensor:
        return (page + 1) % self.pages


@dataclass(frozen=True)
class KeyedRouter:
    """Selects the page by the arc of the circle that contains the phase angle; without a phase, the next page."""

    pages: int
    uses_phase = True

    def __call__(self, page, complexity, angle):
        if angle is None:
            return (page + 1) % self.pages
        return circle_bucket(angle, self.pages)


@dataclass(frozen=True)
class HierarchicalRouter:
    """Selects a coarse page by complexity and a fine page within it by the phase angle (without a phase, the next one),
    then mixes: round((1 - mix) sequential + mix hierarchical).
    """

    coarse: int
    fine: int
    mix: float = 1.0
    uses_phase = True

    def __call__(self, page, complexity, angle):
        pages = self.coarse * self.fine
        following = (page + 1) % pages
        coarse = bucket(complexity * self.coarse, self.coarse)
        fine = following % self.fine if angle is None else circle_bucket(angle, self.fine)
        chosen = coarse * self.fine + fine
        return ((1.0 - self.mix) * following.double() + self.mix * chosen.double()).round().long()


def bucket(x: Tensor, count: int) -> Tensor:
    """Return floor(x) as an index below `count`; NaN gives a valid index too."""
    return x.floor().long().clamp(0, count - 1)


def circle_bucket(angle: Tensor, count: int) -> Tensor:
    """Return the index of the arc that contains the angle, among `count` equal arcs from -pi on."""
    return bucket((angle + math.pi) / (2 * math.pi) * count, count)


def first_of_window(exceeds: Tensor, starts: Tensor, spent: Tensor | None = None) -> Tensor:
    """Return True at the first chunk of each window that exceeds the limit.

    exceeds: bool [b m]. starts: long [m], the first chunk of each chunk's window. spent: bool [b m], whether the window
    had its switch in an earlier call.
    """
    before = exceeds.long().cumsum(dim=-1) - exceeds.long()
    first = exceeds & (before == before[:, starts])
    return first if spent is None else first & ~spent


def turn_pages(page: Tensor, switched: Tensor, complexity: Tensor, angle: Tensor | None, router: Router, pages: int):
    """Return the page of each chunk, after a switch at that chunk: long [b m].

    page: long [b], the page before the first chunk. switched: bool [b m]. complexity: [b m]. angle: [b m] or None. The
    router's result (any shape that broadcasts) is clamped to the existing pages.
    """
    b, m = switched.shape
    stay = torch.arange(pages, device=page.device).expand(b, m, pages)
    named = _named(router(stay, complexity.unsqueeze(-1), None if angle is None else angle.unsqueeze(-1)), stay)
    table = torch.where(switched.unsqueeze(-1), named.clamp(0, pages - 1), stay)
    reach = 1
    while reach < m:  # entry i leads over the last 2 * reach chunks
        table = torch.cat((table[:, :reach], table[:, reach:].gather(-1, table[:, :-reach])), dim=1)
        reach *= 2
    return table.gather(-1, page.long()[:, None, None].expand(b, m, 1)).squeeze(-1)


def _named(page: Tensor | int, stay: Tensor) -> Tensor:
    """Check a router's result; return it as long of a shape that broadcasts with the pages given."""
    if isinstance(page, int):
        return torch.full_like(stay, page)
    if not isinstance(page, Tensor):
        raise wrong("page_router", Words(f"a router that names {type(page).__name__}"), "pages as a tensor")
    sizes = zip(reversed(page.shape), reversed(stay.shape), strict=False)
    if page.ndim > stay.ndim or any(a not in (1, b) for a, b in sizes):
        got = Words(f"a router that names pages of shape {tuple(page.shape)}")
        raise wrong("page_router", got, f"one for each of {tuple(stay.shape)}, elementwise")
    return page.long()


def naive_turn_pages(page, exceeds, windows, spent, complexity, angle, router, pages):
    """`turn_pages` and `first_of_window` as a loop over rows and chunks. windows [m]: the window of each chunk. spent
    [b]: the window in which the row has switched already. Returns (page [b m], switched [b m]).
    """
    page_of, switched = torch.zeros_like(exceeds, dtype=torch.long), torch.zeros_like(exceeds)
    for row in range(len(page)):
        now, last = page[row], int(spent[row])
        for i in range(exceeds.shape[1]):
            if exceeds[row, i] and int(windows[i]) != last:
                now = router(now, complexity[row, i], None if angle is None else angle[row, i]).clamp(0, pages - 1)
                last, switched[row, i] = int(windows[i]), True
            page_of[row, i] = now
    return page_of, switched


def active_rows(page: Tensor, pages: int, heads: int) -> tuple[Tensor, Tensor]:
    """Return the heads that each chunk is written to, bool [(b p heads) m], and their rows, long [(b heads) m]."""
    b, m = page.shape
    of_page = torch.arange(b, device=page.device).unsqueeze(-1) * pages + page  # [b m]
    rows = of_page.unsqueeze(1) * heads + torch.arange(heads, device=page.device).unsqueeze(-1)
    active = page.unsqueeze(1) == torch.arange(pages, device=page.device).unsqueeze(-1)
    return active.repeat_interleave(heads, dim=1).flatten(0, 1), rows.flatten(0, 1)
