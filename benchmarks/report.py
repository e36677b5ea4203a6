"""Results of benchmarks/run.py as text, Markdown or CSV, and two of them compared. Only what was measured is printed.

python benchmarks/report.py results.json [--markdown | --csv] [--compare old.json]
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

NOT_MEASURED = "not yet measured"
NO_CONTENDER = "-"  # of this layer
FIELDS = (
    *("case", "layer", "batch", "dtype", "mode", "contender", "status", "reason"),
    *("ms", "p20", "p80", "rounds", "speedup", "rate", "gbps", "floor", "floor_ms", "bound", "memory"),
    *("launches", "graph"),
)
NO_ATTENTION = "no attention"  # a model whose layers only project: no contender, but what one could reach at most
SLOWER = 0.9  # of the old share of the floor: below it, a row of a comparison counts as a regression


def save(results: dict, path: Path) -> None:
    """Write in one step, so that an interrupt leaves the last complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, path)


def load(path: Path) -> dict:
    results = json.loads(Path(path).read_text())
    if not isinstance(results, dict) or not {"machine", "rows"} <= results.keys():
        raise ValueError(f"{path} holds no results of benchmarks/run.py: expected the keys 'machine' and 'rows'")
    return results


def number(value: object, show: Callable[[float], str]) -> str:
    """``value`` as ``show`` writes it; anything but a finite number was not measured."""
    measured = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return show(value) if measured else NOT_MEASURED


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


SHOW: dict[str, Callable[[float], str]] = {
    "ms": _milliseconds,
    "p20": _milliseconds,
    "p80": _milliseconds,
    "speedup": lambda value: f"{value:.2f}x",
    "gbps": _three_digits,
    "floor": lambda value: f"{100 * value:.0f} %",
    "memory": lambda value: f"{value / 2**20:.1f} MiB",
}
LAYERS = ("gbps", "floor")
MODELS = {"rate": _three_digits}
TITLES = {
    "speedup": "vs eager",
    "rate": "images/s",
    "gbps": "GB/s",
    "floor": "of floor",
    "memory": "peak memory",
    "graph": "graph, ms",
}
ON_A_GPU = {"launches": "{:.0f}".format, "graph": _milliseconds}
EXPLANATION = (
    "vs eager: eager's median in the same run over this median. GB/s: what a fused operator must move over the\n"
    "median. of floor: the time in which this machine, at the rates above, could move those bytes or do the\n"
    "arithmetic (benchmarks/roofline.py), whichever is longer, over the median; past 100 % a cache served it, or\n"
    "products ran faster than in a large matmul. peak memory: most bytes of tensors alive at once, with results,\n"
    "without inputs."
)
EXPLANATION_OF_MODELS = (
    "eager: the model on the reference backend; of accelerate-*, the library's model as it is shipped, of which\n"
    "vitkernels' is an accelerated copy. vs eager: its median in the same run over this median; that of\n"
    "'no attention', layers that only project, is the most that fused attention can gain. fwd is inference, full a\n"
    "training step without its optimiser. peak memory: most bytes of tensors alive at once, without parameters."
)
EXPLANATION_ON_A_GPU = (
    "Times are by events, the L2 cache flushed before each call. launches: kernels, copies and fills. graph, ms: as a\n"
    "CUDA graph, replayed in a row, the cache warm."
)


def _align(table: list[list[str]], left: int) -> list[str]:
    """Lines of ``table``, its first ``left`` columns flush left and the others flush right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    cells = [[c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in table]
    return ["  ".join(row).rstrip() for row in cells]


def groups(rows: Iterable[dict], *keys: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def header(results: dict) -> str:
    found = dict(results["machine"])
    found["copy bandwidth"] = number(
        results.get("bandwidth"), lambda value: f"{value / 1e9:.1f} GB/s, read plus written"
    )
    for name, rate in results.get("rates", {}).items():
        what = "float32 arithmetic" if name == "vector" else f"{name} products"
        found[what] = number(rate, lambda value: f"{value / 1e9:.0f} GFLOP/s")
    width = max(map(len, found))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in found.items())


def _floors(rows: list[dict]) -> str:
    """The floor of every pass of a layer, and what sets it."""
    floors = {(r["mode"], r["dtype"]): (r["floor_ms"], r["bound"]) for r in rows if r.get("floor_ms")}
    words = [f"{mode} {number(ms, _milliseconds)} ms ({bound})" for (mode, _), (ms, bound) in floors.items()]
    return f"\n  floor: {', '.join(words)}" if words else ""


def _status(row: dict) -> str:
    return f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]


def text(results: dict) -> str:
    """The whole table, one block per layer."""
    on_a_gpu = any("launches" in row for row in results["rows"])
    cases = groups(results["rows"], "case", "layer", "batch")
    models = {about for about, rows in cases.items() if any("rate" in row for row in rows)}
    blocks = [header(results), *([EXPLANATION] if not models or models < cases.keys() else [])]
    blocks += [EXPLANATION_OF_MODELS] * bool(models) + [EXPLANATION_ON_A_GPU] * on_a_gpu
    for (case, layer, batch), rows in cases.items():
        show = SHOW | (ON_A_GPU if on_a_gpu else {})
        if (case, layer, batch) in models:
            show = {name: how for name, how in show.items() if name not in LAYERS} | MODELS
        titles = [TITLES.get(name, name) for name in ("mode", "dtype", "contender", *show)]
        measured = [r for r in rows if r["status"] == "ok"]
        cells = [[r["mode"], r["dtype"], r["contender"], *(number(r.get(k), show[k]) for k in show)] for r in measured]
        others = [f"{r['mode']}  {r['dtype']}  {r['contender']}  {_status(r)}" for r in rows if r["status"] != "ok"]
        lines = _align([titles, *cells], 3) if cells else []
        title = f"{case}: batch {batch}, {layer}{_floors(rows)}"
        blocks.append("\n".join([title, *(f"  {line}" for line in lines + others)]))
    if not results["rows"]:
        blocks.append(NOT_MEASURED)
    if not results.get("complete"):
        blocks.append("This run was not finished; the rows above are those it measured.")
    return "\n\n".join(blocks)


def markdown_table(titles: Sequence[str], lines: Iterable[Sequence[str]], left: int) -> str:
    """The first ``left`` columns flush left, the others flush right."""
    rule = "|---" * left + "|---:" * (len(titles) - left) + "|"
    return "\n".join(["| " + " | ".join(titles) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])


def markdown(results: dict) -> str:
    """One row per layer and mode: milliseconds of every contender that was tried, then speed-up and memory of ours.

    On a GPU also milliseconds as a CUDA graph, which the processor that launches does not hold up.
    """
    rows, show = results["rows"], SHOW | ON_A_GPU
    ran = [row for row in rows if row["status"] != "skipped"]
    names = list(dict.fromkeys(row["contender"] for row in ran))
    ours = [name for name in names if name.startswith("vitkernels")]
    contenders = [name for name in names if name not in ours] + ours  # a first layer may lack some of the others
    titles = ["layer", "batch", "dtype", "pass", *(f"{name}, ms" for name in contenders)]
    graphs = [name for name in ("eager", *ours) if any(row.get("graph") for row in ran)]
    titles += [f"{name}: as a graph, ms" for name in graphs]
    titles += [f"{name}: {what}" for name in ours for what in ("vs eager", "of floor")]
    titles += [f"{name}: peak memory" for name in ("eager", *ours)]
    lines = []
    for (case, batch, dtype, mode), group in groups(rows, "case", "batch", "dtype", "mode").items():
        found = {row["contender"]: row for row in group}

        def cell(contender: str, field: str, found=found) -> str:
            return number(found[contender].get(field), show[field]) if contender in found else NO_CONTENDER

        cells = [case, str(batch), dtype, mode, *(cell(name, "ms") for name in contenders)]
        cells += [cell(name, "graph") for name in graphs]
        cells += [cell(name, field) for name in ours for field in ("speedup", "floor")]
        cells += [cell(name, "memory") for name in ("eager", *ours)]
        lines.append(cells)
    return markdown_table(titles, lines, 4) if rows else NOT_MEASURED


def sides(rows: list[dict]) -> tuple[dict, dict, dict]:
    """Of a layer's rows that of eager, the fastest of the others, and the fastest of vitkernels; {} where none is."""
    found = {row["contender"]: row for row in rows if row.get("ms")}
    eager, _ = found.pop("eager", {}), found.pop(NO_ATTENTION, None)
    ours = {name for name in found if name.startswith("vitkernels")}
    kinds = found.keys() - ours, ours
    return eager, *(min((found[n] for n in sorted(kind)), key=lambda row: row["ms"], default={}) for kind in kinds)


PASSES = {"fwd": "forward", "bwd": "backward", "full": "forward + backward"}
LINES = 8  # of cases in `closing`, which has ten lines


def closing(results: dict) -> str:
    """Ten lines at most: the best of vitkernels in every pass of a case, and what to run next."""
    modes = [mode for mode in PASSES if any(row["mode"] == mode for row in results["rows"])]
    table = [[", ".join(map(PASSES.get, modes)), "vs eager", "vs best other", "", "of floor", "peak memory", "eager's"]]
    cases = groups(results["rows"], "case", "batch", "dtype")
    for (case, batch, dtype), rows in list(cases.items())[:LINES]:
        passes = [sides(found) for found in groups(rows, "mode").values()]
        columns = [_pass(*found) for found in passes]
        joined = [
            " ".join(dict.fromkeys(column)) if i == 2 else ", ".join(column) for i, column in enumerate(zip(*columns))
        ]
        wrong = [row for row in rows if row["status"] == "FAILED" and row["contender"].startswith("vitkernels")]
        cells = [f"{wrong[0]['contender']} {_status(wrong[0])[:60]}", *[""] * 5] if wrong else joined
        table.append([f"{case}, batch {batch}, {dtype}", *cells])
    more = f"{len(cases) - LINES} more in the file; " if len(cases) > LINES else ""
    state = "" if results.get("complete") else "Not finished. "
    options = "--full for every layer, --models, --case 'swin-*', --help"
    last = f"{state}Next: {more}python benchmarks/run.py (make bench BENCH=...) with {options}"
    return "\n".join([*(_align(table, 1) if cases else [NOT_MEASURED]), last])


def _pass(eager: dict, best: dict, ours: dict) -> list[str]:
    """Cells of a pass in `closing`: speed-ups, the best other contender, the share of the floor, and peak memory."""
    ratio = number(best["ms"] / ours["ms"], SHOW["speedup"]) if best and ours else NO_CONTENDER
    floor = NO_CONTENDER if "rate" in ours else number(ours.get("floor"), SHOW["floor"])
    memory = [number(side.get("memory"), SHOW["memory"]) for side in (ours, eager)]
    return [number(ours.get("speedup"), SHOW["speedup"]), ratio, best.get("contender", ""), floor, *memory]


def summary(results: dict) -> str:
    """The steps of benchmarks/gpu.sh, and of every layer the best of vitkernels beside the best of the others."""
    steps = [["part", "step", "status", "seconds", "what"]]
    for step in results.get("steps", []):
        seconds = f"{step['seconds']:.0f}" if step["seconds"] else ""
        steps.append([step["part"], step["step"], step["status"], seconds, step["reason"][:160]])
    table = [
        ["layer", "pass", "batch", "dtype", "eager", "best other", "", "vitkernels", "vs eager", "vs best", "of floor"]
    ]
    for (case, mode, batch, dtype), rows in groups(results["rows"], "case", "mode", "batch", "dtype").items():
        eager, best, ours = sides(rows)
        ratio = best["ms"] / ours["ms"] if best and ours else None
        times = [number(row.get("ms"), _milliseconds) for row in (eager, best, ours)]
        shares = number(ours.get("speedup"), SHOW["speedup"]), number(ratio, SHOW["speedup"])
        about = [case, mode, str(batch), dtype, *times[:2], best.get("contender", ""), times[2]]
        table.append([*about, *shares, number(ours.get("floor"), SHOW["floor"])])
    blocks = [header(results), "\n".join(_align(steps, len(steps[0])))]
    if len(table) > 1:
        blocks.append("milliseconds:\n" + "\n".join(_align(table, 4)))
    if not results.get("complete"):
        blocks.append("This run was not finished; the rows above are those it has.")
    return "\n\n".join(blocks)


def csv_text(results: dict) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({field: row.get(field) for field in FIELDS} for row in results["rows"])
    return out.getvalue()


def _verdict(old: float, new: float) -> str:
    if new < SLOWER * old:
        return "SLOWER"
    return "faster" if old < SLOWER * new else ""


def compare(new: dict, old: dict) -> str:
    """Rows that both runs measured, judged on their share of the floor, which allows for a faster or slower machine."""
    keys = ("case", "batch", "dtype", "mode", "contender")
    before = {tuple(row[key] for key in keys): row for row in old["rows"] if row["status"] == "ok"}
    table = [[*keys, "old ms", "ms", "old of floor", "of floor", ""]]
    for row in new["rows"]:
        was = before.get(tuple(row[key] for key in keys))
        if was is None or row["status"] != "ok" or None in (row.get("floor"), was.get("floor")):
            continue
        verdict = _verdict(was["floor"], row["floor"])
        numbers = [number(r.get(field), SHOW[field]) for field in ("ms", "floor") for r in (was, row)]
        table.append([*(str(row[key]) for key in keys), *numbers, verdict])
    differ = [k for k in ("device", "cpu", "threads", "torch") if new["machine"].get(k) != old["machine"].get(k)]
    notes = [f"{key}: was {old['machine'].get(key)}, is {new['machine'].get(key)}" for key in differ]
    if not table[1:]:
        return "No row is in both runs."
    return "\n".join(["Compared with the older run:", *notes, *_align(table, 5)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/report.py", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON written by benchmarks/run.py")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="a Markdown table, one row per layer and pass")
    form.add_argument("--csv", action="store_true", help="comma-separated values, one row per measurement")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="also compare with older results")
    args = parser.parse_args(argv)
    results = load(args.results)
    write = markdown if args.markdown else csv_text if args.csv else text
    print(write(results))
    if args.compare:
        print("\n" + compare(results, load(args.compare)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
