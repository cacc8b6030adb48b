"""Writes README's generated parts between their markers: the summary of what runs where, and the measured figures.

    python scripts/update_readme.py            writes
    python scripts/update_readme.py --check    exits 1 where README is stale
"""

from __future__ import annotations

import json
import math
import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from tessera.backends.cpu import ATEN
from tessera.support import FEATURES, Column, Feature, columns

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def support() -> str:
    """One line a group of features, one column a backend: all, or all but what."""
    asked = [column for column in columns() if column.kernel != ATEN]  # what torch's kernel lacks, the tiles have
    lines = ["| | " + " | ".join(f"`{c.backend}` ({_device(c)})" for c in asked) + " |", "|---" * (len(asked) + 1) + "|"]
    for group, members in groupby(FEATURES, key=lambda feature: feature.group):
        features = list(members)
        lines.append(f"| {group} | " + " | ".join(_cell(column, features) for column in asked) + " |")
    return "\n".join(lines)


def _device(column: Column) -> str:
    homes = {"hopper": "H100, H200", "torch": "any device, not fast"}
    return homes.get(column.backend, column.device.kind.upper())


def _cell(column: Column, features: list[Feature]) -> str:
    """Impossible anywhere (a head_dim of 257) is no backend's fault and not listed."""
    possible = [f for f in features if any(not other.refusal(f) for other in columns())]
    served = [f.name for f in possible if not column.refusal(f)]
    refused = [f.name for f in possible if column.refusal(f)]
    if not refused:
        return "all"
    return ", ".join(served) if len(served) < len(refused) else "all but " + ", ".join(refused)


def benchmarks() -> str:
    """The newest forward record: TFLOP/s of ours and the ratio to the best peer, cell by cell, losing cells first."""
    parts = []
    for path in sorted(RESULTS.glob("forward_*.json"))[-1:]:
        parts.append(_paper_grid(json.loads(path.read_text()), path.name))
    return "\n\n".join(parts) or "Nothing measured yet."


def _paper_grid(record: dict[str, Any], name: str) -> str:
    cells = [cell for cell in record["cells"] if cell["sec"] == "paper"]
    ratios = {id(cell): min(ratio[0] for ratio in cell["ratio"].values()) for cell in cells}
    lengths = sorted({cell["S"] for cell in cells})
    head = (
        f"Forward, bf16, {record['gpu']}, torch {record['torch']}, Triton {record['triton']}, {record['date']}; 16384 tokens, "
        f"hidden 2048; interleaved with FA3 and cuDNN in one run (`benchmarks/results/{name}`). TFLOP/s, and in brackets the "
        "ratio to the faster of the two peers."
    )
    lines = [head, "", "| | " + " | ".join(_thousands(s) for s in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    cells.sort(key=lambda cell: (cell["D"], cell["causal"], cell["S"]))
    for (dim, causal), members in groupby(cells, key=lambda cell: (cell["D"], cell["causal"])):
        row = {cell["S"]: f"{cell['tflops']['ours']:.0f} ({ratios[id(cell)]:.2f})" for cell in members}
        lines.append(f"| d{dim} {'causal' if causal else 'full'} | " + " | ".join(row.get(s, "") for s in lengths) + " |")
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    behind = sorted((cell for cell in cells if ratios[id(cell)] < 1), key=lambda cell: ratios[id(cell)])
    lost = ", ".join(f"d{c['D']} {'causal' if c['causal'] else 'full'} {_thousands(c['S'])} {ratios[id(c)]:.3f}" for c in behind)
    lines += ["", f"Geometric mean {mean:.3f}; behind in {len(behind)} of {len(cells)} cells" + (f": {lost}." if behind else ".")]
    return "\n".join(lines)


def _thousands(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 else str(number)


def updated(text: str) -> str:
    for marker, body in (("support", support()), ("benchmarks", benchmarks())):
        pattern = rf"(<!-- {marker}:begin -->\n).*?(<!-- {marker}:end -->)"
        text = re.sub(pattern, lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text, flags=re.DOTALL)
    return text


def main() -> int:
    text = README.read_text()
    new = updated(text)
    if "--check" in sys.argv[1:]:
        if new != text:
            print("README.md is stale: run `make matrix`", file=sys.stderr)
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
