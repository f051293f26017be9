"""One training run as a process: started to come after serving, and ended for certain.

It runs at the lowest priority, dies with the server, and gets SIGTERM to write a checkpoint and
stop. It must not know jobs or what is trained.
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
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Child:
    def __init__(self, process: Process) -> None:
        self._process = process
        self._exited = asyncio.ensure_future(process.wait())

    @classmethod
    async def start(
        cls, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> "Child":
        """Run `command`, what it says going to `log`."""
        with log.open("ab") as out:
            process = await asyncio.create_subprocess_exec(
                *LAUNCHER,
                str(os.getpid()),
                *command,
                stdin=DEVNULL,
                stdout=out,
                stderr=out,
                env=dict(environment),
                start_new_session=True,
            )
        return cls(process)

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    def num_bytes(self) -> int:
        """Of memory it holds; 0 where that cannot be seen."""
        try:
            text = Path(f"/proc/{self._process.pid}/statm").read_text()
        except OSError:
            return 0
        return int(text.split()[1]) * PAGE_BYTES

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
        """Ask, wait, and end what is left of it; its exit status."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            await self.wait(grace_s)
        return await self.kill()

    async def kill(self) -> int:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return await self._exited
