"""One engine process: started with one end of a socket pair, ended for certain.

It must not know what is said over the socket, nor when to start another.
"""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Mapping
from dataclasses import dataclass

ENGINE_COMMAND = (sys.executable, "-m", "lory_server")
STDERR_FD = 2
READ_LIMIT_BYTES = 1024 * 1024


@dataclass(frozen=True)
class EngineProcess:
    """A child and our end of the line to it."""

    process: Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def spawn(
        cls, command: tuple[str, ...], environment: Mapping[str, str]
    ) -> "EngineProcess":
        """Start `command --fd N`, its logs on our stderr, in a session of its own.

        A Ctrl-C in the terminal thus reaches the router alone, which drains first.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    "--fd",
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=DEVNULL,
                    stdout=STDERR_FD,
                    env=dict(environment),
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=READ_LIMIT_BYTES)
        return cls(process, reader, writer)

    async def end(self, grace_s: float) -> int:
        """Hang up, wait, then kill whatever is left of its process group; the exit status."""
        self.writer.transport.abort()
        try:
            await asyncio.wait_for(self.process.wait(), grace_s)
        except TimeoutError:
            pass
        finally:
            self.kill()
        return await self.process.wait()

    def kill(self) -> None:
        """SIGKILL to the engine and its group; a stopped process dies of it as well.

        Children in sessions of their own die with their parent (lory_server.lifeline).
        """
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exited with code {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
