"""Read a long file as one stream, in pieces. The state is saved at the end, and the next call continues from it.

The size of the state and the cost per byte do not depend on how much was read.

python examples/stream_a_file.py --file my.txt --run runs/mac     # a model that `titans train` wrote
python examples/stream_a_file.py --file my.txt --state my.state   # an untrained model; continues from my.state
"""

import argparse
import math
import sys
from pathlib import Path
from pickle import UnpicklingError

from titans_pytorch.common.files import replacing
from titans_pytorch.common.threads import choose_threads
from titans_pytorch.models.config import TitansConfig
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.options import OneLineParser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, threads=True)
    parser.add_argument("--file", type=Path, default=Path(argparse.__file__), help="any file [a source file of Python]")
    parser.add_argument("--run", type=Path, help="the folder of a run [a small, untrained model]")
    parser.add_argument("--state", type=Path, default=Path("stream.state"), help="file for the state [stream.state]")
    parser.add_argument("--bytes", type=int, default=20_000, help="most bytes to read in this call (0: all) [20000]")
    parser.add_argument("--piece", type=int, default=1024, help="bytes per forward pass [1024]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def save(content: dict, path: Path) -> None:
    """Save atomically: if interrupted, the earlier state remains."""
    import torch

    with replacing(path) as part:
        torch.save(content, part)


def load(path: Path, device) -> dict:
    """Load what `save` wrote. Raise TrainingError for any other file."""
    import torch

    try:
        kept = torch.load(path, map_location=device, weights_only=True)
    except (UnpicklingError, EOFError, RuntimeError, ValueError, KeyError):
        kept = None
    if not isinstance(kept, dict) or kept.keys() != {"read", "nats", "cache"}:
        raise TrainingError(f"{path} is not a state that this script saved")
    return kept


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    import torch  # takes seconds: after --help was answered
    from torch.nn import functional as F
    from tqdm import tqdm

    from titans_pytorch import build_model
    from titans_pytorch.models.runs import load_run
    from titans_pytorch.training.device import resolve_device

    torch.manual_seed(options.seed)
    try:
        device = resolve_device(options.device)
        if options.run is None:
            model = build_model(TitansConfig.tiny(variant="mac", window=32, chunk_size=16), device).eval()
        else:
            model = load_run(options.run, device)[1]
        text = torch.from_file(str(options.file), size=options.file.stat().st_size, dtype=torch.uint8)
        kept = load(options.state, device) if options.state.exists() else {"read": 0, "nats": 0.0, "cache": None}
    except (OSError, TrainingError, RuntimeError) as error:
        print(f"stream: {' '.join(str(error).split())}", file=sys.stderr)
        return 1

    choose_threads(options.threads, model.config.d_model)
    read, nats, cache = kept["read"], kept["nats"], kept["cache"]
    if read:
        print(f"{options.state}: {read:,} bytes were read before")
    end = min(len(text) - 1, read + options.bytes) if options.bytes else len(text) - 1
    with torch.inference_mode(), tqdm(total=end, initial=read, unit="B", disable=None) as bar:
        while read < end:
            piece = text[read : min(read + options.piece, end) + 1].long().to(device)[None]
            logits, cache = model(piece[:, :-1], cache=cache, return_cache=True)
            nats += F.cross_entropy(logits[0].float(), piece[0, 1:], reduction="sum").item()
            read += piece.shape[1] - 1
            bar.update(piece.shape[1] - 1)
    save({"read": read, "nats": nats, "cache": cache}, options.state)
    print(f"{read:,} bytes read, {nats / max(read, 1) / math.log(2):.4f} bits per byte")
    print(f"{options.state}: {options.state.stat().st_size:,} bytes; the same command continues from here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
