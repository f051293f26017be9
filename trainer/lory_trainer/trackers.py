"""TensorBoard, Weights & Biases and MLflow, through transformers' own callbacks.

They hear a run's events and must not know how they come about.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from lory_trainer.config import TrackingOptions
from lory_trainer.errors import ConfigError
from lory_trainer.events import Event, Listener

NOT_LOGGED = {"type", "time", "step", "num_steps"}


def trackers(options: TrackingOptions, run: Path, name: str) -> Sequence[Listener]:
    """None, if none is asked for; raises ConfigError if its package is not installed."""
    if not options.to:
        return ()
    try:
        callbacks = [kind() for kind in get_reporting_integration_callbacks(list(options.to))]
    except (RuntimeError, ImportError, ValueError) as error:
        raise ConfigError(f"tracking.to: {error}") from error
    arguments = TrainingArguments(
        output_dir=str(run),
        report_to=list(options.to),
        run_name=options.run_name or name,
        project=options.project,
        use_cpu=True,
    )
    return (_Tracker(callbacks, arguments),)


class _Tracker:
    """Turns events into what the callbacks of a transformers Trainer are told."""

    def __init__(self, callbacks: Sequence[Any], arguments: TrainingArguments) -> None:
        self._callbacks = callbacks
        self._arguments = arguments
        self._state = TrainerState(is_local_process_zero=True, is_world_process_zero=True)

    def __call__(self, event: Event) -> None:
        self._state.global_step, self._state.max_steps = event["step"], event["num_steps"]
        match event["type"]:
            case "started":
                self._tell("on_train_begin")
            case "step" | "eval":
                prefix = "eval_" if event["type"] == "eval" else ""
                logs = {
                    prefix + key: value for key, value in event.items() if key not in NOT_LOGGED
                }
                self._tell("on_log", logs=logs)
            case "finished" | "failed":
                self._tell("on_train_end")

    def _tell(self, what: str, **more: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, what)(self._arguments, self._state, TrainerControl(), **more)
