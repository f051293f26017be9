"""`lory serve` over `fake_engine_process`, to be run as a process and sent signals.

python serve_with_fake_engine.py '{"flag": value, ...}' [arguments of the fake engine]

It prints its URL, and how many objects the garbage collector need not look at.
"""

import gc
import json
import sys
from pathlib import Path

from lory_router import serve
from lory_router.config import CommandError, ServeConfig
from lory_router.supervisor import RestartPolicy

FAKE = str(Path(__file__).with_name("fake_engine_process.py"))


async def tell(url: str) -> None:
    print(url, flush=True)
    print(gc.get_freeze_count(), flush=True)


def main() -> None:
    config = ServeConfig.from_flags(json.loads(sys.argv[1]))
    command = (sys.executable, FAKE, *sys.argv[2:])
    policy = RestartPolicy(first_delay_s=0.05, max_deaths=3)
    try:
        sys.exit(serve.run(config, after_ready=tell, engine_command=command, policy=policy))
    except CommandError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
