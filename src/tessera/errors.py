"""Refusals as data: what was asked, by which name, why it cannot be had, and what can."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """One reason why one backend (or no backend) can do what was asked.

    `argument` names the user's argument, `value` is how it prints, `why` is the limit it meets and `instead` the
    nearest thing that works.
    """

    argument: str
    value: str
    why: str
    instead: str

    def __str__(self) -> str:
        return f"{self.argument}={self.value}: {self.why}; {self.instead}"


class Unsupported(NotImplementedError):
    """No backend can run the problem here (or the one asked for can't). `refusals` maps each backend to its reasons."""

    def __init__(self, headline: str, refusals: dict[str, tuple[Reason, ...]]):
        self.headline, self.refusals = headline, refusals
        lines = [headline]
        for backend, reasons in refusals.items():
            lines += [f"  {backend}: {reason}" for reason in reasons]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type, tuple[str, dict[str, tuple[Reason, ...]]]]:
        return type(self), (self.headline, self.refusals)  # so that it crosses from worker processes


def bad_value(argument: str, value: object, why: str, instead: str) -> ValueError:
    """A ValueError in the house's form: argument, value, reason, what works."""
    return ValueError(str(Reason(argument, str(value), why, instead)))


def bad_type(argument: str, value: object, why: str, instead: str) -> TypeError:
    """A TypeError in the house's form: argument, value, reason, what works."""
    return TypeError(str(Reason(argument, str(value), why, instead)))
