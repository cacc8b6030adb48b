"""`register()`, and what it says where transformers is missing, broken or too old."""

from __future__ import annotations

import subprocess
import sys

import pytest
import transformers
from tiny_models import assert_same, pair, prompt

from tessera.integrations.transformers import OLDEST, library, register, unregister


def names() -> tuple[bool, bool]:
    return "tessera" in transformers.AttentionInterface(), "tessera" in transformers.AttentionMaskInterface()


def test_register_twice_and_take_back() -> None:
    register()
    register()
    assert names() == (True, True)
    unregister()
    unregister()
    assert names() == (False, False)
    with pytest.raises(ValueError, match="tessera"):
        transformers.LlamaForCausalLM(transformers.LlamaConfig(attn_implementation="tessera"))


def test_switched_on_in_a_living_model() -> None:
    model, _ = pair("llama")
    expected = model(prompt()).logits
    model.set_attn_implementation("tessera")
    assert model.config._attn_implementation == "tessera"
    assert_same(model(prompt()).logits, expected)


def test_importing_tessera_leaves_transformers_alone() -> None:
    code = "import sys, tessera, tessera.integrations.transformers; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers is not installed: pip install 'transformers>=5\.5'"):
        library()


@pytest.mark.parametrize("version", ["4.57.1", "5.4.9", "5.3.0.dev0"])
def test_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library(), "__version__", version)
    with pytest.raises(ImportError, match=f"transformers {version} is too old: pip install -U"):
        register()


@pytest.mark.parametrize("version", [f"{OLDEST[0]}.{OLDEST[1]}.0", "5.10.0.dev0", "6.0.0"])
def test_new_enough(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library(), "__version__", version)
    register()
