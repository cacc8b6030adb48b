"""The code in docs/transformers.md runs, from the first block to the last."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"


def test_the_pages_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["model"].config._attn_implementation == "tessera"
    assert names["vectors"].shape == (2, 384)
