"""The texts of flags and variables as values; a ValueError quotes the text and shows the fix.

It must not know which flags there are.
"""

import re

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|[KMGT]i?B)?", re.IGNORECASE)
POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
SWITCH_WORDS = frozenset(["0", "1", "f", "false", "n", "no", "off", "on", "t", "true", "y", "yes"])
"""What typer reads as a truth value."""


def parse_size(text: str | int) -> int:
    """Bytes of "512MiB" (1024s), "4GB" (1000s) or a bare number."""
    if isinstance(text, int):
        return text
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 512MiB, 4GB or 1073741824")
    number, unit = match.group(1), (match.group(2) or "B").lower()
    base = 1024 if "i" in unit else 1000
    return int(float(number) * base ** POWERS.get(unit[0], 0))


def parse_whole(text: str | int) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number; write it like 8080") from None


def parse_number(text: str | float) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number; write it like 2.5") from None


def comma_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def first_key(text: str) -> str:
    """One key of what may be a server's whole list, whose variable has the same name."""
    return next(iter(comma_list(text)), "")


def with_scheme(url: str) -> str:
    return url if "://" in url else f"http://{url}"


def is_switch(text: str) -> bool:
    """Whether it says true or false; nothing is false."""
    return not text or text.strip().lower() in SWITCH_WORDS
