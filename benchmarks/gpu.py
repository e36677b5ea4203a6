"""What only an NVIDIA GPU can show: the kernels built, tested, sanitized, repeated bit for bit, and measured.

Everything is written to benchmarks/results/<gpu>/<date>.json as it comes, so that a run cut short keeps what it has; a
step or a baseline that fails is a row with its reason, and the rest goes on. A table comes last.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock, Thread
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent
PARTS = {  # and the most seconds of each; what one leaves over goes to those after it
    "build": 110,
    "tests": 100,
    "sanitize": 60,
    "repeat": 40,
    "sweep": 160,
    "models": 50,
}
# most wanted first
SWEEP = (
    *(
        "crossformer-s-224-stage1-*",
        "boat-swin-t-224-stage1-both",
        "mvitv2-s-224-stage1-attend",
        "maxvit-t-224-stage1-*",
    ),
    *(
        "crossformer-s-224-*",
        "boat-swin-t-224-stage1-*",
        "mvitv2-s-224-stage1-*",
        "plain-*",
        "swin-t-224-stage1-shifted",
    ),
    "*",
)
COMPILED = ("crossformer-s-224-stage1-sda", "swin-t-224-stage1-shifted", "mvitv2-s-224-stage3-attend")
REPEATS = 1000
# of compute-sanitizer, with the line behind it that says where
FINDING = re.compile(r"=+ ((?:Error:|Invalid|Uninit|Potential|ERROR SUMMARY: [1-9]).*(?:\n=+ +(?:at|and) .*)?)")
KERNEL_TESTS = ("triton", "cluster_triton", "pool_triton", "pooled_triton", "position_bias", "lsda")


class Step(NamedTuple):
    """A row of the summary."""

    part: str
    step: str
    status: str  # "ok", "skipped" or "FAILED"
    reason: str = ""  # or what was found
    seconds: float = 0.0


class Record:
    """The results, on disk after every change."""

    def __init__(self, path: Path, machine: dict[str, str]):
        import report

        self.path, self.report, self.lock = path, report, Lock()
        self.results = report.load(path) if path.exists() else {"bandwidth": None, "rates": {}, "rows": []}
        self.results |= {"machine": machine, "complete": False}
        self.results.setdefault("steps", [])

    def begin(self, part: str) -> None:
        """Forget an earlier run of a part."""
        self.results["steps"] = [step for step in self.results["steps"] if step["part"] != part]

    def add(self, step: Step) -> None:
        with self.lock:
            self.results["steps"].append(step._asdict())
            self.save()
        print(f"{step.part}: {step.step}: {step.status} {step.reason}".rstrip(), file=sys.stderr, flush=True)

    def merge(self, other: dict) -> None:
        """Take rows and rates of a run of benchmarks/run.py; a row that was there is replaced."""
        keys = ("case", "batch", "dtype", "mode", "contender")
        with self.lock:
            rows = {tuple(row[key] for key in keys): row for row in (*self.results["rows"], *other["rows"])}
            self.results["rows"] = list(rows.values())
            self.results["machine"] = other.get("machine") or self.results["machine"]  # with the libraries just built
            self.results["bandwidth"] = other.get("bandwidth") or self.results["bandwidth"]
            self.results["rates"] |= other.get("rates", {})
            self.save()

    def save(self) -> None:
        self.report.save(self.results, self.path)


class Run(NamedTuple):
    """What the parts share."""

    record: Record
    dry: bool  # on the CPU, as little as shows that everything is there
    device: str  # "cuda" or "cpu"
    capability: str  # "9.0", or nothing without a GPU


STOPPED = Event()  # by an interrupt: whatever runs is to end


def python(*arguments: str | Path) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def together(function: Callable, jobs: Iterable, workers: int) -> None:
    """Call ``function`` for every job, several at a time."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(function, jobs))
        except KeyboardInterrupt:
            STOPPED.set()
            raise


def environment(**more: str) -> dict[str, str]:
    """The package of this folder, without a Triton that interprets."""
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    found.pop("TRITON_INTERPRET", None)
    return found | more


def lines_of(command: list[str], until: float, cwd: str | Path = ROOT, **more: str) -> Iterator[str]:
    """What a command prints, as it comes. Returns why it is not to be trusted, or nothing.

    At ``until``, or on an interrupt, it gets SIGINT, then is killed.
    """
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", bufsize=1, start_new_session=True,
    )  # fmt: skip
    late: list[bool] = []

    def watch() -> None:
        while process.poll() is None:
            if time.monotonic() > until or STOPPED.is_set():
                late.append(True)
                return _end(process)
            time.sleep(0.1)
        time.sleep(1)
        _kill(process)  # what it started and left behind would keep its output open

    Thread(target=watch, daemon=True).start()
    last = ""
    try:
        for line in process.stdout:
            last = line.strip() or last
            yield line.rstrip("\n")
        code = process.wait()
    except BaseException:
        _end(process)
        raise
    if late:
        return "cut short"
    if code < 0:
        return f"died of {signal.Signals(-code).name}: {last}"
    return f"exit status {code}: {last}" if code else ""


def _end(process: subprocess.Popen) -> None:
    """SIGINT to a process and its children; SIGKILL for what is there after it has ended, or after 15 seconds."""
    try:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(15)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    _kill(process)


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def every_line(command: list[str], until: float, see: Callable[[str], object], **more: str) -> str:
    """Show ``see`` every line; returns why the command is not to be trusted, or nothing. ``more``: of `lines_of`."""
    lines = lines_of(command, until, **more)
    while True:
        try:
            see(next(lines))
        except StopIteration as end:
            return end.value


# the parts


def build(run: Run, until: float) -> None:
    """Both libraries, in place, for this GPU alone; a dry run only looks whether they are there."""
    begun, tail = time.monotonic(), []
    if not run.dry:
        attempts = ["1", "0"] if _nvcc() else ["0"]  # where the CUDA library fails, the C++ library is still to come
        if attempts == ["0"]:
            run.record.add(Step("build", "CUDA library", "skipped", "nvcc is neither on PATH nor in /usr/local/cuda"))
        with tempfile.TemporaryDirectory() as folder:
            # without pyproject.toml, which only a recent setuptools reads; the libraries land in the package
            for name in ("setup.py", "csrc", "vitkernels"):
                (Path(folder) / name).symlink_to(ROOT / name)
            command = python("setup.py", "-q", "build_ext", "--inplace", "--build-temp", ROOT / "build" / "gpu")
            more = {"VITKERNELS_NATIVE": "1", "TORCH_CUDA_ARCH_LIST": run.capability}
            for cuda in attempts:
                why = every_line(command, until, tail.append, cwd=folder, VITKERNELS_CUDA=cuda, **more)
                if not why:
                    break
                errors = [line.strip() for line in tail if re.search(r"\berror\b", line, re.I)]
                step = "libraries" if cuda == "1" else "C++ library"
                run.record.add(Step("build", step, "FAILED", (errors or [why])[0], time.monotonic() - begun))
                tail.clear()
    found: list[str] = []
    why = every_line(python("-m", "vitkernels", "info"), until, found.append)
    backends = [" ".join(line.split()) for line in found if line.startswith("backend")]
    spent = time.monotonic() - begun
    if why or not backends:
        run.record.add(Step("build", "vitkernels info", "FAILED", why or "it names no backend", spent))
    for line in backends:
        name, _, state = line.removeprefix("backend ").partition(" ")
        status = "ok" if state.startswith("available") else "skipped"
        run.record.add(Step("build", f"backend {name}", status, state, spent))


def _nvcc() -> str | None:
    folders = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{folder}/bin") for folder in folders if folder)]
    return next(filter(None, places), None)


def tests(run: Run, until: float) -> None:
    """Tests that are marked gpu, file by file, several at a time; then those of the Triton kernels, as time allows."""
    listed: list[str] = []
    collect = ["-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    why = every_line(python(*collect), until, listed.append)
    files = list(dict.fromkeys(line.split("::")[0] for line in listed if "::" in line))
    if why or not files:
        run.record.add(Step("tests", "collection", "FAILED", why or "no test is marked gpu"))
    if run.dry:
        for file in files:
            count = sum(line.startswith(f"{file}::") for line in listed)
            run.record.add(
                Step("tests", f"{file}, marked gpu", "skipped", f"{count} tests, none of which runs without a GPU")
            )
        return
    jobs = [(file, "gpu") for file in files] + [(f"tests/test_{name}.py", "not gpu") for name in KERNEL_TESTS]
    together(lambda job: _test_file(run, until, *job), jobs, max(1, (os.cpu_count() or 2) // 2))


def _test_file(run: Run, until: float, file: str, mark: str) -> None:
    begun, counts = time.monotonic(), {"passed": 0, "failed": 0, "error": 0, "skipped": 0}

    def see(line: str) -> None:
        if found := re.match(r"(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", line):
            counts[found[2].lower()] += 1
        elif found := re.match(r"(FAILED|ERROR) (\S+::.*?)(?: - (.*))?$", line):  # of the summary
            run.record.add(Step("tests", found[2], "FAILED", found[3] or ""))

    arguments = ["-m", "pytest", file, "-m", mark, "-v", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
    # room for reasons beside long names; references run on the CPU, beside those of other files
    why = every_line(python(*arguments), until, see, COLUMNS="400", OMP_NUM_THREADS="2")
    text = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none ran"
    failed = counts["failed"] or counts["error"] or (why and why != "cut short")
    status = "FAILED" if failed else "ok" if counts["passed"] else "skipped"
    step = f"{file}, {'marked gpu' if mark == 'gpu' else 'on CUDA tensors'}"
    run.record.add(Step("tests", step, status, f"{text}; {why}" if why else text, time.monotonic() - begun))


def _repeats(run: Run, part: str, until: float, times: int, batch: int, prefix: list[str] | None = None) -> None:
    """Take the rows that a worker prints. Where a kernel ends the worker, another goes on behind it."""
    from cases import EVERY_KERNEL
    from run import LOST

    names, label = list(EVERY_KERNEL), f"{prefix[2]}: " if prefix else ""
    while names and time.monotonic() < until:
        others: list[str] = []

        def see(line: str, others=others) -> None:
            if line.startswith('{"step"'):
                found = json.loads(line)
                names.remove(found["step"])
                run.record.add(Step(part, **found | {"step": label + found["step"]}))
            elif line.strip():
                others.append(line.strip())

        asked = list(names)
        arguments = ["--worker", run.device, str(times), str(batch), *asked]
        # every tensor a piece of memory of its own, so that no overrun lands in another
        more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if prefix else {}
        why = every_line([*(prefix or []), *python(Path(__file__), *arguments)], until, see, **more)
        findings = [re.sub(r"\n=+ +", " ", text) for text in FINDING.findall("\n".join(others))]
        if findings or (why and not names):  # a sanitizer's belong to some kernel before
            run.record.add(Step(part, f"{label}findings", "FAILED", "; ".join([why, *findings[:3]])))
        if not why or why == "cut short" or (findings and len(names) == len(asked)):
            break
        if names and (not why.startswith(f"exit status {LOST}:") or len(names) == len(asked)) and not findings:
            run.record.add(Step(part, label + names.pop(0), "FAILED", why))
    if names:
        run.record.add(Step(part, f"{label}the rest", "skipped", f"not reached: {', '.join(names)}"))


def sanitize(run: Run, until: float) -> None:
    """Every kernel once under compute-sanitizer, for memory errors and for races in shared memory."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if run.dry or tool is None:
        why = "a dry run" if run.dry else "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin"
        run.record.add(Step("sanitize", "memcheck and racecheck", "skipped", why))
        return
    options = ["--error-exitcode", "86", "--print-limit", "3"]
    # frameworks probe for functions that a driver lacks: no errors; compilers are started as well, and are not meant
    options += ["--report-api-errors", "no", "--target-processes", "application-only"]
    checks = ([tool, "--tool", check, *options] for check in ("memcheck", "racecheck"))
    together(lambda prefix: _repeats(run, "sanitize", until, 1, 1, prefix), checks, 2)  # mostly the processor's time


def repeat(run: Run, until: float) -> None:
    """Output and gradients 1,000 times on one input, compared bit for bit."""
    _repeats(run, "repeat", until, 2 if run.dry else REPEATS, 1 if run.dry else 8)


def models(run: Run, until: float) -> None:
    """Whole models, fused, unfused, and as timm and torchvision have them: images per second."""
    from cases import MODELS

    if run.dry:
        _sweep(run, until, ["crossformer++-s"], "--models", "--mode", "fwd", "--batch", "1", "--seconds", "0")
        return
    _sweep(run, until, [case.name for case in MODELS], "--models", "--seconds", "0.1")


def sweep(run: Run, until: float) -> None:
    """benchmarks/run.py against every baseline that is installed, most wanted layers first, those compiled last."""
    from cases import CASES
    from workload import select

    if run.dry:
        _sweep(run, until, ["crossformer-s-224-stage4-sda"], "--batch", "1", "--seconds", "0", "--quick")
        return
    reserve = min(60.0, (until - time.monotonic()) / 2)
    names = [case.name for case in select(CASES, SWEEP)]
    _sweep(run, until - reserve, names, "--no-compile", "--seconds", "0.1")
    _sweep(run, until, list(COMPILED), "--compile", "--backend", "compile", "flex", "triton", "--seconds", "0.1")


def _sweep(run: Run, until: float, names: list[str], *options: str) -> None:
    """Where a case brings the process down, its row says so and the next process goes on behind it."""
    begun, partial = time.monotonic(), run.record.path.with_suffix(".sweep.json")
    part = "models" if "--models" in options else "sweep"
    label = "compiled contenders" if "--compile" in options else "models" if part == "models" else "layers"
    done: set[str] = set()
    while names and time.monotonic() < until:
        partial.unlink(missing_ok=True)
        command = python(HERE / "run.py", "--device", run.device, "--json", str(partial), "--case", *names, *options)

        seen: list[float] = []
        at: list[str] = []

        def see(line: str, seen=seen, at=at) -> None:
            if progress := re.match(r"\[\d+/\d+\] (\S+) \w+$", line):
                at[:] = [progress[1]]
            if partial.exists() and (changed := partial.stat().st_mtime) not in seen:
                seen.append(changed)
                run.record.merge(run.record.report.load(partial))

        why = every_line(command, until, see)
        see("")
        found = run.record.report.load(partial) if partial.exists() else {"rows": []}
        rows, finished = found["rows"], found.get("complete", False)
        measured = {row["case"] for row in rows} - (
            {at[0]} if at and why and why != "cut short" and not finished else set()
        )
        done |= measured
        wrong = [row for row in rows if row["status"] == "FAILED" and row["contender"].startswith("vitkernels")]
        bad = sorted({row["case"] for row in wrong})
        for case in bad:
            reasons = {row["contender"]: row["reason"] for row in wrong if row["case"] == case}
            run.record.add(Step(part, case, "FAILED", "; ".join(f"{who}: {what}" for who, what in reasons.items())))
        names = [name for name in names if name not in measured]
        if not why or finished or why == "cut short":
            break
        if why.startswith("exit status 2:"):
            run.record.add(Step(part, label, "FAILED", why))
            break
        culprit = next((name for name in (*at, *names[:1]) if name in names), None)
        if culprit and culprit not in bad:  # nobody wrote down what happened to it
            run.record.add(Step(part, culprit, "FAILED", why))
        names = [name for name in names if name != culprit]
    partial.unlink(missing_ok=True)
    text = f"{len(done)} measured" + (f", {len(names)} left for want of time" if names else "")
    status = "ok" if done else "skipped" if names else "FAILED"
    run.record.add(Step(part, label, status, text, time.monotonic() - begun))


# what runs in a process of its own, so that a fault takes nothing else with it


def worker(device: str, *arguments: str) -> int:
    """Print a row of JSON for every kernel."""
    from run import LOST, DeviceLost

    try:
        for name, status, reason, seconds in _repeat_kernels(device, *arguments):
            found = {"step": name, "status": status, "reason": reason, "seconds": seconds}
            print(json.dumps(found), flush=True)
    except DeviceLost:
        return LOST
    return 0


def _repeat_kernels(device: str, times: str, batch: str, *names: str) -> Iterator[tuple[str, str, str, float]]:
    """Every kernel's output and gradients; whether all have the bits of the first."""
    import torch
    from cases import CASES
    from run import DeviceLost, alive, refusal
    from workload import OURS

    cases, repeats = {case.name: case for case in CASES}, int(times) - 1
    for name in names:
        begun, case = time.monotonic(), cases[name]
        try:
            workload = case.kind.random(case, int(batch), torch.device(device), torch.bfloat16)
            contender = workload.build(OURS + (case.kind.gpu if device == "cuda" else "cpu"))
            once = workload.forward if case.kind.modes == ("fwd",) else workload.full
            first = _flat(once(contender))
            differ = int(sum((_flat(once(contender)) != first).any().int() for _ in range(repeats)))
            text = f"{differ} of {repeats} repeats differ" if differ else f"{times} times the same bits"
            found = "FAILED" if differ else "ok", text if repeats else "ran"
        except Exception as error:
            found = refusal(OURS, error)
        yield name, *found, time.monotonic() - begun
        if not alive(torch.device(device)):
            raise DeviceLost(name)


def _flat(tensors: object):
    """All elements as bits, so that NaN equals NaN."""
    import torch

    tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    return torch.cat([x.detach().contiguous().view(torch.uint8).flatten() for x in tensors])


def results_path(device: str, folder: Path) -> Path:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "dry-run"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return folder / slug / f"{datetime.date.today().isoformat()}.json"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts:\n" + "\n".join(f"  {name:<9} {globals()[name].__doc__.splitlines()[0]}" for name in PARTS),
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="a share of it")
    parser.add_argument("--minutes", type=float, default=8.7, help="for everything that is asked for (8.7)")
    parser.add_argument("--dry-run", action="store_true", help="walk through it on the CPU, without measuring anything")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="FOLDER", help="benchmarks/results")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes must be above 0, got {args.minutes:g}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    sys.path.insert(0, str(ROOT))  # before an installed package
    for name in ("torch", "einops"):
        if importlib.util.find_spec(name) is None:
            print(f"benchmarks/gpu.sh: {sys.executable} has no {name}; PYTHON=... names another", file=sys.stderr)
            return 2
    if args.worker:
        return worker(*args.worker)
    import measure
    import report
    import torch
    from run import no_gpu

    if not args.dry_run and (why := no_gpu()):
        print(f"benchmarks/gpu.sh: {why}; --dry-run walks through it on the CPU", file=sys.stderr)
        return 2
    device = "cpu" if args.dry_run else "cuda"
    capability = "" if args.dry_run else "{}.{}".format(*torch.cuda.get_device_capability())
    path = results_path(device, args.out)
    try:
        record = Record(path, measure.machine(torch.device(device)))
        record.save()
    except (OSError, ValueError) as error:
        print(
            f"benchmarks/gpu.sh: {path} cannot be gone on with ({error}); --out names another folder", file=sys.stderr
        )
        return 2
    run, status = Run(record, args.dry_run, device, capability), 0
    print(f"results: {record.path}", file=sys.stderr)
    if "build" in args.part and not args.dry_run and _nvcc() is None:
        print("no nvcc, neither on PATH nor in /usr/local/cuda: the CUDA library is left out", file=sys.stderr)
    end = time.monotonic() + 60 * args.minutes
    asked = [name for name in PARTS if name in args.part]
    try:
        for i, name in enumerate(asked):
            record.begin(name)
            share = PARTS[name] / sum(PARTS[other] for other in asked[i:])
            begun = time.monotonic()
            try:
                globals()[name](run, begun + share * (end - begun))
            except Exception as error:  # of this file: the other parts go on
                record.add(Step(name, name, "FAILED", f"{type(error).__name__}: {error}"))
        record.results["complete"] = True
    except KeyboardInterrupt:
        status = 130
    record.save()
    print(report.summary(record.results))
    return status or int(any(step["status"] == "FAILED" for step in record.results["steps"]))


if __name__ == "__main__":
    raise SystemExit(main())
