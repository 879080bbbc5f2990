"""Servers on loopback that serve a folder, well or badly."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

Fault = str | int
"""An HTTP status to refuse with, or `cut`, `delay` (until the client leaves), `corrupt`, `longer`, `drop`."""


class FaultyServer:
    """Serves `folder` and counts each GET; `faults[name]` befall the next GETs of files whose names end so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.faults: dict[str, deque[Fault]] = {}
        self.bytes_per_s: float | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Refuses connections from now on."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _take(self, path: str) -> Fault | None:
        with self._lock:
            self.requests[path.lstrip("/")] += 1
            for name, faults in self.faults.items():
                if path.endswith(name) and faults:
                    return faults.popleft()
        return None

    def _handler(self) -> Callable[..., BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fault = server._take(self.path)
                path = server.folder / self.path.lstrip("/")
                if isinstance(fault, int) or not path.is_file():
                    self.send_error(fault if isinstance(fault, int) else 404)
                elif fault != "drop":
                    # A client may be killed, or leave when it has waited for long enough.
                    with suppress(BrokenPipeError, ConnectionResetError):
                        self._send(bytearray(path.read_bytes()), fault)

            def _send(self, content: bytearray, fault: Fault | None) -> None:
                middle = len(content) // 2
                if fault == "corrupt":
                    content[middle] ^= 1
                if fault == "longer":
                    content += b"more"
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[:middle])
                if fault == "delay":
                    server._closing.wait(10)
                if fault in ("cut", "delay"):
                    return
                if server.bytes_per_s:
                    time.sleep(len(content) / server.bytes_per_s)
                self.wfile.write(content[middle:])

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@contextmanager
def http_server(folder: Path) -> Iterator[FaultyServer]:
    """A server that runs until the end of the block."""
    server = FaultyServer(folder)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint of an empty S3, which moto plays."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    try:
        # moto keeps what an earlier server of this process was sent.
        urlopen(Request(f"{endpoint}/moto-api/reset", method="POST")).close()
        yield endpoint
    finally:
        server.stop()
