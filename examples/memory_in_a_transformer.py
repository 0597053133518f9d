"""Put a memory layer into a Llama of transformers that sees one segment at a time. Needs the extra `hf`.

Each row repeats a phrase of random tokens. The Llama reads one phrase per call, so by itself it cannot predict the
tokens. A memory layer behind its first block carries the phrase from call to call. At the end the script compares with
writing switched off.

python examples/memory_in_a_transformer.py
python examples/memory_in_a_transformer.py --steps 400 --phrase 16
"""

import math
import sys

from titans_pytorch.common.threads import choose_threads
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.options import OneLineParser

parser = OneLineParser(description=__doc__, threads=True)
parser.add_argument("--steps", type=int, default=150, help="training steps [150]")
parser.add_argument("--phrase", type=int, default=12, help="tokens per phrase and segment [12]")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cpu")
if __name__ == "__main__":
    parser.parse_args()  # answers --help before torch is imported, which takes a second

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch import LMMLayer, titans_memory
from titans_pytorch.analysis.storing import storing_off
from titans_pytorch.training.device import resolve_device

TOKENS = 16


class WithMemory(nn.Module):
    """A block of the other model, then x + memory(x). The layer keeps its state between calls."""

    def __init__(self, block: nn.Module, dim: int):
        super().__init__()
        self.block = block
        self.memory = LMMLayer(dim, memory=titans_memory(dim, heads=4, chunk_size=8, init_decay_bias=-4.0))
        self.state = None

    def forward(self, hidden: Tensor, *args, **kwargs):
        out = self.block(hidden, *args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
        remembered, self.state = self.memory(hidden, self.state)
        hidden = hidden + remembered
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def build(device: torch.device) -> tuple[nn.Module, WithMemory]:
    """A new, small Llama with a memory behind its first block. A trained Llama works the same way."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dim = 64
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=dim,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    layer = model.model.layers[0] = WithMemory(model.model.layers[0], dim)
    return model.to(device), layer


def loss_on_repeats(model: nn.Module, layer: WithMemory, rows: Tensor, phrase: int) -> Tensor:
    """Mean cross entropy after the first phrase, segment by segment."""
    layer.state, losses = None, []
    for segment in rows[:, :-1].split(phrase, dim=1):
        start = len(losses) * phrase
        logits = model(segment).logits
        targets = rows[:, start + 1 : start + 1 + segment.shape[1]]
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    return torch.stack(losses[1:]).mean()


def main(argv: list[str] | None = None) -> int:
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    try:
        device = resolve_device(options.device)
        choose_threads(options.threads, 64)  # the width of the Llama above
        model, layer = build(device)
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 1
    except ImportError:
        print("this example needs transformers: pip install -e '.[hf]' in a clone of this repository", file=sys.stderr)
        return 1

    def rows(count: int) -> Tensor:
        # no token occurs twice in a phrase, so each token determines the next
        phrases = torch.rand(count, TOKENS).argsort(dim=1)[:, : options.phrase]
        return phrases.repeat(1, 4)[:, : 4 * options.phrase + 1].to(device)

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(1, options.steps + 1):
        loss = loss_on_repeats(model, layer, rows(16), options.phrase)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step == 1 or step % 25 == 0:
            print(f"step {step:>4}: {loss.item():.3f} nats per token of the repeats")

    with torch.no_grad():
        test = rows(64)
        remembered = loss_on_repeats(model, layer, test, options.phrase).item()
        with storing_off(model):
            forgotten = loss_on_repeats(model, layer, test, options.phrase).item()
    print(f"new phrases: {remembered:.3f} nats with the memory, {forgotten:.3f} with its storing switched off")
    print(f"(guessing among all tokens: {math.log(TOKENS):.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
