"""The options that commands share which talk to a running server: where it is, and the key to send.

It must not know what is asked of it.
"""

from typing import Any

import typer

from lory_router.config import ENVIRONMENT_PREFIX
from lory_router.values import first_key, with_scheme


def server_url_option(*other_names: str) -> Any:
    """The `--url` of commands that talk to a running server."""
    return typer.Option(
        "http://127.0.0.1:8080",
        "--url",
        *other_names,
        help="Where the server listens.",
        parser=with_scheme,
        metavar="URL",
    )


def caller_key_option() -> Any:
    """The `--api-key` of commands that talk to a running server."""
    return typer.Option(
        "",
        "--api-key",
        help="Bearer key to send, if the server asks for one; of several with commas, the first.",
        parser=first_key,
        metavar="KEY",
        envvar=f"{ENVIRONMENT_PREFIX}API_KEY",
        show_default=False,
    )
