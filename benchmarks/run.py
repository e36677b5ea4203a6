"""Time attention layers: vitkernels beside plain PyTorch, SDPA, torch.compile and FlexAttention. Or whole models.

Without options: a layer of every kind of attention and a whole model, within three minutes on two cores, and a summary
of ten lines. --full measures every layer, --models every model, --quick two or three layers briefly; --case chooses.

A contender is timed only after its output and gradients agree with the float64 reference, and its clusters, where it
makes them, with those of float64. Contenders take turns, call by call, so that their ratios come from one run. Results
are saved as they come; Ctrl-C prints what there is.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import measure
import report
import torch
from cases import CASES, HEADLINE, MODELS, QUICK
from report import NO_ATTENTION
from roofline import Rates, work
from workload import DTYPES, MODES, OURS, Case, Contender, Workload, select

RESULTS = Path(__file__).parent / "results" / "latest.json"
OLDEST = (8, 0)  # compute capability
LOST = 3  # exit status: the device failed, so that nothing more can run on it in this process
BASELINES = tuple(dict.fromkeys(name for case in (*CASES, *MODELS) for name in case.kind.baselines))
ON_A_CPU = ("eager", "eager-unbind", "sdpa", "compile", "timm", "torchvision", NO_ATTENTION)


def contenders(case: Case, args: argparse.Namespace) -> list[str]:
    """Their names in the order of the table; eager, which the others are measured against, comes first."""
    if args.backend:
        asked = [name if name in BASELINES else OURS + name for name in args.backend]
        return list(dict.fromkeys(["eager", *asked]))
    compiled = ("compile", "flex") if args.device == "cuda" else ("compile",)
    fit = case.kind.baselines if args.device == "cuda" else ON_A_CPU
    fit = [name for name in fit if name in case.kind.baselines and (args.compile or name not in compiled)]
    return [*fit, OURS + (case.kind.gpu if args.device == "cuda" else "cpu")]


def reason(error: Exception) -> str:
    """Of what went wrong, in a line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def refusal(name: str, error: Exception) -> tuple[str, str]:
    """(status, reason) of a contender that raised: no failure where a baseline or a backend cannot run a case."""
    unable = isinstance(error, RuntimeError) and " cannot run " in str(error)
    absent = not name.startswith(OURS) or unable or isinstance(error, torch.OutOfMemoryError)
    if not absent:
        traceback.print_exception(error)
    return "skipped" if absent else "FAILED", reason(error)


def admit(names: list[str], workload: Workload, gradients: bool) -> tuple[dict[str, Contender], dict]:
    """Contenders that may be timed, and (status, reason) of the others."""
    admitted, refused, objection_to = {}, {}, workload.gate(gradients)
    for name in names:
        if name in BASELINES and name not in workload.baselines:
            refused[name] = ("skipped", "no baseline of this operator")
            continue
        try:
            contender = workload.build(name)
            objection = objection_to(contender)
        except Exception as error:
            refused[name] = refusal(name, error)
            continue
        if objection:
            refused[name] = ("FAILED", objection)
        else:
            admitted[name] = contender
    return admitted, refused


def prepare(workload: Workload, mode: str, admitted: dict[str, Contender]) -> tuple[dict[str, Callable], dict]:
    """What to time, called once, and (status, reason) of contenders that cannot run this mode."""
    calls, refused = {}, {}
    for name, contender in admitted.items():
        try:
            call = workload.call(contender, mode)
            call()
            calls[name] = call
        except Exception as error:
            refused[name] = refusal(name, error)
    return calls, refused


def measure_calls(calls: dict[str, Callable], device: torch.device, seconds: float) -> dict[str, dict]:
    """The measured fields of every contender."""
    times = measure.interleave(calls, device, seconds)
    rows = {}
    for name, call in calls.items():
        rows[name] = {
            "ms": statistics.median(times[name]),
            "p20": measure.percentile(times[name], 20),
            "p80": measure.percentile(times[name], 80),
            "rounds": len(times[name]),
            "memory": measure.peak_memory(call, device),
        }
        if device.type == "cuda":
            rows[name]["launches"] = measure.launches(call, device)
    if device.type == "cuda":  # last, for a capture that fails may leave traces
        for name, call in calls.items():
            rows[name] |= _replayed(call, device)
    return rows


def _replayed(call: Callable, device: torch.device) -> dict[str, object]:
    """Not every contender can be captured."""
    try:
        return {"graph": measure.replay(call, device)}
    except Exception as error:
        return {"graph": None, "no_graph": reason(error)}


def shares(row: dict, case: Case, rates: Rates, eager: float | None) -> dict[str, object]:
    """What follows from a measured time, the rates of the machine and the work of the layer."""
    if case.kind.whole:
        return {"speedup": eager / row["ms"] if eager else None, "rate": row["batch"] / row["ms"] * 1e3}
    about = row["batch"], row["dtype"], row["mode"]
    floor, bound = rates.floor(case, *about)
    seconds = row["ms"] * 1e-3
    return {
        "speedup": eager / row["ms"] if eager else None,
        "gbps": work(case, *about).bytes / seconds / 1e9,
        "floor": floor / seconds,
        "floor_ms": floor * 1e3,
        "bound": bound,
    }


def alive(device: torch.device) -> bool:
    """Whether the device still answers: after an illegal access no call on it succeeds in this process."""
    if device.type != "cuda":
        return True
    try:
        torch.randn(1, device=device).sum().item()  # random numbers too: a graph that was not captured may hold them
    except RuntimeError:
        return False
    return True


class DeviceLost(Exception):
    """The device does not answer any more."""


@contextmanager
def progress(cases: int, steps: int) -> Iterator[Callable[[str, str], None]]:
    """A function that names the case and the next of all its steps: a bar on a terminal, else a line for every case."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        Console = None
    if Console is None or not sys.stderr.isatty():
        seen: list[str] = []

        def line(case: str, step: str) -> None:
            if case not in seen:
                seen.append(case)
                print(f"[{len(seen)}/{cases}] {case}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, begun = bar.add_task("", total=steps), []

        def advance(case: str, step: str) -> None:
            bar.update(task, description=f"{case}: {step}", advance=1 if begun else 0)
            begun.append(case)

        yield advance


def run_case(case: Case, dtype: str, args: argparse.Namespace, modes: list[str], step: Callable) -> Iterator[list]:
    """Rows of a case, pass by pass: who took part, and what was measured."""
    device, batch, names = torch.device(args.device), args.batch or case.batch(args.device), contenders(case, args)
    about = {"case": case.name, "layer": case.describe(), "batch": batch, "dtype": dtype}
    step(f"{case.name} {dtype}", "parity")
    try:
        workload = case.kind.random(case, batch, device, DTYPES[dtype])
        admitted, refused = admit(names, workload, gradients=modes != ["fwd"])
    except Exception as error:  # of the inputs, or of the reference
        admitted, refused = {}, {name: refusal(name, error) for name in names}
    for mode in modes:
        step(f"{case.name} {dtype}", mode)
        calls, unable = prepare(workload, mode, admitted) if admitted else ({}, {})
        try:
            measured = measure_calls(calls, device, args.seconds) if calls else {}
        except Exception as error:
            measured, unable = {}, {**unable, **{name: refusal(name, error) for name in calls}}
        found = {name: ("ok", "") for name in names} | refused | unable
        whats = ({"mode": mode, "contender": name, "status": s, "reason": r} for name, (s, r) in found.items())
        yield [about | what | measured.get(what["contender"], {}) for what in whats]


def run(cases: list[Case], args: argparse.Namespace, results: dict, save: Callable[[], None]) -> None:
    """Measure everything asked for; ``results`` fills as it goes."""
    device = torch.device(args.device)
    modes = {case: [mode for mode in args.mode if mode in case.kind.modes] for case in cases}
    steps = 1 + len(args.dtype) * sum(1 + len(found) for found in modes.values())
    with progress(1 + len(args.dtype) * len(cases), steps) as step:
        step("the machine", "its rates")
        rates = Rates.measured(device, args.dtype, args.quick)
        results.update(bandwidth=rates.bandwidth, rates={**rates.products, "vector": rates.vector})
        for case, dtype in itertools.product(cases, args.dtype):
            for rows in run_case(case, dtype, args, modes[case], step):
                eager = next((row.get("ms") for row in rows if row["contender"] == "eager"), None)
                results["rows"] += [row | (shares(row, case, rates, eager) if "ms" in row else {}) for row in rows]
                save()
            if not alive(device):
                raise DeviceLost(case.name)
    results["complete"] = True
    save()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python benchmarks/run.py\n"
        "  python benchmarks/run.py --full --json full.json\n"
        "  python benchmarks/run.py --case 'crossformer-s-224-*' --mode fwd full --json crossformer.json\n"
        "  python benchmarks/run.py --models --case 'maxvit*' 'boat*' --threads 2\n"
        "  python benchmarks/run.py --case '*stage1*' --dtype bfloat16 --backend sdpa cpu --compare old.json",
    )
    known = [*BASELINES, "triton", "cuda", "cpu", "reference"]
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--case",
        nargs="+",
        metavar="GLOB",
        help="names of cases, with wildcards, in the order to be run; --list prints them",
    )
    what.add_argument(
        "--mode", nargs="+", choices=MODES, default=["fwd", "full"], help="full: fwd and bwd; default: fwd full"
    )
    what.add_argument("--dtype", nargs="+", choices=DTYPES, help="float32 on a CPU, bfloat16 on a GPU")
    backends = f"contenders beside eager, of {', '.join(known)}; those that suit the device"
    what.add_argument("--backend", nargs="+", choices=known, metavar="NAME", help=backends)
    what.add_argument("--batch", type=int, help="images; the default is each case's own")
    what.add_argument("--full", action="store_true", help="every layer, and the whole table")
    what.add_argument("--quick", action="store_true", help="a layer or two of CrossFormer, BOAT and MViT, briefly")
    what.add_argument("--models", action="store_true", help="whole models instead of layers: images per second")
    what.add_argument("--list", action="store_true", help="print the cases and stop")
    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is one")
    how.add_argument("--threads", type=int, help="CPU threads; torch's default")
    how.add_argument("--seconds", type=float, help="time spent on each row (1; 0.5 with --quick and without options)")
    how.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="contenders that torch.compile makes, slowly; on a GPU, unless the run is to be short",
    )
    out = parser.add_argument_group("results")
    out.add_argument(
        "--json", type=Path, default=RESULTS, metavar="PATH", help="default: benchmarks/results/latest.json"
    )
    out.add_argument("--csv", type=Path, metavar="PATH", help="also as comma-separated values")
    out.add_argument("--markdown", action="store_true", help="print a Markdown table, one row per layer and pass")
    out.add_argument("--compare", type=Path, metavar="OLD", help="compare with the JSON of an older run")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ["bfloat16" if args.device == "cuda" else "float32"]
    args.patterns = args.case or (QUICK if args.quick and not args.models else ["*"])
    args.headline = not (args.full or args.quick or args.models or args.case or args.list)
    args.seconds = args.seconds if args.seconds is not None else (0.5 if args.quick or args.headline else 1.0)
    args.compile = args.device == "cuda" and not args.headline if args.compile is None else args.compile
    for other in ("quick", "case"):
        if args.full and getattr(args, other):
            parser.error(f"--full measures every layer and --{other} some of them: leave one out")
    for name, value in (("--batch", args.batch), ("--threads", args.threads)):
        if value is not None and value < 1:
            parser.error(f"{name} must be at least 1, got {value}")
    if args.device == "cuda" and (why := no_gpu()):
        parser.error(f"--device cuda: {why}")
    return args


def no_gpu() -> str | None:
    """Why nothing can be measured on a GPU here, or None."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if (found := torch.cuda.get_device_capability()) < OLDEST:
        name, (major, minor) = torch.cuda.get_device_name(), found
        return f"{name} has compute capability {major}.{minor}, the kernels need {OLDEST[0]}.{OLDEST[1]} or later"
    return None


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    known = HEADLINE if args.headline else MODELS if args.models else CASES
    cases = [case for case in select(known, args.patterns) if set(args.mode) & set(case.kind.modes)]
    if not cases:
        what = f"{' '.join(args.patterns)} and has a pass {' or '.join(args.mode)}"
        print(f"no case matches {what}; --list prints the cases", file=sys.stderr)
        return 2
    if args.list:
        width = max(len(case.name) for case in cases)
        print("\n".join(f"{case.name:<{width}}  {case.describe()}" for case in cases))
        return 0
    old = report.load(args.compare) if args.compare else None  # read before a long run, not after it
    if args.threads:
        torch.set_num_threads(args.threads)
    results = {"machine": measure.machine(torch.device(args.device)), "bandwidth": None, "rates": {}}
    results |= {"complete": False, "rows": []}
    status = 0
    # a shift's -100 leaves subnormal weights, which slow plain PyTorch on a CPU up to five times: not held against it
    torch.set_flush_denormal(True)
    try:
        run(cases, args, results, lambda: report.save(results, args.json))
    except KeyboardInterrupt:
        status = 130
    except DeviceLost as error:
        print(f"the device stopped answering at {error}; the cases after it were not measured", file=sys.stderr)
        status = LOST
    finally:
        torch.set_flush_denormal(False)
    write = report.markdown if args.markdown else report.closing if args.headline else report.text
    print(write(results))
    if old:
        print("\n" + report.compare(results, old))
    if args.csv and results["rows"]:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        args.csv.write_text(report.csv_text(results))
    if results["rows"]:
        print(f"results: {args.json}", file=sys.stderr)
    # a baseline that misses the contract is not timed, and says so in its row: no failure of this package
    failed = any(row["status"] == "FAILED" and row["contender"].startswith(OURS) for row in results["rows"])
    return status or int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
