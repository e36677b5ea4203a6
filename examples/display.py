"""How train.py shows a run: a bar while it learns, a log of its losses, a picture of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

LOSS_COLOR, ACCURACY_COLOR = "#3f6fd0", "#d9480f"


@contextmanager
def progress(
    done: int, steps: int, shown: bool
) -> Iterator[tuple[Callable[[int, Tensor], None], Callable[[str], None]]]:
    """Two functions, on stderr: for the epoch and the loss of each of ``steps`` steps, which advance a bar on a
    terminal, and for a line at the end of an epoch.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        Console = None
    if not shown:
        yield lambda epoch, loss: None, lambda line: None
        return
    if Console is None or not sys.stderr.isatty():
        yield lambda epoch, loss: None, lambda line: print(line, file=sys.stderr, flush=True)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as bar:
        task = bar.add_task("", total=steps, completed=done)

        def tick(epoch: int, loss: Tensor) -> None:
            if bar.tasks[task].completed % 10 == 0:  # to read a loss is to wait for the device
                bar.update(task, description=f"epoch {epoch}, loss {loss.item():.3f}")
            bar.advance(task)

        yield tick, bar.console.print


def log(history: list[dict], first: int = 0) -> str:
    """JSON lines of the epochs from ``first``: one for every step, and one for the epoch after its steps."""
    lines, steps = [], sum(len(epoch["losses"]) for epoch in history[:first])
    for number, epoch in enumerate(history[first:], first + 1):
        lines += [{"epoch": number, "step": step, "loss": loss} for step, loss in enumerate(epoch["losses"], steps + 1)]
        lines += [{"epoch": number, "accuracy": epoch["accuracy"], "seconds": epoch["seconds"]}]
        steps += len(epoch["losses"])
    return "".join(json.dumps(line) + "\n" for line in lines)


def draw(history: list[dict], path: Path) -> None:
    """The loss of every step, its mean over as many steps as an epoch has, and the accuracy after every epoch."""
    losses = torch.tensor([loss for epoch in history for loss in epoch["losses"]])
    width = len(history[0]["losses"])
    steps, ends = torch.arange(1, len(losses) + 1), width * torch.arange(1, len(history) + 1)
    accuracies = [100 * epoch["accuracy"] for epoch in history]
    figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
    right = left.twinx()
    left.plot(steps, losses, color=LOSS_COLOR, alpha=0.3, linewidth=0.8)
    mean = losses.unfold(0, width, 1).mean(1)
    left.plot(steps[: len(mean)] + (width - 1) / 2, mean, color=LOSS_COLOR, linewidth=1.8)
    right.plot(ends, accuracies, color=ACCURACY_COLOR, marker="o", markersize=3.5, linewidth=1.2)
    left.set(xlabel=f"step; an epoch has {width}", xlim=(0, len(losses) * 1.02), ylim=(0, None))
    left.set_ylabel("training loss, and its mean over an epoch", color=LOSS_COLOR)
    right.set_ylabel("test accuracy, %", color=ACCURACY_COLOR)
    right.set_ylim(0, 102)
    right.annotate(
        f"{accuracies[-1]:.1f} %", (ends[-1], accuracies[-1]), (0, -14), color=ACCURACY_COLOR, ha="right",
        textcoords="offset points",
    )  # fmt: skip
    left.grid(alpha=0.25)
    for axes in (left, right):
        axes.spines["top"].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
