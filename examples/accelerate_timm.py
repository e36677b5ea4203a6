"""A timm model as it is shipped and with the attention of this package: what is replaced, what differs, the speed.

Both have the same weights and see the same random images. They take turns, so that whatever else the machine does slows
both; the medians are compared.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import statistics
import sys
import time
from types import ModuleType
from typing import NoReturn

import torch
import torch.nn.functional as F
from options import number
from torch import Tensor, nn

import vitkernels

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXAMPLES = """examples:
  python examples/accelerate_timm.py
  python examples/accelerate_timm.py maxvit_tiny_tf_224 --training --dtype bfloat16
  python examples/accelerate_timm.py mvitv2_small --batch 1 --threads 1 --seconds 60
  python examples/accelerate_timm.py swinv2_tiny_window8_256.ms_in1k --pretrained --verify
"""
_LIBRARIES: list[torch.library.Library] = []  # which live as long as torchvision


def refuse(message: str) -> NoReturn:
    print(f"accelerate_timm.py: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def parse(argv: list[str] | None) -> argparse.Namespace:
    layout, default = argparse.RawDescriptionHelpFormatter, "swin_tiny_patch4_window7_224"
    prog = "python examples/accelerate_timm.py"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    parser.error = lambda message: refuse(f"{message} (--help has all options)")
    parser.add_argument("model", nargs="?", default=default, help=f"a name that timm knows; default: {default}")
    count, positive = number(int, 1), number(float, 0, above=True)
    parser.add_argument("--batch", type=count, default=8, metavar="N", help="images at a time; default: 8")
    parser.add_argument("--size", type=count, metavar="PIXELS", help="of an image's side; default: the model's own")
    parser.add_argument("--seconds", type=positive, default=20.0, metavar="S", help="to measure for; default: about 20")
    parser.add_argument("--training", action="store_true", help="measure a training step too: forward, loss, backward")
    parser.add_argument("--verify", action="store_true", help="compare every module with what would replace it, first")
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=cuda, metavar="NAME", help="cpu, cuda or cuda:N; default: cuda if there")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32; the others by autocast")
    parser.add_argument("--threads", type=count, metavar="N", help="of the CPU; default: as many as torch chooses")
    parser.add_argument("--pretrained", action="store_true", help="download weights; default: random ones")
    return parser.parse_args(argv)


def import_timm() -> ModuleType:
    """timm imports torchvision, whose import needs its operators' names; beside a CPU build of torch it has none."""
    try:
        try:
            import torchvision  # noqa: F401
        except RuntimeError:  # operator torchvision::nms does not exist
            _LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
            for name in ("nms", "qnms"):
                _LIBRARIES[-1].define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        import timm
    except ModuleNotFoundError as error:
        refuse(f"this needs timm, and {error.name} is not installed: pip install timm")
    return timm


def create(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model, and images of a size that it takes."""
    timm, name = import_timm(), args.model
    if ":" not in name and not timm.is_model(name):  # hf-hub:... is elsewhere
        near = difflib.get_close_matches(name, timm.list_models()) or ["a name of timm.list_models()"]
        refuse(f"timm {timm.__version__} has no model {name}: try {' or '.join(near)}")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        refuse(f"--device {args.device} must be one that is there ({str(error).splitlines()[0]}): try --device cpu")
    torch.manual_seed(0)
    try:
        size = {"img_size": args.size} if args.size else {}
        model = timm.create_model(name, pretrained=args.pretrained, **size).eval().to(args.device)
        for p in () if args.pretrained else model.parameters():
            if not p.any():  # as the norms at the end of Swin V2's blocks are at first: no attention would be seen
                nn.init.normal_(p, std=0.2)
        channels, *pixels = model.default_cfg["input_size"]
        images = torch.randn(args.batch, channels, *([args.size] * 2 if args.size else pixels), device=args.device)
        step(model, images[:1], args)
    except Exception as error:  # every family refuses a size in its own way, and a download fails in many
        way = f"leave --size {args.size} out, or try a multiple of 32" if args.size else "try another model"
        refuse(f"timm cannot make and run {name} ({type(error).__name__}: {error}): {way}")
    return model, images


def step(model: nn.Module, images: Tensor, args: argparse.Namespace, training: bool = False) -> Tensor:
    """What the model says of the images; of training, all but the optimiser, which is the same for both."""
    dtype, mixed = DTYPES[args.dtype], args.dtype != "float32"
    with torch.set_grad_enabled(training), torch.autocast(images.device.type, dtype, enabled=mixed):
        out = model(images)
        if training:
            loss = F.cross_entropy(out, torch.arange(len(out), device=out.device) % out.shape[1])
    if training:
        model.zero_grad()
        loss.backward()
    return out


def bar(what: str, spent: float, total: float) -> None:
    """On a terminal's stderr; nothing else is needed for it."""
    if sys.stderr.isatty():
        done = min(round(30 * spent / total), 30)
        text = f"{'=' * done}{' ' * (30 - done)}| {what}, {max(total - spent, 0):.0f} s left" if what else ""
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)


def measure(args: argparse.Namespace, models: list[nn.Module], images: Tensor, times: dict[str, list]) -> None:
    """Fill ``times``: of every pass, pairs of seconds as shipped and accelerated."""

    def seconds(model: nn.Module, training: bool) -> float:
        start = time.perf_counter()
        step(model, images, args, training)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - start

    passes = {"inference": False, **({"training step": True} if args.training else {})}
    for name, training in passes.items():
        spent, total, rounds = 0.0, args.seconds / len(passes), 0
        bar(f"{name}: warming up", spent, total)
        for model in [model.train(training) for model in models] * 2:  # kernels are compiled and memory is found
            seconds(model, training)
        while rounds < 3 or spent < total:
            pair = [seconds(model, training) for model in models]
            times.setdefault(name, []).append(pair)
            spent, rounds = spent + sum(pair), rounds + 1
            bar(f"{name}: {rounds} rounds", spent, total)


def table(times: dict[str, list], batch: int) -> str:
    lines = [f"{'images per second':<18}{'as shipped':>12}{'accelerated':>13}{'ratio':>9}{'rounds':>8}"]
    for name, pairs in times.items():
        shipped, ours = (statistics.median(column) for column in zip(*pairs))
        lines.append(f"{name:<18}{batch / shipped:>12.2f}{batch / ours:>13.2f}{shipped / ours:>8.2f}x{len(pairs):>8}")
    return "\n".join(lines)


def compare(args: argparse.Namespace) -> int:
    model, images = create(args)
    accelerated = copy.deepcopy(model)
    report = vitkernels.accelerate(accelerated, verify=args.verify)
    print(report, end="\n\n", flush=True)
    if not report.replaced:
        why = "as the report says: try another model; python -m vitkernels info lists what can run here"
        print(f"accelerate_timm.py: nothing in {args.model} was accelerated, {why}", file=sys.stderr)
        return 1
    size, shape = sum(p.numel() for p in model.parameters()) / 1e6, " x ".join(map(str, images.shape))
    where = f"{args.dtype}, {args.device}, CPU threads {torch.get_num_threads()}"
    print(f"{args.model}: {size:.1f} million parameters, images {shape}, {where}")
    expected, found = (step(each, images, args).float() for each in (model, accelerated))
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"largest difference of the outputs: {difference:.1e} of the largest magnitude", end="\n\n", flush=True)
    times, status = {}, 0
    try:
        measure(args, [model, accelerated], images, times)
    except KeyboardInterrupt:
        status = 130
    finally:
        bar("", 0, 1)
    print(table(times, args.batch) if times else "interrupted before anything was measured")
    return status


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        return compare(args)
    except torch.OutOfMemoryError:
        refuse(f"{args.device} has too little memory for {args.batch} images at a time: try a smaller --batch")
    except KeyboardInterrupt:  # before the measurement
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
