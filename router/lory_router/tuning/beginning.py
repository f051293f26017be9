"""What a run is at before its first step, which may take minutes: told as it begins, and again
while it lasts.

It must not know processes or the database.
"""

from collections.abc import Iterable

from lory_router.tuning.meter import Usage
from lory_router.tuning.news import News

FIRST_S = 10.0
"""Until it is told again; each time twice as long."""
LOADING = "loading the base and tokenizing the rows"
STEPPING = "at the first step"


class Beginning:
    """Of one run."""

    def __init__(self, num_rows: int) -> None:
        self.text = f"The run begins by {LOADING}, {num_rows} in the training file"
        self._phase = LOADING
        self._next_s = FIRST_S

    def hear(self, news: Iterable[News], usage: Usage) -> tuple[str, ...]:
        """What there is to tell of what the run has said."""
        found: list[str] = []
        for one in news:
            if one.type == "started" and self._phase == LOADING:
                self._phase = STEPPING
                found.append(f"Loaded and tokenized, after {_told(usage)}: {_ahead(one)}")
            elif one.type == "step":
                self._phase = ""
        return tuple(found)

    def look(self, usage: Usage) -> tuple[str, ...]:
        """What there is to tell as time passes."""
        if not self._phase or usage.ran + usage.held < self._next_s:
            return ()
        self._next_s *= 2
        return (f"Still {self._phase}: {_told(usage)} so far",)


def _told(usage: Usage) -> str:
    held = f", of which {usage.held:.0f} s held back for requests" if usage.held >= 0.5 else ""
    return f"{usage.ran + usage.held:.0f} s{held}"


def _ahead(started: News) -> str:
    rows = f"{started.num_rows} rows, " if started.num_rows else ""
    return f"{rows}step {started.step} of {started.num_steps} done"
