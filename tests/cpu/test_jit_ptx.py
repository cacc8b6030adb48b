"""What Triton can't say: marks in its PTX, and what the pass makes of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tessera import jit
from tessera.jit import ptx, toolchain

LOAD = (
    "@%p8 cp.async.bulk.tensor.5d.shared::{space}.global.mbarrier::complete_tx::bytes{more} "
    "[%r109], [%rd6, {{%r110, %r111, %r205, %r112, %r113}}], [%r108]{last};\n"
)
PLAIN = LOAD.format(space="cta", more="", last="")
TILES = jit.Tiles("bf16", (64, 128))


def marked(words: str, code: str) -> str:
    return f"a;\n{PLAIN}// tessera: {words}\nmov.u32 %r1, 0;\n{code}// tessera end\n\tmov.u32 %r9, 0;\n{PLAIN}b;\n"


def test_text_without_marks_stays():
    assert ptx.rewritten(PLAIN, 128) == PLAIN


def test_what_is_for_debuggers_goes_and_places_stay():
    """The labels would cut basic blocks in two; from Triton 3.8 on places name strings, which stay too."""
    strings = "\t.section\t.debug_str\n\t{\n$L__info_string0:\n.b8 97\n\t}\n"
    debugging = "\t.section\t.debug_info\n\t{\n.b64 $L__tmp7\n.b32 .debug_abbrev\n\t}\n"
    begin, end = f"{PLAIN}\t.loc 1 7 0\n", f"$L__BB0_1:\n{PLAIN}{strings}"
    assert ptx.rewritten(f"{begin}$L__tmp7:\n{end}{debugging}", 128) == begin + end


@pytest.mark.parametrize(("words", "policy"), [("evict_first", "0x12f0000000000000"), ("evict_last", "0x14f0000000000000")])
def test_a_policy_reaches_each_load_between_the_marks_and_no_other(words, policy):
    changed = LOAD.format(space="cta", more=".L2::cache_hint", last=f", {policy}")
    found = ptx.rewritten(marked(words, PLAIN + "add.s32 %r1, %r2, 8192;\n" + PLAIN), 128)
    assert found.count(changed) == 2
    assert found.count(PLAIN) == 2


def test_a_multicast_goes_by_the_cluster():
    changed = LOAD.format(space="cluster", more=".multicast::cluster", last=", 3")
    assert changed in ptx.rewritten(marked("multicast 3", PLAIN), 128)


def test_what_goes_only_into_l2_names_neither_shared_memory_nor_an_mbarrier():
    found = ptx.rewritten(marked("only L2", PLAIN), 128)
    assert found.count(PLAIN) == 2
    assert "@%p8 cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%rd6, {%r110, %r111, %r205, %r112, %r113}];" in found


def test_an_address_is_what_is_initialised():
    start = "@%p7 mbarrier.init.shared::cta.b64 [%r5], 2;\n"
    found = ptx.rewritten(marked("address", start), 128)
    assert start in found
    assert "add.u32 %r9, %r5, 0;" in found


def test_a_place_in_the_source_may_stand_between_the_lines_of_a_mark():
    """As from Triton 3.8 on."""
    start = "@%p7 mbarrier.init.shared::cta.b64 [%r5], 2;\n"
    text = marked("address", start).replace("\tmov.u32", "\t.loc\t4 94 12, inlined_at 3 101 13 // compat.py:94:12\n\tmov.u32")
    assert text != marked("address", start)
    assert "add.u32 %r9, %r5, 0;" in ptx.rewritten(text + "$L__BB0_7:\n", 128)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (marked("evict_first", "add.s32 %r1, %r2, 8192;\n"), "no instruction that it could change"),
        (marked("address", PLAIN), "no instruction that it could change"),
        (marked("evict_never", PLAIN), "no such mark: 'evict_never'; there are evict_first"),
        (marked("evict_first", f"$L__BB0_7:\n{PLAIN}"), "another basic block"),
        (marked("evict_first", f"{PLAIN}// tessera: multicast 3\n{PLAIN}") + "// tessera end", "another mark begins"),
        (PLAIN + "// tessera: evict_first\n" + PLAIN, "1 marks begin and 0 end"),
    ],
)
def test_a_mark_in_the_wrong_place_is_an_error(text, words):
    with pytest.raises(ptx.MarkError, match=words):
        ptx.rewritten(text, 128)


def test_where_a_cluster_meets_the_other_warps_arrive_as_the_kernel_begins():
    kernel = "{{\n// %bb.0:\n\tld.param.b32 %r1, [p];\n{0}}}\n"
    found = ptx.rewritten(kernel.format(f"{ptx.MEETING}\nbarrier.cluster.wait;\n"), 128)
    before, after = found.split("\tld.param.b32")
    assert "setp.ge.u32 other, thread, 128; @other barrier.cluster.arrive" in before
    assert "barrier.cluster.arrive" not in after
    assert ptx.rewritten(kernel.format(""), 128) == kernel.format("")
    with pytest.raises(ptx.MarkError, match="2 meetings of the cluster"):
        ptx.rewritten(kernel.format(2 * f"{ptx.MEETING}\n"), 128)


def test_the_pass_is_part_of_the_key():
    assert Path(ptx.__file__) in toolchain.source_files("tessera.backends.hopper.forward")


@pytest.mark.parametrize(
    ("how", "wanted"),
    [("evict_first", "bytes.L2::cache_hint ["), ("multicast 3", "cluster.global.mbarrier::complete_tx::bytes.multicast")],
)
def test_a_kernels_marks_reach_ptxas(how, wanted, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    spec = jit.KernelSpec("jit_kernels.hinted:hinted_copy", (("source", TILES), ("target", TILES)), (("HOW", how),), num_warps=1)
    binary = jit.compile(spec)
    loads = [line for line in binary.ptx.splitlines() if "complete_tx" in line]
    assert len(loads) == 2, "a load a 64 columns"
    assert all(wanted in line for line in loads)
    sys.modules.pop("jit_kernels.hinted")
