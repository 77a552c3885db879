"""What a proof says: the figure measured, the figure allowed, and what a deliberately wrong answer measured."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Check(BaseModel):
    """One check: `measured` must not exceed `tolerance`, and its `control`, a wrong answer, must exceed it far.

    `control` is None where the check counts things and a wrong answer would have raised.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    what: str
    unit: str
    measured: float
    tolerance: float
    control: float | None = None
    required: bool = True

    @property
    def control_speaks(self) -> bool:
        """Whether the wrong answer was caught, by at least ten times the tolerance and what the check allows."""
        return self.control is None or self.control > 10 * self.tolerance

    @property
    def passed(self) -> bool:
        return self.measured <= self.tolerance and self.control_speaks


class Verification(BaseModel):
    """All checks of one conversion or comparison."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks if check.required)

    @property
    def failures(self) -> tuple[str, ...]:
        return tuple(
            f"{c.name}: measured {c.measured:.3g} {c.unit}, allowed {c.tolerance:.3g}"
            + ("" if c.control_speaks else f"; the control measured only {c.control:.3g}")
            for c in self.checks
            if c.required and not c.passed
        )

    def __add__(self, other: Verification) -> Verification:
        return Verification(checks=self.checks + other.checks, notes=self.notes + other.notes)
