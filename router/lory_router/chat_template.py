"""Chat templates: the Jinja of a tokenizer's files, rendered as transformers renders it.

Templates are run in a sandbox that sees plain JSON data alone; the base's by the front itself,
those that adapters bring by a process of their own (`text_process`), for no sandbox bounds time
or memory. This module must not know tokenizers or requests.
"""

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import NoReturn, Protocol

import jinja2
import jinja2.ext
import jinja2.utils
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, object]

RESERVED_NAMES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class TemplateError(ValueError):
    """The template cannot render these messages; the text is the template's own complaint."""


class PromptTemplate(Protocol):
    """What makes a prompt of messages; it may take its time."""

    source: str

    def render(
        self, messages: Iterable[Message], options: Mapping[str, object] | None = None
    ) -> str: ...


class ChatTemplate:
    """One compiled template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], whose: str = "base") -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template of the {whose} does not compile: {error}") from error

    def render(
        self, messages: Iterable[Message], options: Mapping[str, object] | None = None
    ) -> str:
        """The prompt for an answer to `messages`; `options` are further names for the template,
        or other values of its usual ones."""
        usual = {"tools": None, "documents": None, "add_generation_prompt": True}
        names = {**self._special_tokens, **usual, **(options or {})}
        try:
            return self._template.render(
                {**names, "messages": [dict(message) for message in messages]}
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise TemplateError(str(error) or type(error).__name__) from error


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; for a prompt it is its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["dict"] = _PlainDict()
    environment.globals["namespace"] = _PlainNamespace
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _PlainDict:
    """`dict` without the type: nothing to climb out of the sandbox by."""

    def __call__(
        self, pairs: Iterable[tuple[object, object]] = (), **names: object
    ) -> dict[object, object]:
        return dict(pairs) | dict(names)

    def fromkeys(self, keys: Iterable[object], value: object = None) -> dict[object, object]:
        return dict.fromkeys(keys, value)


class _PlainNamespace(jinja2.utils.Namespace):
    """`namespace` that holds no underscored names, as transformers' holds none."""

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"a template may not set {name!r} on a namespace")
        super().__setitem__(name, value)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
