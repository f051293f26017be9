"""What strangers wrote of texts, looked at by a process that may be lost: adapters' chat templates
are compiled and rendered there, and their tokenizers' files judged.

    python -m lory_router.text_process --fd N      N: an inherited socket to the router

A template is a program: `{{ 10**(10**10) }}` never ends, `{{ 'a' * 10**11 }}` takes all memory, and
nothing within a process can stop either. Here the kernel does, after CPU_S seconds or
MAX_MEMORY_BYTES, and the next one finds another process. A tokenizer's file is some ten megabytes
of JSON, and reading that in the router would stop every stream for a part of a second. The process
starts when it is first needed. It must not know adapters or requests.
"""

import argparse
import hashlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace

import msgspec

from lory_router.chat_template import ChatTemplate, Message, TemplateError
from lory_router.sources.memory import Memory
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.tokenizer_files import COMPANIONS, TokenizerFiles, read_tokenizer

CPU_S = 1.0
"""For one prompt; honest ones take milliseconds."""
LOOK_CPU_S = 20.0
"""For a tokenizer's files."""
MAX_MEMORY_BYTES = 1024 * 1024 * 1024
MAX_PROMPT_CHARS = 8 * 1024 * 1024
ANSWER_TIMEOUT_S = 30.0
"""On a machine that is busy, CPU_S may take long; longer than this is taken for stuck."""
REFUSED_S = 30.0
"""For which a template that took too long is not tried again: others wait for the process."""
MAX_REFUSED = 1024
MAX_FRAME_BYTES = 64 * 1024 * 1024

TOO_LONG = f"takes more than {CPU_S:g} s to render"


class Look(msgspec.Struct, frozen=True, tag=True):
    """At a tokenizer's files, whose descriptors come along."""

    names: tuple[str, ...]


class Wish(msgspec.Struct, frozen=True, tag=True):
    source: str
    special_tokens: dict[str, str]
    messages: list[dict[str, object]] | None = None
    """None: compile it, no more."""
    options: dict[str, object] | None = None


class Answer(msgspec.Struct, frozen=True):
    text: str = ""
    complaint: str | None = None
    files: TokenizerFiles | None = None
    """Without their bytes."""


class AdapterTemplate:
    """One template; to be used as a `ChatTemplate`, off the event loop."""

    def __init__(
        self, process: "TextProcess", source: str, special_tokens: Mapping[str, str]
    ) -> None:
        """Raises ValueError for one that does not compile."""
        self.source = source
        self._process = process
        self._special_tokens = dict(special_tokens)
        try:
            process.ask(Wish(source, self._special_tokens))
        except TemplateError as error:
            raise ValueError(f"chat_template: {error}") from error

    def render(
        self, messages: Iterable[Message], options: Mapping[str, object] | None = None
    ) -> str:
        """As `ChatTemplate.render`."""
        told = [dict(message) for message in messages]
        return self._process.ask(Wish(self.source, self._special_tokens, told, dict(options or {})))


class TextProcess:
    """Threads use it one after the other."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: what strangers' programs run beside; None: all that this process has."""
        self._environment = environment
        self._turn = threading.Lock()
        self._running: _Running | None = None
        self._refused: Memory[bytes, str] = Memory(MAX_REFUSED)
        """Why, by digests of templates."""

    def look(self, descriptors: Mapping[str, int]) -> TokenizerFiles:
        """A tokenizer's open files, without their bytes; raises AdapterInvalidError."""
        with self._turn:
            try:
                answer = self._process().ask(Look(tuple(descriptors)), tuple(descriptors.values()))
            except OSError as error:
                self._end()
                raise AdapterInvalidError(
                    f"its tokenizer takes too long to read: {error}"
                ) from error
        if answer.files is None:
            raise AdapterInvalidError(answer.complaint or "its tokenizer cannot be read")
        return answer.files

    def ask(self, wish: Wish) -> str:
        """What it renders, in time; raises TemplateError."""
        digest = hashlib.sha256(wish.source.encode()).digest()
        with self._turn:
            if (reason := self._refused.get(digest)) is not None:
                raise TemplateError(f"{reason}, a moment ago; try again later")
            try:
                answer = self._process().ask(wish)
            except TimeoutError:
                self._end()
                self._refused.put(digest, TOO_LONG, REFUSED_S)
                raise TemplateError(TOO_LONG) from None
            except OSError as error:
                self._end()
                raise TemplateError("broke the process that renders it") from error
        if answer.complaint is not None:
            raise TemplateError(answer.complaint)
        return answer.text

    def _process(self) -> "_Running":
        if self._running is None or self._running.has_ended:
            self._end()
            self._running = _Running(self._environment)
        return self._running

    def _end(self) -> None:
        if self._running is not None:
            self._running.end()
            self._running = None


class _Running:
    """A process that runs, and ends with its last user."""

    def __init__(self, environment: Mapping[str, str] | None) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=environment,
                start_new_session=True,
            )
        ours.settimeout(ANSWER_TIMEOUT_S)
        self._connection = ours
        self.end = weakref.finalize(self, _end, self._process, ours)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, wish: Wish | Look, descriptors: tuple[int, ...] = ()) -> Answer:
        """TimeoutError: it took too long; another OSError: it was lost."""
        send(self._connection, wish, descriptors)
        payload, _ = receive(self._connection)
        if payload:
            return msgspec.msgpack.decode(payload, type=Answer)
        if self._process.wait(ANSWER_TIMEOUT_S) == -signal.SIGPROF:
            raise TimeoutError
        raise ConnectionResetError("it ended")


def _end(process: "subprocess.Popen[bytes]", connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()


# -- frames: four bytes of length, and msgpack ----------------------------------------------------


def send(
    connection: socket.socket, message: msgspec.Struct, descriptors: tuple[int, ...] = ()
) -> None:
    payload = msgspec.msgpack.encode(message)
    socket.send_fds(connection, [len(payload).to_bytes(4, "big")], descriptors)
    connection.sendall(payload)


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """The next frame, and descriptors that came with it; empty at the end of the stream."""
    length, descriptors, _, _ = socket.recv_fds(connection, 4, 1 + len(COMPANIONS))
    length += _exactly(connection, 4 - len(length)) if length else b""
    num_bytes = int.from_bytes(length, "big")
    if num_bytes > MAX_FRAME_BYTES:
        raise ConnectionResetError(f"a frame of {num_bytes} bytes")
    return _exactly(connection, num_bytes), descriptors


def _exactly(connection: socket.socket, num_bytes: int) -> bytes:
    parts: list[bytes] = []
    while num_bytes:
        part = connection.recv(num_bytes)
        if not part:
            return b""
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


# -- in the process -------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(prog="lory_router.text_process")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the router")
    connection = socket.socket(fileno=parser.parse_args().fd)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    decoder = msgspec.msgpack.Decoder(Wish | Look)
    while True:
        payload, descriptors = receive(connection)
        if not payload:
            return 0
        wish = decoder.decode(payload)
        # SIGPROF ends a process that has no handler for it.
        signal.setitimer(signal.ITIMER_PROF, CPU_S if isinstance(wish, Wish) else LOOK_CPU_S)
        answer = _rendered(wish) if isinstance(wish, Wish) else _looked(wish, descriptors)
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(connection, answer)


def _looked(look: Look, descriptors: list[int]) -> Answer:
    try:
        files = read_tokenizer(dict(zip(look.names, descriptors, strict=True)))
        return Answer(files=replace(files, raw=b""))
    except AdapterInvalidError as error:
        return Answer(complaint=str(error))
    except OSError as error:
        return Answer(complaint=f"its tokenizer cannot be read: {error}")
    except MemoryError:
        return Answer(complaint="its tokenizer takes too much memory to read")
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _rendered(wish: Wish) -> Answer:
    try:
        template = ChatTemplate(wish.source, wish.special_tokens, "adapter")
        text = "" if wish.messages is None else template.render(wish.messages, wish.options)
        text.encode()
    except (TemplateError, ValueError) as error:
        return Answer(complaint=str(error)[:1000])
    except MemoryError:
        return Answer(complaint="takes too much memory")
    except RecursionError:
        return Answer(complaint="is nested too deeply")
    if len(text) > MAX_PROMPT_CHARS:
        return Answer(complaint=f"makes a prompt of more than {MAX_PROMPT_CHARS} characters")
    return Answer(text)


if __name__ == "__main__":
    raise SystemExit(main())
