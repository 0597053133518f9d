"""Options of all commands. --help needs nothing else, so torch is not imported here."""

import math
from argparse import ArgumentParser, ArgumentTypeError
from contextlib import suppress

from titans_pytorch.cli.settings import NAMED, start_of, start_options
from titans_pytorch.training.config import LARGEST_SEED
from titans_pytorch.training.errors import TrainingError
from titans_pytorch.training.options import OneLineParser, number, read_arguments, whole_numbers

__all__ = [
    "SEARCH",
    "TRAIN",
    "analyze_options",
    "evaluate_options",
    "list_settings",
    "memory_check_options",
    "sample_options",
    "search_options",
    "train_options",
]

TRAIN = """titans train: train one of the family's models on text or a task.

titans train --config configs/mac.yaml                      # settings from a file
titans train --config configs/mac.yaml --lr 1e-3 --steps 50 # any setting by name (also as --training.lr 1e-3)
titans train --preset tiny --task recall --pairs 4          # a task in place of text
titans train --config configs/mac.yaml --check               # check all settings, print them and stop
titans train --out runs/mac --resume                        # go on after Ctrl-C or a crash
torchrun --nproc-per-node 2 -m titans_pytorch.cli train ... # several processes, one model
"""

SEARCH = """titans search: train every combination of some settings, choose the best, and train it again on other seeds.

titans search --config configs/copy.yaml --steps 100 --grid lr=1e-3,3e-3 --grid max_step=0.1,0.5 --seeds 0,1
titans search --out runs/search --config ... --grid ...   # stopped, then started again: finished runs are kept

Chosen by the mean over --seeds of --metric; what --report-seeds then give is the figure to state.
"""

SAMPLE = """titans sample: let a trained model go on with a text.

titans sample runs/mac --prompt "The memory" --new-bytes 200
titans sample runs/mac --prompt-file start.txt --temperature 0 --no-storing
titans sample runs/mac --top-k 40 --top-p 0.9              # filters, applied in the order top-k, top-p, min-p
"""

ANALYZE = """titans analyze: what the memories of a trained model do along a text.

titans analyze runs/mac --length 2048                # on the run's own held-out text
titans analyze runs/mac --text book.txt --out look   # writes look/memory.png and look/memory.json
"""

MEMORY_CHECK = """titans memory-check: does the memory change while the model reads, and does that help?

Measured against the same model with storing switched off, on the same rows.

titans memory-check runs/mac                  # held-out text, or the run's task
titans memory-check runs/mac --length 8192 --rows 32 --json check.json
"""

EVALUATE = """titans eval: measure a trained model again: bits per byte of a text, or accuracy on a task, at any length.

titans eval runs/mac                                   # as at the end of training
titans eval runs/mac --text book.txt --length 512 4096 # bits per byte, each window read from its start
titans eval runs/copy --length 64 1024 --rows 200      # a run trained on a task
"""

TEXT = "any text, plain, .gz, .bz2, .xz or .zip [the run's own held-out part]"

whole = number(int, "a whole number of at least 1", lambda n: n >= 1)
seed_number = number(int, f"a whole number from 0 to {LARGEST_SEED}", lambda n: 0 <= n <= LARGEST_SEED)
temperature = number(float, "a number of at least 0", lambda x: 0 <= x < math.inf)
share = number(float, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
share_or_none = number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)


def parser_for(prog: str, description: str) -> ArgumentParser:
    """A parser with the options that all these commands share."""
    parser = OneLineParser(prog, description, threads=True)
    parser.add_argument("run", metavar="RUN", help="the folder of a run of titans train or train_mac.py")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or another of torch [auto]")
    return parser


def sample_options() -> ArgumentParser:
    found = parser_for("titans sample", SAMPLE)
    found.add_argument("--prompt", metavar="TEXT", help="what to continue (a line's end where neither is given)")
    found.add_argument("--prompt-file", metavar="FILE", help="or a file that holds it, of any length")
    found.add_argument(
        "--new-bytes", "--length", type=whole, default=256, metavar="N", help="bytes to write after the prompt [256]"
    )
    found.add_argument(
        "--temperature", type=temperature, default=0.8, metavar="X", help="0: the likeliest each time [0.8]"
    )
    found.add_argument("--top-k", type=whole, metavar="N", help="only the N likeliest [off]")
    found.add_argument("--top-p", type=share, metavar="P", help="only the likeliest, of probability P together [off]")
    found.add_argument(
        "--min-p",
        type=share_or_none,
        metavar="P",
        help="none less likely than P times the likeliest [0.1, or 0 beside the other two]",
    )
    found.add_argument("--seed", type=seed_number, default=0, metavar="N", help="seed of the random choices [0]")
    found.add_argument("--no-storing", action="store_true", help="with storing in memory switched off")
    return found


def analyze_options() -> ArgumentParser:
    found = parser_for("titans analyze", ANALYZE)
    found.add_argument("--text", metavar="FILE", help=TEXT)
    found.add_argument("--length", type=whole, default=1024, metavar="N", help="tokens to read [1024]")
    found.add_argument("--piece", type=whole, default=32, metavar="N", help="tokens between looks at the weights [32]")
    found.add_argument("--out", metavar="DIR", help="where memory.png and memory.json are written [RUN/analysis]")
    return found


def memory_check_options() -> ArgumentParser:
    found = parser_for("titans memory-check", MEMORY_CHECK)
    found.add_argument("--text", metavar="FILE", help=TEXT)
    found.add_argument("--length", type=whole, metavar="N", help="tokens of a row [those of training]")
    found.add_argument("--rows", type=whole, default=32, metavar="N", help="rows to measure on [32]")
    found.add_argument("--batch-size", type=whole, default=8, metavar="N", help="rows in one pass [8]")
    found.add_argument("--json", metavar="FILE", help="also write the result here")
    return found


def evaluate_options() -> ArgumentParser:
    found = parser_for("titans eval", EVALUATE)
    found.add_argument("--text", metavar="FILE", help=TEXT)
    found.add_argument("--length", type=whole, nargs="+", metavar="N", help="tokens of a row [those of training]")
    found.add_argument("--rows", type=whole, default=200, metavar="N", help="rows of a task [200]")
    limit = "only the first bytes of the text, this many [of the run's own text its eval_limit, of --text all]"
    found.add_argument("--limit", type=whole, metavar="N", help=limit)
    found.add_argument("--json", metavar="FILE", help="also write the result here")
    return found


def train_options(parser: ArgumentParser) -> None:
    start_options(parser)
    parser.add_argument("--out", metavar="DIR", help="where the run is kept (runs/ and the configuration's name)")
    parser.add_argument("--check", action="store_true", help="check the settings, print them, and stop")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")


def grid_option(text: str) -> tuple[str, list[str]]:
    """`lr=1e-3,3e-3` as a name and the texts of its values."""
    name, equals, values = text.partition("=")
    parts = [part.strip() for part in values.split(",") if part.strip()]
    if not equals or not parts:
        raise ArgumentTypeError(f"must be NAME=VALUE,VALUE,..., got {text!r}")
    return name.strip().rpartition(".")[2].replace("-", "_"), parts


def search_options(parser: ArgumentParser) -> None:
    start_options(parser)
    parser.add_argument("--grid", type=grid_option, action="append", metavar="NAME=V,V,...", help="values to try")
    parser.add_argument("--seeds", type=whole_numbers, metavar="N,N,...", help="seeds to choose by [0]")
    parser.add_argument("--report-seeds", type=whole_numbers, metavar="N,N,...", help="seeds for the best one [100]")
    parser.add_argument("--out", metavar="DIR", help="where the runs and search.json are kept [runs/search]")


def list_settings(name: str, argv: list[str]) -> None:
    """Print --help of train and search, with the settings of the configuration that `argv` names, and exit. Returns
    where there is no such configuration.
    """
    described = {"train": (TRAIN, train_options), "search": (SEARCH, search_options)}
    with suppress(TrainingError):
        read_arguments(f"titans {name}", described[name][0], argv, described[name][1], start_of, **NAMED)
