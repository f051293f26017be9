"""One training run as a process: started to come after serving, and ended for certain.

It runs at the lowest priority, dies with the server, even while it is stopped, and gets SIGTERM to
write a checkpoint and end. It must not know jobs or what is trained.

Only the process itself is stopped, as only it is sure to die with the server; what it may have
started comes to rest for want of work.
"""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Mapping, Sequence
from pathlib import Path

LAUNCHER = (sys.executable, "-m", "lory_router.tuning.launch")
LOOK_S = 0.5


class Child:
    def __init__(self, process: Process, tied: int) -> None:
        """`tied` can be read, to its end, once the process dies with this one for certain."""
        self._process = process
        self._exited = asyncio.ensure_future(process.wait())
        self._tied = tied
        self._is_tied = False
        self._is_held = False
        self._is_leaving = False
        asyncio.get_running_loop().add_reader(tied, self._on_tied)

    @classmethod
    async def start(
        cls, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> "Child":
        """Run `command`, what it says going to `log`."""
        tied, told = os.pipe()
        try:
            with log.open("ab") as out:
                process = await asyncio.create_subprocess_exec(
                    *LAUNCHER,
                    str(os.getpid()),
                    str(told),
                    *command,
                    stdin=DEVNULL,
                    stdout=out,
                    stderr=out,
                    env=dict(environment),
                    start_new_session=True,
                    pass_fds=(told,),
                )
        except BaseException:
            os.close(tied)
            raise
        finally:
            os.close(told)
        return cls(process, tied)

    @property
    def session(self) -> int:
        """Of it and what it starts."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    @property
    def may_be_held(self) -> bool:
        """Stopped before it is tied, or elsewhere than on Linux, it could outlive the server."""
        return self._is_tied and not self._is_leaving and sys.platform == "linux"

    def hold(self) -> None:
        """Stop it until it may go on."""
        if not self._is_held:
            self._is_held = True
            self._send(signal.SIGSTOP)

    def go_on(self) -> None:
        if self._is_held:
            self._is_held = False
            self._send(signal.SIGCONT)

    async def wait(self, timeout_s: float, asked: asyncio.Event | None = None) -> int | None:
        """Its exit status, if it ends within the time and before it is `asked` of."""
        asking = [asyncio.ensure_future(asked.wait())] if asked else []
        await asyncio.wait(
            {self._exited, *asking}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        for one in asking:
            one.cancel()
        return self._process.returncode

    async def stop(self, grace_s: float) -> int:
        """Ask, wait, and end what is left of it; its exit status. It is not held any more: what is
        stopped hears nothing."""
        self._is_leaving = True
        if self.is_running:
            self._send(signal.SIGTERM)
            self.go_on()
            await self.wait(grace_s)
        return await self.kill()

    async def kill(self) -> int:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        status = await self._exited
        self._on_tied()
        return status

    def _send(self, number: signal.Signals) -> None:
        """Not by the process's own method, which looks for its end, and may take that from the one
        who waits for it."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def _on_tied(self) -> None:
        """The launcher has closed its end, or has ended."""
        if not self._is_tied:
            self._is_tied = True
            asyncio.get_running_loop().remove_reader(self._tied)
            os.close(self._tied)
