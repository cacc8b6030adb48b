"""What tests/gpu/sanitize.py makes of racecheck's reports, and that the source lines by which it explains them are there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tessera.backends import hopper
from tessera.backends.hopper.backward_plan import backward_config
from tessera.operands import describe

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
import sanitize

SOURCES = {path: path.read_text().splitlines() for path in Path(hopper.__path__[0]).rglob("*.py")}


def line_of(beginning: str) -> tuple[str, int]:
    """A source file's name, and the number of its first line that begins so."""
    return next((path.name, i + 1) for path, lines in SOURCES.items() for i, line in enumerate(lines) if
                line.strip().startswith(beginning))  # fmt: skip


def report(write: tuple[str, int], read: tuple[str, int]) -> str:
    access = "access at kernel+0x10"
    return (
        f"========= Error: Race reported between Write {access} in {write[0]}:{write[1]}\n"
        f"=========     and Read {access} in {read[0]}:{read[1]} [8 hazards]\n========= \nran a case\n"
    )


@pytest.mark.parametrize("beginning", [line for lines in sanitize.EXPLAINED.values() for line in lines])
def test_what_explains_a_hazard_is_in_the_sources(beginning: str) -> None:
    assert line_of(beginning)


def test_both_sides_of_a_hazard_have_one_reason() -> None:
    written, posted = line_of("numbers.index(place).store("), line_of("posted = numbers.index(place).load(")
    factor = line_of("shared.passed[1].index(0).store(")
    explained, found = sanitize.hazards(report(written, posted))
    assert (sum(explained.values()), found) == (1, ())
    explained, found = sanitize.hazards(report(factor, posted) + report(written, posted))
    assert sum(explained.values()) == 1
    assert len(found) == 1
    assert "latent.py" in found[0]


def test_racecheck_is_given_no_clusters() -> None:
    pairs, forward = sanitize.FAMILIES["forward, in pairs"], sanitize.FAMILIES["forward"]
    assert pairs.cases_under("memcheck") == pairs.cases
    assert pairs.cases_under("racecheck") == ()
    assert len(forward.cases_under("racecheck")) > len(forward.cases) / 2


def test_what_the_backward_divides_is_among_its_cases() -> None:
    """A plan may come to leave last tiles whole at a case's size: nobody would look at divided ones then."""
    divided = [case for case in sanitize.BACKWARD if case.name.startswith("last tiles divided")]
    assert {case.head_dim for case in divided} == {64, 128, 256}
    for case in divided:
        problem = describe(sanitize.FAMILIES["backward"].request(case, "meta"), "cuda")
        assert backward_config(problem).divides_remainder, case.name
