"""SIGTERM and SIGINT as a wish to stop: the step under way ends, a checkpoint is written.

It must not know what runs.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_wishes() -> Iterator[Callable[[], bool]]:
    """Yields what says whether a signal came. A second one raises KeyboardInterrupt at once."""
    wished = False

    def wish(_number: int, _frame: FrameType | None) -> None:
        nonlocal wished
        if wished:
            raise KeyboardInterrupt
        wished = True

    before = {number: signal.signal(number, wish) for number in SIGNALS}
    try:
        yield lambda: wished
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
