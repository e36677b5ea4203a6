"""The options of train.py, and how it refuses what does not suit."""

from __future__ import annotations

import argparse
import ast
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from vitkernels import models

DTYPES = {"off": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # of --amp


def refuse(message: object) -> NoReturn:
    """One line of one process, for what all processes find wrong."""
    if os.environ.get("RANK", "0") == "0":
        print(f"train.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def device_type(args: argparse.Namespace) -> str:
    """Where a run takes place."""
    return "cuda" if torch.cuda.is_available() and args.backend != "cpu" else "cpu"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(f"{message} (--help has all options)")


def number(of: type, least: float, above: bool = False, most: float = math.inf) -> Callable[[str], float]:
    """Reads an int or a float in a range."""

    def read(text: str) -> float:
        try:
            value = of(text)
        except ValueError:
            value = math.nan
        if (least < value if above else least <= value) and value <= most:
            return value
        bounds = f"{'above' if above else 'of at least'} {least}" + (f" and at most {most}" if most < math.inf else "")
        what = "an integer" if of is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what} {bounds}, got {text!r}")

    return read


def assignment(text: str) -> tuple[str, object]:
    """A name, and a Python value or else a string."""
    name, _, value = text.partition("=")
    if not (name and value):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, such as drop_path=0.1, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def build(description: str) -> Parser:
    parser = Parser(
        prog="python examples/train.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python examples/train.py\n"
        "  python examples/train.py --epochs 60 --resume\n"
        "  python examples/train.py --data flowers --model crossformer_small --override drop_path=0.1\n"
        "  torchrun --nproc-per-node 2 examples/train.py --parallel fsdp",
    )
    count, positive, rate = number(int, 1), number(float, 0, above=True), number(float, 0)
    group = parser.add_argument_group("model")
    names = f"of {', '.join(models.list_models())}; default: a small CrossFormer"
    group.add_argument("--model", metavar="NAME", help=names)
    arguments = "arguments of the model's class in place of its own, such as drop_path=0.1 'depths=(1, 1, 2, 1)'"
    group.add_argument("--override", nargs="+", type=assignment, default=[], metavar="NAME=VALUE", help=arguments)
    group.add_argument("--backend", choices=("triton", "cpu", "reference"), help="of the attention; default: by device")
    group = parser.add_argument_group("images")
    folder = (
        "with a folder of images for each class, of which a fifth is held out for the test, or with two such folders, "
        "train and val; default: scikit-learn's digits"
    )
    group.add_argument("--data", type=Path, metavar="FOLDER", help=folder)
    group.add_argument("--image-size", type=count, metavar="PIXELS", help="of a side; default: 224, of the digits 32")
    group.add_argument("--limit", type=count, metavar="N", help="images of each split at most, to try something out")
    loading = "processes that load images; default: 4, for the digits 0"
    group.add_argument("--workers", type=number(int, 0), metavar="N", help=loading)
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=count, default=30, metavar="N", help="default: 30")
    group.add_argument("--batch-size", type=count, default=64, metavar="N", help="of all processes; default: 64")
    group.add_argument("--lr", type=positive, metavar="RATE", help="the highest; default: 0.0025, with --model 0.0005")
    group.add_argument("--warmup", type=rate, metavar="EPOCHS", help="until it is reached; default: a tenth of all")
    group.add_argument("--weight-decay", type=rate, default=0.05, metavar="RATE", help="default: 0.05")
    share = number(float, 0, most=1)
    group.add_argument("--label-smoothing", type=share, default=0.1, metavar="SHARE", help="default: 0.1")
    group.add_argument("--clip", type=positive, default=1.0, metavar="NORM", help="of the gradient at most; default: 1")
    group.add_argument("--seed", type=number(int, 0, most=2**32 - 1), default=0, metavar="N", help="default: 0")
    group.add_argument("--amp", choices=DTYPES, help="mixed precision; default: bfloat16 on a GPU, off on a CPU")
    parts = "what each process that torchrun starts has of the model: all (ddp) or a part (fsdp); default: ddp"
    group.add_argument("--parallel", choices=("ddp", "fsdp"), help=parts)
    group = parser.add_argument_group("run")
    files = "for last.pt, best.pt, log.jsonl and curve.png, on a file system of all processes; default: runs/train"
    group.add_argument("--output", type=Path, default=Path("runs/train"), metavar="FOLDER", help=files)
    group = group.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on from the output's last.pt, with the same options")
    group.add_argument("--overwrite", action="store_true", help="begin anew where the output has a run")
    return parser


def parse(argv: list[str] | None, description: str) -> argparse.Namespace:
    parser = build(description)
    args = parser.parse_args(argv)
    args.image_size = args.image_size or (224 if args.data else 32)
    args.workers = (4 if args.data else 0) if args.workers is None else args.workers
    args.lr = args.lr or (5e-4 if args.model else 2.5e-3)
    args.amp = args.amp or ("bfloat16" if device_type(args) == "cuda" else "off")
    started = "RANK" in os.environ  # by torchrun
    if args.parallel and not started:
        parser.error(f"--parallel needs processes: torchrun --nproc-per-node 2 ... --parallel {args.parallel}")
    args.parallel = args.parallel or ("ddp" if started else None)
    if args.warmup is not None and args.warmup >= args.epochs:
        parser.error(f"--warmup must be less than the {args.epochs} epochs, got {args.warmup:g}")
    if (last := args.output / "last.pt").exists() and not (args.resume or args.overwrite):
        parser.error(f"{last} exists: --resume goes on from it, --overwrite begins anew, --output names another folder")
    return args
