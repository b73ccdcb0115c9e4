"""The dashboard: Optuna's own, over a storage of studies, served from this machine.

Anyone who reaches the page may change or delete studies, so it listens on the loopback address unless told
otherwise.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna_dashboard

from planner.storage import open_storage


class _Server(ThreadingMixIn, WSGIServer):
    # A browser keeps connections open; none of them keeps the process alive.
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """The page asks for news every few seconds; nobody wants to read that."""


def serve(storage_url: str, port: int, *, host: str = "127.0.0.1", on_ready: Callable[[str], None]) -> None:
    """Serves the studies in a storage until interrupted. Port 0 is any free port.

    `on_ready` is called once with the page's address, when the server accepts connections.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"A port is a number from 0 to 65535, got {port}. Port 0 is any free one.")
    page = optuna_dashboard.wsgi(open_storage(storage_url))
    try:
        server = make_server(host, port, page, server_class=_Server, handler_class=_QuietHandler)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"Port {port} on {host} is taken. Give another port, or port 0 for any free one."
            ) from error
        raise ValueError(f"Cannot serve on port {port} of {host}: {error.strerror}.") from error
    with server:
        on_ready(f"http://{host}:{server.server_port}/dashboard")
        server.serve_forever()
