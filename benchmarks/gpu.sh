#!/usr/bin/env bash
# What only an NVIDIA GPU can show, in one command and under nine minutes, with the Python that is there and no network.
# benchmarks/gpu.sh --help says more; PYTHON names another Python.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
