"""Imports point one way, read from the source; importing the package imports no triton."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "vitkernels"
FILES = sorted(
    p.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".") for p in PACKAGE.rglob("*.py")
)

_OPERATORS = {"partition", "partition_attention", "pooled_attention", "position_bias"}
# what a file may import from the package, by its name, with that of its folder where two have one name
ALLOWED = {
    "__init__": {"_dispatch", "partition", "module", "op", "clusters", "reference"}
    | {"position_bias", "partition_attention", "cluster_attention", "pooled_attention", "pool"}
    | {"integrations", "accelerate"},
    "__main__": {"", "_dispatch"},
    "module": {
        "_checks",
        "_dispatch",
        "_layer",
        "partition",
        "tree",
        "op",
        "clusters",
        "pool",
        "reference",
        "position_bias",
    },
    "op": {"_checks", "_dispatch", "partition", "tree", "clusters", "pool", "reference", "kernels"},
    "clusters": {"_checks", "_dispatch", "reference"},
    "pool": {"_checks", "_dispatch", "reference", "pool_kernels"},
    "kernels": {"_triton", "tree", "position_bias.kernels", "streamed", "positions"},
    "pool_kernels": {"_triton"},
    "positions": {"_triton"},
    "streamed": {"_triton", "tree", "positions"},
    "reference": {"_softmax", "partition", "tree"},
    "_layer": {"_checks"},
    # models compose layers, and nothing else
    "_blocks": {"_checks", "_dispatch", "_layer", "pooled_attention"},
    "boat": {"_blocks", "_checks", "_layer", "cluster_attention", "partition_attention"},
    "crossformer": {"_blocks", "_checks", "_layer", "partition_attention"},
    "maxvit": {"_blocks", "_layer", "partition_attention"},
    "mvit": {"_blocks", "_checks", "_layer", "pooled_attention"},
    "checkpoints": {"_blocks", "_checks", "boat", "crossformer", "maxvit", "mvit"},
    # integrations call operators from modules of others, whose parts they read by the rule that layers have
    "recipe": _OPERATORS | {"_layer", "partition_attention.reference"},
    "swin": _OPERATORS | {"_layer", "partition_attention.module", "recipe"},
    "integrations.crossformer": _OPERATORS | {"_layer", "position_bias.module", "recipe"},
    "integrations.maxvit": _OPERATORS | {"_layer", "recipe"},
    "integrations.mvit": _OPERATORS | {"_layer", "recipe"},
    "accelerate": {"_checks", "_dispatch", "crossformer", "maxvit", "mvit", "recipe", "swin"},
    "_triton": set(),
    "_dispatch": {"_native", "_triton"},
    "_checks": set(),
    "_sizes": set(),
    "_softmax": set(),
    "_native": set(),
    "partition": {"_checks"},
    "tree": set(),
}
ANYWHERE = {"_sizes"}  # arithmetic
KERNELS = {"_triton", "kernels", "streamed", "pool_kernels", "positions"}  # may import triton


def imports(module: str):
    """(imported module, names, whether inside a function) for every import of ``module``, made absolute."""
    path = PACKAGE.parent / (module.replace(".", "/") + ".py")
    tree = ast.parse(path.read_text())
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    parents = module.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inner
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parents[: len(parents) - node.level]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            if source == "vitkernels" or node.module is None:  # from . import x, from .. import x
                yield from ((f"{source}.{alias.name}", id(node) in inner) for alias in node.names)
            else:
                yield source, id(node) in inner


@pytest.mark.parametrize("module", FILES)
def test_direction(module):
    name = module.rsplit(".", 1)[-1]
    own = module.rsplit(".", 1)[0]
    allowed = ALLOWED.get(f"{own.rsplit('.', 1)[-1]}.{name}") or ALLOWED[name]
    for imported, lazy in imports(module):
        if imported.split(".")[0] == "triton":
            assert name in KERNELS, f"{module} imports triton"
        if imported.split(".")[0] != "vitkernels":
            continue
        short = imported.removeprefix("vitkernels.").removeprefix(own.removeprefix("vitkernels.") + ".")
        known = short in allowed | ANYWHERE or (name in ("__init__", "__main__") and "." not in short)
        assert known, f"{module} imports {imported}"
        if short in KERNELS and name not in KERNELS:
            assert lazy, f"{module} imports {short} when it is imported"


def test_importing_the_package_imports_no_triton():
    code = "import sys, vitkernels; raise SystemExit('triton' in sys.modules and 'triton.language' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_benchmarks_and_examples_use_public_names_alone():
    """But for the one that compiles the launches themselves."""
    for path in [*PACKAGE.parent.glob("benchmarks/*.py"), *PACKAGE.parent.glob("examples/*.py")]:
        if path.name == "ahead_of_time.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.startswith("vitkernels.") and n != "vitkernels.models" for n in names), path
