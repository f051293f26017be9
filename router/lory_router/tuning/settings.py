"""What the fine-tuning API may do and how much of it, as one frozen value.

It must not know where a setting comes from.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TRAIN_COMMAND = (sys.executable, "-m", "lory_router", "train")

TrainingDevice = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class TuningSettings:
    folder: Path
    """Files, runs and the database; this server's alone."""
    adapters: Path
    """Where finished adapters go, to be served."""
    base: str
    """The base, as `--model` names it."""
    model_names: tuple[str, ...]
    """What callers may call it."""
    quantize: Literal["none", "nf4"] = "none"
    """As the base is served, so it is trained on."""
    double_quant: bool = False
    device: TrainingDevice = "cpu"
    gpu: str = ""
    """Its number among those that the server sees; empty: the first, the engine's."""
    threads: int = 1
    share: float = 0.1
    """Part of the time that a job may run while requests run."""
    max_memory_bytes: int = 0
    """A job that takes more is ended; 0: a part of what is free as it begins."""
    max_file_bytes: int = 512 * 2**20
    max_files_bytes: int = 20 * 2**30
    """Of all files together."""
    max_jobs: int = 100
    """Waiting, running or paused; one more is refused."""
    max_jobs_per_tenant: int = 0
    """0: no fewer than of all together; so is the next."""
    max_files_bytes_per_tenant: int = 0
    keep_jobs: int = 1000
    """That are over, of each tenant; older ones are forgotten."""
    keep_days: int = 0
    """And none that ended longer ago; 0: however long."""
    stop_grace_s: float = 60.0
    """How long a job may take to write its checkpoint before it is killed."""
    command: tuple[str, ...] = TRAIN_COMMAND
    """What a run is started with."""

    @property
    def database(self) -> Path:
        return self.folder / "jobs.sqlite"

    @property
    def files(self) -> Path:
        return self.folder / "files"

    def file(self, file_id: str) -> Path:
        """Where a file is kept. By its ending the trainer knows what it is."""
        return self.files / f"{file_id}.jsonl"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"
