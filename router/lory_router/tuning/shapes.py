"""OpenAI's shapes of files and fine-tuning jobs, as types: what comes in and what goes out.

Source: OpenAI's openapi.yaml, files and fine-tuning. It must not know where the facts come from.
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from lory_router.tuning.records import CheckpointRecord, EventRecord, FileRecord, JobRecord

Auto = Literal["auto"]


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True):
    n_epochs: int | Auto = "auto"
    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"
    beta: float | Auto | msgspec.UnsetType = msgspec.UNSET
    """Of DPO alone."""


class MethodPart(msgspec.Struct, frozen=True, kw_only=True):
    hyperparameters: Hyperparameters | None = None


class Method(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    supervised: MethodPart | None = None
    dpo: MethodPart | None = None


class CreateJob(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """As before there was `method`; supervised."""
    integrations: list[Any] | None = None
    metadata: dict[str, str] | None = None


class FileReply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None
    expires_at: None = None


class DeletedReply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class ErrorReply(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    message: str
    param: str | None


class UsageReply(msgspec.Struct, frozen=True, kw_only=True):
    """Ours alone; clients keep what they do not know."""

    trained_seconds: float
    held_seconds: float
    charged_seconds: float
    cost: float | None


class JobReply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    model: str
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    fine_tuned_model: str | None
    organization_id: str
    status: str
    training_file: str
    validation_file: str | None
    result_files: tuple[str, ...]
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    trained_tokens: int | None
    error: ErrorReply | None
    seed: int
    integrations: tuple[()] = ()
    metadata: dict[str, str]
    user_provided_suffix: str | None
    usage: UsageReply


class EventReply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    type: str
    message: str
    data: dict[str, Any]


class CheckpointReply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]


class ListReply(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: Sequence[Any]
    first_id: str | None
    last_id: str | None
    has_more: bool


def file_reply(record: FileRecord) -> FileReply:
    return FileReply(
        id=record.id,
        bytes=record.num_bytes,
        created_at=record.created_at,
        filename=record.filename,
        purpose=record.purpose,
    )


def job_reply(job: JobRecord) -> JobReply:
    method = msgspec.json.decode(job.method)
    error = None
    if job.error_code:
        error = ErrorReply(
            code=job.error_code, message=job.error_message, param=job.error_param or None
        )
    return JobReply(
        id=job.id,
        model=job.model,
        created_at=job.created_at,
        finished_at=job.finished_at or None,
        estimated_finish=(job.estimated_finish or None) if job.status == "running" else None,
        fine_tuned_model=job.adapter_id if job.status == "succeeded" else None,
        organization_id=job.tenant,
        status=job.status,
        training_file=job.training_file,
        validation_file=job.validation_file or None,
        result_files=(job.result_file,) if job.result_file else (),
        hyperparameters=method[method["type"]]["hyperparameters"],
        method=method,
        trained_tokens=None if job.is_open else job.trained_tokens or None,
        error=error,
        seed=job.seed,
        metadata=msgspec.json.decode(job.metadata),
        user_provided_suffix=job.suffix or None,
        usage=UsageReply(
            trained_seconds=round(job.trained_seconds, 3),
            held_seconds=round(job.held_seconds, 3),
            charged_seconds=round(job.charged_seconds, 3),
            cost=job.cost or None,
        ),
    )


def event_reply(event: EventRecord) -> EventReply:
    return EventReply(
        id=event.id,
        created_at=event.created_at,
        level=event.level,
        type=event.type,
        message=event.message,
        data=msgspec.json.decode(event.data),
    )


def checkpoint_reply(checkpoint: CheckpointRecord) -> CheckpointReply:
    return CheckpointReply(
        id=checkpoint.id,
        created_at=checkpoint.created_at,
        fine_tuned_model_checkpoint=checkpoint.adapter_id,
        fine_tuning_job_id=checkpoint.job_id,
        step_number=checkpoint.step,
        metrics=msgspec.json.decode(checkpoint.metrics),
    )
