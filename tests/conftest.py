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
    """How many random problems were tried and what the random server did, summed over the workers."""
    sums: dict[str, Counter[str]] = {"random problems": Counter(), "random server": Counter()}
    for report in terminalreporter.getreports("passed"):
        for name, counts in report.user_properties:
            if name in sums:
                sums[name].update(counts)
    tried, server = sums.values()
    if tried:
        total = tried["dense"] + tried["varlen"]
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tried.items()))
        terminalreporter.write_line(f"{total} random problems agree with the oracle: {kinds}")
    if server:
        terminalreporter.write_line("random server: " + ", ".join(f"{n} {what}" for what, n in sorted(server.items())))
