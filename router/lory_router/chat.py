"""`lory chat` and `lory adapters`: a running server in the terminal.

It must not know the engine or anything of the server's inside: it is one more client (`remote`).
"""

import difflib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from rich.console import Console
from rich.text import Text

from lory_router.adapter_table import matching, print_adapters
from lory_router.config import CommandError
from lory_router.remote import (
    TooLongError,
    check,
    connect,
    error_text,
    list_adapters,
    list_models,
    one_line_errors,
)

BASE_TEMPERATURE = 0.7
DEFAULT_ANSWER_TOKENS = 512
SSE_DATA = "data:"
HELP = """\
/adapter NAME  talk to that adapter (no name: the base)
/adapters      list what is served
/clear         forget the conversation
/exit          leave (as exit, quit and Ctrl-D do)"""


@dataclass(frozen=True)
class ChatOptions:
    """How to ask."""

    adapter: str = ""
    system: str = ""
    max_tokens: int | None = None
    """None: 512, or what is left of the context."""
    temperature: float | None = None
    """None: greedy with an adapter, which was trained to one answer, and 0.7 with the base."""
    is_plain: bool = False

    @property
    def resolved_temperature(self) -> float:
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.adapter else BASE_TEMPERATURE


@dataclass
class Conversation:
    """What was said so far."""

    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        first = {"role": "system", "content": self.system}
        self.messages = [first] if self.system else []

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})


def run_chat(url: str, api_key: str, options: ChatOptions) -> int:
    """Read lines and print answers until the end of input; the exit code.

    It is 1 if a question failed and nobody was there to see it: the lines came from a pipe.
    """
    console = Console(highlight=False)
    with connect(url, api_key) as client:
        check_adapter(list_models(client), options.adapter)
        session = _Session(client, console, options)
        console.print(Text("/help lists what can be typed", style="dim"))
        while (line := _read_line(console, session.options.adapter)) is not None:
            if not session.take(line.strip()):
                break
    return int(session.has_failed and not sys.stdin.isatty())


def show_adapters(
    url: str,
    api_key: str,
    console: Console | None = None,
    *,
    pattern: str = "",
    as_json: bool = False,
) -> None:
    """Print what is served, or that of it whose name matches: a table, or the server's own
    entries."""
    console = console or Console(highlight=False)
    with connect(url, api_key) as client:
        if as_json:
            console.print_json(data=matching(list_adapters(client), pattern))
        else:
            _print_served(client, console, pattern)


def _print_served(client: httpx.Client, console: Console, pattern: str = "") -> None:
    base = [] if pattern else [one["id"] for one in list_models(client) if not one.get("parent")]
    print_adapters(console, base, matching(list_adapters(client), pattern))


def check_adapter(models: list[dict[str, Any]], name: str) -> None:
    """Refuse an adapter that is not served; no name is the base. Revisions are not listed."""
    served = [model["id"] for model in models]
    names = {name, name.partition(":")[2], name.partition("@")[0]}
    if name and not names & {*served}:
        near = difflib.get_close_matches(name, served, n=1)
        hint = f"did you mean {near[0]}?" if near else "lory adapters lists what is"
        raise CommandError(f"no adapter {name!r} is served; {hint}")


def stream_answer(
    client: httpx.Client, options: ChatOptions, messages: list[dict[str, str]]
) -> Iterator[str]:
    """The answer to the last message, piece by piece."""
    if options.max_tokens is not None:
        yield from _stream(client, options, messages, options.max_tokens)
        return
    try:
        yield from _stream(client, options, messages, DEFAULT_ANSWER_TOKENS)
    except TooLongError:
        # Without a limit the answer may fill what is left, which is less than the default.
        yield from _stream(client, options, messages, None)


def _stream(
    client: httpx.Client,
    options: ChatOptions,
    messages: list[dict[str, str]],
    max_tokens: int | None,
) -> Iterator[str]:
    call = _plain_call if options.is_plain else _chat_call
    path, body, text_of = call(options, messages, max_tokens)
    with one_line_errors(), client.stream("POST", path, json=body) as reply:
        if reply.is_error:
            reply.read()
        check(reply)
        for line in reply.iter_lines():
            if line.startswith(SSE_DATA) and (data := line[len(SSE_DATA) :].strip()) != "[DONE]":
                yield text_of(_checked_event(data))


class _Session:
    """One chat: commands change it, other lines are asked."""

    def __init__(self, client: httpx.Client, console: Console, options: ChatOptions) -> None:
        self._client = client
        self._console = console
        self._conversation = Conversation(options.system)
        self.options = options
        self.has_failed = False

    def take(self, line: str) -> bool:
        """Act on one line; False to leave."""
        command, _, argument = line.partition(" ")
        match command:
            case "":
                pass
            case "/exit" | "/quit" | "exit" | "quit" if not argument:
                return False
            case "/help":
                self._console.print(HELP, markup=False)
            case "/adapters":
                self._show_adapters()
            case "/clear":
                self._conversation.clear()
            case "/adapter":
                self._switch(argument.strip())
            case _ if command.startswith("/"):
                self._say_error(CommandError(f"no such command: {command}; there are\n{HELP}"))
            case _:
                self._ask(line)
        return True

    def _show_adapters(self) -> None:
        try:
            _print_served(self._client, self._console)
        except CommandError as error:
            self._say_error(error)

    def _switch(self, adapter: str) -> None:
        try:
            check_adapter(list_models(self._client), adapter)
        except CommandError as error:
            self._say_error(error)
            return
        self.options = replace(self.options, adapter=adapter)

    def _say_error(self, error: CommandError) -> None:
        self.has_failed = True
        self._console.print(Text(f"error: {error}", style="red"), soft_wrap=True)

    def _ask(self, line: str) -> None:
        self._conversation.add("user", line)
        pieces: list[str] = []
        try:
            for piece in stream_answer(self._client, self.options, self._conversation.messages):
                pieces.append(piece)
                self._console.print(Text(piece), end="", soft_wrap=True)
            self._console.print()
        except KeyboardInterrupt:
            self._console.print(Text(" (stopped)", style="dim"))
        except CommandError as error:
            self._conversation.messages.pop()
            self._say_error(error)
            return
        self._conversation.add("assistant", "".join(pieces))


def _read_line(console: Console, adapter: str) -> str | None:
    try:
        return console.input(Text(f"{adapter or 'base'}> ", style="bold cyan"))
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


Call = tuple[str, dict[str, Any], Callable[[dict[str, Any]], str]]


def _chat_call(
    options: ChatOptions, messages: list[dict[str, str]], max_tokens: int | None
) -> Call:
    body = {
        "model": options.adapter,
        "messages": messages,
        "temperature": options.resolved_temperature,
        "stream": True,
    }
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    return "/v1/chat/completions", body, _chat_text


def _plain_call(
    options: ChatOptions, messages: list[dict[str, str]], max_tokens: int | None
) -> Call:
    parameters: dict[str, Any] = {}
    if max_tokens is not None:
        parameters["max_new_tokens"] = max_tokens
    if options.adapter:
        parameters["adapter_id"] = options.adapter
    if options.resolved_temperature:
        parameters |= {"do_sample": True, "temperature": options.resolved_temperature}
    body = {"inputs": messages[-1]["content"], "parameters": parameters}
    return "/generate_stream", body, _plain_text


def _chat_text(event: dict[str, Any]) -> str:
    choices = event.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def _plain_text(event: dict[str, Any]) -> str:
    token = event.get("token") or {}
    return "" if token.get("special") else token.get("text", "")


def _checked_event(data: str) -> dict[str, Any]:
    event = json.loads(data)
    if event.get("error"):
        raise CommandError(error_text(event))
    return event
