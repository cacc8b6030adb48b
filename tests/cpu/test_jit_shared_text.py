"""One text for several partitions: what the pass makes of PTX, and what it refuses."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tessera import jit
from tessera.jit import shared_text, toolchain
from tessera.jit.ptx import MarkError

MARK = "\t// begin inline asm\n\t{0}\n\tmov.u32 %r{2}, {1};\n\t// end inline asm\n"
SHARE, BEGIN, END = (
    MARK.format(shared_text.SHARE, 0, 20), MARK.format(shared_text.BEGIN, shared_text.NUMBER, 21),
    MARK.format(shared_text.END, 0, 22),
)  # fmt: skip
KERNEL = """
	.reg .pred 	%p<9>;
// %bb.0:
	ld.param.b32 	%r4, [p];
	mov.u32 	%r1, %tid.x;
	and.b32 	%r2, %r1, 127;
	{branch}
$L__BB0_8:
	bar.sync 	0, 128;
	setmaxnreg.dec.sync.aligned.u32 	{left};
	barrier.sync 	1;
{default}	ret;
$L__BB0_1:                              // %.preheader
	add.s32 	%r5, %r4, 1;
	bra.uni 	$L__BB0_2;
$L__BB0_2:
	barrier.sync 	1;
	$L_brx_0: .branchtargets
		$L__BB0_3,
		$L__BB0_5,
		$L__BB0_6;
	brx.idx 	%r6, $L_brx_0;
$L__BB0_3:
	setmaxnreg.inc.sync.aligned.u32 	168;
	barrier.sync 	1;
{owner}	bar.sync 	2, 128;
	@%p1 bra 	$L__BB0_7;
	{body}
	bra.uni 	$L__BB0_7;
$L__BB0_5:
	setmaxnreg.inc.sync.aligned.u32 	168;
	barrier.sync 	1;
{other}	add.s32 	%r8, %r6, 1;
	bra.uni 	$L__BB0_2;
$L__BB0_7:
	bar.sync 	2, 128;
{end}	barrier.sync 	1;
	bra.uni 	$L__BB0_2;
$L__BB0_6:
	bar.sync 	3, 128;
	ret;
"""
WHOLE = {
    "branch": "@%p4 bra 	$L__BB0_8;\n\tbra.uni 	$L__BB0_1;", "default": SHARE, "owner": BEGIN, "other": SHARE, "end": END,
    "body": "add.s32 	%r7, %r5, %r2;", "left": "168",
}  # fmt: skip


def kernel(**changes: str) -> str:
    return KERNEL.format(**WHOLE | changes)


def after(text: str, mark: str, which: int = 0) -> str:
    """What follows a mark, up to the next blank."""
    return text.split(mark)[which + 1]


def test_text_without_marks_stays():
    plain = kernel(default="", owner="", other="", end="")
    assert shared_text.merged(plain) == plain


@pytest.mark.parametrize("branch", [WHOLE["branch"], "@!%p4 bra 	$L__BB0_1;"], ids=["3.6", "3.8"])
def test_all_become_the_owners_threads_and_work_out_what_workers_do(branch):
    found = shared_text.merged(kernel(branch=branch))
    begin = found[found.index("$L__tessera_text:") : found.index(BEGIN)]
    assert begin.endswith(
        "\tmov.u32 \t%r1, %tid.x;\n\tand.b32 \t%r1, %r1, 127;\n\tadd.s32 \t%r1, %r1, 128;\n"
        "\tand.b32 \t%r2, %r1, 127;\n\tadd.s32 \t%r5, %r4, 1;\n"
    )


@pytest.mark.parametrize(("which", "number", "following"), [(0, 0, "ret"), (1, 2, "add.s32 \t%r8")])
def test_who_shares_jumps_there_and_knows_its_own_threads_when_it_is_back(which, number, following):
    found = after(shared_text.merged(kernel()), SHARE, which)
    own = "\tmov.u32 \t%r1, %tid.x;\n\tand.b32 \t%r2, %r1, 127;\n"
    assert found.startswith(f"\tbra.uni \t$L__tessera_text;\n$L__tessera_back_{number}:\n{own}\t{following}")


def test_all_begin_behind_their_registers_and_know_their_number():
    found = shared_text.merged(kernel())
    text = found[found.index("$L__tessera_text:") :]
    assert found[: found.index("$L__tessera_text:")].endswith("\tsetmaxnreg.inc.sync.aligned.u32 \t168;\n\tbarrier.sync \t1;\n")
    assert text.index(f"shfl.sync.idx.b32 \t{shared_text.NUMBER}") < text.index(BEGIN)
    assert f".reg .b32 \t{shared_text.NUMBER}" in found


def test_the_texts_warps_meet_by_their_number_and_others_as_before():
    found = shared_text.merged(kernel())
    assert found.count(f"add.s32 \t%tessera_barrier, {shared_text.NUMBER}, 2;\n\tbar.sync \t%tessera_barrier, 128;") == 2
    assert re.findall(r"bar\.sync \t\d, 128", found) == ["bar.sync \t0, 128", "bar.sync \t3, 128"]


def test_each_leaves_the_text_for_where_it_shared_it():
    found = after(shared_text.merged(kernel()), END)
    for number in (0, 2):
        leaves = f"setp.eq.u32 \t%tessera_leaves, {shared_text.NUMBER}, {number};"
        assert f"\t{leaves}\n\t@%tessera_leaves bra.uni \t$L__tessera_back_{number};\n" in found


def test_a_place_in_the_source_may_stand_between_the_lines_of_a_mark():
    """As from Triton 3.8 on."""
    place = "\t.loc\t4 94 12, inlined_at 3 101 13 // compat.py:94:12\n"
    marks = {name: WHOLE[name].replace("\tmov.u32", f"{place}\tmov.u32") for name in ("default", "owner", "other", "end")}
    plain, placed = shared_text.merged(kernel()), shared_text.merged(kernel(**marks))
    assert placed.replace(place, "") == plain != placed


def test_addresses_that_workers_name_while_they_wait_are_named_anew():
    """As from Triton 3.9 on."""
    address = "\tmov.b32 \t%r9, global_smem;\n"
    changes = {"body": "add.s32 \t%r7, %r9, %r2;"}
    waiting = kernel(**changes).replace("\t$L_brx_0:", f"{address}\t$L_brx_0:")
    found = shared_text.merged(waiting)
    assert found[found.index("$L__tessera_text:") : found.index(BEGIN)].endswith(f"\tadd.s32 \t%r5, %r4, 1;\n{address}")
    with pytest.raises(MarkError, match="uses %r9"):
        shared_text.merged(waiting.replace("global_smem", "%r6"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"default": "", "other": ""}, "1 begin, 1 end, 0 partitions share one"),
        ({"body": BEGIN}, "2 begin, 1 end, 2 partitions"),
        ({"end": ""}, "1 begin, 0 end, 2 partitions"),
        ({"owner": "", "default": BEGIN}, "elsewhere than in a worker partition"),
        ({"body": "add.s32 	%r7, %r8, %r2;"}, "uses %r8, which other partitions set"),
        ({"left": "160"}, "warpgroup 0 has 160 registers for a text of 168"),
        ({"branch": "@%p4 bra 	$L__BB0_8;\n\tbra.uni 	$L__BB0_6;"}, "does not follow the kernel's first branch"),
    ],
)
def test_what_cannot_be_one_text_is_an_error(changes, words):
    with pytest.raises(MarkError, match=re.escape(words)):
        shared_text.merged(kernel(**changes))


def test_the_pass_is_part_of_the_key():
    assert Path(shared_text.__file__) in toolchain.source_files("tessera.backends.hopper.forward")


def test_a_kernels_partitions_share_their_text(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    arguments = (("out_ptr", jit.Pointer("i32")), ("after_ptr", jit.Pointer("i32")), ("factor", jit.Scalar("i32")))
    found = jit.compile(jit.KernelSpec("jit_kernels.sharing:three_writers", arguments))
    assert found.ptx.count("bra.uni \t$L__tessera_text;") == 2
    assert found.ptx.count("bar.sync \t%tessera_barrier, 128;") == 1
    with pytest.raises(MarkError, match="0 partitions share one"):
        jit.compile(jit.KernelSpec("jit_kernels.sharing:nobody_shares", arguments[:1]))
    sys.modules.pop("jit_kernels.sharing")
