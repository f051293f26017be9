"""Checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint is an adapter folder (in float32) with the optimizer's state, the generator's and
the run's progress beside it, as safetensors and JSON. It is there whole or not at all. This module
must not know data, losses or the terminal.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lory_trainer.base import load_adapter
from lory_trainer.errors import OutputError
from lory_trainer.export import AdapterFacts, write_files
from lory_trainer.folders import draft_of, publish, remove

FOLDER = "checkpoints"
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"
_NAME = re.compile(r"step-(\d{8})")


Identity = Mapping[str, Any]
"""options, base (digests) and rows (a digest): all that decides a run's steps."""


@dataclass(slots=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    seconds: float = 0.0
    num_parts: int = 1
    """Into how many each batch is split, because a whole one does not fit."""
    losses: list[float] = field(default_factory=list)
    """One a step."""
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None
    num_worse: int = 0
    """Evaluations since the best."""


def checkpoint_path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """Whole ones, oldest first."""
    if not (run / FOLDER).is_dir():
        return []
    return sorted(path for path in (run / FOLDER).iterdir() if _NAME.fullmatch(path.name))


def kept(run: Path) -> str:
    """What a run that ends badly leaves behind, in words."""
    found = checkpoints(run)
    return f"the last good checkpoint is {found[-1]}" if found else "nothing was written"


def begun_with(run: Path) -> Mapping[str, Any]:
    """The options of the run that the newest checkpoint is of; none without a readable one."""
    found = checkpoints(run)
    try:
        state = json.loads((found[-1] / STATE_FILE).read_text(encoding="utf-8")) if found else {}
        options = state["identity"]["options"] if found else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return options if isinstance(options, dict) else {}


def save_checkpoint(
    run: Path,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    facts: AdapterFacts,
    identity: Identity,
) -> Path:
    path = checkpoint_path(run, progress.step)
    with draft_of(path) as draft:
        write_files(model, facts, draft, "float32")
        _save_optimizer(optimizer, draft)
        save_file(_random_states(), draft / RANDOM_FILE)
        state = {"identity": identity, "progress": asdict(progress)}
        (draft / STATE_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        publish(draft, path)
    return path


def load_checkpoint(
    path: Path, model: PeftModel, optimizer: torch.optim.Optimizer, *, identity: Identity
) -> Progress:
    """Raises OutputError if the run is another one: its options, base or rows have changed."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        tensors = load_file(path / OPTIMIZER_FILE)
        generator = load_file(path / RANDOM_FILE)
        changes = _changes(state["identity"], identity)
        progress = Progress(**state["progress"])
        if not changes:
            load_adapter(model, path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise OutputError(
            f"{path} cannot be read: {error}; remove it to go on from an earlier one"
        ) from error
    if changes:
        raise OutputError(
            f"{path.parent.parent} holds a run with other {', '.join(changes)}; give another "
            "--run, or --replace without --resume to begin anew"
        )
    _load_optimizer(optimizer, tensors)
    _set_random_states(generator)
    return progress


def _changes(before: Identity, now: Identity) -> list[str]:
    """Names of what differs: options, parts of the base, the rows."""
    names = _differing(before["options"], now["options"])
    names += [f"base ({name})" for name in _differing(before["base"], now["base"])]
    return names if before["rows"] == now["rows"] else [*names, "rows"]


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def forget_old(run: Path, keep: int, spared: Path | None) -> None:
    """Leaves the newest `keep`, and the one that is spared."""
    for path in checkpoints(run)[:-keep]:
        if path != spared:
            remove(path)


def forget_all(run: Path) -> None:
    for path in checkpoints(run):
        remove(path)


# -- the optimizer's state: a mapping of numbers to mappings of tensors ------------------------


def _save_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    tensors = {
        f"{index}.{name}": value.detach().to("cpu").contiguous().clone()
        for index, name, value in _states(optimizer)
    }
    save_file(tensors, folder / OPTIMIZER_FILE)


def _states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, str, torch.Tensor]]:
    for index, state in torch.optim.Optimizer.state_dict(optimizer)["state"].items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                value = torch.tensor(value)
            yield index, name, value


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        is_count = name == "step" and value.dtype == torch.int64
        state.setdefault(int(index), {})[name] = int(value) if is_count else value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# -- the generators' states ------------------------------------------------------------------


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state().clone()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
