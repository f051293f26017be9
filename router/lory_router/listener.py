"""The listening socket, and how many connections the process has room for.

It must not know what is said on a connection.
"""

import logging
import resource
import socket
import sys

from lory_router.config import StartError
from lory_router.connection import BACKLOG

log = logging.getLogger("lory")

SPARE_FILES = 4 * BACKLOG + 64
"""Open files that are not connections: ours, and those accepted before they can be refused.

asyncio accepts a whole backlog in each turn of its loop; one too many is closed three turns later.
"""
UNBOUNDED_FILES = 10240
PEER_TIMEOUT_S = 60
"""How long a peer may leave sent bytes or probes unacknowledged."""
PROBE_AFTER_S = 30
PROBE_EVERY_S = 10


def listen(host: str, port: int) -> socket.socket:
    """The listening socket, taken before a model is loaded for nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only where the protocol is named: 40 ms a reply otherwise.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _notice_vanished_peers(listener)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise StartError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from error
    return listener


def _notice_vanished_peers(listener: socket.socket) -> None:
    """Have the kernel probe silent peers and reset those that do not answer: a machine that lost
    its power says no goodbye. Accepted sockets inherit this on Linux."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        for option, value in (
            (socket.TCP_USER_TIMEOUT, PEER_TIMEOUT_S * 1000),
            (socket.TCP_KEEPIDLE, PROBE_AFTER_S),
            (socket.TCP_KEEPINTVL, PROBE_EVERY_S),
        ):
            listener.setsockopt(socket.IPPROTO_TCP, option, value)


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def room_for_connections(wanted: int) -> int:
    """Raise the limit of open files as far as it goes; how many connections fit under it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(soft, UNBOUNDED_FILES) if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    room = max(1, most - SPARE_FILES)
    if room < wanted:
        log.warning(
            "%d open files are allowed: at most %d connections instead of %d; raise ulimit -n",
            most,
            room,
            wanted,
        )
    return min(room, wanted)
