"""What every test shares: one torch thread (the tensors are small, pytest-xdist's workers are the parallelism) and a seed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many random problems were tried, summed over the workers."""
    tried: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, counts in report.user_properties:
            if name == "random problems":
                tried.update(counts)
    if tried:
        total = tried["dense"] + tried["varlen"]
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tried.items()))
        terminalreporter.write_line(f"{total} random problems agree with the oracle: {kinds}")
