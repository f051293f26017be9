"""`lory chat` and `lory adapters`: a running server from the terminal, over plain HTTP.

It must not know the engine or anything of the server's inside: it is one more client.
"""

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lory_router.config import CommandError

CONNECT_TIMEOUT_S = 5.0
BASE_TEMPERATURE = 0.7
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
    max_tokens: int = 512
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


def run_chat(url: str, api_key: str, options: ChatOptions) -> None:
    """Read lines and print answers until the end of input."""
    console = Console(highlight=False)
    with connect(url, api_key) as client:
        check_adapter(client, options.adapter)
        session = _Session(client, console, options)
        console.print(Text("/help lists what can be typed", style="dim"))
        while (line := _read_line(console, session.options.adapter)) is not None:
            if not session.take(line.strip()):
                return


def show_adapters(url: str, api_key: str, console: Console | None = None) -> None:
    """Print a table of what is served."""
    with connect(url, api_key) as client:
        (console or Console()).print(adapter_table(list_models(client)))


def connect(url: str, api_key: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
    return httpx.Client(base_url=url, headers=headers, timeout=timeout)


def list_models(client: httpx.Client) -> list[dict[str, Any]]:
    """The entries of GET /v1/models."""
    with one_line_errors():
        reply = client.get("/v1/models")
        _check(reply)
        return reply.json()["data"]


def check_adapter(client: httpx.Client, name: str) -> None:
    """Refuse an adapter that is not served; with no name there is nothing to ask."""
    if not name:
        return
    served = [model["id"] for model in list_models(client)]
    if name not in served and name.partition(":")[2] not in served:
        near = difflib.get_close_matches(name, served, n=1)
        hint = f"did you mean {near[0]}?" if near else "lory adapters lists what is"
        raise CommandError(f"no adapter {name!r} is served; {hint}")


def adapter_table(models: list[dict[str, Any]]) -> Table:
    table = Table("name", "tier", "parent", box=None)
    for model in models:
        table.add_row(model["id"], model.get("tier") or "-", model.get("parent") or "-")
    return table


def stream_answer(
    client: httpx.Client, options: ChatOptions, messages: list[dict[str, str]]
) -> Iterator[str]:
    """The answer to the last message, piece by piece."""
    path, body, text_of = _plain_call(options, messages)
    if not options.is_plain:
        path, body, text_of = _chat_call(options, messages)
    with one_line_errors(), client.stream("POST", path, json=body) as reply:
        if reply.is_error:
            reply.read()
        _check(reply)
        for line in reply.iter_lines():
            if line.startswith(SSE_DATA) and (data := line[len(SSE_DATA) :].strip()) != "[DONE]":
                yield text_of(_checked_event(data))


class one_line_errors:  # noqa: N801 - reads as the statement it is
    """Turns failures of the connection into `CommandError`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, httpx.ConnectError):
            raise CommandError(
                f"no server answers at {error.request.url.copy_with(path='/')}; "
                "start one with lory serve, or name it with --url"
            ) from error
        if isinstance(error, httpx.HTTPError | httpx.InvalidURL):
            raise CommandError(f"the server could not be asked: {error}") from error


class _Session:
    """One chat: commands change it, other lines are asked."""

    def __init__(self, client: httpx.Client, console: Console, options: ChatOptions) -> None:
        self._client = client
        self._console = console
        self._conversation = Conversation(options.system)
        self.options = options

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
                self._console.print(adapter_table(list_models(self._client)))
            case "/clear":
                self._conversation.clear()
            case "/adapter":
                self._switch(argument.strip())
            case _:
                self._ask(line)
        return True

    def _switch(self, adapter: str) -> None:
        try:
            check_adapter(self._client, adapter)
        except CommandError as error:
            self._say_error(error)
            return
        self.options = replace(self.options, adapter=adapter)

    def _say_error(self, error: CommandError) -> None:
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


def _chat_call(options: ChatOptions, messages: list[dict[str, str]]) -> Call:
    body = {
        "model": options.adapter,
        "messages": messages,
        "max_tokens": options.max_tokens,
        "temperature": options.resolved_temperature,
        "stream": True,
    }
    return "/v1/chat/completions", body, _chat_text


def _plain_call(options: ChatOptions, messages: list[dict[str, str]]) -> Call:
    parameters: dict[str, Any] = {"max_new_tokens": options.max_tokens}
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
        raise CommandError(_error_text(event))
    return event


def _check(reply: httpx.Response) -> None:
    if reply.is_success:
        return
    try:
        text = _error_text(reply.json())
    except (ValueError, AttributeError):
        text = reply.text[:200]
    raise CommandError(f"{reply.status_code}: {text}")


def _error_text(body: dict[str, Any]) -> str:
    error = body.get("error")
    if not isinstance(error, dict):
        return str(error)
    return f"{error.get('message')}{_way_out(error)}"


def _way_out(error: dict[str, Any]) -> str:
    """What to do here about an error of the chat route."""
    if error.get("code") == "context_length_exceeded":
        return "; /clear forgets the conversation, --max-tokens asks for a shorter answer"
    if "no chat template" in str(error.get("message")):
        return "; with --plain, lory chat needs none"
    return ""
