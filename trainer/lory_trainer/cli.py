"""`lory train CONFIG.yaml`: the command, its progress bar and its messages.

Importing this module must stay cheap: torch and peft are imported when a run begins.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lory_trainer.config import TrainOptions, load_options
from lory_trainer.destination import check_output
from lory_trainer.errors import TrainerError

EXIT_INTERRUPTED = 130

if TYPE_CHECKING:
    from lory_trainer.train import StepReport, TrainResult

OPTIONAL_KERNELS_LOGGER = "bitsandbytes.backends.cpu.ops"
"""Warns, as peft imports it, of kernels that it does without and that training never uses."""


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", exists=True)],
    output: Annotated[
        Path | None,
        typer.Option(help="Adapter folder to write; adapters/<name of CONFIG> if not given."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the adapter that is there.")
    ] = False,
) -> None:
    """Train a LoRA adapter and write it as a plain PEFT folder."""
    console = Console(stderr=True)
    target = output if output is not None else Path("adapters") / config.stem
    before = _identity(target)
    try:
        options = load_options(config)
        check_output(target, replace=replace)
        result = run(options, folder=config.parent, output=target, replace=replace, console=console)
    except TrainerError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        is_written = _identity(target) != before
        what = f"{target} is written" if is_written else "nothing written"
        console.print(f"interrupted; {what}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    console.print(summary(result), highlight=False, markup=False, soft_wrap=True)


def _identity(folder: Path) -> int | None:
    """Another number once the folder is another one."""
    return folder.stat().st_ino if folder.exists() else None


def main() -> None:
    typer.run(train)


def run(
    options: TrainOptions, *, folder: Path, output: Path, replace: bool, console: Console
) -> "TrainResult":
    """Trains with a progress bar on the console."""
    logging.getLogger(OPTIONAL_KERNELS_LOGGER).setLevel(logging.ERROR)
    train_adapter = _load_trainer()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(output.name, total=None, note="loading the base")

        def show(report: "StepReport") -> None:
            note = f"loss {report.loss:.4f}  {report.tokens_per_s:,.0f} tokens/s"
            progress.update(bar, completed=report.step, total=report.num_steps, note=note)

        return train_adapter(options, folder=folder, output=output, replace=replace, watch=show)


def _load_trainer():
    try:
        from transformers.utils.logging import disable_progress_bar

        from lory_trainer.train import train_adapter
    except ModuleNotFoundError as error:
        if error.name not in ("peft", "torch"):
            raise
        raise TrainerError(
            f"training needs {error.name}; install it with: pip install 'lory-server[train]'"
        ) from error
    disable_progress_bar()  # its bars would tear ours
    return train_adapter


def summary(result: "TrainResult") -> str:
    """Two lines: what was trained, and how to serve it."""
    share = 100 * result.num_trainable / result.num_parameters
    dropped = f", {result.num_dropped_rows} too long and dropped" if result.num_dropped_rows else ""
    return (
        f"{result.output}: {result.num_steps} steps on {result.num_rows} rows{dropped}, "
        f"loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}, "
        f"{result.num_trainable:,} trainable parameters ({share:.2f} %), {result.elapsed_s:.0f} s\n"
        f"serve it: put the folder under the server's adapters folder; "
        f"its adapter_id is {result.output.name}"
    )


if __name__ == "__main__":
    main()
