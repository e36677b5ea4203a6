"""python -m vitkernels info | selftest"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vitkernels import __main__ as command
from vitkernels import _dispatch


def test_selftest_runs_every_backend_that_is_here(capsys):
    assert command.selftest() == 0
    printed = capsys.readouterr().out
    for backend in _dispatch.BACKENDS[:-1]:
        lines = [line for line in printed.splitlines() if line.startswith(backend)]
        expected = [name for name, (_, backends) in command.CHECKS.items() if backend in backends]
        if why := _dispatch.absent(backend):
            assert len(lines) == 1 and why in lines[0]
        else:
            assert [line.split()[1] for line in lines] == expected and all(" passed on " in line for line in lines)


@pytest.mark.skipif(bool(_dispatch.absent("cpu")), reason="no C++ library")
def test_selftest_fails_where_a_backend_is_wrong(monkeypatch, capsys):
    def wrong(dtype, device, backend):
        return [torch.ones(1) + (backend != "reference") * 1e-3]

    monkeypatch.setattr(command, "CHECKS", {"partition_attention": (wrong, ("cpu",))})
    monkeypatch.setattr(sys, "argv", ["vitkernels", "selftest"])
    assert command.main() == 1
    assert "FAILED on cpu: largest relative error 1.0e-03" in capsys.readouterr().out


@pytest.mark.parametrize("asked, status", [("info", 0), ("selftest", 1)])
def test_a_reader_that_has_enough_gets_no_traceback(asked, status):
    command = f"'{sys.executable}' -u -m vitkernels {asked}"
    done = subprocess.run(["bash", "-c", f"({command}; echo $? >&2) | true"], capture_output=True, text=True)
    assert done.stderr.strip() == str(status)
