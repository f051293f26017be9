"""What is known of a file, a job and what happened in it: plain rows of the database.

It must not know SQL, HTTP or processes. Times are whole seconds since 1970.
"""

import json
import secrets
import time
from dataclasses import dataclass, replace
from typing import Literal

JobStatus = Literal[
    "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"
]
OPEN: tuple[JobStatus, ...] = ("validating_files", "queued", "running", "paused")
"""Not over yet."""

Purpose = Literal["fine-tune", "fine-tune-results"]


@dataclass(frozen=True, slots=True)
class FileRecord:
    id: str
    tenant: str
    filename: str
    purpose: Purpose
    num_bytes: int
    created_at: int


@dataclass(frozen=True, slots=True)
class JobRecord:
    id: str
    tenant: str
    created_at: int
    status: JobStatus
    model: str
    training_file: str
    validation_file: str
    """Empty: none."""
    seed: int
    method: str
    """JSON of the method as it was asked for, hyperparameters filled in."""
    suffix: str
    metadata: str
    """JSON."""
    adapter_id: str
    """What the adapter is called, once there is one."""
    owner: str = ""
    """The tenant that the adapter is for alone; empty: it is for all."""
    finished_at: int = 0
    trained_tokens: int = 0
    trained_seconds: float = 0.0
    """That it ran."""
    estimated_finish: int = 0
    error_code: str = ""
    error_message: str = ""
    error_param: str = ""
    result_file: str = ""
    bytes_read: int = 0
    """Of the run's events."""
    held_seconds: float = 0.0
    """That it was stopped, for requests ran."""
    charged_seconds: float = 0.0
    cost: float = 0.0
    """Of these, at the price of their time."""

    @property
    def is_open(self) -> bool:
        return self.status in OPEN

    @property
    def kind(self) -> str:
        """Of its method."""
        return json.loads(self.method)["type"]

    @property
    def labels(self) -> dict[str, str]:
        """The metadata, as pairs."""
        return json.loads(self.metadata)


@dataclass(frozen=True, slots=True)
class EventRecord:
    id: str
    job_id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: str
    """JSON."""


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    id: str
    job_id: str
    created_at: int
    step: int
    adapter_id: str
    metrics: str
    """JSON."""


def failed(job: JobRecord, code: str, message: str, param: str = "") -> JobRecord:
    """The job, over; one that is over already stays as it is."""
    if not job.is_open:
        return job
    over = replace(job, status="failed", finished_at=int(time.time()))
    return replace(over, error_code=code, error_message=message, error_param=param)


def new_id(kind: str) -> str:
    """Such as ftjob-6f1c9a0b2d3e4f5a6b7c8d9e."""
    return f"{kind}-{secrets.token_hex(12)}"
