"""The compile gate: every kernel variant, compiled for Hopper on a machine without a GPU, and judged by its machine code.

    python -m tessera.jit.gate [--json FILE] [--jobs N] [--variants module:function | --choosable] [words of names ...]

A wgmma kernel fails silently: ptxas serialises its tensor-core instructions, or spills registers in the main loop, says
so in messages that Triton hides, and the kernel still gives right results, several times slower. This makes it a failed
check. Works under every Triton that `compat` knows; run it once under each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tessera.jit import descriptors
from tessera.jit.compiler import obtain
from tessera.jit.register_pool import Pool, pool
from tessera.jit.sass import WARPGROUP, disassemble, parse
from tessera.jit.spec import Variant
from tessera.jit.toolchain import toolchain_key, triton_version

PROVIDERS = (
    "tessera.backends.hopper.variants:variants",
    "tessera.backends.hopper.backward_variants:variants",
    "tessera.backends.hopper.chunk_variants:variants",
    "tessera.backends.hopper.decode_variants:variants",
)
"""Functions that together return the variants that are kept fast, and so must pass."""
CHOOSABLE = ("tessera.backends.hopper.choosable:variants",)
"""The same for what else plans may choose: it must be right, and may be slow."""

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that one block may have on Hopper (CUDA C++ Programming Guide, "Compute Capabilities")."""
REGISTER_FILE = 64 * 1024
"""32-bit registers of one SM."""
COUNTED = ("HGMMA", "QGMMA", "USETMAXREG", "LDL", "STL", "MUFU", "BAR", "UTMALDG", "UTMASTG", "UTMAREDG")

_WARNING = re.compile(r"warning|\(C75\d\d\)|Potential Performance Loss|serializ", re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """One variant's compile. Sizes in bytes; `loop_*` tell of the main loop, the innermost with the most tensor-core work.

    `spills` are those ptxas counts anywhere (stores, loads); `loop_spills` the local-memory instructions inside main loops,
    `edge_spills` those inside loops that run at a tile's edge alone (see `sass.Code.main_loops`). `faults` is empty for a
    variant that passes. `unset` are instructions whose operands lie where a path leaves unset (see `descriptors`), `pool` the
    registers that warps share (see `register_pool`).
    """

    name: str
    registers: int
    threads: int
    shared: int
    spills: tuple[int, int]
    loop_spills: int
    edge_spills: int
    loop_instructions: int
    loop_tensor_core: int
    counts: dict[str, int]
    warnings: tuple[str, ...]
    unset: tuple[str, ...]
    pool: Pool | None
    seconds: float
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.faults

    @property
    def is_wrong(self) -> bool:
        """Whether it did not compile, reads what a path leaves unset, or waits for registers for ever. All other faults are
        slow."""
        return bool(self.unset) or not self.registers or self.waits

    @property
    def waits(self) -> bool:
        """Whether its warps want more registers than there are."""
        return self.pool is not None and self.pool.wanted > self.pool.reserved


def examine(variant: Variant) -> Verdict:
    """Compiles a variant (or finds it in the disk cache) and judges it. A failed compile is a fault, not an exception."""
    start = time.perf_counter()
    try:
        binary = obtain(variant.spec)
        code = parse(disassemble(binary.cubin))
    except Exception as error:
        words = f"{type(error).__name__}: {error}"[:2000]
        return Verdict(variant.name, 0, 0, 0, (0, 0), 0, 0, 0, 0, {}, (), (), None, time.perf_counter() - start, (words,))
    loops, main_loops = code.tensor_core_loops(), code.main_loops()
    main = loops[0] if loops else None
    spills = sum(loop.spills for loop in main_loops)
    warnings = tuple(line.strip() for line in binary.messages.splitlines() if _WARNING.search(line))
    verdict = Verdict(
        name=variant.name,
        registers=binary.registers,
        threads=binary.threads,
        shared=binary.shared,
        spills=binary.spills,
        loop_spills=spills,
        edge_spills=sum(loop.spills for loop in loops) - spills,
        loop_instructions=main.instructions if main else 0,
        loop_tensor_core=main.tensor_core if main else 0,
        counts={opcode: code.counts[opcode] for opcode in COUNTED},
        warnings=warnings,
        unset=descriptors.unset(code),
        pool=pool(code, binary.registers, binary.threads, 32 * variant.spec.num_warps),
        seconds=time.perf_counter() - start,
        faults=(),
    )
    return Verdict(**{**vars(verdict), "faults": tuple(_faults(variant, verdict))})


def _faults(variant: Variant, verdict: Verdict) -> Iterable[str]:
    yield from verdict.warnings
    if verdict.unset:
        yield f"{len(verdict.unset)} operands lie where a uniform register says that a path leaves unset: {verdict.unset[0]}"
    if verdict.loop_spills:
        yield f"{verdict.loop_spills} spill instructions (LDL, STL) in main loops"
    if variant.wgmma and not any(verdict.counts[opcode] for opcode in WARPGROUP):
        yield "no HGMMA or QGMMA: the products do not run on wgmma"
    if variant.setmaxnreg and not verdict.counts["USETMAXREG"]:
        yield "no USETMAXREG: registers are not moved between warpgroups"
    if verdict.pool is not None and verdict.waits:
        yield f"warps want {verdict.pool.wanted} registers of {verdict.pool.reserved} that the launch reserves, and wait for ever"
    if verdict.shared > SHARED_LIMIT:
        yield f"{verdict.shared} bytes of shared memory; Hopper has {SHARED_LIMIT} a block"
    if verdict.registers * verdict.threads > REGISTER_FILE:
        yield f"{verdict.registers} registers x {verdict.threads} threads exceed the register file"


def examine_all(variants: Sequence[Variant], jobs: int = 1) -> tuple[Verdict, ...]:
    """Judges all variants, `jobs` processes at a time, in the given order."""
    if jobs <= 1:
        return tuple(examine(variant) for variant in variants)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return tuple(pool.map(examine, variants))


def collect(providers: Iterable[str] = PROVIDERS, words: Sequence[str] = ()) -> tuple[Variant, ...]:
    """The variants of all providers ("module:function") whose names hold every one of `words`."""
    found: list[Variant] = []
    for provider in providers:
        module, function = provider.split(":")
        found += getattr(importlib.import_module(module), function)()
    return tuple(variant for variant in found if all(word in variant.name for word in words))


def one_in(every: int, variants: Iterable[Variant], share: int = 0) -> tuple[Variant, ...]:
    """Of each kernel's variants every `every`-th: the first and so on, or of `every` such shares another one."""
    met: Counter[str] = Counter()
    found = []
    for variant in variants:
        if met[variant.spec.kernel] % every == share % every:
            found.append(variant)
        met[variant.spec.kernel] += 1
    return tuple(found)


def table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as text, a line each, the faults below."""
    width = max((len(verdict.name) for verdict in verdicts), default=4)
    opcodes = " ".join(f"{opcode:>{max(4, len(opcode))}}" for opcode in COUNTED)
    lines = [
        f"{'':{width}}  {'':>5} {'':>7} {'':>7} {'spilt':>9} {'-- main loop --':>17} {'edge':>5}",
        f"{'variant':{width}}  {'regs':>5} {'threads':>7} {'shared':>7} {'bytes':>9} {'instr':>5} {'mma':>5} {'spill':>5} "
        f"{'spill':>5}  {opcodes}  verdict",
    ]
    for one in verdicts:
        counts = " ".join(f"{one.counts.get(opcode, 0):>{max(4, len(opcode))}}" for opcode in COUNTED)
        spills = f"{one.spills[0]}/{one.spills[1]}"
        lines.append(
            f"{one.name:{width}}  {one.registers:>5} {one.threads:>7} {one.shared:>7} {spills:>9} {one.loop_instructions:>5} "
            f"{one.loop_tensor_core:>5} {one.loop_spills:>5} {one.edge_spills:>5}  {counts}  {'ok' if one.passed else 'FAILED'}"
        )
    for one in verdicts:
        lines += [f"{one.name}: {fault}" for fault in one.faults]
    passed = sum(one.passed for one in verdicts)
    lines.append(
        f"{passed} of {len(verdicts)} pass; {toolchain_key().splitlines()[0]}; {sum(one.seconds for one in verdicts):.0f} s"
    )
    return "\n".join(lines)


def as_json(verdicts: Sequence[Verdict]) -> str:
    """The verdicts with the compiler's version, for keeping."""
    content = {"triton": triton_version(), "toolchain": toolchain_key(), "variants": [asdict(one) for one in verdicts]}
    return json.dumps(content, indent=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 0 when every variant passes."""
    parser = argparse.ArgumentParser(prog="python -m tessera.jit.gate", description=__doc__.split("\n\n")[0])
    parser.add_argument("words", nargs="*", help="only variants whose names hold all of these")
    parser.add_argument("--json", type=Path, help="also write the verdicts to this file")
    parser.add_argument("--choosable", action="store_true", help="what else plans choose; there wrong code fails, slow code not")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile at the same time")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th variant of each kernel")
    parser.add_argument("--share", type=int, default=0, metavar="K", help="which of these N shares, modulo N")
    parser.add_argument(
        "--variants", action="append", help=f"module:function that returns variants (default: {' and '.join(PROVIDERS)})"
    )
    chosen = parser.parse_args(arguments)
    providers = chosen.variants or (CHOOSABLE if chosen.choosable else PROVIDERS)
    variants = one_in(chosen.every, collect(providers, chosen.words), chosen.share)
    if not variants:
        print("no variant has such a name", file=sys.stderr)
        return 2
    verdicts = examine_all(variants, chosen.jobs)
    print(table(verdicts))
    if chosen.json:
        chosen.json.write_text(as_json(verdicts))
    if chosen.choosable:
        print(f"{sum(one.is_wrong for one in verdicts)} of them wrong")
    return 1 if any(one.is_wrong if chosen.choosable else not one.passed for one in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
