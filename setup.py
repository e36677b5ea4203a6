"""Builds the native library ``vitkernels/_C`` where torch is importable; a pure Python package elsewhere.

VITKERNELS_NATIVE=1 fails instead of skipping the library, VITKERNELS_NATIVE=0 skips it.
"""

import importlib.util
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc/cpu")
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", "-Wall", "-Wno-psabi"]
# The stable ABIs of LibTorch (from 2.10) and of Python (from 3.10): one library for every later version.
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030A0000")]

# A file *.kernel.cpp is compiled once per vector level, into a namespace of that name; the library chooses at run time.
LEVELS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}


def torch_folder() -> Path | None:
    """Where torch lies, without importing it; None where the native library is not to be built."""
    wanted = os.environ.get("VITKERNELS_NATIVE")
    spec = None if wanted == "0" else importlib.util.find_spec("torch")
    if spec is None and wanted == "1":
        raise RuntimeError(
            "VITKERNELS_NATIVE=1 but torch is not importable here: install torch first, then vitkernels with "
            "pip install --no-build-isolation"
        )
    return Path(spec.origin).parent if spec else None


class BuildNative(build_ext):
    """Compiles every source, the kernels once per vector level, in parallel, and links them."""

    def build_extension(self, extension: Extension) -> None:
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
    return [
        Extension(
            "vitkernels._C",
            sources=sorted(map(str, SOURCES.glob("*.cpp"))),
            depends=sorted(map(str, Path("csrc").rglob("*.h"))),
            include_dirs=[str(torch / "include"), "csrc"],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],  # found by its name at load time: torch is imported first
            define_macros=MACROS + levels,
            py_limited_api=True,
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions() else {},
)
