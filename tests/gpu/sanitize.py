"""compute-sanitizer over small cases of every family of kernels: python tests/gpu/sanitize.py (-h for its options)

Each tool sees each family in a process of its own, side by side, the GPUs in turns; ends with 1 if something was found. Not a
pytest: it takes a minute, and most of a machine.
"""

from __future__ import annotations

import argparse
import json
import linecache
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import cycle, product
from pathlib import Path

import torch
from compile_ahead import compile_all, kernels

from tessera import dispatch, operators
from tessera.backends import hopper
from tessera.backends.hopper.config import ForwardConfig
from tessera.backends.hopper.decode_plan import LONG
from tessera.bench import machine
from tessera.cases import CASES, Case
from tessera.device import Device
from tessera.operands import Request, describe
from tessera.serving import operators as serving
from tessera.serving.cases import CACHE_CASES, CacheCase
from tessera.serving.operands import CacheRequest
from tessera.verify import differentiated

TOOLS = ("memcheck", "racecheck")
NO_CLUSTERS = ("racecheck",)
"""Tools that are given no clusters: racecheck never ends of a cluster that meets before its warps specialise, which a kernel that
does nothing else shows (H200, CUDA 13, 2026-11-21). memcheck and synccheck see them."""
EXPLAINED = {
    "Triton's own words to its partitions, between two barrier.sync of the whole block": (
        "def attention_", "def _start_", "def decode(", "gl.warp_specialize([", "if config.consumers == 2:",
        "if divided_by(config, ", "elif divided_by(config, ", "if not shares_text(config):",
    ),
    "the posted tile, between the arrives and the waits of an mbarrier pair": (
        "numbers.index(place).store(", "posted = numbers.index(place).load(",
        # such loads too, but for the compiler's table of lines (at the reported offsets the code has LDS of the tile's words)
        "out = o * gl.convert_layout(factor, layout)", "factor = factor * me.score.modifiers.dropout[0].keep_scale",
    ),
    "MLA's factors, between the arrivals at a barrier and the wait for it": (
        "shared.passed[1].index(0).store(", "o = rescale(o, shared.passed[1].index(0).load(",
        "out = o * shared.passed[1].index(0).load(", "return gl.inline_asm_elementwise(",
    ),
}  # fmt: skip
"""Why racecheck sees hazards where there are none: it models neither way to order accesses. By each reason, the beginnings of
the source lines; both accesses of a hazard must be of one reason. (Gluon puts a barrier of the partition before each arrive.)"""

_REPORT = re.compile(r"Race reported between (.*?)(?:\n=+ *\n|\Z)", re.DOTALL)
_PLACE = re.compile(r"(?:Write|Read) access at \w+\+0x[0-9a-f]+ in (\S+\.py):(\d+)")
ROOT = Path(__file__).resolve().parents[2]
GQA = {"heads_q": 16, "heads_kv": 4, "head_dim": 128}
LATENT = {"latent": True, "head_dim": 576, "head_dim_v": 512, "heads_kv": 1}
ALONE = {"batch": 1, "heads_q": 1, "heads_kv": 1}
EIGHT = {"heads_q": 8, "heads_kv": 8}
"""Heads enough for a program to have several tiles."""
PLANE = {"seqlen_q": 200, "seqlen_k": 200, "heads_kv": 2}

FORWARD = (
    *(CASES[name] for name in ("causal", "off the tile", "more queries, causal", "gqa", "window", "padding left", "documents",
                               "softcap", "sinks, window", "varlen, used", "varlen, empty sequences")),
    *(CASES[name] for name in ("d8", "d72", "d96", "d128", "d192", "d256", "d192 v128")),
    Case("more tiles than programs", head_dim=128, batch=4, seqlen_q=300, seqlen_k=300, heads_q=24, heads_kv=8, causal=True),
    Case("three consumers", head_dim=128, seqlen_q=200, seqlen_k=2000, **ALONE),
    *(Case(f"three consumers, d{d}", head_dim=d, seqlen_q=4000, seqlen_k=4000, causal=d == 64, **ALONE) for d in (64, 96)),
    Case("three consumers, window", window=(1024, 0), seqlen_q=4000, seqlen_k=4000, **ALONE),
    *(Case(f"tall and low tiles, d{d}", head_dim=d, seqlen_q=5000, seqlen_k=1700, **ALONE | EIGHT) for d in (64, 96)),
    Case("tall and low tiles, window", window=(100, 0), seqlen_q=5000, seqlen_k=5000, **ALONE | EIGHT),
    *(Case(f"d{d}, window", head_dim=d, window=(100, 0), seqlen_q=300, seqlen_k=300, **ALONE) for d in (128, 192, 256)),
    Case("d192, full", head_dim=192, seqlen_q=300, seqlen_k=300, **ALONE),
    *(Case(f"d{d}, off the tile, causal", head_dim=d, seqlen_q=309, seqlen_k=333, causal=True, **ALONE) for d in (64, 96, 128)),
    Case("d64, wide window", window=(2500, 0), seqlen_q=4100, seqlen_k=4100, **ALONE),
    Case("d128, wide window", head_dim=128, window=(600, 0), seqlen_q=1130, seqlen_k=1100, **ALONE),
)  # fmt: skip
PAIRS = (
    Case("by rows", head_dim=192, head_dim_v=128, seqlen_q=4300, seqlen_k=4200, **ALONE),
    Case("by heads", head_dim=128, seqlen_q=4100, seqlen_k=6200, batch=1, heads_q=2, heads_kv=1, causal=True),
)
BACKWARD = (
    *(CASES[name] for name in ("gqa", "more queries, causal", "softcap", "sinks, window", "varlen, empty sequences")),
    *(Case(f"d{d}, causal", head_dim=d, seqlen_q=330, seqlen_k=330, heads_kv=2, causal=True) for d in (128, 256)),
    *(Case(f"d{d}, varlen", head_dim=d, lengths_q=(100, 1, 230, 0), lengths_k=(100, 1, 230, 0), causal=True) for d in (128, 256)),
    *(Case(f"d{d}, full", head_dim=d, seqlen_q=330, seqlen_k=330, heads_kv=2) for d in (64, 128, 256)),
    Case("d128, window, gqa", head_dim=128, window=(100, 0), seqlen_q=330, seqlen_k=330, heads_q=4, heads_kv=2),
    *(Case(f"more tiles than programs, d{d}", head_dim=d, batch=4, seqlen_q=300, seqlen_k=300, heads_q=24, heads_kv=heads,
           causal=True) for d, heads in ((64, 24), (128, 12), (256, 8))),
    Case("more tiles than programs, long ones", head_dim=128, batch=3, seqlen_q=600, seqlen_k=600, heads_q=45, heads_kv=9,
         causal=True),
    *(Case(f"last tiles divided, d{d}", head_dim=d, batch=3, seqlen_q=450, seqlen_k=keys, heads_q=heads, heads_kv=9)
      for d, keys, heads in ((64, 900, 54), (128, 600, 108), (256, 300, 54))),
)  # fmt: skip
MODIFIERS = (
    *(CASES[name] for name in ("alibi", "dropout, causal, gqa", "bias", "varlen, softcap, alibi, dropout")),
    *(Case(f"d{d}, dropout", head_dim=d, dropout_p=0.2, **PLANE) for d in (64, 128, 256)),
    *(Case("d128, bias", head_dim=128, bias=(1, 4, 200, 200), constant_bias=is_constant, causal=True, **PLANE)
      for is_constant in (False, True)),
    Case("padding left, dropout", key_start=(30, 17), dropout_p=0.2, causal=True, **PLANE),
)  # fmt: skip
DECODE = (
    *(CACHE_CASES[name] for name in ("one query", "group of 5", "four queries", "long", "left padding, window", "packed",
                                     "sinks, window, softcap", "d96", "d256", "d192 v128", "pages of 16", "pages of 128",
                                     "pages, vLLM's form", "one head beside", "three splits", "splits, pages, sinks")),
    CacheCase("many parts", cached=(9000,), heads_q=8, num_splits=60),
)  # fmt: skip
STREAM_K = (
    *(CACHE_CASES[name] for name in ("stream-k", "stream-k, pages, packed", "batch-invariant")),
    CacheCase("ragged", cached=(3000, 37, 0, 410, 5000), schedule="stream_k", **GQA),
    CacheCase("equal lengths", cached=(2000,) * 5, schedule="stream_k", **GQA),
    CacheCase("K freed first", cached=(3000, 400), capacity=LONG // 2, heads_q=68, heads_kv=68, head_dim=8, schedule="stream_k"),
)
FP8 = tuple(CACHE_CASES[f"fp8, {name}"] for name in ("no scales", "scales of heads", "scales of sequences", "scales of blocks",
                                                      "scales of blocks, contiguous", "d128, window, sinks"))  # fmt: skip
APPEND = (
    *(CACHE_CASES[name] for name in ("append", "append more than asked", "append fewer than asked", "append, pages of 1",
                                     "append, packed, pages, beside", "append, left padding", "rotary",
                                     "rotary, halves, in part, packed", "rotary, float32 tables", "fp8, append",
                                     "fp8, append, blocks, packed", "latent, append")),
    CacheCase("many tokens", cached=(100, 37, 0), new=200, seqlen_q=200),
    CacheCase("many tokens, rotary", cached=(100, 37, 0), new=200, seqlen_q=200, rotary_dim=64, page_size=16),
    CacheCase("many tokens, rotary, halves", new=1, lengths_q=(500, 1, 150), rotary_dim=48, interleaved=False, heads_kv=1),
    CacheCase("many tokens, fp8", scales="block", cached=(64, 32), new=300, seqlen_q=300, page_size=32, head_dim=128),
)  # fmt: skip
CHUNK = (
    *(CACHE_CASES[name] for name in ("64 queries", "more queries than keys", "packed, sinks, long", "pages, 64 queries",
                                     "pages of 1", "pages of 4", "window both ways")),
    CacheCase("in splits", cached=(1000, 295, 130), seqlen_q=64, num_splits=4, **GQA),
    CacheCase("in splits of pages", cached=(1000, 295, 130), seqlen_q=64, num_splits=4, page_size=16, **GQA),
    CacheCase("in halves", cached=(1000, 295, 30), seqlen_q=64, num_splits=2, **GQA),
    CacheCase("pages of 24", cached=(500, 95), seqlen_q=40, heads_q=8, head_dim=128, page_size=24),
    CacheCase("d256", cached=(500, 95), seqlen_q=40, heads_q=8, head_dim=256, page_size=64, num_splits=3),
    CacheCase("packed, pages", lengths_q=(64, 1, 0, 200, 17), cached=(300, 150, 33, 30, 4), sinks=True, page_size=64, **GQA),
)  # fmt: skip
MLA = (
    *(CACHE_CASES[name] for name in ("latent", "latent, pages, 3 queries", "latent, small")),
    CacheCase("latent, splits", cached=(530, 400), heads_q=128, seqlen_q=2, num_splits=3, **LATENT),
    CacheCase("latent, pages, splits", cached=(530, 400, 3), heads_q=128, page_size=64, num_splits=5, sinks=True, **LATENT),
    *(
        CacheCase(f"latent, tiles in pairs, {name}", cached=(900, 4150), heads_q=128, page_size=size, num_splits=1, **LATENT)
        for name, size in (("contiguous", None), ("pages", 64))
    ),
)


@dataclass(frozen=True)
class Family:
    """Cases that one process runs: forward, and where `with_gradients` backward."""

    cases: tuple[Case | CacheCase, ...]
    with_gradients: bool = False
    deterministic: bool = False

    def request(self, case: Case | CacheCase, device: str) -> Request | CacheRequest:
        if isinstance(case, CacheCase):
            return case.request(device, torch.bfloat16)._replace(backend="hopper")
        request = case.request(device, torch.bfloat16, requires_grad=self.with_gradients)
        return request._replace(backend="hopper", deterministic=self.deterministic)

    def cases_under(self, tool: str) -> tuple[Case | CacheCase, ...]:
        """Those that the tool comes to an end of."""
        return tuple(case for case in self.cases if tool not in NO_CLUSTERS or not runs_in_clusters(self.request(case, "meta")))

    def run(self, tool: str) -> None:
        for case in self.cases_under(tool):
            request = self.request(case, "cuda")
            if isinstance(request, CacheRequest):
                serving.forward(request)
            elif self.with_gradients:
                (out, lse), (_, inputs) = operators.forward(request), differentiated(request)
                torch.autograd.grad((out, lse), inputs, (torch.randn_like(out), torch.randn_like(lse)))
            else:
                operators.forward(request)
            torch.cuda.synchronize()
            print("ran", case.name, flush=True)


def runs_in_clusters(request: Request | CacheRequest) -> bool:
    """Whether programs of the call's main kernel reach for each other's shared memory (tensors may be on meta)."""
    device = Device.named("h200")
    if isinstance(request, CacheRequest):
        return any(spec.cluster > 1 for spec in kernels(request, device))
    config = dispatch.select(describe(request, "cuda"), device, "hopper").forward.config
    return isinstance(config, ForwardConfig) and config.cluster > 1


FAMILIES = {
    "forward": Family(FORWARD),
    "forward, in pairs": Family(PAIRS),
    "backward": Family(BACKWARD, with_gradients=True),
    "backward, deterministic": Family(BACKWARD, with_gradients=True, deterministic=True),
    "modifiers": Family(MODIFIERS),
    "modifiers, backward": Family(MODIFIERS, with_gradients=True),
    "decode": Family(DECODE),
    "stream-K": Family(STREAM_K),
    "FP8 cache": Family(FP8),
    "append, rotary": Family(APPEND),
    "chunk": Family(CHUNK),
    "latent": Family(MLA),
}


@dataclass(frozen=True)
class Verdict:
    """What one tool said of one family: the hazards that a reason above explains, by reason, and what nothing does. `left_out`:
    the cases that it was not given."""

    tool: str
    family: str
    cases: int
    clean: bool
    explained: dict[str, int]
    found: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        said = f"{self.tool:10} {self.family:24} {'clean' if self.clean else 'FOUND'}: {self.cases} cases"
        said += f"; left out, for they run in clusters: {', '.join(self.left_out)}" if self.left_out else ""
        return "\n    ".join((said, *(f"{count} of {reason}" for reason, count in self.explained.items()), *self.found))


def hazards(report: str) -> tuple[Counter[str], tuple[str, ...]]:
    """racecheck's pairs of accesses: how many each reason explains, and the others as source lines."""
    explained, others = Counter[str](), set()
    for block in _REPORT.findall(report):
        first, *rest = _PLACE.findall(block)
        for other in rest:
            lines = [_source(*place) for place in (first, other)]
            reason = next((why for why, known in EXPLAINED.items() if all(line.startswith(known) for line in lines)), None)
            if reason is None:
                others.add(" and ".join(f"{Path(name).name}:{number}: {line}" for (name, number), line in
                                        zip((first, other), lines, strict=True)))  # fmt: skip
            else:
                explained[reason] += 1
    return explained, tuple(sorted(others))


def _source(path: str, number: str) -> str:
    """A line of the kernels' sources, which need not lie where they were compiled from."""
    here = next(Path(hopper.__path__[0]).rglob(Path(path).name), path)
    return linecache.getline(str(here), int(number)).strip()


def judge(tool: str, name: str, gpu: str, seconds: float) -> tuple[Verdict, str]:
    """Runs a family under a tool: the verdict, and what the tool said. Memory comes from the driver, tensor by tensor: what lies
    beside one is nobody's."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "2000"]
    command += [sys.executable, __file__, "--child", name, "--tools", tool]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpu}
    with tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            status = run.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # the tool's own child too
            status = run.wait()
            said.seek(0, os.SEEK_END)
            said.write(f"\nno end after {seconds:g} s\n")
        said.seek(0)
        report = said.read()
    for folder in (ROOT, sys.prefix):  # a record names no machine's folders
        report = report.replace(f"{folder}/", "")
    ran = len(re.findall(r"^ran ", report, re.MULTILINE))
    explained, found = hazards(report)
    cases = FAMILIES[name].cases_under(tool)
    if ran < len(cases) or (status and not explained and not found):
        rest = _REPORT.sub("", report).splitlines()[-12:]
        found = (*found, *([f"no end of {cases[ran].name}"] if ran < len(cases) else []), *rest)
    left_out = tuple(case.name for case in FAMILIES[name].cases if case not in cases)
    return Verdict(tool, name, ran, not found, dict(explained), found, left_out), report


def _visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be, one at a time."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(max(1, torch.cuda.device_count()))]


def main() -> int:
    parser = argparse.ArgumentParser(description="compute-sanitizer over small cases of every family of kernels")
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=(*TOOLS, "synccheck", "initcheck"))
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES), metavar="NAME")
    parser.add_argument("--json", type=Path, help="write the verdicts")
    parser.add_argument("--reports", type=Path, help="a folder for what the tools said, in full")
    parser.add_argument("--seconds", type=float, default=300, help="a family's time under one tool; then it is ended, and found")
    parser.add_argument("--compile", action="store_true", help="compile what is needed and end; needs no GPU")
    parser.add_argument("--child", choices=list(FAMILIES), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ["TRITON_DISABLE_LINE_INFO"] = "0"  # reasons go by lines, which a compile does not note unasked
    if asked.child:
        FAMILIES[asked.child].run(asked.tools[0])
        return 0
    names = asked.families
    device = Device.named("h200")
    compile_all(spec for name in names for case in FAMILIES[name].cases
                for spec in kernels(FAMILIES[name].request(case, "meta"), device))  # fmt: skip
    if asked.compile:
        return 0
    verdicts, gpus = [], cycle(_visible_gpus())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [(tool, name) for tool, name in product(asked.tools, names) if FAMILIES[name].cases_under(tool)]
        futures = [pool.submit(judge, tool, name, next(gpus), asked.seconds) for tool, name in jobs]
        for future in as_completed(futures):
            verdict, report = future.result()
            verdicts.append(verdict)
            print(verdict, flush=True)
            if asked.reports is not None:
                asked.reports.mkdir(parents=True, exist_ok=True)
                (asked.reports / f"{verdict.tool} {verdict.family}.txt").write_text(report)
    if asked.json is not None:
        verdicts.sort(key=lambda verdict: (asked.tools.index(verdict.tool), names.index(verdict.family)))
        data = {"schema": 1, "kind": "sanitizer", "machine": asdict(machine.describe()), "verdicts": list(map(asdict, verdicts))}
        asked.json.write_text(json.dumps(data, indent=1) + "\n")
    return int(not all(verdict.clean for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
