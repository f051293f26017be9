"""The engine process: builds an engine as the router asks, then runs its loop until told to end.

    python -m lory_server --fd N      N: an inherited socket to the router

What goes wrong while building is one Fatal message. What goes wrong in a step ends the process:
the router sees the socket close, ends the streams in flight and starts another engine.
"""

import argparse
import gc
import logging
import os
import socket
import sys
import threading
import time
from typing import assert_never

from lory_server.build import EngineError, build
from lory_server.channel import Channel
from lory_server.engine import Engine
from lory_server.lifeline import die_with_parent
from lory_server.messages import (
    AdapterOrder,
    Cancel,
    Command,
    EngineOptions,
    Fatal,
    ListAdapters,
    Submit,
)

HEARTBEAT_S = 0.5
GIL_SWITCH_S = 0.0002
EXIT_FATAL = 1

log = logging.getLogger("lory.engine")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lory_server")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the router")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # bitsandbytes warns at import of kernels it could fetch; what runs here is its own library.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    wake = threading.Event()
    channel = Channel(socket.socket(fileno=arguments.fd), wake.set)
    options = channel.read_options()
    logging.getLogger().setLevel(options.log_level.upper())
    channel.start()
    try:
        engine, info = build(options, wake.set)
    except EngineError as error:
        channel.send(Fatal(message=str(error)))
        channel.flush(timeout_s=2)
        return EXIT_FATAL
    except Exception as error:  # the process's border: say why, then end
        log.exception("the engine could not be built")
        channel.send(Fatal(message=f"{type(error).__name__}: {error}; the log has the details"))
        channel.flush(timeout_s=2)
        return EXIT_FATAL
    channel.send(info)
    keep_step_smooth()
    serve(engine, channel, wake)
    return 0


def keep_step_smooth() -> None:
    """What Python does behind the step's back, bounded.

    A full collection over everything that was imported held the interpreter for 280 ms while
    adapters loaded; and a loader thread keeps it for 5 ms at a time unless told otherwise.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(GIL_SWITCH_S)


def serve(engine: Engine, channel: Channel, wake: threading.Event) -> None:
    """The loop. Ends with the process, when the router closes the socket."""
    last_report = time.monotonic()
    while True:
        wake.clear()
        for command in channel.commands():
            _obey(engine, command)
        engine.step()
        now = time.monotonic()
        if engine.has_events or now - last_report >= HEARTBEAT_S:
            channel.send(engine.events())
            last_report = now
        for answer in engine.adapter_answers():
            channel.send(answer)
        if not engine.can_step:
            wake.wait(HEARTBEAT_S)


def _obey(engine: Engine, command: Command) -> None:
    match command:
        case Submit():
            engine.submit(command)
        case Cancel():
            engine.cancel(command)
        case ListAdapters():
            engine.list_adapters(command)
        case AdapterOrder():
            engine.obey(command)
        case EngineOptions():
            raise ValueError("options come first and once")
        case _:
            assert_never(command)


def run() -> None:
    """Entry of the child process; leaves without waiting for daemon threads."""
    die_with_parent()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
