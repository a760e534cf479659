"""An HTTP server of a directory, on loopback, that fails as it is told to."""

import re
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote


class Request(NamedTuple):
    name: str
    start: int
    stop: int


Fault = Callable[["Handler", bytes, Request], None]  # answers the request for these bytes in its own way


@dataclass
class Server:
    """`faults` of a file answer its next requests, one each; `always` answers all."""

    root: Path
    requests: list[Request] = field(default_factory=list)
    faults: dict[str, deque[Fault]] = field(default_factory=lambda: defaultdict(deque))
    always: dict[str, Fault] = field(default_factory=dict)
    url: str = ""

    def fail(self, name: str, *faults: Fault) -> None:
        self.faults[name].extend(faults)

    def ranges(self, name: str) -> list[tuple[int, int]]:
        """Of the file's requests so far, in order."""
        return [(request.start, request.stop) for request in self.requests if request.name == name]


class Handler(BaseHTTPRequestHandler):
    """GET with one range, over connections that stay open."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        ours: Server = self.server.ours  # type: ignore[attr-defined]
        name = unquote(self.path.rpartition("/")[2])
        try:
            content = (ours.root / name).read_bytes()
        except FileNotFoundError:
            content = None
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", f"bytes=0-{1 << 60}"))
        request = Request(name, int(span[1]), int(span[2]) + 1)
        ours.requests.append(request)
        with suppress(ConnectionError):
            if content is None:
                self.answer(404, b"")
            elif ours.faults[name]:
                ours.faults[name].popleft()(self, content, request)
            else:
                ours.always.get(name, well)(self, content, request)

    def answer(self, status: int, body: bytes, length: int | None = None) -> None:
        """`length`: what the header claims; the connection ends after a body that is shorter."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length is not None and length != len(body)

    def log_message(self, *_: Any) -> None:
        """Stays silent."""


def well(handler: Handler, content: bytes, request: Request) -> None:
    if request.start >= len(content):
        handler.answer(416, b"")
    else:
        handler.answer(206, content[request.start : request.stop])


def status(code: int) -> Fault:
    return lambda handler, content, request: handler.answer(code, b"")


def broken_after(num_bytes: int) -> Fault:
    """The connection breaks after so many bytes of the body."""

    def fault(handler: Handler, content: bytes, request: Request) -> None:
        body = content[request.start : request.stop]
        handler.answer(206, body[:num_bytes], len(body))

    return fault


def cut_to(num_bytes: int) -> Fault:
    """Only so many bytes of the body, and a header that agrees."""
    return lambda handler, content, request: handler.answer(206, content[request.start : request.stop][:num_bytes])


def stuck_until(released: threading.Event, reached: threading.Event) -> Fault:
    """Half of the body, and the rest when `released`."""

    def fault(handler: Handler, content: bytes, request: Request) -> None:
        body = content[request.start : request.stop]
        handler.send_response(206)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2])
        reached.set()
        released.wait()
        handler.wfile.write(body[len(body) // 2 :])

    return fault


def without_ranges(handler: Handler, content: bytes, request: Request) -> None:
    handler.answer(200, content)


def other_bytes(handler: Handler, content: bytes, request: Request) -> None:
    """As many as asked for, of another file."""
    handler.answer(206, bytes(len(content[request.start : request.stop])))


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Clients are killed, and close connections that they no longer need."""


@contextmanager
def serve(root: Path) -> Iterator[Server]:
    ours = Server(root)
    with _Quiet(("127.0.0.1", 0), Handler) as server:
        server.ours = ours  # type: ignore[attr-defined]
        ours.url = f"http://127.0.0.1:{server.server_port}/data"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield ours
        finally:
            server.shutdown()
            thread.join()
