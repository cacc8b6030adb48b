"""Draws docs/images/masks.png: what the Mask algebra makes of each tile. Read off mask.RowLimits, like the kernels' loops."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Patch, Rectangle

from tessera.mask import Coverage, Mask, RowLimits

SEQLEN, TILE = 96, 8
COLOURS = {Coverage.FULL: "#1f6f8b", Coverage.PARTIAL: "#f2a65a", Coverage.EMPTY: "#f3f1ec"}
LABELS = {
    Coverage.FULL: "full: no mask is computed",
    Coverage.PARTIAL: "edge: masked element by element",
    Coverage.EMPTY: "empty: never loaded",
}


def limits(mask: Mask) -> RowLimits:
    def rows(bounds: torch.Tensor | None) -> tuple[int, ...] | None:
        return None if bounds is None else tuple(bounds[0].tolist())

    return RowLimits(
        SEQLEN, SEQLEN, mask.left, mask.right, begin=rows(mask.document_begin), end=rows(mask.document_end),
        key_end=SEQLEN if mask.key_end is None else int(mask.key_end[0]),
    )  # fmt: skip


def draw(axes: plt.Axes, title: str, mask: Mask) -> None:
    own = limits(mask)
    for row in range(0, SEQLEN, TILE):
        for key in range(0, SEQLEN, TILE):
            coverage = own.coverage(range(row, row + TILE), range(key, key + TILE))
            colour = COLOURS[coverage]
            axes.add_patch(Rectangle((key, row), TILE, TILE, facecolor=colour, edgecolor="white", linewidth=1.2))
    axes.set(xlim=(0, SEQLEN), ylim=(SEQLEN, 0), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=9, family="monospace")
    for spine in axes.spines.values():
        spine.set_visible(False)


def main() -> None:
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([28, 41, 27]))
    documents, padding = Mask.documents(ids), Mask.padding(torch.tensor([70]))
    masks = {
        "causal()": Mask.causal(),
        "window(24, 0)": Mask.window(24, 0),
        "documents(ids)": documents,
        "documents(ids) & causal()": documents & Mask.causal(),
        "window(30, 10) & padding(70)": Mask.window(30, 10) & padding,
    }
    figure, row = plt.subplots(1, len(masks), figsize=(13, 3.1))
    for axes, (title, mask) in zip(row, masks.items(), strict=True):
        draw(axes, title, mask)
    row[0].set_ylabel("queries", fontsize=9)
    row[0].set_xlabel("keys", fontsize=9)
    handles = [Patch(facecolor=COLOURS[c], edgecolor="#999999", linewidth=0.5, label=LABELS[c]) for c in COLOURS]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.subplots_adjust(left=0.02, right=0.995, top=0.9, bottom=0.15, wspace=0.06)
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/masks.png")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
