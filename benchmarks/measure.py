"""Clocks, the rates that set the floor, launches, peak memory, and what the machine is."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import vitkernels

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else torch's profiler reports every start and stop on stderr

AT_LEAST, AT_MOST = 7, 200  # rounds
REPLAYS = 10  # of a CUDA graph, timed together


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[round((len(ordered) - 1) * percent / 100)]


def timer(device: torch.device) -> Callable[[Callable], float]:
    """A function that times one call, in ms: by the wall clock on a CPU; by events, L2 cache flushed, on a GPU."""
    if device.type != "cuda":

        def wall(call: Callable) -> float:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3

        return wall

    flush = torch.zeros(torch.cuda.get_device_properties(device).L2_cache_size // 2, device=device)  # twice the cache
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def events(call: Callable) -> float:
        flush.sum()  # reading leaves nothing that is to be written back while the call runs
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return events


def interleave(calls: Mapping[str, Callable], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every call, in turns so that drift of the machine hits all alike, for about ``seconds`` each."""
    clock = timer(device)
    for call in calls.values():
        call()
        call()
    names, times = list(calls), {name: [] for name in calls}
    start = time.perf_counter()
    for rounds in range(AT_MOST):
        if rounds >= AT_LEAST and time.perf_counter() - start > seconds * len(names):
            break
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(clock(calls[name]))
    return times


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second, read plus written, of copying ``size`` bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _quick(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOPs per second of multiplying two square matrices of random numbers."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _quick(lambda: a @ b, device)


def _quick(call: Callable, device: torch.device) -> float:
    """Seconds of a quick call, as the rates of a machine are meant: what it does undisturbed."""
    return percentile(interleave({"": call}, device, 0.5)[""], 20) * 1e-3


def launches(call: Callable, device: torch.device) -> int | None:
    """Kernels, copies and fills that ``call`` starts on a GPU; None where no profiler may count them."""
    if device.type != "cuda":
        return None
    try:
        return _count_launches(call, device)
    except RuntimeError:
        return None


def _count_launches(call: Callable, device: torch.device) -> int | None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    kernels = (event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(event.count for event in kernels) or None


def replay(call: Callable, device: torch.device) -> float | None:
    """Milliseconds of ``call`` as a CUDA graph, replayed in a row (L2 cache warm); None on a CPU.

    What then remains is the GPU's own time: of many small kernels the rest is launches. RuntimeError where it cannot
    be captured.
    """
    if device.type != "cuda":
        return None
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        call()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails may leave its own
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(AT_LEAST):
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / REPLAYS)
    return statistics.median(times)


def peak_memory(call: Callable, device: torch.device) -> int | None:
    """The most bytes of tensors alive at once during ``call``, beyond those that were there before it.

    On a GPU the allocator says so; on a CPU it is the largest running sum of the allocations and releases that torch's
    profiler records.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    alive = most = 0
    for _, change in changes:
        alive += change
        most = max(most, alive)
    return most if changes else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _output_of(*command: str) -> str:
    try:
        folder = Path(__file__).parent
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _commit() -> str:
    commit = _output_of("git", "rev-parse", "--short=12", "HEAD")
    return commit + ("+changes" if _output_of("git", "status", "--porcelain") else "") if commit else "unknown"


def machine(device: torch.device) -> dict[str, str]:
    """What ran, with what, when."""
    found = {"device": "CPU"}
    if device.type == "cuda":
        driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        found = {"device": torch.cuda.get_device_name(device), "driver": driver[0] if driver else "unknown"}
    found["cpu"] = f"{_cpu_model()}, {os.cpu_count()} logical CPUs"
    found["threads"] = str(torch.get_num_threads())
    found["system"] = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    wanted = ("vitkernels", "torch", "triton", *(f"backend {name}" for name in ("triton", "cuda", "cpu")))
    found |= {key: value for key, value in vitkernels.info().items() if key in wanted}
    found["float32 matmul"] = torch.get_float32_matmul_precision()
    found["subnormals"] = "flushed to zero"
    found["commit"] = _commit()
    found["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return found
