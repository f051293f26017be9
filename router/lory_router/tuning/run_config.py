"""A job as `lory train` wants it: the configuration file and the command line.

It must not know how training is done, nor anything of a process.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lory_router.tuning.checkpoints import MAX_KEPT
from lory_router.tuning.news import EVENTS_NAME
from lory_router.tuning.records import JobRecord
from lory_router.tuning.settings import TuningSettings
from lory_router.tuning.wishes import DEFAULT_BETA, DEFAULT_EPOCHS

CONFIG_NAME = "config.yaml"
AUTO_BATCH = 16
"""Rows of a step where the batch size is the trainer's to find."""
MAX_CHECKPOINT_STEPS = 500
SFT_WEIGHT = 1.0
"""Without the better answer's own loss, what the model says may not change at all."""
METHODS = {"supervised": "sft", "dpo": "dpo"}


@dataclass(frozen=True, slots=True)
class RunConfig:
    job: JobRecord
    training: Path
    validation: Path | None
    run: Path
    """The run's own folder."""
    num_rows: int
    """To train on."""

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return json.loads(self.job.method)[self.job.kind]["hyperparameters"]


def write_config(config: RunConfig, settings: TuningSettings) -> None:
    """JSON is YAML too, and needs no quoting of a caller's text."""
    text = json.dumps(configuration(config, settings), indent=2)
    (config.run / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def configuration(config: RunConfig, settings: TuningSettings) -> dict[str, Any]:
    """In the keys of docs/training.md; rows of messages go through the base's chat template."""
    given = config.hyperparameters
    epochs, multiplier = given["n_epochs"], given["learning_rate_multiplier"]
    values: dict[str, Any] = {
        "base": settings.base,
        "data": str(config.training),
        "method": METHODS[config.job.kind],
        "epochs": DEFAULT_EPOCHS if epochs == "auto" else epochs,
        "batch_size": given["batch_size"],
        "learning_rate": "auto",
        "learning_rate_multiplier": 1.0 if multiplier == "auto" else multiplier,
        "checkpoint_steps": _checkpoint_steps(config.num_rows, given["batch_size"]),
        "keep_checkpoints": MAX_KEPT,
        "seed": config.job.seed,
        "device": settings.device,
    }
    if config.validation is not None:
        values["eval_data"] = str(config.validation)
    if settings.quantize == "nf4":
        values["quantization"] = {"bits": 4, "double": settings.double_quant}
    if config.job.kind == "dpo":
        beta = given["beta"]
        beta = DEFAULT_BETA if beta == "auto" else beta
        values["dpo"] = {"beta": beta, "sft_weight": SFT_WEIGHT}
    return values


def _checkpoint_steps(num_rows: int, batch_size: int | str) -> int:
    """A pass, unless it is so long that a stopped run would lose too much."""
    rows_per_step = AUTO_BATCH if batch_size == "auto" else int(batch_size)
    return min(-(-num_rows // rows_per_step), MAX_CHECKPOINT_STEPS)


def train_command(config: RunConfig, settings: TuningSettings) -> tuple[str, ...]:
    """Goes on from the newest checkpoint if the run has begun before."""
    run = config.run
    has_begun = (run / EVENTS_NAME).exists()
    return (
        *settings.command,
        str(run / CONFIG_NAME),
        "--output",
        str(settings.adapters / config.job.adapter_id),
        "--run",
        str(run),
        *(("--resume",) if has_begun else ()),
    )
