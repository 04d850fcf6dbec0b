"""`optimize serve DIR`: an exported file behind the queue that forms batches, asked by the open inference protocol.

    GET /v2   /v2/health/live   /v2/health/ready   /v2/models/NAME   /v2/models/NAME/ready   /metrics
    POST /v2/models/NAME/infer

Clients of Triton and of KServe speak it. A full queue is 503; SIGTERM and Ctrl-C answer what waits, then end.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..exporters import onnx
from ..exporters.runner import Runner, RunnerOptions
from ..optimizer.errors import Error, InputError, RecipeError
from . import protocol
from .batching import Answer, Batcher, Policy, batch_axes, tried
from .feeds import random_feeds

HEADER = "Inference-Header-Content-Length"
MAX_BATCH = 8
SECONDS_IDLE = 60.0
"""After which a connection that sends nothing is closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Where to listen and how to run. max_batch: None = MAX_BATCH where the model has a batch dimension, else 1.

    port: 0 = any that is free. dims: sizes of named dimensions other than the batch in the request that warms up.
    max_bytes: of the body of a request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    threads: int = 1
    max_batch: int | None = None
    max_delay_ms: float = 1.0
    workers: int = 1
    capacity: int = 256
    max_bytes: int = 64 << 20
    dims: Mapping[str, int] = field(default_factory=dict)
    kernels: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise RecipeError(f"port={self.port} is out of range", where="--port", fix="use 0 to 65535")


@dataclass(slots=True, kw_only=True, eq=False)
class Service:
    """A model that answers; `counts` are what /metrics says."""

    name: str
    runner: Runner
    batcher: Batcher
    outputs: Mapping[str, np.ndarray]
    axes: Mapping[str, int]
    max_bytes: int
    counts: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, query: protocol.Query) -> Answer | None:
        """Return the answer to a query; None where the queue is full."""
        answer = self.batcher.ask_if_room(query.feeds)
        if answer is not None:
            self._count(answer)
        return answer

    def metadata(self) -> dict[str, Any]:
        inputs = [protocol.described(spec.name, spec.dtype, spec.shape) for spec in self.runner.inputs]
        outputs = []
        for name, array in self.outputs.items():
            varies = [-1 if axis == self.axes.get(name) else size for axis, size in enumerate(array.shape)]
            outputs.append(protocol.described(name, array.dtype.name, varies))
        return {
            "name": self.name,
            "versions": ["1"],
            "platform": "onnxruntime_onnx",
            "inputs": inputs,
            "outputs": outputs,
        }

    def metrics(self) -> str:
        """Return the counters in the text form of Prometheus."""
        with self.lock:
            counts = dict(self.counts)
        return "".join(f"paredown_{name} {value:g}\n" for name, value in sorted(counts.items()))

    def count(self, name: str, value: float = 1) -> None:
        with self.lock:
            self.counts[name] = self.counts.get(name, 0.0) + value

    def _count(self, answer: Answer) -> None:
        self.count("inferences_total")
        self.count("queue_seconds_total", answer.started - answer.submitted)
        self.count("compute_seconds_total", answer.finished - answer.started)
        self.count("batch_samples_total", answer.batch)


def service(path: Path, spec: Spec) -> Service:
    """Return the file of an output folder, or a file, ready to answer: it has run once.

    Raises InputError where there is no such file, and where `max_batch` is asked of a model that has no batch.
    """
    file = path / "model.onnx" if path.is_dir() else path
    if not file.is_file() or file.suffix != onnx.suffix:
        fix = f"run optimize export {path} --target onnx" if path.is_dir() else "name an output folder or an .onnx file"
        raise InputError("is no exported model", where=str(file), fix=fix)
    runner = onnx.open(file, RunnerOptions(threads=spec.threads, kernels=spec.kernels))
    outputs = tried(runner, random_feeds(runner, _least(runner), spec.dims, 0))
    axes = _axes(runner, spec.dims, required=spec.max_batch not in (None, 1))
    batch = spec.max_batch or (MAX_BATCH if axes else 1)
    policy = Policy(max_batch=batch, max_delay_ms=spec.max_delay_ms, workers=spec.workers, capacity=spec.capacity)
    name = path.resolve().name if path.is_dir() else path.stem
    return Service(
        name=re.sub(r"[^\w.-]+", "_", name),
        runner=runner,
        batcher=Batcher(runner, policy, dims=spec.dims),
        outputs=outputs,
        axes=axes,
        max_bytes=spec.max_bytes,
    )


def _least(runner: Runner) -> int:
    """Return the least batch."""
    first = runner.inputs[0].shape[0] if runner.inputs and runner.inputs[0].shape else 1
    return first if isinstance(first, int) else 1


def _axes(runner: Runner, dims: Mapping[str, int], *, required: bool) -> Mapping[str, int]:
    """Return the batch axis of each output; none where the model has no batch and none is required."""
    try:
        return batch_axes(runner, dims)[1]
    except InputError:
        if required:
            raise
        return {}


class _Server(ThreadingHTTPServer):
    """A thread per connection; a client that leaves early ends its own thread, and is no error of the server."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def server(found: Service, spec: Spec) -> ThreadingHTTPServer:
    """Return a server that listens, and does not answer yet; RecipeError where the address cannot be had."""
    handler = type("Handler", (_Handler,), {"service": found})
    try:
        made = _Server((spec.host, spec.port), handler)
    except OSError as error:
        what = f"{spec.host}:{spec.port} cannot be listened on: {error.strerror or error}"
        raise RecipeError(what, where="--port", fix="use another --port or --host") from error
    made.daemon_threads = False  # what was asked is answered
    return made


def run(path: Path, spec: Spec, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then answer what waits."""
    found = service(path, spec)
    with server(found, spec) as listening:
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        host, port = listening.server_address[:2]
        policy = found.batcher.policy
        say(f"{found.name} at http://{host!s}:{port}/v2/models/{found.name} in {found.runner.name}")
        say(f"batches of up to {policy.max_batch}, which wait {policy.max_delay_ms:g} ms; Ctrl-C ends")
        ended.wait()
        listening.shutdown()
        found.batcher.close()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    service: Service
    protocol_version = "HTTP/1.1"
    timeout = SECONDS_IDLE

    def do_GET(self) -> None:
        name, found = f"/v2/models/{self.service.name}", self.service
        pages: dict[str, Callable[[], dict[str, Any]]] = {
            "/v2": lambda: {
                "name": "paredown",
                "version": version("paredown"),
                "extensions": list(protocol.EXTENSIONS),
            },
            "/v2/health/live": lambda: {"live": True},
            "/v2/health/ready": lambda: {"ready": True},
            name: found.metadata,
            f"{name}/ready": lambda: {"name": found.name, "ready": True},
        }
        path = self.path.rstrip("/")
        if path == "/metrics":
            self._send(HTTPStatus.OK, found.metrics().encode(), "text/plain; version=0.0.4")
        elif path in pages:
            self._send(HTTPStatus.OK, json.dumps(pages[path]()).encode())
        else:
            self._fail(HTTPStatus.NOT_FOUND, f"there is no {self.path}; the model is at {name}")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            self.close_connection = True
            self._fail(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long its body is")
            return
        if int(length) > self.service.max_bytes:
            self.close_connection = True
            what = f"the body has {length} bytes, at most {self.service.max_bytes} are taken"
            self._fail(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, what)
            return
        body = self.rfile.read(int(length))
        name = f"/v2/models/{self.service.name}"
        if self.path not in (f"{name}/infer", f"{name}/versions/1/infer"):
            self._fail(HTTPStatus.NOT_FOUND, f"there is no {self.path}; ask {name}/infer")
            return
        self._infer(body)

    def _infer(self, body: bytes) -> None:
        header = self.headers.get(HEADER)
        try:
            if header is not None and not header.isdigit():
                raise InputError(f'"{header}" is no number', where=HEADER)
            query = protocol.read(body, None if header is None else int(header), self.service.runner.inputs)
            answer = self.service.ask(query)
            if answer is None:
                self._fail(HTTPStatus.SERVICE_UNAVAILABLE, "the queue is full; ask again later")
                return
            if answer.error is not None:
                what = f"the model failed: {answer.error}"
                self._fail(HTTPStatus.INTERNAL_SERVER_ERROR, what)
                return
            content, size = protocol.write(query, answer.outputs, self.service.name)
        except Error as error:
            self._fail(HTTPStatus.BAD_REQUEST, str(error))
            return
        if size is None:
            self._send(HTTPStatus.OK, content)
        else:
            self._send(HTTPStatus.OK, content, "application/octet-stream", {HEADER: str(size)})

    def _send(
        self,
        status: HTTPStatus,
        content: bytes,
        kind: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.service.count(f'responses_total{{code="{status.value}"}}')
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _fail(self, status: HTTPStatus, what: str) -> None:
        self._send(status, json.dumps({"error": what}).encode())

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what is no request or another method than GET and POST, as everything else is refused."""
        self.close_connection = True
        self._fail(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def log_message(self, *_: object) -> None:
        """Print nothing per request: /metrics counts."""
