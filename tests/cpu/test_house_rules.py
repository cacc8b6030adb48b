"""The scripts that CI runs over the source: what they say of it, and that they would notice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def rules() -> ModuleType:
    import importlib.util

    spec = importlib.util.spec_from_file_location("check_imports", SCRIPTS / "check_imports.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_source_keeps_the_import_rules() -> None:
    done = subprocess.run([sys.executable, SCRIPTS / "check_imports.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("mask.py", "from tessera.problem import Problem", "mask stands under problem"),
        ("mask.py", "def late():\n    import tessera.api", "mask stands under api"),
        ("operands.py", "from .backends import cpu", "operands stands under backends"),
        ("backends/cpu/tiled.py", "from tessera.backends.hopper import plan", "backends never import each other"),
        ("backends/cpu/tiled.py", "from ..hopper import plan", "backends never import each other"),
        ("backends/cpu/tiled.py", "from tessera.backends.cpu import aten", None),
        ("backends/cpu/tiled.py", "import tessera.api", "backends stands under api"),
        ("reference.py", "from tessera.partial import merge", "the oracle imports"),
        ("reference.py", "from tessera.mask import Mask", None),
        ("mask.py", "import triton.language as tl", "Triton"),
        ("mask.py", "if True:\n    from triton import jit", "Triton"),
        ("mask.py", "def late():\n    import triton", None),
        ("backends/hopper/forward.py", "import triton", None),
        ("api.py", "import rich.table", "rich comes with an extra"),
        ("api.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rich", None),
        ("commands/demo.py", "import rich.table", None),
        ("mask.py", "import tessera.newcomer", "no place in LAYERS"),
    ],
)
def test_import_rules_notice(rules: ModuleType, tmp_path: Path, file: str, source: str, complaint: str | None) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    said = [why for found in rules.imports_of(path, file) for why in rules.complaints(file, found)]
    if complaint is None:
        assert not said
    else:
        assert any(complaint in why for why in said), said


def test_size_report_runs() -> None:
    done = subprocess.run([sys.executable, SCRIPTS / "size_report.py"], capture_output=True, text=True, check=True)
    assert "longest functions" in done.stdout
    assert "tessera/mask.py" in done.stdout
