"""A job as a caller asks for it, checked field by field: what can be known before it runs.

It must not know where jobs are kept or how one runs.
"""

import json
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from lory_router.errors import Invalid, shown
from lory_router.keys import Caller
from lory_router.tuning.records import JobRecord, new_id
from lory_router.tuning.shapes import CreateJob, Hyperparameters, Method, MethodPart

MAX_SUFFIX = 64
MAX_SLUG = 40
MAX_METADATA = 16
MAX_EPOCHS = 50
MAX_BATCH = 256
BOUNDS: Mapping[str, tuple[float, float]] = {
    "n_epochs": (1, MAX_EPOCHS),
    "batch_size": (1, MAX_BATCH),
    "learning_rate_multiplier": (0.01, 100),
    "beta": (0.001, 2),
}
WHOLE = ("n_epochs", "batch_size")
DEFAULT_BETA = 0.1
DEFAULT_EPOCHS = 3
MAX_SEED = 2**31 - 1


def read_wish(wish: CreateJob, caller: Caller, model_names: tuple[str, ...]) -> JobRecord:
    """The job that `wish` asks for; raises Invalid naming the field.

    Admins' adapters are for all; a tenant's are its own, and their names begin with its own.
    """
    if wish.model not in model_names:
        raise Invalid(
            f"`model`: {shown(wish.model)} is not what is trained on here; it is"
            f" {shown(model_names[0])}, the base that is served",
            param="model",
        )
    _check_rest(wish)
    method = _method(wish)
    job_id = new_id("ftjob")
    owner = "" if caller.is_admin else caller.tenant
    return JobRecord(
        id=job_id,
        tenant=caller.tenant,
        owner=owner,
        created_at=int(time.time()),
        status="validating_files",
        model=wish.model,
        training_file=wish.training_file,
        validation_file=wish.validation_file or "",
        seed=secrets.randbelow(MAX_SEED) if wish.seed is None else wish.seed,
        method=json.dumps(method),
        suffix=wish.suffix or "",
        metadata=json.dumps(wish.metadata or {}),
        adapter_id=_adapter_id(wish.suffix or wish.model, job_id, owner),
    )


def _adapter_id(text: str, job_id: str, owner: str) -> str:
    """A name that no other adapter has: ft-support-desk-6f1c9a0b2d3e, or acme/ft-..."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:MAX_SLUG].strip("-")
    number = job_id.partition("-")[2][:12]
    name = f"ft-{slug}-{number}" if slug else f"ft-{number}"
    return f"{owner}/{name}" if owner else name


def _check_rest(wish: CreateJob) -> None:
    if wish.suffix is not None and not 1 <= len(wish.suffix) <= MAX_SUFFIX:
        raise Invalid(f"`suffix`: give 1 to {MAX_SUFFIX} characters", param="suffix")
    if wish.seed is not None and not 0 <= wish.seed <= MAX_SEED:
        raise Invalid(f"`seed`: give 0 to {MAX_SEED}", param="seed")
    if wish.integrations:
        raise Invalid(
            "`integrations`: jobs report to nobody else; read their events", param="integrations"
        )
    metadata = wish.metadata or {}
    sizes = all(len(key) <= 64 and len(value) <= 512 for key, value in metadata.items())
    if len(metadata) > MAX_METADATA or not sizes:
        raise Invalid(
            f"`metadata`: at most {MAX_METADATA} pairs, keys up to 64 and values up to 512"
            " characters",
            param="metadata",
        )


def _method(wish: CreateJob) -> dict[str, Any]:
    """The method in full, as it is shown."""
    if wish.method is None:
        return _filled("supervised", wish.hyperparameters, "hyperparameters")
    if wish.hyperparameters is not None:
        raise Invalid("`hyperparameters`: give them within `method`, once", param="hyperparameters")
    kind, part = _part(wish.method)
    place = f"method.{kind}.hyperparameters"
    return _filled(kind, part.hyperparameters if part else None, place)


def not_reinforced() -> Invalid:
    return Invalid(
        "`method.type`: 'reinforcement' is not trained here, for no grader is asked; supervised and"
        " dpo are",
        param="method.type",
    )


def told_by_bounds(error: Invalid) -> Invalid:
    """A wrong type as what may be given, where it is a hyperparameter's."""
    param = error.param or ""
    is_one = ".hyperparameters." in f".{param}" and param.rpartition(".")[2] in BOUNDS
    return _out_of_bounds(param) if is_one else error


def _out_of_bounds(param: str) -> Invalid:
    name = param.rpartition(".")[2]
    low, high = BOUNDS[name]
    kind = "a whole number" if name in WHOLE else "a number"
    return Invalid(f"`{param}`: give {kind} from {low} to {high}, or auto", param=param)


def _part(method: Method) -> tuple[str, MethodPart | None]:
    parts = {"supervised": method.supervised, "dpo": method.dpo}
    if method.type not in parts:
        raise Invalid(
            f"`method.type`: {shown(method.type)} is not trained here; supervised and dpo are",
            param="method.type",
        )
    for kind, part in parts.items():
        if kind != method.type and part is not None:
            raise Invalid(
                f"`method.{kind}`: does not go with the type {method.type}", param=f"method.{kind}"
            )
    return method.type, parts[method.type]


def _filled(kind: str, given: Hyperparameters | None, place: str) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(given or Hyperparameters())
    if kind == "dpo":
        values.setdefault("beta", "auto")
    elif "beta" in values:
        raise Invalid(f"`{place}.beta`: is of dpo alone", param=f"{place}.beta")
    for name, value in values.items():
        low, high = BOUNDS[name]
        if value != "auto" and not low <= value <= high:
            raise _out_of_bounds(f"{place}.{name}")
    return {"type": kind, kind: {"hyperparameters": values}}
