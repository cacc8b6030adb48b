"""The gate: loops found in machine code, and verdicts that fail what would be slow."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tessera import jit
from tessera.jit import barriers, gate, sass
from tessera.jit.binary import Binary
from tessera.jit.register_pool import Pool

sys.path.insert(0, str(Path(__file__).parents[1]))

LINES = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R0 ;
        /*0014*/                   ULDC.64 UR4, c[0x0][0x8e0] ;
        /*0018*/                   UIADD3.64 UR6, UR4, 0x2, URZ ;
        /*0020*/                   USETMAXREG.DEALLOC.CTAPOOL 0x78 ;
        /*0030*/                   BRX R2 -0x40   (*"BRANCH_TARGETS .L_x_1,.L_x_9"*);
.L_x_1:
        /*0040*/                   MUFU.EX2 R3, R4 ;
.L_x_2:
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
        /*0060*/              @!P0 BRA `(.L_x_7) ;
.L_x_3:
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*0080*/                   MUFU.EX2 R3, R4 ;
        /*0090*/               @P0 BRA `(.L_x_2) ;
        /*00a0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
.L_x_4:
        /*00b0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*00c0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*00d0*/                   INSIDE
        /*00e0*/               @P1 BRA `(.L_x_4) ;
        /*00f0*/               @P2 BRA `(.L_x_1) ;
        /*0100*/                   EXIT ;
.L_x_7:
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
        /*0120*/              @!P0 BRA `(.L_x_7) ;
        /*0130*/                   BRA `(.L_x_3) ;
.L_x_9:
        /*0140*/                   UTMALDG.4D [UR4], [UR6] ;
        /*0150*/                   EXIT ;
.L_x_10:
        /*0160*/                   BRA `(.L_x_10);
        /*0170*/                   NOP;
"""
GOOD = LINES.replace("INSIDE", "FADD R3, R3, R4 ;")
SPILLING = LINES.replace("INSIDE", "LDL.LU R3, [R1+0x4] ;")


def test_loops_are_natural_and_innermost():
    """The barrier's retry behind the end belongs to its loop; the outer loop, which holds both others, is not counted."""
    most, other = sass.parse(GOOD).tensor_core_loops()
    assert (most.tensor_core, most.instructions, most.spills) == (2, 4, 0)
    assert (other.tensor_core, other.instructions) == (1, 8)
    assert other.counts["SYNCS"] == 2


def loop(label: int, products: int, others: int, extra: str = "") -> str:
    """A loop of so many tensor-core and other instructions, and what more is given."""
    body = "/*0000*/ HGMMA.64x128x16 R24, gdesc[UR4] ;\n" * products + "/*0000*/ FADD R1, R1, R2 ;\n" * others
    return f".L_x_{label}:\n{body}{extra}/*0000*/ @P0 BRA `(.L_x_{label}) ;\n"


MASKING = "/*0000*/ FSEL R1, R2, -INF , !P1 ;\n/*0000*/ STL [R1], R0 ;\n" * 4
SET = "/*0000*/ UIADD3.64 UR4, URZ, 0x2, URZ ;\n/*0000*/ UIADD3.64 UR6, URZ, 0x4, URZ ;\n"
TWINS = SET + loop(1, 4, 56, MASKING) + loop(2, 4, 56) + loop(3, 4, 57) + loop(4, 2, 200)
"""The main loops of two warpgroups, a loop that masks as well and spills, and the main loop of a warpgroup with other work."""


def test_main_loops_are_twins_and_not_the_masking_ones():
    code = sass.parse(TWINS)
    assert [(one.tensor_core, one.instructions, one.spills) for one in code.main_loops()] == [(4, 61, 0), (4, 62, 0), (2, 203, 0)]
    assert [one.spills for one in code.tensor_core_loops()] == [0, 0, 4, 0]


def test_instructions_are_counted_once():
    counts = sass.parse(GOOD).counts
    assert (counts["HGMMA"], counts["STL"], counts["USETMAXREG"], counts["UTMALDG"], counts["EXIT"]) == (4, 1, 1, 1, 2)
    assert sum(counts.values()) == 26


def test_a_reconvergence_point_is_no_jump():
    listing = GOOD.replace("INSIDE", "").replace("FADD R3, R3, R4 ;", "BSSY B0, `(.L_x_9) ;")
    assert sass.parse(listing).tensor_core_loops()[0].tensor_core == 2


def verdict(monkeypatch: pytest.MonkeyPatch, listing: str = GOOD, messages: str = "", **changes: object) -> gate.Verdict:
    """The gate's judgement of a made-up binary."""
    made = Binary("entry", b"", 384, 200_000, 0, (), "ptxas info    : Used 168 registers\n" + messages, "")
    monkeypatch.setattr(gate, "obtain", lambda _: replace(made, **changes))
    monkeypatch.setattr(gate, "disassemble", lambda _: listing)
    return gate.examine(jit.Variant("a variant", jit.KernelSpec("a:b", ())))


def test_a_good_kernel_passes_though_it_spills_before_its_loops(monkeypatch):
    passed = verdict(monkeypatch)
    assert passed.faults == ()
    assert (passed.loop_instructions, passed.loop_tensor_core, passed.registers) == (4, 2, 168)
    assert passed.counts["STL"] == 1


@pytest.mark.parametrize(
    "message",
    [
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma",
        "ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient",
        "ptxas warning : something new",
    ],
)
def test_what_ptxas_warns_of_is_a_fault(monkeypatch, message):
    assert verdict(monkeypatch, messages=message).faults == (message,)


def test_spills_in_a_loop_are_a_fault(monkeypatch):
    (fault,) = verdict(monkeypatch, SPILLING).faults
    assert fault == "1 spill instructions (LDL, STL) in main loops"


def test_spills_at_the_edge_are_told_and_pass(monkeypatch):
    seen = verdict(monkeypatch, TWINS + "/*0000*/ USETMAXREG.DEALLOC.CTAPOOL 0x78 ;\n")
    assert (seen.loop_spills, seen.edge_spills, seen.faults) == (0, 4, ())


TABLE = """
        /*0030*/                   BRX R2 -0x40   (*"BRANCH_TARGETS .L_x_2,.L_x_3,.L_x_4,.L_x_6"*);
"""
BRANCHES = """
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0034*/               @P2 BRA `(.L_x_3) ;
        /*0038*/                   BRA `(.L_x_6) ;
"""
SPECIALISED = """
        /*0000*/                   ISETP.GT.U32.AND P0, PT, R0, 0x3, PT ;
        /*0010*/              @!P0 BRA `(.L_x_5) ;
.L_x_1:
        /*0020*/                   USETMAXREG.DEALLOC.CTAPOOL 0x78 ;
        /*0030*/                   BRX R2 -0x40   (*"BRANCH_TARGETS .L_x_2,.L_x_3,.L_x_4,.L_x_6"*);
.L_x_2:
        /*0040*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, CONSUMER ;
        /*0050*/              @!P0 BRA `(.L_x_2) ;
        /*0060*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   USETMAXREG.DEALLOC.CTAPOOL PRODUCER ;
        /*0080*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*0090*/                   USETMAXREG.DEALLOC.CTAPOOL PRODUCER ;
        /*00a0*/                   BRA `(.L_x_1) ;
.L_x_5:
        /*00b0*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x100 ;
        /*00c0*/              @!P0 BRA `(.L_x_5) ;
        /*00d0*/                   USETMAXREG.DEALLOC.CTAPOOL DEFAULT ;
        /*00e0*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[URZ], RZ, !UPT ;
.L_x_7:
        /*00f0*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x100 ;
        /*0100*/              @!P0 BRA `(.L_x_7) ;
.L_x_6:
        /*0110*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("consumer", "producer", "default", "wanted"),
    [(240, 24, 240, 504), (232, 40, 232, 504), (232, 48, 232, 512), (240, 24, 248, 512), (64, 24, 64, 496)],
    ids=["as they come", "another split", "too much", "too much of the default", "most before the work"],
)
@pytest.mark.parametrize("listing", [SPECIALISED, SPECIALISED.replace(TABLE, BRANCHES)], ids=["by a table", "by branches"])
def test_registers_that_the_launch_does_not_reserve_are_a_fault(monkeypatch, listing, consumer, producer, default, wanted):
    """168 for each of 384 threads are 504 of a warpgroup's."""
    numbers = {"CONSUMER": hex(consumer), "PRODUCER": hex(producer), "DEFAULT": hex(default)}
    for name, number in numbers.items():
        listing = listing.replace(name, number)
    found = verdict(monkeypatch, listing)
    assert found.pool == Pool(reserved=504 * 128, wanted=wanted * 128)
    waits = wanted > 504
    assert (found.is_wrong, found.passed) == (waits, not waits)
    if waits:
        assert found.faults == ("warps want 65536 registers of 64512 that the launch reserves, and wait for ever",)


def test_missing_instructions_and_sizes_are_faults(monkeypatch):
    plain = GOOD.replace("HGMMA", "HMMA").replace("USETMAXREG", "NOP")
    faults = " ".join(verdict(monkeypatch, plain, shared=gate.SHARED_LIMIT + 1, threads=512).faults)
    for words in ("no HGMMA or QGMMA", "no USETMAXREG", "232449 bytes of shared memory", "168 registers x 512 threads"):
        assert words in faults


@pytest.mark.parametrize(("before", "after", "expected"), [
    ("UIADD3.64 UR6", "UIADD3 UR6", 4),  # the pair's second half
    ("UIADD3.64 UR6", "UIADD3.64 UP0, UR6", 0),
    ("FADD R3, R3, R4", "@P3 UMOV UR5, 0x4", 0),
    ("gdesc[UR4], RZ", "gdesc[UR6], RZ", 4),  # 8 and 9
    ("R24, gdesc[UR4], RZ", "R24, R88, gdesc[UR4], RZ", 0),
    ("R24, gdesc[UR4], RZ", "R24, R88, gdesc[UR2], RZ", 0),  # A's pair is idle
], ids=["half a pair", "with a predicate", "set again", "never", "A in registers", "idle"])  # fmt: skip
def test_registers_that_are_not_set(monkeypatch, before, after, expected):
    found = verdict(monkeypatch, GOOD.replace(before, after))
    assert len(found.unset) == expected
    assert bool(found.faults) == bool(expected)


def test_a_descriptor_that_one_of_two_branches_sets(monkeypatch):
    """By way of .L_x_3 alone, the second product's A is set on one path of two, and by way of the jump round it on the other."""
    branch = "@P3 BRA `(.L_x_5) ;\n        /*00d4*/                   UMOV UR5, 0x4 ;\n.L_x_5:\n"
    product = "        /*00d8*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;"
    one_path = GOOD.replace("ULDC.64 UR4,", "ULDC UR4,").replace("HGMMA.64x128x16.F32.BF16 R24, gdesc", "FADD R3, gdesc")
    assert len(verdict(monkeypatch, one_path.replace("FADD R3, R3, R4 ;", branch + product)).unset) == 1
    both = one_path.replace("FADD R3, R3, R4 ;", "UMOV UR5, 0x2 ;\n        /*00d2*/                   " + branch + product)
    assert verdict(monkeypatch, both).unset == ()


PARTITIONED = """
    %full = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared, #smem, mutable>
    %empty = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared, #smem, mutable>
    %numbers = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared, #smem, mutable>
    %0 = ttg.memdesc_index %full[%c0_i32] : !ttg.memdesc<2x1xi64, #shared, #smem, mutable>
    ttng.init_barrier %0, 1 : !ttg.memdesc<1xi64, #shared, #smem, mutable>
    %1 = ttg.memdesc_index %empty[%c0_i32] : !ttg.memdesc<2x1xi64, #shared, #smem, mutable>
    ttng.init_barrier %1, 1 : !ttg.memdesc<1xi64, #shared, #smem, mutable>
    ttg.warp_specialize(%full, %out)
    default {
      CONSUMER
    }
    partition0(%arg0: !ttg.memdesc<2x1xi64>, %arg1: !tt.ptr<i32>) num_warps(1) {
      %1 = ttg.memdesc_index %arg0[%c0_i32] : !ttg.memdesc<2x1xi64, #shared, #smem, mutable>
      ttng.arrive_barrier %1, 1 : !ttg.memdesc<1xi64, #shared, #smem, mutable>
    } : (!ttg.memdesc<2x1xi64>, !tt.ptr<i32>) -> ()
"""


@pytest.mark.parametrize(("line", "expected"), [("", ("%empty",)), ("ttng.wait_barrier %1, %c0_i32", ())])
def test_a_barrier_is_used_by_name_outside_partitions_or_by_capture(line, expected):
    """A partition's %1 is another."""
    assert barriers.unused(PARTITIONED.replace("CONSUMER", line)) == expected


class TestWithTriton:
    """The whole way, on kernels that compile in a second."""

    PROVIDER = "jit_kernels.variants:variants"

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        pytest.importorskip("triton")
        monkeypatch.setenv("TESSERA_CACHE_DIR", str(tmp_path))
        return tmp_path

    def test_each_variant_is_judged_for_its_own_faults(self, monkeypatch):
        monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "0")
        found = {one.name: one for one in gate.examine_all(gate.collect([self.PROVIDER]))}
        assert {name for name, one in found.items() if one.passed} == {"matmul good", "cluster plain"}
        assert found["matmul good"].loop_tensor_core == 4
        assert found["matmul good"].counts["UTMALDG"] == 2
        assert "no USETMAXREG" in found["matmul demanding"].faults[0]
        assert "Insufficient registers (40)" in found["matmul starved"].faults[0]
        assert "TypeError" in found["matmul broken"].faults[0]
        assert "no HGMMA" in found["cluster demanding"].faults[0]
        assert "%forgotten: barriers that are made and never used" in found["forgetful"].faults[0]

    def test_the_command(self, folder, capsys):
        report = folder / "report.json"
        assert gate.main(["--variants", self.PROVIDER, "--json", str(report), "good"]) == 0
        printed = capsys.readouterr().out
        assert "matmul good" in printed
        assert "1 of 1 pass" in printed
        content = json.loads(report.read_text())
        assert content["variants"][0]["counts"]["HGMMA"] == 4
        assert gate.main(["--variants", self.PROVIDER, "cluster"]) == 1
        assert "FAILED" in capsys.readouterr().out
        assert gate.main(["--variants", self.PROVIDER, "no such name"]) == 2


def test_shares_of_the_variants_are_all_of_them():
    kernels = {"a:forward": 5, "b:decode": 4, "c:append": 1}
    variants = [jit.Variant(str(n), jit.KernelSpec(kernel, (), ())) for kernel, count in kernels.items() for n in range(count)]
    first, second = (gate.one_in(2, variants, share) for share in (0, 7))
    assert [variant.name for variant in first] == ["0", "2", "4", "0", "2", "0"]
    assert [variant.name for variant in second] == ["1", "3", "1", "3"]


def test_slow_code_is_not_wrong(monkeypatch):
    slow, wrong = verdict(monkeypatch, SPILLING), verdict(monkeypatch, GOOD.replace("UIADD3.64 UR6", "UIADD3 UR6"))
    assert [(one.passed, one.is_wrong) for one in (slow, wrong)] == [(False, False), (False, True)]
    monkeypatch.setattr(gate, "collect", lambda *_: (jit.Variant("one", jit.KernelSpec("a:b", ())),))
    for found, code in ((slow, 0), (wrong, 1)):
        monkeypatch.setattr(gate, "examine_all", lambda *_, one=found: (one,))
        assert gate.main(["--choosable"]) == code
        assert gate.main([]) == 1
