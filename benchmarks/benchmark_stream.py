"""A million tokens through one memory, piece by piece: are speed and memory constant?

python benchmarks/benchmark_stream.py --output-json runs/stream.json --output-png runs/stream.png    # 1,048,576 tokens
python benchmarks/benchmark_stream.py --quick                                                        # seconds

NeuralMemory(64, chunk_size = 8, batch_size = 64, qk_rmsnorm = True, default_step_transform_max_lr = 0.1) reads random
tokens without gradients, the state carried from piece to piece. A control reads the same pieces in
alternation, with the state of the stream after its first piece. Noise of the machine affects both, so the ratio of
their speeds shows the effect of the stream's length. Recorded for each twentieth of the stream: the speed of its
fastest and of its median piece, that ratio (median over the pieces), the resident memory, the bytes of the carried
state and the size of the outputs.

Verdict: the ratios of all twentieths lie within 15 % of each other; the state has the same bytes at every mark and
resident memory grows by less than 16 MB after the first; the peak is below 1 GB over idle; outputs are finite. Exit
status 1 where outputs are not finite, 2 for bad arguments, else 0.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from harness.environment import REPOSITORY, run_record
from harness.later import torch
from harness.plots import COLOURS, new_figure, save_png, style
from harness.program import UsageError, add_engine, checked_device
from harness.resident import Watermark, resident
from harness.tables import percent, size, table
from harness.timing import DTYPES, timed
from tqdm import tqdm

from titans_pytorch.common.files import write_json
from titans_pytorch.common.threads import choose_threads
from titans_pytorch.training.options import OneLineParser

if TYPE_CHECKING:
    from speed.arms import Setup

SCHEMA = 1
MEMORY = {"chunk_size": 8, "batch_size": 64, "qk_rmsnorm": True, "default_step_transform_max_lr": 0.1}
DIM = 64
MARKS = 20
FLAT, GROWTH, PEAK = 0.15, 16e6, 1e9


@dataclass
class Mark:
    """One part of the stream. tokens: read by its end; best, median: tokens/s of its fastest and its median piece;
    to_control: speed over the control's, None where the control has not read; seconds: of the stream so far; resident:
    bytes now; state: bytes carried; rms: of its outputs."""

    tokens: int
    best: float
    median: float
    to_control: float | None
    seconds: float
    resident: int
    state: int
    rms: float


def stream(
    memory: torch.nn.Module, setup: Setup, tokens: int, piece: int, marks: int = MARKS
) -> Iterator[tuple[int, Mark | None]]:
    """Yields (tokens read, the mark of the part that ended there or None) after every piece."""
    generator = torch.Generator().manual_seed(setup.seed + 1)
    pieces = -(-tokens // piece)
    marks = min(marks, pieces)
    ends = {-(-pieces * (i + 1) // marks) for i in range(marks)}
    state, early, part, seconds = None, None, Part(), 0.0
    for index in range(pieces):
        x = torch.randn(1, min(piece, tokens - index * piece), DIM, generator=generator)
        x = x.to(setup.device, setup.parameter_dtype)
        before, control = state, None
        if early is not None and index % 2:  # the first to run finds cold caches, so the order alternates
            control = timed_read(memory, setup, x, early)[0]
        took, out, state = timed_read(memory, setup, x, before)
        if early is not None and control is None:
            control = timed_read(memory, setup, x, early)[0]
        early = early or state
        seconds += took
        if x.shape[1] == piece or not part.speeds:  # a shorter last piece has another speed
            part.speeds.append(x.shape[1] / took)
            part.ratios += [] if control is None else [control / took]
        part.squares.append(out.double().square().mean().item())
        done = index * piece + x.shape[1]
        if index + 1 not in ends:
            yield done, None
            continue
        # of the state before this piece: it is built already, so counting it does not slow the next one
        carried = state_bytes(state if before is None else before)
        yield done, part.mark(done, seconds, memory_now(setup), carried)
        part = Part()


def timed_read(memory: torch.nn.Module, setup: Setup, x: torch.Tensor, state: Any) -> tuple[float, torch.Tensor, Any]:
    """Read a piece: (seconds, output, next state)."""
    result = []

    def read():
        with torch.no_grad(), setup.autocast():
            result.extend(memory(x, state=state))

    return timed(read, setup.device), *result


@dataclass
class Part:
    """Measurements of the pieces between two marks."""

    speeds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)

    def mark(self, tokens: int, seconds: float, resident: int, state: int) -> Mark:
        ratio = statistics.median(self.ratios) if self.ratios else None
        rms = math.sqrt(statistics.fmean(self.squares))
        best, median = max(self.speeds), statistics.median(self.speeds)
        return Mark(tokens, best, median, ratio, seconds, resident, state, rms)


def memory_now(setup: Setup) -> int:
    return torch.cuda.memory_allocated() if setup.device.startswith("cuda") else resident()


def state_bytes(state: Any) -> int:
    """Return the bytes of all tensors in a state but `updates`, the history of one call."""

    def count(value) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, Mapping):
            return sum(count(v) for v in value.values())
        return sum(count(v) for v in value) if isinstance(value, tuple) else 0

    return count(tuple(state._replace(updates=None)))


def verdict(marks: list[Mark], peak_over_idle: int) -> dict[str, Any]:
    """Return each claim with its measurement and limit."""
    first = marks[1:] or marks  # the first mark still sees the allocator fill up
    growth = max(mark.resident for mark in first) - first[0].resident
    states = {mark.state for mark in marks}
    relative = spread([m.to_control for m in marks if m.to_control is not None] or [1.0])
    found = {
        "spread of the speed relative to the control": (relative, FLAT),
        "growth of resident memory": (growth, GROWTH),
        "growth of the state": (max(states) - min(states), 0),
        "peak over idle": (peak_over_idle, PEAK),
        "parts with outputs not finite": (sum(not math.isfinite(m.rms) for m in marks), 0),
    }
    claims = {name: {"got": got, "limit": limit, "met": got <= limit} for name, (got, limit) in found.items()}
    raw = {"fastest": spread([m.best for m in marks]), "median": spread([m.median for m in marks])}
    return {"claims": claims, "met": all(c["met"] for c in claims.values()), "spread_of_pieces": raw}


def spread(speeds: list[float]) -> float:
    """Return by how much the fastest exceeds the slowest: 0.15 is 15 %."""
    return max(speeds) / min(speeds) - 1


def new_memory(setup: Setup) -> torch.nn.Module:
    from titans_pytorch import NeuralMemory

    torch.manual_seed(setup.seed)
    return NeuralMemory(DIM, **MEMORY, engine=setup.engine).to(setup.device, setup.parameter_dtype)


def draw(marks: list[Mark], idle: int, path: str, subtitle: str) -> None:
    tokens = [m.tokens / 1e3 for m in marks]
    with style():
        figure = new_figure(7.5, 6.5)
        figure.suptitle(subtitle, fontsize=8, x=0.01, ha="left")
        speed, relative, memory = figure.subplots(3, 1, sharex=True)
        speed.plot(tokens, [m.best / 1e3 for m in marks], "o-", color=COLOURS[0], label="fastest piece")
        speed.plot(tokens, [m.median / 1e3 for m in marks], "o--", color=COLOURS[2], label="median piece")
        speed.set(ylabel="thousand tokens/s", title="speed, by twentieths of the stream")
        speed.set_ylim(0, 1.2 * max(m.best for m in marks) / 1e3)
        speed.legend(loc="lower right", ncols=2)
        ratios = [(m.tokens / 1e3, m.to_control) for m in marks if m.to_control is not None]
        relative.plot(*zip(*ratios, strict=True), "o-", color=COLOURS[0])
        relative.set(ylabel="ratio", ylim=(0.7, 1.3), title="speed over that of a memory that has read one piece only")
        over = [(m.resident - idle) / 1e6 for m in marks]
        memory.plot(tokens, over, "o-", color=COLOURS[0])
        memory.set(xlabel="thousand tokens read", ylabel="MB", ylim=(0, 1.4 * max(*over, 1)))
        memory.set_title(f"resident memory over idle (limit {PEAK / 1e6:.0f} MB)")
    save_png(figure, path)


def parser() -> argparse.ArgumentParser:
    p = OneLineParser(description=__doc__, threads=True)
    p.add_argument("--tokens", type=int, help="length of the stream (default: 1048576, with --quick 65536)")
    p.add_argument("--piece", type=int, help="tokens of one call (default: 1024, with --quick 512)")
    p.add_argument("--quick", action="store_true")
    add_engine(p)
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--dtype", default="float32", choices=DTYPES, help="bfloat16 is autocast")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output-json", metavar="FILE")
    p.add_argument("--output-png", metavar="FILE")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser()
    args = arguments.parse_args(argv)
    args.tokens = args.tokens if args.tokens is not None else (65536 if args.quick else 1048576)
    args.piece = args.piece if args.piece is not None else (512 if args.quick else 1024)
    for name in ("tokens", "piece"):
        if (got := getattr(args, name)) is not None and got < 1:
            arguments.error(f"{name} must be an integer of at least 1, got {got}")
    choose_threads(args.threads, DIM)
    try:
        checked_device(args.device)
    except UsageError as error:
        arguments.error(str(error))
    from speed.arms import Setup

    setup = Setup(args.device, args.dtype, args.seed, engine=args.engine)

    for _ in stream(new_memory(setup), setup, 128, 64):
        pass  # loading on first use is not part of the stream
    memory = new_memory(setup)
    watermark, marks = Watermark(setup.device), []
    with tqdm(total=args.tokens, unit="token", unit_scale=True, file=sys.stderr, disable=None) as bar:
        for done, mark in stream(memory, setup, args.tokens, args.piece):
            bar.update(done - bar.n)
            if mark is not None:
                marks.append(mark)
    used = watermark.read()
    judged = verdict(marks, used["over_idle"])
    show(marks, judged, used)

    run = run_record(vars(args), [args.seed], args.device, torch.get_num_threads(), argv and [__file__, *argv])
    if args.output_json:
        config = {"dim": DIM, **MEMORY, "engine": args.engine}
        result = {"benchmark": "stream", "schema": SCHEMA, "run": run, "memory": config, "used": used}
        write_json(args.output_json, {**result, "marks": [asdict(m) for m in marks], "verdict": judged})
    if args.output_png:
        where = f"{run['device']['name']}, {run['threads']} thread(s), {args.dtype}, pieces of {args.piece} tokens"
        draw(marks, used["idle"], args.output_png, where)
    return 0 if judged["claims"]["parts with outputs not finite"]["met"] else 1


def show(marks: list[Mark], judged: dict[str, Any], used: dict[str, int]) -> None:
    header = ("tokens", "fastest", "median", "to control", "resident over idle", "state", "rms of outputs")
    lines = [
        (
            f"{m.tokens:,}",
            f"{m.best:,.0f} tokens/s",
            f"{m.median:,.0f} tokens/s",
            "" if m.to_control is None else f"{m.to_control:.3f}",
            size(m.resident - used["idle"]),
            size(m.state),
            f"{m.rms:.3g}",
        )
        for m in marks
    ]
    print(table(header, lines, left=0))
    for name, claim in judged["claims"].items():
        shown = percent if name.startswith("spread") else str if name.startswith("parts") else size
        got, limit = shown(claim["got"]), shown(claim["limit"])
        print(f"{'met' if claim['met'] else 'NOT MET'}: {name} {got}, limit {limit}")
    raw = ", ".join(f"{name} {percent(value)}" for name, value in judged["spread_of_pieces"].items())
    print(f"spread of the pieces themselves, the machine's noise included: {raw}; {marks[-1].seconds:.1f} s in all")


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    sys.exit(main())
