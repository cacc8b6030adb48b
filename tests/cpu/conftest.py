"""How random problems are drawn: the same in every run, in whatever time; with TESSERA_EXAMPLES above 2000 others each time. And
what several tests of the driver's callers stand in for."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
from hypothesis import HealthCheck, settings

from tessera.jit import driver

EXAMPLES = int(os.environ.get("TESSERA_EXAMPLES", "2000"))

settings.register_profile(
    "ci", derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)
settings.register_profile("fuzz", parent=settings.get_profile("ci"), derandomize=False)
settings.load_profile("ci" if EXAMPLES <= 2000 else "fuzz")


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The devices whose contexts were made current, of which there are none."""
    devices: list[int] = []
    monkeypatch.setattr(driver, "current", lambda device: nullcontext(devices.append(device)))
    return devices
