"""Builds the native libraries where torch is importable, a CUDA device or not; a pure Python package elsewhere.

``vitkernels/_C`` is C++, ``vitkernels/_CUDA`` is CUDA and needs nvcc. VITKERNELS_NATIVE=1 and VITKERNELS_CUDA=1 fail
instead of skipping a library; VITKERNELS_CUDA=0 skips CUDA, VITKERNELS_NATIVE=0 both. TORCH_CUDA_ARCH_LIST, as in
"8.0;9.0+PTX", names the GPUs to compile for.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("csrc/cpu")
CUDA_SOURCES = Path("csrc/cuda")
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", "-Wall", "-Wno-psabi"]
FLAGS += ["-falign-loops=64"]  # the inner loop of a product in as few cache lines as it has (docs/experiments.md)
CUDA_FLAGS = ["-std=c++17", "-O3", "-shared", "-cudart=static", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# The stable ABIs of LibTorch (from 2.10) and of Python (from 3.10): one library for every later version.
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030A0000")]

# A file *.kernel.cpp is compiled once per vector level, into a namespace of that name; the library chooses at run time.
LEVELS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}

# Ampere to Blackwell, of which nvcc may not know the latest, and PTX for what comes after. Nothing before 8.0 will do.
GPUS = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]


def torch_folder() -> Path | None:
    """Where torch lies, without importing it; None where the native library is not to be built."""
    if os.environ.get("VITKERNELS_NATIVE") == "0":
        return None
    spec = importlib.util.find_spec("torch")
    for variable in ("VITKERNELS_NATIVE", "VITKERNELS_CUDA"):
        if spec is None and os.environ.get(variable) == "1":
            raise RuntimeError(
                f"{variable}=1 but torch is not importable here: install torch first, then vitkernels with "
                "pip install --no-build-isolation"
            )
    return Path(spec.origin).parent if spec else None


def nvcc() -> str | None:
    """The CUDA compiler; None where the CUDA library is not to be built."""
    wanted = os.environ.get("VITKERNELS_CUDA")
    folders = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{folder}/bin") for folder in folders if folder)]
    found = None if wanted == "0" else next(filter(None, places), None)
    if found is None and wanted == "1":
        raise RuntimeError("VITKERNELS_CUDA=1 but nvcc is neither on PATH nor in $CUDA_HOME/bin or /usr/local/cuda/bin")
    return found


def gpus(compiler: str) -> str:
    """What tells nvcc which GPUs to compile for: all from the PTX of 8.0, for the kernels use nothing newer."""
    known = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    names = re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) or GPUS
    numbers = [re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name) for name in names]
    if None in numbers:
        raise RuntimeError(f"TORCH_CUDA_ARCH_LIST must be numbers as in '8.0;9.0+PTX', got {' '.join(names)!r}")
    codes = [f"sm_{number[1]}{number[2]}" for number in numbers if int(number[1]) >= 8]
    codes = [code for code in codes if code in known] + ["compute_80"] * any(number[3] for number in numbers)
    return f"-gencode=arch=compute_80,code=[{','.join(codes)}]"


class BuildNative(build_ext):
    """Compiles every C++ source, the kernels once per vector level, in parallel, and links them; CUDA by nvcc alone."""

    def build_extension(self, extension: Extension) -> None:
        if extension.language == "cuda":
            return self.build_cuda(extension)
        jobs = [(source, level) for source in extension.sources for level in self.levels(source)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self.compile(extension, *job), jobs))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(extension.name),
            libraries=extension.libraries,
            library_dirs=extension.library_dirs,
            target_lang="c++",
        )

    def build_cuda(self, extension: Extension) -> None:
        target, temporary = Path(self.get_ext_fullpath(extension.name)), Path(self.build_temp)
        for folder in (target.parent, temporary):
            folder.mkdir(parents=True, exist_ok=True)
        # The library needs libtorch_cuda at run time, which a CPU build of torch lacks: an empty one lends its name.
        stand_in = temporary / "libtorch_cuda.so"
        named = f"-Wl,-soname,{stand_in.name}"
        flags = [f"-D{name}={value}" for name, value in extension.define_macros]
        flags += [f"-I{path}" for path in extension.include_dirs]
        flags += [f"-L{path}" for path in [temporary, *extension.library_dirs]]
        flags += ["-Xlinker", "--no-as-needed", *(f"-l{name}" for name in extension.libraries)]
        compiler = nvcc()
        try:
            self.spawn([*getattr(self.compiler, "linker_so_cxx", self.compiler.linker_so), named, "-o", str(stand_in)])
            self.spawn([compiler, *CUDA_FLAGS, gpus(compiler), *extension.sources, *flags, "-o", str(target)])
        except Exception as error:
            raise CompileError(f"{extension.name} was not built: {error}") from error

    def levels(self, source: str) -> list[str]:
        return list(LEVELS) if source.endswith(".kernel.cpp") else ["baseline"]

    def compile(self, extension: Extension, source: str, level: str) -> str:
        (compiled,) = self.compiler.compile(
            [source],
            output_dir=os.path.join(self.build_temp, level),
            macros=extension.define_macros + [("VITKERNELS_LEVEL", level)],
            include_dirs=extension.include_dirs,
            extra_postargs=FLAGS + LEVELS[level],
            depends=extension.depends,
        )
        return compiled


def extensions() -> list[Extension]:
    torch = torch_folder()
    if torch is None:
        return []
    levels = [(f"VITKERNELS_HAS_{level.upper()}", "1") for level in LEVELS]
    common = dict(
        depends=sorted(map(str, Path("csrc").rglob("*.*h"))),
        include_dirs=[str(torch / "include"), "csrc"],
        library_dirs=[str(torch / "lib")],
        py_limited_api=True,
    )
    found = [
        Extension(
            "vitkernels._C",
            sources=sorted(map(str, SOURCES.glob("*.cpp"))),
            libraries=["torch_cpu"],  # found by its name at load time: torch is imported first
            define_macros=MACROS + levels,
            **common,
        )
    ]
    if nvcc():
        found.append(
            Extension(
                "vitkernels._CUDA",
                sources=sorted(map(str, [*CUDA_SOURCES.glob("*.cpp"), *CUDA_SOURCES.glob("*.cu")])),
                libraries=["torch_cpu", "torch_cuda"],
                define_macros=[*MACROS, ("USE_CUDA", "1")],
                language="cuda",
                optional=os.environ.get("VITKERNELS_CUDA") != "1",
                **common,
            )
        )
    return found


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions() else {},
)
