"""What the integrations' tests share: transformers, offline, with Tessera registered, and small random models in pairs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: a test that reaches for the network fails

pytest.importorskip("transformers")

from tessera.integrations.transformers import register, unregister


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register()
    yield
    unregister()
