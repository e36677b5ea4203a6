"""Train a model of the package on images: handwritten digits, or a folder with a folder of images for each class.

Without arguments, a small CrossFormer learns scikit-learn's digits of 8 x 8 pixels, enlarged. The checkpoint of every
epoch holds what the next one depends on: a run that was interrupted goes on as if it had not been, on a CPU bit for
bit. With torchrun, several processes share every batch; each has the whole model (ddp) or a part of its parameters
(fsdp), and a checkpoint of the one fits the other, and a single process. To use one elsewhere:

  saved = torch.load("runs/train/best.pt", weights_only=True)
  model = create_model(**saved["build"])
  model.load_state_dict(saved["model"])
"""

from __future__ import annotations

import argparse
import math
import os
import reprlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import display
import options
import torch
import torch.distributed as dist
import torch.nn.functional as F
from options import refuse
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from vitkernels import (
    CrossShapedWindowAttention,
    FeatureSpaceAttention,
    LongShortDistanceAttention,
    MaxSA,
    MultiScaleAttention,
    WindowAttention,
    models,
)

# stages of 8 x 8 and of 4 x 4 tokens, each with a block of short-distance and one of long-distance attention
SMALL = {
    "name": "crossformer_tiny", "embed_dim": 64, "depths": (2, 2), "heads": (2, 4), "group_size": (4, 2),
    "interval": 2, "patch_size": (4, 8), "drop_path": 0.0,
}  # fmt: skip
ATTENTION = (
    LongShortDistanceAttention, WindowAttention, CrossShapedWindowAttention, FeatureSpaceAttention, MaxSA,
    MultiScaleAttention,
)  # fmt: skip
POSITIONS = ("bias_table", "rel_pos", "pos_embed", "cls_token")  # in the names of parameters that multiply nothing
# options that a run keeps to the end; more epochs, another backend, amp or number of processes may come
KEPT = ("image_size", "batch_size", "lr", "weight_decay", "warmup", "label_smoothing", "clip", "seed")


@dataclass(frozen=True)
class Team:
    """The processes that share every batch, and which of them this one is."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def sum(self, x: Tensor) -> Tensor:
        """In place, of a tensor that every process has."""
        if self.world > 1:
            dist.all_reduce(x)
        return x


@contextmanager
def processes(args: argparse.Namespace) -> Iterator[Team]:
    """Those that torchrun started, or this one alone."""
    device = torch.device(options.device_type(args))
    if not args.parallel:
        yield Team(device)
        return
    if device.type == "cuda":
        found, wanted = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
        if wanted > found:
            refuse(f"{wanted} processes need as many GPUs, found {found}: torchrun --nproc-per-node {found} ...")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Team(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@dataclass
class Run:
    """What learns, and what its checkpoints hold."""

    args: argparse.Namespace
    about: dict  # how the model is built, its classes, the options that shape the run
    model: nn.Module
    forward: nn.Module  # the model, or what shares its gradients between the processes
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    history: list[dict] = field(default_factory=list)  # of every epoch: losses of its steps, accuracy, seconds

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, options.DTYPES[self.args.amp], enabled=self.args.amp != "off")

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Learn from a batch; the loss before."""
        with self.autocast(images.device):
            loss = F.cross_entropy(self.forward(images), labels, label_smoothing=self.args.label_smoothing)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return loss.detach()

    def state(self) -> dict:
        """Asked of all processes; the first one has whole tensors."""
        whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        return {
            **self.about,
            "model": states.get_model_state_dict(self.model, options=whole),
            "optimizer": states.get_optimizer_state_dict(self.model, self.optimizer, options=whole),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
        }

    def load(self, saved: dict) -> None:
        whole = states.StateDictOptions(full_state_dict=True)
        states.set_optimizer_state_dict(self.model, self.optimizer, saved["optimizer"], options=whole)
        states.set_model_state_dict(self.model, saved["model"], options=whole)
        self.schedule.load_state_dict(saved["schedule"])
        if saved["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        self.history = saved["history"]


def begin(args: argparse.Namespace, data: datasets.Data, team: Team) -> Run:
    """The model with its first weights, spread over the processes, and what trains it."""
    build = {**({"name": args.model} if args.model else SMALL), "in_channels": data.channels}
    build |= {"num_classes": len(data.classes), **dict(args.override)}
    model = create(build, args, team)
    forward = model
    if args.parallel == "fsdp":
        shard(model, team)
    elif args.parallel == "ddp":
        forward = DistributedDataParallel(model)
    groups = ([], [])
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and not any(part in name for part in POSITIONS)].append(parameter)
    rates = (0.0, args.weight_decay)
    groups = [{"params": group, "weight_decay": rate} for group, rate in zip(groups, rates) if group]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    steps = len(data.train) // args.batch_size
    warmup = round(steps * (args.epochs / 10 if args.warmup is None else args.warmup))
    schedule = LambdaLR(optimizer, lambda step: rate_at(step, warmup, steps * args.epochs))
    scaler = torch.amp.GradScaler(team.device.type, enabled=args.amp == "float16")
    settings = {name: getattr(args, name) for name in KEPT} | {"images": len(data.train)}
    about = {"build": build, "classes": data.classes, "settings": settings}
    return Run(args, about, model, forward, optimizer, schedule, scaler)


def create(build: dict, args: argparse.Namespace, team: Team) -> nn.Module:
    torch.manual_seed(args.seed)
    try:
        model = models.create_model(**build, backend=args.backend).to(team.device)
        with torch.no_grad():  # a size or a backend that does not suit shows here
            model.eval()(torch.zeros(1, build["in_channels"], args.image_size, args.image_size, device=team.device))
    except (ValueError, TypeError, RuntimeError) as error:
        refuse(error)
    return model


def shard(model: nn.Module, team: Team) -> None:
    """Spread the parameters; those of a block, whatever the family, come together when its turn comes."""
    mesh = init_device_mesh(team.device.type, (team.world,))
    for module in reversed(list(model.modules())):  # the inner ones first
        if module is model or any(isinstance(child, ATTENTION) for child in module.children()):
            fully_shard(module, mesh=mesh)


def rate_at(step: int, warmup: int, total: int) -> float:
    """Of the highest learning rate: up in a line, then down along half a cosine."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * min((step - warmup) / max(total - warmup, 1), 1))


def loader(dataset: Dataset, batches: list[datasets.Batch], args: argparse.Namespace, team: Team) -> Iterator:
    """Images and labels, on the device."""
    cuda = team.device.type == "cuda"
    for batch in DataLoader(dataset, None, sampler=batches, num_workers=args.workers, pin_memory=cuda):
        yield [x.to(team.device, non_blocking=True) for x in batch]


def learn(run: Run, data: datasets.Data, team: Team, tick: Callable[[int, Tensor], None]) -> list[float]:
    """An epoch; the loss of every step."""
    args, epoch, losses = run.args, len(run.history) + 1, []
    torch.manual_seed((args.seed * 100_003 + epoch) * 4_099 + team.rank)  # stochastic depth, dropout
    batches = datasets.training_batches(len(data.train), args.batch_size, args.seed, epoch, team.rank, team.world)
    run.model.train()
    for images, labels in loader(data.train, batches, args, team):
        losses.append(run.step(images, labels))
        tick(epoch, losses[-1])
    for buffer in run.model.buffers():  # BatchNorm's statistics, of which every process has those of its share
        if buffer.is_floating_point():
            team.sum(buffer).div_(team.world)
    return team.sum(torch.stack(losses)).div_(team.world).tolist()


@torch.no_grad()
def accuracy(run: Run, data: datasets.Data, team: Team) -> float:
    """The share of the test's images whose class is found."""
    batches = datasets.test_batches(len(data.test), run.args.batch_size, team.rank, team.world)
    own = len(range(team.rank, len(data.test), team.world))  # an image after these is a repetition
    run.model.eval()
    hits = []
    for images, labels in loader(data.test, batches, run.args, team):
        with run.autocast(team.device):
            hits.append(run.model(images).argmax(1) == labels)
    return team.sum(torch.cat(hits)[:own].sum()).item() / len(data.test)


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Put what ``write`` makes in place of ``path``, which is whole at every moment."""
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def keep(run: Run, team: Team) -> None:
    """Write the checkpoint of an epoch, and its lines of the log."""
    state, folder = run.state(), run.args.output
    if team.rank:
        return
    found = [epoch["accuracy"] for epoch in run.history]
    if found[-1] > max(found[:-1], default=-1):
        replace(folder / "best.pt", lambda path: torch.save(state, path))
    replace(folder / "last.pt", lambda path: torch.save(state, path))
    with open(folder / "log.jsonl", "a") as file:
        file.write(display.log(run.history, len(run.history) - 1))


def resume(run: Run) -> None:
    """Load the last checkpoint, which must be of the same run."""
    path = run.args.output / "last.pt"
    if not path.exists():
        refuse(f"--resume needs a checkpoint, there is no {path}: leave --resume out, or name the run's --output")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        before, now = ({"classes": x["classes"], **x["build"], **x["settings"]} for x in (saved, run.about))
    except Exception as error:  # of whatever another program, or a full disk, has left there
        refuse(f"{path} is no checkpoint of this program ({type(error).__name__}): name another --output")
    if changed := [name for name in before | now if before.get(name) != now.get(name)]:
        shown = (f"{n} {reprlib.repr(before.get(n))}, not {reprlib.repr(now.get(n))}" for n in changed)
        refuse(f"--resume goes on as {path} began, with {'; '.join(shown)}: give the same, or another --output")
    run.load(saved)


def train(run: Run, data: datasets.Data, team: Team) -> None:
    """All epochs that are left, each with its test and its checkpoint."""
    args, epochs, steps = run.args, run.args.epochs, len(data.train) // run.args.batch_size
    with display.progress(len(run.history) * steps, epochs * steps, team.rank == 0) as (tick, line):
        while len(run.history) < epochs:
            start = time.perf_counter()
            losses = learn(run, data, team, tick)
            seconds = time.perf_counter() - start
            name = f"epoch {len(run.history) + 1}/{epochs}"
            if not all(map(math.isfinite, losses)):
                refuse(f"the loss of {name} is not finite: try a lower --lr, a longer --warmup, or --amp off")
            found = accuracy(run, data, team)
            run.history.append({"losses": losses, "accuracy": found, "seconds": seconds})
            keep(run, team)
            speed = f"{steps * args.batch_size / seconds:.0f} images/s"
            line(f"{name}: loss {sum(losses) / steps:.3f}, test accuracy {100 * found:.2f} %, {speed}")


def fit(args: argparse.Namespace, data: datasets.Data, team: Team) -> int:
    """A run from its first or its last epoch; the exit status."""
    start, folder = time.perf_counter(), args.output
    if args.batch_size % team.world:
        refuse(f"--batch-size must be a multiple of the {team.world} processes that share it, got {args.batch_size}")
    run = begin(args, data, team)
    if args.resume:
        resume(run)
    if team.rank == 0:
        for name in () if args.resume else ("last.pt", "best.pt", "curve.png"):
            (folder / name).unlink(missing_ok=True)
        replace(folder / "log.jsonl", lambda path: path.write_text(display.log(run.history)))
        build, size = run.about["build"], sum(p.numel() for p in run.model.parameters()) / 1e6
        print(f"{build['name']}, {size:.2f} million parameters, {team.world} x {team.device.type}, amp {args.amp}")
        print(f"{len(data.train)} images for training, {len(data.test)} for the test", flush=True)
    status = 0
    try:
        train(run, data, team)
    except KeyboardInterrupt:
        status = 130
    except datasets.Unreadable as error:  # from another process it comes with its traceback
        raise SystemExit(f"train.py: {str(error).strip().splitlines()[-1]}") from None
    if team.rank == 0:
        if run.history:
            replace(folder / "curve.png", lambda path: display.draw(run.history, path))
            report(run, (time.perf_counter() - start) / 60)
        if status:
            way = "the same command with --resume goes on" if run.history else "before the first checkpoint"
            print(f"interrupted: {way}", file=sys.stderr)
    return status


def report(run: Run, minutes: float) -> None:
    folder, found = run.args.output, [100 * epoch["accuracy"] for epoch in run.history]
    images = run.args.batch_size * sum(len(epoch["losses"]) for epoch in run.history)
    speed = images / sum(epoch["seconds"] for epoch in run.history)
    print(f"test accuracy {found[-1]:.2f} % after {len(found)} epochs, {max(found):.2f} % at best")
    print(f"{minutes:.2f} minutes, {speed:.0f} images/s in training")
    print(f"picture: {folder / 'curve.png'}")
    print(f"checkpoints: {folder / 'last.pt'}, {folder / 'best.pt'}")


def main(argv: list[str] | None = None) -> int:
    args = options.parse(argv, __doc__)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        data = datasets.load(args.data, args.image_size, args.limit)
    except (ValueError, OSError) as error:
        refuse(error)
    except ModuleNotFoundError as error:
        refuse(f"{error.name} is not installed: pip install scikit-learn pillow")
    if len(data.train) < args.batch_size:
        refuse(f"--batch-size must be at most the {len(data.train)} images for training, got {args.batch_size}")
    try:
        with processes(args) as team:
            return fit(args, data, team)
    except KeyboardInterrupt:  # before the first epoch
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
