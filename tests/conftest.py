"""What the tests share. Without a CUDA device the Triton kernels run in Triton's interpreter."""

import copy
import fcntl
import gc
import importlib.util
import io
import mmap
import os
import pathlib
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from types import ModuleType, SimpleNamespace

import pytest

CORES = len(os.sched_getaffinity(0))
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))  # processes that share the cores
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // WORKERS)))  # torch reads it once

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton


def _interpreter_refusal() -> str | None:
    """Why the Triton kernels cannot run here, or None."""
    try:
        import numpy
        import triton
        from packaging.version import Version
    except ImportError as error:
        return f"no Triton kernels without {error.name}"
    if torch.cuda.is_available():
        return None
    if Version(numpy.__version__) >= Version("2.4") and Version(triton.__version__) < Version("3.7.1"):
        return f"the interpreter of triton {triton.__version__} breaks on numpy {numpy.__version__}; install numpy<2.4"
    return None


def _hasten_the_interpreter() -> None:
    """Put the interpreter into Triton's language once a launch, not once a call of a device function.

    A type's counterpart in NumPy is looked up once. What a check for overflow would need, which is never made, is not
    computed.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    core, patch = interpreter.tl.core, interpreter._patch_lang
    everywhere = SimpleNamespace(__globals__={"tl": interpreter.tl, "core": core})

    def patch_language(function: object) -> object:
        inside = not core.is_builtin(
            core.load
        )  # a device function: its launch has patched the language, and restores it
        return interpreter._LangPatchScope() if inside else patch(everywhere)

    numpy_type, known = interpreter._get_np_dtype, {}

    def remembered(dtype: object) -> object:
        if dtype.name not in known:
            known[dtype.name] = numpy_type(dtype)
        return known[dtype.name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_language, remembered
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options


TRITON_REFUSAL = _interpreter_refusal()
if TRITON_REFUSAL is None and not torch.cuda.is_available():
    _hasten_the_interpreter()
needs_triton = pytest.mark.skipif(TRITON_REFUSAL is not None, reason=str(TRITON_REFUSAL))


def sparse(elements: int, device: str) -> torch.Tensor:
    """A float16 tensor of which only the touched pages take memory on a CPU."""
    if device == "cuda":
        return torch.empty(elements, dtype=torch.float16, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.float16)


def assert_graph_replays(step: Callable[[], Iterable[torch.Tensor]], x: torch.Tensor) -> None:
    """``step``, captured as a CUDA graph, gives what it gives by itself, also after ``x`` has changed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


def restored(layer: torch.nn.Module) -> torch.nn.Module:
    """A copy that had other parameters before it loaded the saved state of ``layer``."""
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(layer)
    for p in other.parameters():
        torch.nn.init.normal_(p)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


def pytest_collection_finish() -> None:
    """What was imported lives as long as the tests: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of ``-n auto``: one per core, and none beside this process where they would compete for a GPU."""
    return 0 if torch.cuda.is_available() else CORES


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[pathlib.Path], object]], pathlib.Path]:
    """``once(name, make)``: path of a file that ``make(path)`` writes in the first worker that asks for it."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # of all workers

    def path(name: str, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
        target, partial = folder / name, folder / f"partial-{name}"
        with open(folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                make(partial)
                partial.replace(target)
        return target

    return path


@pytest.fixture(scope="session")
def built(once) -> Callable[..., ModuleType]:
    """``built(name, *flags, variant)``: tests/cpp/NAME.cpp, which includes headers of csrc, as a Python module."""
    pybind11 = pytest.importorskip("pybind11")
    pytest.importorskip("numpy")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    root = pathlib.Path(__file__).parents[1]
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"], str(root / "csrc")]
    common = "-std=c++17 -Og -shared -fPIC -fvisibility=hidden".split() + [f"-I{path}" for path in includes]

    def module(name: str, *flags: str, variant: str = "") -> ModuleType:
        command = [compiler, *common, *flags, str(root / "tests" / "cpp" / f"{name}.cpp"), "-o"]
        file = f"{name}{variant}{sysconfig.get_config_var('EXT_SUFFIX')}"
        library = once(file, lambda path: subprocess.run([*command, str(path)], check=True))
        spec = importlib.util.spec_from_file_location(name, library)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    return module


@pytest.fixture
def device() -> str:
    """Where the Triton kernels run: compiled on CUDA tensors, or interpreted on CPU tensors."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[None, "reference"], ids=["default", "reference"])
def backend(request):
    """The backend that layers run on."""
    from vitkernels import use_backend

    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poison():
    """`torch.empty` returns NaN-filled memory, in C++ too, so that an output nobody writes cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@lru_cache(maxsize=1)
def import_torchvision() -> tuple:
    """torchvision, which timm imports too, and what lives as long. Beside a CPU build of torch its wheel lacks its
    operators, whose names are all that its import needs.
    """
    library = None
    try:
        return pytest.importorskip("torchvision"), library
    except RuntimeError:  # operator torchvision::nms does not exist
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        return pytest.importorskip("torchvision"), library


@pytest.fixture(scope="session")
def torchvision():
    return import_torchvision()[0]


@pytest.fixture(scope="session")
def golden():
    """Loader of golden vectors from the folder named by VITKERNELS_GOLDEN: (meta, tensors in float32)."""
    folder = os.environ.get("VITKERNELS_GOLDEN")
    if not folder:
        pytest.skip("VITKERNELS_GOLDEN names no folder of golden vectors")
    safetensors = pytest.importorskip("safetensors")
    import json

    def load(name: str):
        with safetensors.safe_open(pathlib.Path(folder) / f"{name}.safetensors", "pt") as file:
            meta = json.loads(file.metadata()["meta"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return meta, {k: v if k in ("rows", "perm") else v.float() for k, v in tensors.items()}

    return load
