"""Machine code read: loops, units and bytes under way, from short programs."""

from __future__ import annotations

import importlib
import re
import struct
import sys
from pathlib import Path

import pytest


@pytest.fixture
def sass(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("sass")


@pytest.fixture
def wgmma(sass):
    return importlib.import_module("wgmma")


@pytest.fixture
def report(sass):
    return importlib.import_module("kernel_report")


def text(*lines: str, first: int = 0) -> str:
    """As the disassembler writes it from an address on, with an address for every label."""
    code = [line for line in lines if not line.startswith(".L")]
    labels, address = {}, first
    for line in lines:
        if line.startswith(".L"):
            labels[line.rstrip(":")] = f"0x{address:x}"
        else:
            address += 16
    written = (re.sub(r"`\((.*?)\)", lambda found: labels[found[1]], line) for line in code)
    return "\n".join(f"        /*{first + i * 16:04x}*/                   {line} ;" for i, line in enumerate(written))


FILLER = ["IADD3 R90, R91, R92, RZ"] * 9


def test_the_innermost_loop_with_products_is_hot(sass):
    lines = [
        *(".L_x_0:", *FILLER, "@P0 BRA `(.L_x_0)"),  # a loop without products
        *(".L_x_1:", "MOV R1, R2", ".L_x_2:", "HMMA.16816.F32.BF16 R4, R8, R12, R4", *FILLER, "@!P1 BRA `(.L_x_2)"),
        *(*FILLER, "@P2 BRA `(.L_x_1)"),
        *("EXIT", ".L_x_3:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR18], R10", *FILLER, "@!P5 BRA `(.L_x_3)"),
        *("BRA `(.L_x_2)",),  # back from where it waited: no loop
    ]
    code = sass.Code(text(*lines), warps=4)
    assert [x.kind for x in code.hot] == ["HMMA", *["IADD3"] * 9, "BRA"]
    assert code.matrix == "1 mma.sync"
    assert sass.Code(text(*FILLER, "EXIT"), 4).hot == sass.Code(text(*FILLER, "EXIT"), 4).code


@pytest.mark.parametrize(
    "branch",
    [
        *("BRA {}", "@!UP0 BRA {}", "BRA P1, {}", "BRA.U !UP0, {}", "BRA.DIV UR4, {}"),
        "BRA.U UP0, {}              &req={{4,3,1}}             ?trans5",
    ],
)
def test_every_form_of_a_branch_closes_a_loop(sass, branch):
    """Also behind other kernels."""
    lines = [*FILLER, ".L_x_0:", "MUFU.EX2 R7, R7", *FILLER, branch.format("`(.L_x_0)"), "EXIT"]
    code = sass.Code(text(*lines, first=0x1FFE0), 4)
    assert [x.kind for x in code.hot] == ["MUFU", *["IADD3"] * 9, "BRA"]


def elf(sections: dict[str, bytes]) -> bytes:
    """As much of a file as says where its sections are."""
    sections = {"": b"", ".shstrtab": b"\0".join(map(str.encode, ["", ".shstrtab", *sections])) + b"\0"} | sections
    names, body, headers = sections[".shstrtab"], b"", b""
    for name, content in sections.items():
        place = names.index(name.encode() + b"\0") if name else 0
        headers += struct.pack("<2I4Q2I2Q", place, 1, 0, 0, 64 + len(body), len(content), 0, 0, 1, 0)
        body += content
    return struct.pack("<40xQ10x3H", 64 + len(body), 64, len(sections), 1) + body + headers


def test_code_of_every_kernel_is_disassembled_at_once(sass, tmp_path):
    cubin = elf({".text.b": bytes(32), ".nv.info": b"7" * 5, ".text._a": b"1" * 48})
    assert sass.machine_code(cubin) == {"b": bytes(32), "_a": b"1" * 48}
    tool = tmp_path / "nvdisasm"
    tool.write_text(f"#!{sys.executable}\nprint({text('NOP', 'EXIT', 'MOV R1, R2', 'BRA 0x20', 'EXIT')!r})")
    tool.chmod(0o755)
    codes = [*sass.machine_code(cubin).values()]
    texts = sass.disassemble(tmp_path, 80, [*codes, codes[0]])
    assert [[x.kind for x in sass.Code(texts[code], 1).code] for code in codes] == [
        ["NOP", "EXIT"],
        ["MOV", "BRA", "EXIT"],
    ]
    assert sass.disassemble(tmp_path, 80, []) == {}
    with pytest.raises(RuntimeError, match="wrote 5 instructions of 2"):
        sass.disassemble(tmp_path, 80, codes[:1])


def test_units(sass):
    body = [
        *(
            "LDG.E.128 R4, desc[UR4][R2.64]",
            "@P1 LDG.E.U16 R20, desc[UR4][R2.64]",
            "LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64], P5",
        ),
        *(
            "HMMA.16816.F32.BF16 R24, R4, R12, R24",
            "HMMA.1688.F32.TF32 R24, R4, R12, R24",
            "HMMA.1684.F32.TF32 R24, R4, R12, R24",
        ),
        *(
            "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
            "MUFU.EX2 R7, R7",
            "FFMA R9, R8, R7, R6",
            "IMAD.WIDE R8, R9, 4, R2",
        ),
        *(
            "LOP3.LUT R8, R8, 0x7, RZ, 0xc0, !PT",
            "STG.E.64 desc[UR4][R2.64], R24",
            "BAR.SYNC.DEFER_BLOCKING 0x0",
            "SHFL.BFLY R1, R2, 1, 0x1f",
        ),
    ]
    code = sass.Code(text(".L_x_0:", *body, "@P0 BRA `(.L_x_0)", "EXIT"), warps=4)
    needs = code.needs
    assert needs.requested == 128 * (16 + 2 + 16 + 8)
    assert needs.multiply_adds == 4 * 16 * 8 * (16 + 8 + 4) + 64 * 32 * 16
    assert (needs.special, needs.fma, needs.alu) == (128, 2 * 128, 128)
    assert needs.issued == 4 * (len(body) + 1)
    assert code.loads == "2 x 16, 1 x 2" and code.matrix == "3 mma.sync, 1 wgmma"


def test_tensor_memory_products_come_from_the_intermediate_code(sass, report):
    lines = ["UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR29], tmem[UR20], idesc[UR21], !UPT"]
    loop = [".L_x_0:", *lines * 3, *FILLER, "@P0 BRA `(.L_x_0)"]
    ttgir = (
        "ttng.tc_gen5_mma %a, %b, %c[], %f, %t {is_async} : !ttg.memdesc<64x32xbf16, #s, #smem, mutable>, "
        "!ttg.memdesc<32x64xbf16, #s, #smem>, !ttg.memdesc<64x64xf32, #tmem>"
    )
    assert report._products(ttgir) == (64 * 32 * 64,)
    code = sass.Code(text(*lines, *loop, "EXIT"), 4, [64 * 32 * 64] * 2)
    assert code.needs.multiply_adds == 2 * 64 * 32 * 64 * 3 // 4 and code.matrix == "3 tcgen05"


def pipelined(waits_for: int, stages: int) -> str:
    """Products, then copies of the rows of a later trip; at the top all but ``waits_for`` groups have arrived."""
    copies = ["LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64]"] * 3 + ["LDGDEPBAR"]
    products = ["HMMA.16816.F32.BF16 R24, R4, R12, R24"] * 8
    top = [".L_x_0:", f"DEPBAR.LE SB0, {waits_for:#x}"]
    return text(*copies * (stages - 1), *top, *products, *copies, "@P0 BRA `(.L_x_0)", "EXIT")


def test_bytes_under_way(sass):
    """Two stages ask for rows and wait; with three one group of them comes behind the products."""
    trip = 3 * 16 * 128
    assert sass.Code(pipelined(0, 2), 4).under_way == (trip, 0)
    assert sass.Code(pipelined(1, 3), 4).under_way == (2 * trip, trip)


def test_loads_into_registers_are_waited_for_where_they_are_named(sass):
    load, use = "LDG.E.128 R4, desc[UR4][R2.64]", "FFMA R9, R6, R10, R11"
    late = text(".L_x_0:", load, *["MUFU.EX2 R20, R21"] * 10, use, "@P0 BRA `(.L_x_0)", "EXIT")
    soon = text(".L_x_0:", load, use, *["MUFU.EX2 R20, R21"] * 10, "@P0 BRA `(.L_x_0)", "EXIT")
    assert sass.Code(late, 1).under_way[0] == sass.Code(soon, 1).under_way[0] == 16 * 32
    assert sass.Code(late, 1).under_way[1] > 0.8 * 16 * 32 > sass.Code(soon, 1).under_way[1] == 0


ADDRESS = ["S2R R10, SR_CgaCtaId", "MOV R105, 0x400", "LEA R105, R10, R105, 0x18", "VIADD R94, R105, 0x4000"]
LOW = ["SHF.R.U32.HI R9, RZ, 0x4, R94", "SGXT.U32 R9, R9, 0xe", "IADD3 R11, P2, R9, 0x2, RZ"]
HIGH = ["MOV R0, RZ", "IADD3.X R12, R0, -0x7fffffe0, RZ, P2, !PT"]
GIVEN = ["R2UR UR54, R11", "R2UR UR55, R12"]
PRODUCT = ["HGMMA.64x16x16.F32.BF16 R24, R56, gdesc[UR52].tnspB, R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
MADE_OF = {  # what stands instead of the low word: what is said of it
    "the address of shared memory": (LOW, ""),
    "a global address": (
        ["LDC.64 R34, c[0x0][0x278]", "LEA.HI.X R11, R35, R34, RZ, 0x1, P4", "IADD3 R11, P2, R11, 0x2, RZ"],
        "comes from 0x40 LDC.64 R34, c[0x0][0x278]",
    ),
    "a row": (["LDG.E.128 R8, desc[UR8][R94.64]", "IADD3 R11, P2, R11, 0x2, RZ"], "comes from 0x40 LDG.E.128 R8"),
    "an argument": (["IMAD R11, R94, c[0x0][0x210], RZ"], "comes from 0x40 IMAD R11, R94, c[0x0][0x210], RZ"),
    "a block": (["S2UR UR4, SR_CTAID.X", "IADD3 R11, R94, UR4, RZ"], "comes from 0x40 S2UR UR4, SR_CTAID.X"),
    "a constant": (["IADD3 R11, P2, RZ, 0x2, RZ"], "UR54 is not made of the address of shared memory"),
    "nothing": (["IADD3 R11, P2, R9, 0x2, RZ"], "UR54 comes from R9, which nothing wrote"),
    "nothing on one path": (["@P0 IADD3 R11, P2, R94, 0x2, RZ"], "UR54 comes from R11, which nothing wrote"),
    "a spilled address": (["STL [R1+0x8], R94", *FILLER, "LDL R11, [R1+0x8]"], ""),
    "a spilled argument": (["LDC R9, c[0x0][0x210]", "STL [R1], R9", "LDL R11, [R1]"], "comes from 0x40 LDC R9"),
    "the number of a warp": (["S2R R9, SR_TID.X", "SHFL.IDX PT, R9, R9, RZ, 0x1f", "LEA R11, R9, R94, 0x6"], ""),
    "the next buffer": (["MOV R11, R94", ".L_x_9:", "VIADD R11, R11, 0x40", "@P0 BRA `(.L_x_9)"], ""),
}


@pytest.mark.parametrize("low, said", MADE_OF.values(), ids=MADE_OF)
def test_descriptors(wgmma, low, said):
    """From a kernel whose assembler took half of a global address for that of shared memory."""
    found = wgmma.faults(text(*ADDRESS, *low, *HIGH, *GIVEN, *PRODUCT, "EXIT"))
    assert said in "".join(found) and bool(found) == bool(said)


SWAP = [f"ULOP3.LUT UR{number}, UR55, UR54, URZ, 0x3c, !UPT" for number in (55, 54, 55)]
HIGH_OF = {  # what gives the descriptor behind its low word: what is said of it
    "constants and a carry": ([*HIGH, *GIVEN], ""),
    "zero": (["CS2R R12, SRZ", *GIVEN], ""),
    "the low word": (["MOV R12, R11", *GIVEN], "UR55 comes from 0x0 S2R R10, SR_CgaCtaId"),
    "an address": (["MOV R12, R94", *GIVEN], "UR55 comes from 0x0 S2R R10, SR_CgaCtaId"),
    "a thread": (["S2R R12, SR_TID.X", *GIVEN], "UR55 comes from 0x70 S2R R12, SR_TID.X"),
    "a sum of pairs": ([*HIGH, "R2UR UR8, R11", "R2UR UR9, R12", "UIADD3.64 UR54, UR8, 0x2, URZ"], ""),
    "the wrong pair": (["R2UR UR8, R11", "R2UR UR9, R11", "UIADD3.64 UR54, UR8, 0x2, URZ"], "UR55 comes from 0x0 S2R"),
    "swapped words": ([*HIGH, "R2UR UR54, R12", "R2UR UR55, R11", *SWAP], ""),
    "words swapped by mistake": ([*HIGH, *GIVEN, *SWAP], "UR55 comes from 0x0 S2R R10, SR_CgaCtaId"),
    "words not quite swapped": ([*HIGH, "R2UR UR54, R12", "R2UR UR55, R11", *SWAP[:2]], "UR55 comes from 0x0 S2R"),
    "a spilled pair": ([*HIGH, "STL.64 [R1+0x8], R11", "LDL.64 R11, [R1+0x8]", *GIVEN], ""),
    "a spilled low word": ([*HIGH, "STL.64 [R1+0x8], R11", "LDL R12, [R1+0x8]", *GIVEN], "UR55 comes from 0x0 S2R"),
}


@pytest.mark.parametrize("lines, said", HIGH_OF.values(), ids=HIGH_OF)
def test_high_words_of_descriptors(wgmma, lines, said):
    found = wgmma.faults(text(*ADDRESS, *LOW, *lines, *PRODUCT, "EXIT"))
    assert said in "".join(found) and bool(found) == bool(said)


READ, WRITTEN = "FADD R2, R24, R3", "MOV R57, R2"  # an accumulator, a register of the first operand
OTHER = "HGMMA.64x16x16.F32.BF16 R32, R64, gdesc[UR52].tnspB, R32, gsb0"
HMMA = "HMMA.16816.F32.BF16 R80, R{}, R{}, R80"
IN_FLIGHT = {  # what stands in a loop, its products and what waits for them among it: what is said of it
    "waited for": ([*PRODUCT, READ, WRITTEN], ""),
    "read too soon": ([PRODUCT[0], READ, PRODUCT[1]], "R24 is not its own at"),
    "written too soon": ([PRODUCT[0], WRITTEN, PRODUCT[1]], "R57 is not its own at"),
    "on one path": ([PRODUCT[0], "@P1 BRA `(.L_x_9)", PRODUCT[1], ".L_x_9:", READ], "R24 is not its own at"),
    "on the next trip": ([READ, PRODUCT[0]], "R24 is not its own at"),
    "all but one": ([PRODUCT[0], OTHER, "WARPGROUP.DEPBAR.LE gsb0, 0x1", READ, PRODUCT[1]], ""),
    "the one": ([OTHER, PRODUCT[0], "WARPGROUP.DEPBAR.LE gsb0, 0x1", READ, PRODUCT[1]], "R24 is not its own at"),
    "a group of two": ([PRODUCT[0].replace(", gsb0", ""), *PRODUCT, READ], ""),
    "stored too soon": ([PRODUCT[0], "STS.128 [R94], R22", PRODUCT[1]], "R24 is not its own at"),
    "stored as a matrix": ([PRODUCT[0], "STSM.16.MT88.4 [R94], R21", PRODUCT[1]], "R24 is not its own at"),
    "a row of a smaller product": ([PRODUCT[0], HMMA.format(21, 44), PRODUCT[1]], "R24 is not its own at"),
    "a column of a smaller product": ([PRODUCT[0], HMMA.format(40, 23), PRODUCT[1]], "R24 is not its own at"),
    "beside a smaller product": ([PRODUCT[0], HMMA.format(20, 22), PRODUCT[1]], ""),
    "beside a store": ([PRODUCT[0], "STS.128 [R23], R20", "STS.64 [R23], R32", PRODUCT[1]], ""),
    "some of another's": ([PRODUCT[0], OTHER.replace("R32", "R28"), PRODUCT[1]], "R28 is not its own at"),
    "half of them": ([PRODUCT[0], PRODUCT[0].replace("64x16", "64x8"), PRODUCT[1]], "R24 is not its own at"),
    "another descriptor": ([*PRODUCT, "ULDC UR54, c[0x0][0x210]"], "UR54 comes from"),
}


@pytest.mark.parametrize("body, said", IN_FLIGHT.values(), ids=IN_FLIGHT)
def test_products_under_way(wgmma, body, said):
    lines = [*ADDRESS, *LOW, *HIGH, *GIVEN, ".L_x_0:", *body, "@P0 BRA `(.L_x_0)", "EXIT"]
    found = wgmma.faults(text(*lines))
    assert said in "".join(found) and bool(found) == bool(said)


@pytest.mark.parametrize(
    "line, said",
    [
        ("BRA 0x1a000", "BRA at 0x0 goes to 0x1a000, where no instruction is"),
        ("BRA -0xf0", "goes to -0xf0, where no"),
        ("BRX R4 -0x40", "BRX at 0x0 goes where it does not say"),
        ("CALL.ABS.NOINC R4", "CALL.ABS.NOINC at 0x0 goes where it does not say"),
    ],
)
def test_jumps_that_lead_nowhere(wgmma, line, said):
    """Such as those of another chip, whose jumps are written in another way."""
    with pytest.raises(ValueError, match=said):
        wgmma.steps(text(line, "EXIT"))


def test_resident_blocks(report):
    hopper, ampere = report.CHIPS[90], report.CHIPS[86]
    assert hopper.resident(4, 128, 40 * 1024) == 4 and hopper.resident(4, 168, 40 * 1024) == 3
    assert hopper.resident(4, 129, 0) == 3  # registers come by eight
    assert hopper.resident(1, 137, 0) == 12  # and of each quarter's 16,384
    assert hopper.resident(1, 32, 0) == 32 and ampere.resident(1, 32, 0) == 16
    assert ampere.resident(4, 128, 28 * 1024) == 3 and ampere.resident(4, 128, 100 * 1024) == 0
    assert report.CHIPS[100].resident(4, 64, 0, 256) == 2


def test_a_row_says_what_limits_it(report, sass):
    products = text(".L_x_0:", *["HMMA.16816.F32.BF16 R24, R4, R12, R24"] * 64, "@P0 BRA `(.L_x_0)", "EXIT")
    launch = dict(registers=128, spilled=0, shared=0)
    row = report.kernel("case", "name", report.CHIPS[89], sass.Code(products, 4), 1.0, **launch)
    assert row.clocks["matrix"] == 64 * 4 * 2048 // 256 and row.limit == "matrix"
    loads = text(".L_x_0:", *["LDG.E.128 R4, desc[UR4][R2.64]"] * 64, "@P0 BRA `(.L_x_0)", "EXIT")
    row = report.kernel("case", "name", report.CHIPS[89], sass.Code(loads, 4), 0.5, **launch)
    assert row.limit == "memory" and row.clocks["memory"] == pytest.approx(64 * 2048 / 2 / (1008 / 2.52 / 128), abs=1)
    cells = report.table([row]).splitlines()[2].strip("| ").split(" | ")
    assert len(cells) == len(report.COLUMNS) and cells[-1] == "memory"


def test_drift_is_found(report):
    parts = {
        "": "# Kernels\n",
        "Triton 3.6.0": "## Triton 3.6.0\n\nrows\n",
        "CUDA C++, nvcc 13.0": "## CUDA C++, nvcc 13.0\n",
    }
    committed = "\n".join(parts.values())
    assert report.drifted(parts, committed) == []
    assert report.drifted(parts | {"Triton 3.6.0": "## Triton 3.6.0\n\nother rows\n"}, committed) == ["Triton 3.6.0"]
    other = committed.replace("nvcc 13.0", "nvcc 12.9")
    assert report.drifted(parts, other) == []  # another compiler's numbers are not compared


def test_the_clustering_in_the_document(report):
    """What nvcc makes of it, where it is the nvcc of the document."""
    library = report._cuda_library()
    if library is None:
        pytest.skip("the CUDA library was not built: no nvcc")
    pytest.importorskip("triton", reason="its tools read the library")
    title = f"## CUDA C++, nvcc {report._compiler_of(library)}\n"
    committed = report.DOCUMENT.read_text()
    if title not in committed:
        pytest.skip(f"docs/kernels.md is of another compiler than {title.strip('# ')}")
    found = report.cuda_kernels(library)
    assert found and all(len(rows) == 9 for rows in found.values())
    for chip, rows in found.items():
        assert all(row.spilled == 0 and row.blocks > 0 for row in rows)
        assert report.table(rows) in committed, f"sm_{chip}: `make kernels` writes it again"


def test_help_says_what_it_is_for(report, capsys):
    with pytest.raises(SystemExit):
        report.main(["--help"])
    assert re.search(r"--write\s+write docs/kernels.md", capsys.readouterr().out)


def test_a_chip_may_lack_the_case(report, capsys):
    pytest.importorskip("triton")
    assert report.main(["--chip", "86", "--case", "16 tokens*", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"


def test_unknown_cases_are_refused(report, capsys):
    pytest.importorskip("triton")
    with pytest.raises(SystemExit):
        report.main(["--chip", "90", "--case", "nothing"])
    assert "no case matches nothing; there are" in capsys.readouterr().err
