"""Fine-tune a model with the Trainer of transformers, save it, reload it and sample from it. Needs the extra `hf`.

python examples/fine_tune.py --out tuned                          # a new model, on a source file of Python
python examples/fine_tune.py --model converted --text my.txt --out tuned

`python -m titans_pytorch.hf.convert runs/mac converted` converts a run of `titans train` to such a model.
"""

import argparse
import sys
from pathlib import Path

from titans_pytorch.common.threads import choose_threads
from titans_pytorch.training.options import OneLineParser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, threads=True)
    parser.add_argument("--model", type=Path, help="a folder that save_pretrained wrote [a new model]")
    parser.add_argument("--text", type=Path, default=Path(argparse.__file__), help="any file [a source file of Python]")
    parser.add_argument("--out", type=Path, default=Path("tuned"), help="folder for the model [tuned]")
    parser.add_argument("--steps", type=int, default=60, help="training steps [60]")
    parser.add_argument("--length", type=int, default=128, help="bytes per row [128]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "auto"), help="cpu, or auto: an accelerator if there is one [cpu]"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        import torch  # takes seconds: after --help was answered
        from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

        from titans_pytorch import TitansConfig
        from titans_pytorch.hf import TitansForCausalLM, TitansHFConfig
    except ImportError:
        print("this example needs transformers: pip install -e '.[hf]' in a clone of this repository", file=sys.stderr)
        return 1
    set_seed(options.seed)
    try:
        text = list(options.text.read_bytes())
        if options.model is None:
            small = TitansConfig.tiny(variant="mag", window=32, chunk_size=16)
            model = TitansForCausalLM(TitansHFConfig.of(small))
        else:
            model = AutoModelForCausalLM.from_pretrained(options.model)
    except OSError as error:
        print(f"fine_tune: {' '.join(str(error).split())}", file=sys.stderr)
        return 1

    choose_threads(options.threads, model.config.d_model)
    starts = range(0, len(text) - options.length, options.length)
    rows = [{"input_ids": row, "labels": row} for row in (text[start : start + options.length] for start in starts)]
    if not rows:
        print(f"--text must have more than {options.length} bytes, got {len(text)}", file=sys.stderr)
        return 1
    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=options.device == "cpu",
        seed=options.seed,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()

    again = AutoModelForCausalLM.from_pretrained(options.out)
    prompt = torch.tensor([text[:40]])
    written = again.generate(prompt, max_new_tokens=80, do_sample=True, temperature=0.8, min_p=0.1)[0, 40:]
    print("written by the saved model:", bytes(written.tolist()).decode(errors="replace"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
