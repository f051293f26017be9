"""`python -m lory_router` is `lory`: the command, ended by Ctrl-C without a traceback.

It must stay free of imports that take time: Ctrl-C may come while they run.
"""

import sys

EXIT_INTERRUPTED = 130


def main() -> None:
    try:
        from lory_router.cli import main as run_command

        run_command()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
