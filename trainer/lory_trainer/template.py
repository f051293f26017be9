"""Prompt templates: text with `{column}` fields and nothing cleverer.

`{{` and `}}` are literal braces. Attributes, indices, conversions and format specifications are
refused, so that a template can be rendered by any server in any language. This module must not
know tokenizers or models.
"""

from collections.abc import Mapping
from string import Formatter

from lory_trainer.errors import ConfigError


def template_fields(template: str) -> tuple[str, ...]:
    """The columns a template names, in order, each once; raises ConfigError if it is not plain."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template: {error}; write {{{{ and }}}} for literal braces") from error
    fields: dict[str, None] = {}
    for _, name, spec, conversion in parts:
        if name is not None:
            _check_field(name, spec, conversion)
            fields[name] = None
    if not fields:
        raise ConfigError(
            "template: names no column; write one in braces, such as {text}. Chat templates have "
            "no names here: rows of messages go through the base's own"
        )
    return tuple(fields)


def render(template: str, row: Mapping[str, str]) -> str:
    """The prompt of one row. A column's text is inserted as it is, braces and all."""
    return "".join(
        literal + (row[name] if name is not None else "")
        for literal, name, _, _ in Formatter().parse(template)
    )


def _check_field(name: str, spec: str | None, conversion: str | None) -> None:
    if not name.isidentifier():
        raise ConfigError(f"template: `{{{name}}}` is not a column name; only {{name}} is allowed")
    if spec or conversion:
        raise ConfigError(f"template: `{{{name}}}` takes no `:` or `!`; only {{name}} is allowed")
