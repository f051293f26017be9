"""Where an adapter is written: whether it may be.

It must not know what is written, and imports nothing that takes time: a run asks it first.
"""

from pathlib import Path

from lory_trainer.errors import OutputError

CONFIG_FILE = "adapter_config.json"


def check_output(output: Path, *, replace: bool) -> None:
    """Raises OutputError before any work if the folder could not be written at the end."""
    if not output.exists():
        return
    if not replace:
        raise OutputError(f"{output} exists; choose another --output or give --replace")
    if not (output / CONFIG_FILE).is_file():
        raise OutputError(f"{output} is not an adapter folder; --replace will not remove it")
