"""Build a memory-as-gate language model on bytes, train it for some steps, sample from it, run it as a stream.

python examples/quick_start.py
python examples/quick_start.py --variant mac --text my.txt --steps 300
"""

import argparse
import sys
import time
from pathlib import Path

from titans_pytorch.common.threads import choose_threads
from titans_pytorch.models.config import VARIANTS, TitansConfig
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.options import OneLineParser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, threads=True)
    parser.add_argument("--variant", choices=VARIANTS, default="mag", help="which model of the family [mag]")
    parser.add_argument("--text", type=Path, default=Path(argparse.__file__), help="any file [a source file of Python]")
    parser.add_argument("--steps", type=int, default=60, help="training steps [60]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    import torch  # takes seconds: after --help was answered

    from titans_pytorch import build_model
    from titans_pytorch.training.device import resolve_device

    torch.manual_seed(options.seed)
    try:
        text = torch.frombuffer(bytearray(options.text.read_bytes()), dtype=torch.uint8).long()
        device = resolve_device(options.device)
    except (OSError, ValueError) as error:
        print(f"text: {options.text} cannot be read ({error})", file=sys.stderr)
        return 1
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 1
    text = text.to(device)
    length = 128
    if len(text) <= length:
        print(f"--text must have more than {length} bytes, got {len(text)}", file=sys.stderr)
        return 1

    # a preset, with some settings replaced; TitansConfig.load reads YAML and JSON
    config = TitansConfig.tiny(variant=options.variant, window=32, chunk_size=16)
    choose_threads(options.threads, config.model.d_model)  # a narrow model computes faster in one
    model = build_model(config, device)
    print(f"{options.variant}: {sum(p.numel() for p in model.parameters()):,} parameters")

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    began = time.perf_counter()
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(text) - length, (4,))
        rows = torch.stack([text[start : start + length + 1] for start in starts])
        loss = model(rows, return_loss=True)  # predicts each byte from the bytes before it
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step == 1 or step % 20 == 0:
            print(f"step {step:>4}: {loss.item():.3f} nats per byte, {time.perf_counter() - began:.0f} s")

    model.eval()
    prompt = text[None, :40]
    written = model.sample(prompt, 40 + 80, temperature=0.8)[0]  # the cache has a constant size
    print("written:", bytes(written.tolist()).decode(errors="replace"))

    # a stream: the logits are the same, wherever you cut it into calls
    ids = text[None, :200]
    with torch.no_grad():
        whole = model(ids)
        first, cache = model(ids[:, :77], return_cache=True)
        second, cache = model(ids[:, 77:], cache=cache, return_cache=True)
    difference = (torch.cat((first, second), dim=1) - whole).abs().max().item()
    print(f"read in two calls, the logits differ by {difference:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
