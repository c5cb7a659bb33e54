"""A real S3 server on this machine, and a proxy in front of it that misbehaves as told."""

import http.client
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

BUCKET = "goodfire-r1-features"


class S3:
    """moto's server, with the public bucket."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.request("PUT", f"/{BUCKET}")

    def request(
        self, method: str, path: str, body: bytes = b"", **headers: str
    ) -> tuple[bytes, Any]:
        headers = {"Content-Type": "application/octet-stream"} | headers  # not a form
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        with urllib.request.urlopen(request) as answer:
            return answer.read(), answer.headers

    def put(self, key: str, data: bytes, *, public: bool = True) -> None:
        """An object that anyone may read."""
        acl = "public-read" if public else "private"
        self.request("PUT", f"/{BUCKET}/{key}", data, **{"x-amz-acl": acl})

    def put_in_parts(self, key: str, data: bytes, part: int) -> None:
        """The same, uploaded in parts: its ETag is then no MD5 of the whole."""
        acl = {"x-amz-acl": "public-read"}
        begun, _ = self.request("POST", f"/{BUCKET}/{key}?uploads", **acl)
        upload = begun.decode().split("<UploadId>")[1].split("<")[0]
        listed = ""
        for number, start in enumerate(range(0, len(data), part), 1):
            _, headers = self.request(
                "PUT",
                f"/{BUCKET}/{key}?partNumber={number}&uploadId={upload}",
                data[start : start + part],
            )
            listed += (
                f"<Part><PartNumber>{number}</PartNumber><ETag>{headers['ETag']}</ETag></Part>"
            )
        body = f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()
        self.request("POST", f"/{BUCKET}/{key}?uploadId={upload}", body)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield S3(f"http://{host}:{port}")
    server.stop()


@dataclass
class Answer:
    """What the proxy is about to send."""

    method: str
    path: str
    status: int
    headers: dict[str, str]
    body: bytes
    number: int  # of GET requests so far, this one included
    heads: int  # of HEAD requests
    cut_after: int | None = None  # bytes of the body, then the connection ends
    at_a_time: int = 1 << 20  # bytes written at once


Mischief = Callable[[Answer], None]


class Proxy:
    """Passes requests on to the server; ``mischief`` may change the answers."""

    def __init__(self, target: str) -> None:
        self.mischief: Mischief = lambda answer: None
        self.served = 0  # bytes of bodies
        self.gets = 0
        self.heads = 0
        self.ranges: list[str] = []
        self.limit: int | None = None  # once so much was served, answers are held back
        self.full = threading.Event()
        self._lock = threading.Lock()
        self._go_on = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy._handle(self, target)

            do_HEAD = do_GET

            def log_message(self, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that are killed

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _handle(self, handler: BaseHTTPRequestHandler, target: str) -> None:
        connection = http.client.HTTPConnection(target.removeprefix("http://"))
        wanted = {
            name: handler.headers[name] for name in ("Range", "If-Match") if name in handler.headers
        }
        connection.request(handler.command, handler.path, headers=wanted)
        reply = connection.getresponse()
        body = reply.read()
        connection.close()
        headers = {
            name: value
            for name, value in reply.getheaders()
            if name.lower() not in ("connection", "transfer-encoding", "server", "date")
        }
        with self._lock:
            if handler.command == "GET":
                self.gets += 1
                self.ranges.append(wanted.get("Range", ""))
            else:
                self.heads += 1
            number, heads = self.gets, self.heads
        answer = Answer(handler.command, handler.path, reply.status, headers, body, number, heads)
        self.mischief(answer)
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "GET":
            self._send(handler, answer)

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        end = len(answer.body) if answer.cut_after is None else answer.cut_after
        for start in range(0, end, answer.at_a_time):
            data = answer.body[start : min(end, start + answer.at_a_time)]
            with self._lock:
                held = self.limit is not None and self.served >= self.limit
                if not held:
                    self.served += len(data)
            if held:
                self.full.set()
                self._go_on.wait(60)
                handler.close_connection = True
                return
            handler.wfile.write(data)
        if answer.cut_after is not None:
            handler.close_connection = True

    def hold_after(self, count: int | None) -> None:
        """Lets held connections end, then holds back what comes after ``count`` more bytes."""
        self._go_on.set()
        self._go_on = threading.Event()
        with self._lock:
            self.limit = None if count is None else self.served + count
        self.full.clear()

    def close(self) -> None:
        self.hold_after(None)
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def proxy(s3: S3) -> Iterator[Proxy]:
    proxy = Proxy(s3.url)
    yield proxy
    proxy.close()


@pytest.fixture(scope="session")
def content() -> bytes:
    """Three megabytes and a bit, no two pieces alike."""
    return np.random.default_rng(3).bytes((3 << 20) + 12_345)
