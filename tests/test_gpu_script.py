"""benchmarks/gpu.sh without a GPU: its dry run, what it refuses, and what it keeps when something goes wrong."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


@pytest.fixture
def run(gpu, tmp_path):
    """As if for a device, which is the CPU."""
    return gpu.Run(gpu.Record(tmp_path / "results.json", {"device": "x"}), False, "cpu", "9.0")


def soon(seconds: float = 60) -> float:
    return time.monotonic() + seconds


def steps(run) -> list[tuple[str, str]]:
    """(step, status) as they are on disk."""
    return [(step["step"], step["status"]) for step in json.loads(run.record.path.read_text())["steps"]]


def script(*arguments: str, **environment: str) -> SimpleNamespace:
    command = [ROOT / "benchmarks" / "gpu.sh", *arguments]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")


@pytest.mark.slow
def test_dry_run(gpu, tmp_path):
    done = script("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("dry-run/*.json")
    results = json.loads(path.read_text())
    assert results["complete"] and {"machine", "rates", "rows", "steps"} <= results.keys()
    parts = {step["part"] for step in results["steps"]}
    assert parts == {"build", "tests", "sanitize", "repeat", "sweep", "models"}
    assert not [step for step in results["steps"] if step["status"] == "FAILED"]
    assert {row["mode"] for row in results["rows"]} == {"fwd", "full"}
    repeated = {step["step"]: step["status"] for step in results["steps"] if step["part"] == "repeat"}
    assert repeated == dict.fromkeys(importlib.import_module("cases").EVERY_KERNEL, "ok")
    *_, last = done.stdout.strip().splitlines()
    assert last.startswith("crossformer++-s ")  # the table comes last
    again = script("--dry-run", "--out", str(tmp_path), "--part", "build")
    assert again.returncode == 0
    kept = json.loads(path.read_text())
    assert len(kept["steps"]) == len(results["steps"]) and kept["rows"] == results["rows"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path):
    done = script("--out", str(tmp_path))
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert len(done.stderr.splitlines()) == 1 and "torch finds no CUDA device; --dry-run" in done.stderr


def test_without_torch_one_line_says_so(tmp_path):
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')
    (tmp_path / "python").chmod(0o755)
    done = script(PYTHON=str(tmp_path / "python"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "has no torch" in done.stderr


def test_an_old_gpu_is_refused(gpu, monkeypatch, capsys):
    bench = importlib.import_module("run")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert gpu.main([]) == 2
    message = "Tesla T4 has compute capability 7.5, the kernels need 8.0 or later"
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda"])
    assert message in capsys.readouterr().err


def test_unknown_parts_are_refused():
    done = script("--part", "dance")
    assert done.returncode == 2 and "'build', 'tests', 'sanitize', 'repeat', 'sweep', 'models'" in done.stderr


def test_bad_options_are_refused_in_a_line(gpu, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--minutes", "0"])
    assert "--minutes must be above 0, got 0" in capsys.readouterr().err
    (tmp_path / "file").touch()
    broken = gpu.results_path("cpu", tmp_path / "broken")
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    for folder in ("file", "broken"):
        assert gpu.main(["--dry-run", "--out", str(tmp_path / folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "cannot be gone on with" in line and "--out names another folder" in line
    assert broken.read_text() == "{"  # what is there stays


@pytest.mark.parametrize("nvcc", [None, "nvcc"])
def test_a_build_that_fails_is_a_row(gpu, run, monkeypatch, tmp_path, nvcc):
    """Without nvcc the C++ library; with it the CUDA library, after which the other one is built alone."""
    monkeypatch.setattr(gpu, "_nvcc", lambda: nvcc)
    broken = tmp_path / "setup.py"
    broken.write_text(
        "import os, sys; print('x.cpp:3: error: no such thing');"
        f"open({str(tmp_path / 'built')!r}, 'a').write(os.environ['VITKERNELS_CUDA'])\n"
        f"sys.exit(os.environ['VITKERNELS_CUDA'] == {'1' if nvcc else '0'!r})"
    )
    monkeypatch.setattr(
        gpu, "python", lambda *a: [sys.executable, *map(str, (broken, *a[1:]) if a[0] == "setup.py" else a)]
    )
    gpu.build(run, soon())
    found = dict(steps(run))
    assert found["libraries" if nvcc else "C++ library"] == "FAILED" and found["backend reference"] == "ok"
    assert ("CUDA library" in found) == (nvcc is None) and (tmp_path / "built").read_text() == ("10" if nvcc else "0")
    reasons = [step["reason"] for step in run.record.results["steps"] if step["status"] == "FAILED"]
    assert reasons == ["x.cpp:3: error: no such thing"]


def test_tests_are_counted_and_failures_named(gpu, run, monkeypatch, tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', range(3))\n"
        "def test_a(i):\n    assert i != 1, 'one is wrong'\n"
        "@pytest.mark.skip\ndef test_b(): pass\n"
    )
    gpu._test_file(run, soon(), str(file), "not gpu")
    *failures, (step, status) = steps(run)
    assert status == "FAILED" and len(failures) == 1 and "test_a[1]" in failures[0][0]
    assert run.record.results["steps"][-1]["reason"].startswith("2 passed, 1 failed, 1 skipped")


def test_what_takes_too_long_is_cut_short(gpu, run, tmp_path):
    file = tmp_path / "test_slow.py"
    file.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    begun = time.monotonic()
    gpu._test_file(run, soon(8), str(file), "not gpu")
    assert time.monotonic() - begun < 30
    (step,) = run.record.results["steps"]
    assert step["status"] == "ok" and step["reason"].startswith("1 passed") and "cut short" in step["reason"]


def test_repeats_tell_kernels_that_differ(gpu, run, monkeypatch):
    cases = importlib.import_module("cases")
    monkeypatch.setattr(cases, "EVERY_KERNEL", ("maxvit-t-224-stage4-block",))
    gpu._repeats(run, "repeat", soon(), 3, 1)
    assert steps(run) == [("maxvit-t-224-stage4-block", "ok")]
    partition = importlib.import_module("partition_attention")
    right, calls = partition.Workload.full, []

    def wrong(self, contender):
        calls.append(contender)
        qkv, *bias = right(self, contender)
        return (qkv + (len(calls) == 3), *bias)

    monkeypatch.setattr(partition.Workload, "full", wrong)
    ((name, status, reason, _),) = gpu._repeat_kernels("cpu", "4", "1", "maxvit-t-224-stage4-block")
    assert (status, reason) == ("FAILED", "1 of 3 repeats differ")


STAND_IN = """#!{python}
import sys
names = sys.argv[sys.argv.index("--worker") + 4:]
for name in names:
    if "{what}" == "dies" and name == "{second}":
        import os; os.abort()
    print('{{"step": "%s", "status": "ok", "reason": "ran", "seconds": 1.0}}' % name, flush=True)
print("========= ERROR SUMMARY: %d errors" % ("{what}" == "finds"))
if "{what}" == "finds":
    print("========= Invalid __global__ read of size 16 bytes")
    print("=========     at kernel+0x10 in kernels.py:7")
    sys.exit(86)
"""


@pytest.mark.parametrize("what", ["clean", "dies", "finds"])
def test_the_sanitizer(gpu, run, monkeypatch, tmp_path, what):
    """By a tool that stands in for it."""
    kernels = importlib.import_module("cases").EVERY_KERNEL
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(STAND_IN.format(python=sys.executable, what=what, second=kernels[1]))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    gpu.sanitize(run, soon())
    found = steps(run)
    for check in ("memcheck", "racecheck"):
        mine = dict((step.removeprefix(f"{check}: "), status) for step, status in found if step.startswith(check))
        bad = {"clean": set(), "dies": {kernels[1]}, "finds": {"findings"}}[what]
        assert {step for step, status in mine.items() if status == "FAILED"} == bad
        assert {step for step, status in mine.items() if status == "ok"} == set(kernels) - bad
    reasons = " ".join(step["reason"] for step in run.record.results["steps"] if step["status"] == "FAILED")
    found = "Invalid __global__ read of size 16 bytes at kernel+0x10 in kernels.py:7"
    assert (found in reasons) == (what == "finds") and ("SIGABRT" in reasons) == (what == "dies")


def test_without_the_sanitizer_a_row_says_so(gpu, run, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda *args, **kwargs: None)
    gpu.sanitize(run, soon())
    assert steps(run) == [("memcheck and racecheck", "skipped")]


SWEEPER = """
import json, os, sys
from pathlib import Path
arguments = sys.argv[1:]
path, names = Path(arguments[arguments.index("--json") + 1]), arguments[arguments.index("--case") + 1:]
names = names[: names.index("--seconds")] if "--seconds" in names else names
rows = []
for i, name in enumerate(names):
    lost = name == "lost"
    print(f"[{i}/9] {name} float32", flush=True)
    if name == "dies":
        os.abort()
    row = {"case": name, "layer": "", "batch": 1, "dtype": "float32", "mode": "fwd", "contender": "vitkernels-x"}
    rows.append(row | {"status": "FAILED" if lost else "ok", "reason": "", "ms": None if lost else 1.0})
    partial = path.with_suffix(".new")
    results = {"machine": {}, "bandwidth": 1e9, "rates": {"vector": 1e9}, "rows": rows}
    results["complete"] = i + 1 == len(names) and not lost
    partial.write_text(json.dumps(results))
    partial.replace(path)
    print(name, flush=True)
    if lost:
        sys.exit(3)
    if name == "dies between passes":
        print(f"[{i}/9] dies-later float32", flush=True)
        os.abort()
"""


def test_the_sweep_goes_on_behind_what_fails(gpu, run, monkeypatch, tmp_path):
    """A case that kills the process, and one after which the device does not answer."""
    (tmp_path / "run.py").write_text(SWEEPER)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    gpu._sweep(run, soon(), ["first", "dies", "second", "lost", "third"], "--seconds", "0")
    results = json.loads(run.record.path.read_text())
    assert [row["case"] for row in results["rows"]] == ["first", "second", "lost", "third"]
    found = dict(steps(run))
    assert found == {"dies": "FAILED", "lost": "FAILED", "layers": "ok"}
    assert results["rates"] == {"vector": 1e9} and not list(tmp_path.glob("*.sweep.json"))


def test_the_sweep_blames_the_case_that_was_under_way(gpu, run, monkeypatch, tmp_path):
    """Also where an earlier pass of it was written down."""
    (tmp_path / "run.py").write_text(SWEEPER.replace("dies between passes", "dies-later"))
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    gpu._sweep(run, soon(), ["first", "dies-later", "second"], "--seconds", "0")
    assert [row["case"] for row in json.loads(run.record.path.read_text())["rows"]] == ["first", "dies-later", "second"]
    assert dict(steps(run)) == {"dies-later": "FAILED", "layers": "ok"}


def test_a_sweep_with_wrong_rows_is_finished(gpu, run, monkeypatch, tmp_path):
    text = SWEEPER.replace('"FAILED" if lost', '"FAILED" if i == 1') + "\nsys.exit(1)\n"
    (tmp_path / "run.py").write_text(text)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    gpu._sweep(run, soon(), ["first", "second", "third"], "--seconds", "0")
    assert dict(steps(run)) == {"second": "FAILED", "layers": "ok"}
    assert run.record.results["steps"][-1]["reason"] == "3 measured"


def test_the_sweep_stops_in_time(gpu, run, monkeypatch, tmp_path):
    (tmp_path / "run.py").write_text(SWEEPER.replace("print(name", "import time; time.sleep(2); print(name"))
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    gpu._sweep(run, soon(5), [f"case{i}" for i in range(50)], "--seconds", "0")
    assert "left for want of time" in run.record.results["steps"][-1]["reason"]
    assert json.loads(run.record.path.read_text())["rows"]


def test_an_interrupt_keeps_what_there_is(gpu, monkeypatch, tmp_path, capsys):
    def interrupted(run, until):
        """A part."""
        run.record.add(gpu.Step("repeat", "first", "ok"))
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "repeat", interrupted)
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--part", "repeat", "models"]) == 130
    (path,) = tmp_path.glob("dry-run/*.json")
    results = json.loads(path.read_text())
    assert [step["step"] for step in results["steps"]] == ["first"] and not results["complete"]
    assert "not finished" in capsys.readouterr().out


def test_a_fault_of_a_part_is_a_row(gpu, monkeypatch, tmp_path):
    def broken(run, until):
        """A part."""
        raise ValueError("what is this")

    monkeypatch.setattr(gpu, "repeat", broken)

    def works(run, until):
        """Another."""
        run.record.add(gpu.Step("models", "m", "ok"))

    monkeypatch.setattr(gpu, "models", works)
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--part", "repeat", "models"]) == 1
    (path,) = tmp_path.glob("dry-run/*.json")
    found = [(step["step"], step["reason"]) for step in json.loads(path.read_text())["steps"]]
    assert found == [("repeat", "ValueError: what is this"), ("m", "")]
