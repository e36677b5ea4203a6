"""The tables of README.md and docs/performance.md, from committed results and nothing else.

Between two comments of such a document stands what this writes; the first says of what:

    <!-- results FOLDER/FILE.json [GLOB ..] -->      every row of a run, of the cases that match
    <!-- run FOLDER/FILE.json -->                    what ran, where and when
    <!-- layers FOLDER/FILE.json                     some layers under other names, a line each: CASE = NAME
    ... -->
    <!-- models FOLDER/FILE.json .. -->              every row of some runs of whole models
    <!-- accelerated FILE .. -->                    the same of libraries' models, before and after `accelerate`
    <!-- gpu -->                                     the newest run on every GPU; without one, what is to be measured
    <!-- end -->

python benchmarks/performance.py            writes both documents; --check says whether they have drifted
"""

from __future__ import annotations

import argparse
import fnmatch
import re
from pathlib import Path

import report
import roofline
from cases import CASES
from report import PASSES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
BLOCK = re.compile(r"(<!-- (results|run|layers|models|accelerated|gpu)\b(.*?)-->\n)(.*?)(<!-- end -->)", re.S)
STEPS = {"fwd": "inference", "full": "training"}


def provenance(name: str, results: dict) -> str:
    """What ran, where and when."""
    machine, rates = results["machine"], results.get("rates", {})
    processor = machine["cpu"] if machine["device"] == "CPU" else f"{machine['device']}, driver {machine.get('driver')}"
    words = [processor]
    words += [f"{machine['threads']} threads"] if machine["device"] == "CPU" else [f"triton {machine.get('triton')}"]
    words += [f"torch {machine['torch']}", f"commit {machine['commit'].removesuffix('+changes')}", machine["date"]]
    measured = [f"copy {results['bandwidth'] / 1e9:.1f} GB/s"] if results.get("bandwidth") else []
    rates = {name: rate for name, rate in rates.items() if name != "vector" or "float32" not in rates}
    measured += [f"{name.replace('vector', 'float32')} products {n / 1e9:.0f} GFLOP/s" for name, n in rates.items()]
    if not rates:
        measured.append("no matmul rate was measured: of floor is the share of the copy bandwidth")
    return f"`benchmarks/results/{name}`: {', '.join(words)}; {', '.join(measured)}."


def load(name: str) -> dict:
    return report.load(RESULTS / name)


def of_results(arguments: list[str]) -> str:
    name, *patterns = arguments
    results = load(name)
    keep = [row for row in results["rows"] if any(fnmatch.fnmatchcase(row["case"], p) for p in patterns or ["*"])]
    return provenance(name, results) + "\n\n" + report.markdown(results | {"rows": keep})


TITLES = (
    *("layer", "batch", "pass", "eager, ms", "best plain PyTorch, ms", "vitkernels, ms", "vs eager", "vs best"),
    *("of floor", "peak memory, eager", "vitkernels"),
)


def of_layers(name: str, labels: dict[str, str]) -> str:
    """A row for every layer and pass: eager, the best of the others, ours."""
    results, lines = load(name), []
    rows = report.groups(results["rows"], "case", "batch", "mode")
    for (case, batch, mode), group in rows.items():
        if case not in labels:
            continue
        eager, best, ours = report.sides(group)
        best = min(filter(None, (eager, best)), key=lambda row: row["ms"], default={})
        ratio = best["ms"] / ours["ms"] if best and ours else None
        times = [report.number(row.get("ms"), report.SHOW["ms"]) for row in (eager, best, ours)]
        shares = [(ours.get("speedup"), "speedup"), (ratio, "speedup"), (ours.get("floor"), "floor")]
        memory = [(row.get("memory"), "memory") for row in (eager, ours)]
        numbers = [report.number(value, report.SHOW[key]) for value, key in shares + memory]
        lines.append([labels[case], str(batch), PASSES[mode], *times, *numbers])
    missing = labels.keys() - {case for case, _, _ in rows}
    lines += [[labels[case], "", "", *[report.NOT_MEASURED] * 8] for case in labels if case in missing]
    return report.markdown_table(TITLES, lines, 3)


def of_models(names: list[str]) -> str:
    """A row for every model and pass, in images per second: eager, the library that has it, ours; what limits us."""
    rows, lines = [row for name in names for row in load(name)["rows"]], []
    show = {**report.SHOW, **report.MODELS}
    for (case, batch, mode), group in report.groups(rows, "case", "batch", "mode").items():
        eager, best, ours = report.sides(group)
        ceiling = next((row.get("speedup") for row in group if row["contender"] == report.NO_ATTENTION), None)
        library = best.get("contender", report.NO_CONTENDER)
        ratio = best["ms"] / ours["ms"] if best and ours else None
        rates = [report.number(row.get("rate"), show["rate"]) for row in (eager, best, ours)]
        ratios = [report.number(x, show["speedup"]) for x in (ours.get("speedup"), ceiling, ratio)]
        if not best:
            rates[1] = ratios[2] = report.NO_CONTENDER
        memory = [report.number(row.get("memory"), show["memory"]) for row in (eager, ours)]
        about = [case, library, str(batch), STEPS[mode]]
        lines.append([*about, *rates, *ratios, *memory])
    titles = ["model", "library", "batch", "pass", "eager, images/s", "library", "vitkernels", "vs eager", "at most"]
    return report.markdown_table([*titles, "vs library", "peak memory, eager", "vitkernels"], lines, 4)


def of_accelerated(names: list[str]) -> str:
    """A row for every model and pass, in images per second: as shipped, accelerated."""
    rows, lines = [row for name in names for row in load(name)["rows"]], []
    for (_, layer, batch, mode), group in report.groups(rows, "case", "layer", "batch", "mode").items():
        shipped, _, ours = report.sides(group)
        rates = [report.number(row.get("rate"), report.MODELS["rate"]) for row in (shipped, ours)]
        memory = [report.number(row.get("memory"), report.SHOW["memory"]) for row in (shipped, ours)]
        ratio = report.number(ours.get("speedup"), report.SHOW["speedup"])
        lines.append([layer, str(batch), STEPS[mode], *rates, ratio, *memory])
    titles = [
        "model, pixels",
        "batch",
        "pass",
        "as shipped, images/s",
        "accelerated",
        "ratio",
        "peak memory, as shipped",
    ]
    return report.markdown_table([*titles, "accelerated"], lines, 3)


def of_gpus() -> str:
    """The newest run of every GPU, rows by layer; all layers, with what they move and compute, where there is none."""
    newest = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        results = report.load(path)
        if results["machine"]["device"] != "CPU":
            newest[results["machine"]["device"]] = path, results
    if newest:
        blocks = (
            f"{provenance(f'{path.parent.name}/{path.name}', results)}\n\n{report.markdown(results)}"
            for path, results in newest.values()
        )
        return "\n\n".join(blocks)
    lines = []
    for case in CASES:
        batch = case.batch("cuda")
        for mode in ("fwd", "full") if "full" in case.kind.modes else ("fwd",):
            least = roofline.work(case, batch, "bfloat16", mode)
            arithmetic = f"{(least.products + least.vector) / 1e9:.2f}"
            about = [case.name, str(batch), PASSES[mode], f"{least.bytes / 1e6:.1f}", arithmetic]
            lines.append([*about, *[report.NOT_MEASURED] * 3])
    titles = ("layer", "batch", "pass", "MB", "GFLOP", "eager, ms", "vitkernels, ms", "of floor")
    return report.markdown_table(titles, lines, 3)


def filled(text: str) -> str:
    """A document with its blocks written again."""

    def block(found: re.Match) -> str:
        head, kind, arguments, _, end = found.groups()
        if kind == "gpu":
            body = of_gpus()
        elif kind == "models":
            body = of_models(arguments.split())
        elif kind == "accelerated":
            body = of_accelerated(arguments.split())
        elif kind == "results":
            body = of_results(arguments.split())
        elif kind == "run":
            body = provenance(arguments.strip(), load(arguments.strip()))
        else:
            name, *labels = arguments.strip().splitlines()
            body = of_layers(name.strip(), dict(tuple(map(str.strip, line.split("=", 1))) for line in labels))
        return f"{head}\n{body}\n\n{end}"

    return BLOCK.sub(block, text)


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python benchmarks/performance.py", description=__doc__, formatter_class=form)
    parser.add_argument("--check", action="store_true", help="fail where a document has drifted, and write nothing")
    args = parser.parse_args(argv)
    status = 0
    for path in DOCUMENTS:
        before = path.read_text()
        after = filled(before)
        if args.check and after != before:
            print(f"{path.relative_to(ROOT)} has drifted from the committed results; `make performance` writes it")
            status = 1
        elif not args.check:
            path.write_text(after)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
