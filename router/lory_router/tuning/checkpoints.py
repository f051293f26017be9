"""Checkpoints of a run that can be asked at once: copies beside the other adapters.

The last few are kept, as OpenAI does. It must not know jobs beyond their names.
"""

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from lory_router.tuning.news import News, figures
from lory_router.tuning.records import CheckpointRecord, JobRecord, new_id

MAX_KEPT = 3
FILES = ("adapter_model.safetensors", "adapter_manifest.json", "adapter_config.json")
"""The configuration last: a folder without it is no adapter."""
NEEDED = ("adapter_model.safetensors", "adapter_config.json")


def checkpoint_name(job: JobRecord, one: News) -> str:
    return f"{job.adapter_id}-step-{one.step}"


def publish(job: JobRecord, one: News, run: Path, adapters: Path) -> CheckpointRecord | None:
    """None: the run has made a newer one since, and this one is gone."""
    source = (run / one.path).resolve()
    adapter_id = checkpoint_name(job, one)
    if not source.is_relative_to(run.resolve()):
        raise ValueError(f"{one.path}: leads out of the run")
    target = adapters / adapter_id
    draft = target.with_name(f".{target.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        for name in FILES:
            if name in NEEDED or (source / name).exists():
                shutil.copyfile(source / name, draft / name)
        withdraw(adapters, adapter_id)
        os.rename(draft, target)
    except FileNotFoundError:
        return None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    metrics = json.dumps(figures(one))
    return CheckpointRecord(
        new_id("ftckpt"), job.id, int(time.time()), one.step, adapter_id, metrics
    )


def forget_states(run: Path) -> None:
    """The checkpoints of a run as it made them, from which it could go on; what it told stays."""
    if run.is_dir():
        for path in run.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def withdraw(adapters: Path, adapter_id: str) -> None:
    """Take an adapter away, at once under its name; those who hold it keep it."""
    folder = adapters / adapter_id
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear(adapters: Path, adapter_id: str) -> None:
    """The same, and what a killed run had written of it."""
    withdraw(adapters, adapter_id)
    folder = adapters / adapter_id
    if folder.parent.is_dir():
        for draft in folder.parent.glob(f".{folder.name}.*"):
            shutil.rmtree(draft, ignore_errors=True)
