"""Trains every demo adapter with the project's own trainer: adapters_src/*.yaml to adapters/.

This script must not know what the tasks are; the YAML files and the rows say it.
"""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from rich.console import Console

from lory_trainer.cli import OPTIONAL_KERNELS_LOGGER, run_training, summary
from lory_trainer.config import load_options

DEMO_DIR = Path(__file__).parent


def main(
    only: Annotated[
        list[str] | None, typer.Argument(help="Adapters to train; all if none.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the adapters.")] = DEMO_DIR / "adapters",
    num_threads: Annotated[int, typer.Option(help="CPU threads; 1 is best on a busy machine.")] = 2,
) -> None:
    """Train the demo adapters on demo/base."""
    logging.getLogger(OPTIONAL_KERNELS_LOGGER).setLevel(logging.ERROR)
    from lory_trainer.train import Places  # imports peft, which warns

    torch.set_num_threads(num_threads)
    console = Console()
    for config in sorted((DEMO_DIR / "adapters_src").glob("*.yaml")):
        if only and config.stem not in only:
            continue
        with TemporaryDirectory() as run:
            places = Places(config.parent, output / config.stem, Path(run), replace=True)
            result = run_training(load_options(config), places, console=console)
        console.print(summary(result), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
