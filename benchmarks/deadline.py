"""How long a measurement may go on: what has not begun by then is named, not begun.

It must not know what is measured.
"""

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """Since a moment on the monotonic clock, for so many seconds."""

    began_s: float
    budget_s: float

    @classmethod
    def within(cls, budget_s: float) -> "Deadline":
        return cls(time.monotonic(), budget_s)

    @property
    def left_s(self) -> float:
        return self.began_s + self.budget_s - time.monotonic()

    @property
    def is_over(self) -> bool:
        return self.left_s <= 0

    def part(self, share: float) -> "Deadline":
        """The same beginning, and a share of the time."""
        return Deadline(self.began_s, self.budget_s * share)

    def __str__(self) -> str:
        return f"not reached within {self.budget_s:g} s"
