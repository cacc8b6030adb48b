"""README's code runs, and its generated parts are current."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.jit.gate import collect

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_code_runs(block: str) -> None:
    if "transformers" in block:
        pytest.importorskip("transformers")
    imports = "import torch\nimport tessera\n"
    exec(compile(imports + block, "README.md", "exec"), {})


@pytest.mark.parametrize(("page", "least"), [("serving.md", 7), ("replacing.md", 3)])
def test_the_pages_code_runs(page: str, least: int) -> None:
    """From the first block to the last, each going on from the one before."""
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    assert len(blocks) >= least
    for block in blocks:
        exec(compile(block, f"docs/{page}", "exec"), names)


@pytest.mark.parametrize("name", ["kernel.md", "backward.md", "decoding.md"])
def test_the_kernels_pages_name_what_there_is(name: str) -> None:
    page = (ROOT / "docs" / name).read_text()
    sources = "".join(path.read_text() for path in (ROOT / "src" / "tessera" / "backends" / "hopper").rglob("*.py"))
    names = {name for quoted in re.findall(r"`([^`\n]+)`", page) for name in re.findall(r"[A-Za-z_]\w+", quoted)}
    names |= set(re.findall(r"^    (_\w+)", page, flags=re.MULTILINE))
    elsewhere = {"backends", "cpu", "explain", "forward", "hopper", "py", "tessera", "tiled"}
    assert len(names) > 20
    assert {name for name in names - elsewhere if not re.search(rf"\b{name}\b", sources)} == set()


def test_the_kernels_page_shows_what_a_plan_prints() -> None:
    pytest.importorskip("typer")
    page = (ROOT / "docs" / "kernel.md").read_text()
    found = re.search(r"`tessera explain ([^`]*)`\s+shows\n\n    (.*)\n", page)
    assert found
    asked, shown = found.groups()
    printed = subprocess.run(
        [sys.executable, "-m", "tessera", "explain", *asked.split(), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(printed.stdout)["forward"]["config"] == shown


@pytest.mark.parametrize("name", ["kernel.md", "backward.md", "decoding.md", "developing.md"])
def test_the_gates_words_name_variants(name: str) -> None:
    asked = re.findall(r"tessera\.jit\.gate((?: \w+)+)", (ROOT / "docs" / name).read_text())
    assert asked
    for words in asked:
        assert collect(words=words.split()), words


def test_there_is_code() -> None:
    assert len(BLOCKS) >= 3


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_logs_overview_leads_to_its_sections() -> None:
    """Its references, [F1] and so on, lead to headings as GitHub names their anchors."""
    log = (ROOT / "benchmarks" / "LOG.md").read_text()
    headings = re.findall(r"^## (.*)$", log, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    leads = dict(re.findall(r"^\[(\w+)\]: #(\S+)$", log, flags=re.MULTILINE))
    overview = log[: log.index("\n[F1]: ")]
    assert set(re.findall(r"\[([A-Z]\w*)\]", overview)) == set(leads)
    assert set(leads.values()) <= anchors


def test_generated_parts_are_current() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "update_readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
