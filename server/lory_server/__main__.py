"""`python -m lory_server`: the engine child process. Started by the router, not by hand."""

from lory_server.process import run

if __name__ == "__main__":
    run()
