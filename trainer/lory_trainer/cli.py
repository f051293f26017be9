"""`lory train CONFIG.yaml`: the command and its messages.

Importing this module must stay cheap: torch and peft are imported when a run begins.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lory_trainer.config import TrainOptions, read_config
from lory_trainer.destination import check_output
from lory_trainer.errors import ConfigError, StoppedError, TrainerError

EXIT_FAILED = 1
EXIT_STOPPED = 130
"""After a signal; see events.py for the whole contract."""
INIT_FILE = Path("train.yaml")

if TYPE_CHECKING:
    from lory_trainer.events import Listener
    from lory_trainer.train import Places, TrainResult

LOGGERS_OF_NO_USE = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")
"""Warn, as peft imports them, of kernels that training never uses; and at each of its products,
that 8 bits are made by way of 16."""


ConfigFile = Annotated[
    Path | None, typer.Argument(help="YAML file of the run; Ludwig's and Axolotl's names too.")
]
Dataset = Annotated[
    Path | None, typer.Option(help="Rows to train on, in place of the file's own `data`.")
]
Output = Annotated[
    Path | None,
    typer.Option(help="Adapter folder to write; adapters/<name of CONFIG> if not given."),
]
Run = Annotated[
    Path | None,
    typer.Option(help="Folder of the run's events, curve and checkpoints; runs/<adapter>."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be trained, and what it takes.")
]
Init = Annotated[bool, typer.Option("--init", help="Ask a few questions and write CONFIG.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")]
Replace = Annotated[
    bool, typer.Option("--replace", help="Replace the adapter and the run that are there.")
]
Publish = Annotated[
    str | None,
    typer.Option(
        metavar="URL|FOLDER",
        help="Then upload it to a running server, or copy it into the folder one serves.",
    ),
]
ApiKey = Annotated[
    str,
    typer.Option(help="Bearer key for --publish.", envvar="LORY_API_KEY", show_default=False),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; 1 is repeatable to the last bit.")
]
Price = Annotated[
    float, typer.Option(min=0.0, help="Of this machine, for --dry-run's cost; 0: no cost.")
]


def train(
    config: ConfigFile = None,
    dataset: Dataset = None,
    output: Output = None,
    run: Run = None,
    dry_run: DryRun = False,
    init: Init = False,
    resume: Resume = False,
    replace: Replace = False,
    publish: Publish = None,
    api_key: ApiKey = "",
    threads: Threads = None,
    price_per_hour: Price = 0.0,
) -> None:
    """Train a LoRA adapter and write it as a plain PEFT folder.

    SIGTERM or Ctrl-C ends the step under way, writes a checkpoint and exits with 130; the same
    command with --resume goes on as if nothing had happened.
    """
    console = Console(stderr=True)
    try:
        if init:
            _init(config or INIT_FILE, console)
            return
        options, notes = _options(config, dataset)
        if dry_run:
            _load_libraries(threads)
            _forecast(options, notes, _config_folder(config), price_per_hour)
            return
        target = _target(options, config, output)
        check_output(target, replace=replace)
        _load_libraries(threads)
        places = _places(options, config, target, run, replace=replace, resume=resume)
        deliver = _delivery(publish, _name(options, target), api_key, replace=replace)
        result = run_training(options, places, console=console, notes=notes, deliver=deliver)
    except StoppedError as error:
        _print(console, f"{error}; go on with --resume", "yellow")
        raise typer.Exit(EXIT_STOPPED) from None
    except KeyboardInterrupt:
        _print(console, "interrupted", "yellow")
        raise typer.Exit(EXIT_STOPPED) from None
    except (TrainerError, OSError) as error:
        _print(console, f"error: {error}", "red")
        raise typer.Exit(EXIT_FAILED) from error
    _print(console, summary(result))


def main() -> None:
    typer.run(train)


def _print(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _init(path: Path, console: Console) -> None:
    from lory_trainer.init import ask

    _print(console, f"{ask(path)} is written; look at it with: lory train {path} --dry-run")


def _options(config: Path | None, dataset: Path | None) -> tuple[TrainOptions, tuple[str, ...]]:
    if config is None:
        raise ConfigError("CONFIG is missing: give a YAML file, or --init to make one")
    changes = {} if dataset is None else {"data": str(dataset.resolve())}
    return read_config(config, **changes)


def _config_folder(config: Path | None) -> Path:
    return config.parent if config is not None else Path()


def _target(options: TrainOptions, config: Path | None, output: Path | None) -> Path:
    stem = config.stem if config is not None else "adapter"
    given = output or (Path(options.output) if options.output else None)
    return given or Path("adapters") / (options.name or stem)


def _places(
    options: TrainOptions,
    config: Path | None,
    target: Path,
    run: Path | None,
    *,
    replace: bool,
    resume: bool,
) -> "Places":
    from lory_trainer.train import Places

    folder = run or Path("runs") / _name(options, target)
    return Places(_config_folder(config), target, folder, replace, resume)


def _name(options: TrainOptions, target: Path) -> str:
    from lory_trainer.train import name_of

    return name_of(options, target)


def _delivery(
    target: str | None, name: str, api_key: str, *, replace: bool
) -> Callable[[Path, str], str | None]:
    if target is None:
        return lambda _output, _name: None
    from lory_trainer.publish import check_target, deliver

    check_target(target, name, api_key)
    return lambda output, name: deliver(
        output, name, target=target, api_key=api_key, replace=replace
    )


def _forecast(
    options: TrainOptions, notes: Sequence[str], folder: Path, price_per_hour: float
) -> None:
    from lory_trainer.dry_run import forecast, show

    show(forecast(options, folder), Console(), price_per_hour, notes)


def run_training(
    options: TrainOptions,
    places: "Places",
    *,
    console: Console,
    notes: Sequence[str] = (),
    **more: Any,
) -> "TrainResult":
    """Trains with a progress bar on the console, and stops after a checkpoint when asked to."""
    _load_libraries(None)
    from lory_trainer.progress_bar import ProgressBar
    from lory_trainer.signals import stop_wishes
    from lory_trainer.train import train_adapter

    listeners = _trackers(options, places)
    with ProgressBar(console, places.output.name) as bar, stop_wishes() as should_stop:
        return train_adapter(
            options,
            places,
            listeners=(bar, *listeners),
            notes=notes,
            should_stop=should_stop,
            **more,
        )


def _trackers(options: TrainOptions, places: "Places") -> Sequence["Listener"]:
    """They import transformers' Trainer, and all that it imports: not without need."""
    if not options.tracking.to:
        return ()
    from lory_trainer.trackers import trackers
    from lory_trainer.train import name_of

    return trackers(options.tracking, places.run, name_of(options, places.output))


def _load_libraries(threads: int | None) -> None:
    for name in LOGGERS_OF_NO_USE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import matplotlib  # noqa: F401
        import peft  # noqa: F401
        import torch
        from transformers.utils.logging import disable_progress_bar
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "peft", "torch"):
            raise
        raise TrainerError(
            f"training needs {error.name}; install it with: pip install '.[train]' in the checkout"
        ) from error
    disable_progress_bar()  # its bars would tear ours
    if threads is not None:
        torch.set_num_threads(threads)


def summary(result: "TrainResult") -> str:
    """Two lines: what was trained, and how to serve it."""
    share = 100 * result.num_trainable / result.num_parameters
    dropped = f", {result.num_dropped_rows} too long and dropped" if result.num_dropped_rows else ""
    held_out = "" if result.eval_loss is None else f", {result.eval_loss:.3f} on held-out rows"
    return (
        f"{result.output}: {result.num_steps} steps on {result.num_rows} rows{dropped}, "
        f"loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}{held_out}, "
        f"{result.num_trainable:,} trainable parameters ({share:.2f} %), {result.elapsed_s:.0f} s\n"
        + _whereabouts(result)
    )


def _whereabouts(result: "TrainResult") -> str:
    if result.published is not None:
        return f"published: {result.published}"
    return (
        "serve it: put the folder under the server's adapters folder; "
        f"its adapter_id is {result.output.name}"
    )


if __name__ == "__main__":
    main()
