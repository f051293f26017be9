"""What an evaluation is told: by flags, by the `evaluation:` section of a training file, or both.

A flag goes before the key of the same meaning. It must not know servers or rows.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lory_trainer.evaluation.errors import EvaluationError

SECTION = "evaluation"
BASE, PROMPT_ONLY = "base", "prompt_only"
"""Who else can be asked; no adapter is called so."""


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PromptOnly(_Keys):
    """The base with instructions and examples, for what an adapter has to be better than."""

    instruction: str = ""
    """Said before anything else."""
    shots: int = Field(default=0, ge=0, le=100)
    """Examples shown before each row."""
    shots_from: str | None = None
    """File of the rows that examples are taken from; unset: those of `data` that are not asked."""
    style: Literal["text", "chat"] = "text"
    """chat: by the base's chat template, examples as earlier turns."""


class Judge(_Keys):
    """Another model that compares answers."""

    url: str
    """Of an OpenAI-style endpoint, with /v1 or without."""
    model: str

    @field_validator("url")
    @classmethod
    def _without_version(cls, url: str) -> str:
        return url.rstrip("/").removesuffix("/v1")


class EvaluationOptions(_Keys):
    """A whole evaluation; every key is a flag, too."""

    data: str
    """File of held-out rows, or a folder with a test part."""
    adapters: tuple[str, ...] = ()
    """Which are evaluated; the first is the candidate."""
    completion: str | None = None
    """Column of the wanted answer; unset: completion, response, output, answer or chosen."""
    template: str = ""
    """The prompt, for adapters whose server has no template of theirs."""
    metrics: tuple[str, ...] = Field(default=("exact_match",), min_length=1)
    """Names of metrics; the first decides comparisons."""
    compare: tuple[Literal["base", "prompt_only"], ...] = (BASE,)
    """What else is asked beside the adapters."""
    prompt_only: PromptOnly = PromptOnly()
    """How prompt_only is asked."""
    gate: tuple[str, ...] = ()
    """Conditions, such as `exact_match > base`."""
    judge: Judge | None = None
    """Compares the candidate's answers with the others'."""
    rows: int | None = Field(default=None, ge=1)
    """How many rows are asked, from the first; unset: all."""
    seed: int = Field(default=0, ge=0)
    """Of examples, resamples and draws."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest answer; unset: the adapter's own, or what the longest wanted answer could take."""
    generation: Literal["greedy", "served"] = "greedy"
    """served: adapters draw as their defaults say; the base stays greedy."""
    concurrency: int = Field(default=8, ge=1, le=1024)
    """Most requests at once."""
    price_per_hour: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """What the server's machine costs; 0: no costs are told."""

    @field_validator("adapters", "metrics", "compare", "gate", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


def read_options(config: Path | None, flags: Mapping[str, Any]) -> EvaluationOptions:
    """Flags that are None were not given. Raises EvaluationError naming each wrong key."""
    values = _section(config) if config else {}
    given = {name: value for name, value in flags.items() if value is not None}
    nested = {"prompt_only", "judge"} & given.keys() & values.keys()
    merged = {**values, **given, **{name: {**values[name], **given[name]} for name in nested}}
    options = _validated(merged)
    is_left_out = "compare" in given and "prompt_only" not in given
    if "prompt_only" in merged and PROMPT_ONLY not in options.compare and not is_left_out:
        raise EvaluationError(
            "prompt_only: is told how to ask, and is not asked; compare with it, too: --against"
            " prompt_only"
        )
    return options


NAMED_LATER = "rows.jsonl"


def check_section(section: Any) -> None:
    """Of a training file, before the run. Raises EvaluationError naming each wrong key; its rows
    may be named later."""
    if not isinstance(section, dict):
        raise EvaluationError(f"expected `key: value` lines (given: {section!r})")
    _validated({"data": NAMED_LATER} | _plain(section))


def _validated(values: Mapping[str, Any]) -> EvaluationOptions:
    try:
        return EvaluationOptions.model_validate(values)
    except ValidationError as error:
        raise EvaluationError("\n".join(_explained(error))) from error


def _section(path: Path) -> dict[str, Any]:
    """The section, its paths from the file's folder on, and the run's adapter."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from error
    section = values.get(SECTION) if isinstance(values, dict) else None
    if not isinstance(section, dict):
        raise EvaluationError(f"{path}: has no `{SECTION}:` section")
    found = _plain(section)
    name = values.get("adapter_id") or values.get("name")
    if "adapters" not in found and isinstance(name, str):
        found["adapters"] = [name]
    return _from_folder(found, path.parent)


def _plain(section: dict[str, Any]) -> dict[str, Any]:
    """Metrics and gates may be written as mappings."""
    found = dict(section)
    if isinstance(found.get("metrics"), list):
        found["metrics"] = [_as_metric(metric) for metric in found["metrics"]]
    if isinstance(found.get("gate"), dict):
        found["gate"] = [f"{figure} {condition}" for figure, condition in found["gate"].items()]
    return found


def _as_metric(metric: Any) -> Any:
    if isinstance(metric, dict) and len(metric) == 1:
        ((name, argument),) = metric.items()
        return f"{name}={argument}"
    return metric


def _from_folder(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    if isinstance(found.get("data"), str):
        found["data"] = str(folder / found["data"])
    shown = found.get("prompt_only")
    if isinstance(shown, dict) and isinstance(shown.get("shots_from"), str):
        found["prompt_only"] = {**shown, "shots_from": str(folder / shown["shots_from"])}
    if isinstance(found.get("metrics"), list):
        found["metrics"] = [_metric_from(metric, folder) for metric in found["metrics"]]
    return found


def _metric_from(metric: Any, folder: Path) -> Any:
    if isinstance(metric, str) and metric.startswith("json_schema="):
        return f"json_schema={folder / metric.removeprefix('json_schema=')}"
    return metric


def _explained(error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield f"{place}: no such key{_did_you_mean(problem['loc'])}"
        elif problem["type"] == "missing":
            yield f"{place}: is required"
        else:
            yield f"{place}: {problem['msg']} (given: {problem['input']!r})"


def _did_you_mean(loc: Sequence[int | str]) -> str:
    *parents, key = loc
    kinds: dict[str, type[_Keys]] = {PROMPT_ONLY: PromptOnly, "judge": Judge}
    kind = kinds.get(str(parents[0]), EvaluationOptions) if parents else EvaluationOptions
    near = difflib.get_close_matches(str(key), kind.model_fields, n=1)
    return f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(kind.model_fields)}"
