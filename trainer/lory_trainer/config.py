"""One page of YAML, checked: every key known, every value typed, every default written out.

This module must not know torch, peft or any data; it reads the YAML file and nothing else.
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lory_trainer.errors import ConfigError
from lory_trainer.template import template_fields


def _number_from_text(value: Any) -> Any:
    """YAML 1.1 reads `4e-4` as text; a learning rate is meant."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


Number = Annotated[float, BeforeValidator(_number_from_text), Field(allow_inf_nan=False)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LoraOptions(_Options):
    """What is added to the base."""

    r: int = Field(default=8, ge=1, le=256)
    """Rank of every adapted linear; the server takes no more than 256."""
    alpha: Number | None = Field(default=None, gt=0)
    """The update is scaled by alpha / r (alpha / sqrt(r) with use_rslora); 2 r if unset."""
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs dropped while training."""
    target_modules: str | list[str] = "all-linear"
    """Names of linears, one regular expression over module paths, or `all-linear`."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r), which keeps high ranks learning."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the written tensors; training itself keeps them in float32."""

    @property
    def resolved_alpha(self) -> float:
        """Whole numbers as integers, as other readers of adapter_config.json expect."""
        alpha = 2 * self.r if self.alpha is None else self.alpha
        return int(alpha) if alpha == int(alpha) else alpha


class TrainOptions(_Options):
    """A whole training run."""

    base: str
    """Folder of the base (relative to this file) or its hub id."""
    data: str
    """JSONL file of rows (relative to this file): one object a line, every column text."""
    template: str = "{text}"
    """The prompt: text with `{column}` fields. A caller must send it rendered."""
    completion: str = "completion"
    """Column that holds the answer."""
    lora: LoraOptions = LoraOptions()
    """What is added to the base."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the data."""
    learning_rate: Number = Field(default=2e-4, gt=0)
    """Peak of the schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_fraction: Number = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises to its peak."""
    weight_decay: Number = Field(default=0.0, ge=0)
    """AdamW's weight decay on the adapter."""
    max_gradient_norm: Number = Field(default=1.0, gt=0)
    """Gradients longer than this are scaled down to it."""
    batch_size: int = Field(default=8, ge=1)
    """Rows in one forward pass."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes before each optimizer step."""
    max_length: int = Field(default=1024, ge=2)
    """Longest row, prompt and answer together, in tokens."""
    overlong: Literal["error", "drop"] = "error"
    """What happens to a longer row. It is never cut: its end teaches the model to stop."""
    seed: int = Field(default=0, ge=0)
    """Fixes the adapter's first weights, the order of rows and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU if there is one."""
    dtype: Dtype = "auto"
    """Precision the base is loaded in; auto takes the checkpoint's own."""


def load_options(path: Path) -> TrainOptions:
    """Reads and checks a YAML file; raises ConfigError naming each wrong key."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_options(text, str(path))


def parse_options(text: str, source: str = "config") -> TrainOptions:
    values = _parse_yaml(text, source)
    try:
        options = TrainOptions.model_validate(values)
        _check_template(options)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in _explain(error))
        raise ConfigError(f"{source}:\n{lines}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}:\n  {error}") from error
    return options


def _check_template(options: TrainOptions) -> None:
    if options.completion in template_fields(options.template):
        raise ConfigError(
            f"template: shows the answer, column `{options.completion}`, in the prompt"
        )


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        duplicates = sorted(_duplicate_keys(yaml.compose(text, Loader=yaml.SafeLoader)))
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply, or an alias within itself") from error
    if duplicates:
        raise ConfigError(f"{source}: given twice: {', '.join(duplicates)}; keep one of each")
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected `key: value` lines; at least base and data")
    return values


def _duplicate_keys(node: yaml.Node | None) -> Iterator[str]:
    """YAML lets the last of two equal keys win, in silence."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.YAMLError(f"a key must be text, not a list or mapping{key.start_mark}")
        if key.value in seen:
            yield key.value
        seen.add(key.value)
        yield from _duplicate_keys(value)


def _explain(error: ValidationError) -> Iterator[str]:
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
    known = (LoraOptions if parents == ["lora"] else TrainOptions).model_fields
    close = get_close_matches(str(key), known, n=1)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known: {', '.join(known)}"
