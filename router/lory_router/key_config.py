"""The settings of who may ask, as flags; see docs/keys.md.

It must not know how a key is checked.
"""

from dataclasses import dataclass

from lory_router.flags import flag
from lory_router.values import comma_list


@dataclass(frozen=True)
class KeyConfig:
    """Who may ask."""

    api_key: str = flag(
        "",
        "Bearer keys callers must send one of, comma-separated; empty: open to all who reach it.",
        secret=True,
    )
    api_keys: str = flag(
        "", "YAML file of further keys, each with its tenant and role; read again at SIGHUP."
    )

    @property
    def is_open(self) -> bool:
        """Whether anybody may come in."""
        return not (self.api_key or self.api_keys)

    def check(self) -> None:
        """Raises ValueError naming the flag."""
        if self.api_key and not comma_list(self.api_key):
            raise ValueError("--api-key: holds no key; leave it out to serve everyone")
