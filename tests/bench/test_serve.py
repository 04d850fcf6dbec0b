"""A server of the open inference protocol: what it answers, how requests share batches, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from paredown.bench import protocol, serve
from paredown.optimizer.errors import InputError, RecipeError
from paredown.optimizer.model import InputSpec

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)
X = InputSpec(name="x", shape=("batch", 4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output folder with a file that multiplies by WEIGHT."""
    result = tmp_path / "my net"
    result.mkdir()
    write(result / "model.onnx", ["batch", 4])
    return result


def write(path: Path, shape: Sequence[Any]) -> None:
    ends = (
        helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape[:-1], 3]),
    )
    node, held = helper.make_node("MatMul", ["x", "w"], ["y"]), numpy_helper.from_array(WEIGHT, "w")
    graph = helper.make_graph([node], "g", [ends[0]], [ends[1]], [held])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


class Client:
    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, bytes, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        connection.request(method, path, content, headers or {})
        answer = connection.getresponse()
        found = answer.status, answer.read(), answer.headers
        connection.close()
        return found

    def infer(self, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        status, content, _ = self.ask("POST", "/v2/models/my_net/infer", body, headers)
        return status, json.loads(content)


@pytest.fixture
def client(folder: Path) -> Iterator[Client]:
    yield from started(folder, serve.Spec(port=0, max_delay_ms=50))


def started(folder: Path, spec: serve.Spec) -> Iterator[Client]:
    found = serve.service(folder, spec)
    with serve.server(found, spec) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield Client(listening.server_address[1])
        listening.shutdown()
        found.batcher.close()
        thread.join()


def tensor(values: np.ndarray, **more: Any) -> dict[str, Any]:
    return {"name": "x", "shape": list(values.shape), "datatype": "FP32", **more}


def test_pages_say_what_is_served(client: Client) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/my_net/ready"):
        assert client.ask("GET", path)[0] == 200
    assert json.loads(client.ask("GET", "/v2")[1])["extensions"] == ["binary_tensor_data"]
    found = json.loads(client.ask("GET", "/v2/models/my_net")[1])
    assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert found["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}]
    status, content, _ = client.ask("GET", "/v2/models/other")
    assert (status, json.loads(content)["error"]) == (
        404,
        "there is no /v2/models/other; the model is at /v2/models/my_net",
    )


def test_numbers_in_json_are_answered(client: Client) -> None:
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    status, found = client.infer({"id": "7", "inputs": [tensor(x, data=x.tolist())]})
    assert status == 200
    (y,) = found["outputs"]
    assert (found["id"], found["model_name"], y["name"], y["datatype"], y["shape"]) == (
        "7",
        "my_net",
        "y",
        "FP32",
        [2, 3],
    )
    np.testing.assert_allclose(np.array(y["data"]).reshape(2, 3), x @ WEIGHT, rtol=1e-5)


def test_raw_bytes_are_answered_raw(client: Client) -> None:
    x = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    asked = {
        "inputs": [tensor(x, parameters={"binary_data_size": x.nbytes})],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
    }
    text = json.dumps(asked).encode()
    headers = {serve.HEADER: str(len(text))}
    status, content, answered = client.ask("POST", "/v2/models/my_net/infer", text + x.tobytes(), headers)
    size = int(answered[serve.HEADER])
    assert status == 200
    assert json.loads(content[:size])["outputs"][0]["parameters"] == {"binary_data_size": 36}
    np.testing.assert_allclose(np.frombuffer(content[size:], np.float32).reshape(3, 3), x @ WEIGHT, rtol=1e-5)


def test_requests_share_batches_and_are_counted(client: Client) -> None:
    values = np.random.default_rng(2).standard_normal((8, 1, 4)).astype(np.float32)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: client.infer({"inputs": [tensor(x, data=x.tolist())]}), values))
    for x, (status, answer) in zip(values, found, strict=True):
        assert status == 200
        np.testing.assert_allclose(np.array(answer["outputs"][0]["data"])[None], x @ WEIGHT, rtol=1e-5)
    lines = dict(line.rsplit(" ", 1) for line in client.ask("GET", "/metrics")[1].decode().splitlines())
    assert lines["paredown_inferences_total"] == "8"
    assert lines['paredown_responses_total{code="200"}'] == "8"
    assert float(lines["paredown_batch_samples_total"]) > 8


X1 = np.zeros((1, 4), np.float32)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"{", "the body is no JSON"),
        ({}, '"inputs" is no list of tensors'),
        ({"inputs": []}, "the input x is missing"),
        ({"inputs": [tensor(X1, data=[0] * 4) | {"name": "z"}]}, '"z" is given twice or is none of the inputs; give x'),
        ({"inputs": [tensor(X1, data=[0] * 4) | {"datatype": "INT8"}]}, "its datatype is INT8; give FP32"),
        ({"inputs": [tensor(X1, data=[0] * 3)]}, "it has 3 numbers, its shape says 4"),
        ({"inputs": [tensor(X1, data=["a"] * 4)]}, "its data are no numbers of float32"),
        ({"inputs": [tensor(X1, data=[0, None, 0, 0])]}, "its data hold null, NaN, Infinity or what is too large for"),
        ({"inputs": [tensor(X1, data=[0, float("nan"), 0, 0])]}, "its data hold null, NaN, Infinity or what"),
        ({"inputs": [tensor(X1, data=[0, 1e39, 0, 0])]}, "too large for float32; send such numbers as raw bytes"),
        (
            {"inputs": [tensor(X1, data=[3e38] * 4)]},
            'output "y": it holds NaN or Infinity, which JSON has not; ask for',
        ),
        ({"inputs": [tensor(X1[:, :3], data=[0] * 3)]}, "its shape is [1, 3]; give [batch, 4]"),
        ({"inputs": [tensor(X1[:0], data=[])]}, "its shape is [0, 4]; give [batch, 4]"),
        ({"inputs": [tensor(X1, parameters={"binary_data_size": 8})]}, "binary_data_size is 8, and 0 bytes are left"),
        ({"inputs": [tensor(X1, data=[0] * 4)], "outputs": [{"name": "q"}]}, 'the model has no output "q"; use y'),
    ],
)
def test_what_does_not_fit_is_one_sentence(client: Client, body: Any, what: str) -> None:
    status, found = client.infer(body)
    assert status == 400
    assert what in found["error"]
    assert client.infer({"inputs": [tensor(X1, data=[0] * 4)]})[0] == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "HEAD", "BREW"])
def test_another_method_is_refused_as_all_else_is(client: Client, method: str) -> None:
    status, content, headers = client.ask(method, "/v2")
    assert status == 501
    assert headers["Content-Type"] == "application/json"
    assert method == "HEAD" or json.loads(content) == {"error": f"Unsupported method ('{method}')"}


def test_what_is_no_request_is_refused(client: Client) -> None:
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as peer:
        peer.sendall(b"not a request at all\r\n\r\n")
        answer = peer.makefile("rb").read().decode()
    assert '{"error": "Bad request ' in answer


def test_a_named_dimension_has_one_size() -> None:
    specs = (X, InputSpec(name="z", shape=("batch", 1)))
    body = {"inputs": [tensor(X1, data=[0] * 4), {"name": "z", "shape": [2, 1], "datatype": "FP32", "data": [0, 0]}]}
    with pytest.raises(InputError, match="batch is 1 in x and 2 in z"):
        protocol.read(json.dumps(body).encode(), None, specs)


def test_every_type_comes_back_as_it_was() -> None:
    for name, dtype in protocol.DATATYPES.items():
        value = np.array([[0, 1]]).astype(dtype)
        spec = InputSpec(name="x", shape=("batch", 2), dtype=dtype)
        query = protocol.Query(identity="", feeds={}, outputs={}, binary=True)
        body, size = protocol.write(query, {"x": value}, "m")
        assert size is not None
        document = json.loads(body[:size])
        assert document["outputs"][0]["datatype"] == name
        text = json.dumps({"inputs": document["outputs"]}).encode()
        found = protocol.read(text + body[size:], len(text), (spec,)).feeds["x"]
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)


def test_too_much_is_refused_unread(folder: Path) -> None:
    for client in started(folder, serve.Spec(port=0, max_bytes=10)):
        status, content, _ = client.ask("POST", "/v2/models/my_net/infer", b"x" * 11)
        assert status == 413
        assert "at most 10 are taken" in json.loads(content)["error"]


def test_a_full_queue_says_so(folder: Path) -> None:
    found = serve.service(folder, serve.Spec(port=0, capacity=1, max_delay_ms=5000))
    query = protocol.Query(identity="", feeds={"x": X1}, outputs={}, binary=False)
    waiting = threading.Thread(target=found.ask, args=(query,))
    waiting.start()
    while not found.batcher._state.waiting:
        pass
    assert found.ask(query) is None
    found.batcher.close()
    waiting.join()


def test_a_model_without_a_batch_runs_one_by_one(tmp_path: Path) -> None:
    write(tmp_path / "fixed.onnx", [1, 4])
    found = serve.service(tmp_path / "fixed.onnx", serve.Spec())
    assert (found.name, found.batcher.policy.max_batch) == ("fixed", 1)
    found.batcher.close()
    with pytest.raises(InputError, match='input "x" has no named batch dimension'):
        serve.service(tmp_path / "fixed.onnx", serve.Spec(max_batch=4))


def test_what_cannot_be_served_is_one_sentence(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match=r"model\.onnx: is no exported model; run optimize export"):
        serve.service(tmp_path, serve.Spec())
    spec = serve.Spec(port=0)
    found = serve.service(folder, spec)
    with serve.server(found, spec) as taken:
        with pytest.raises(RecipeError, match="cannot be listened on: Address already in use; use another --port"):
            serve.server(found, replace(spec, port=taken.server_address[1]))
        found.batcher.close()
    with pytest.raises(RecipeError, match="--port: port=70000 is out of range"):
        serve.Spec(port=70000)


@pytest.mark.slow
def test_the_command_serves_and_ends(folder: Path) -> None:
    command = [sys.executable, "-P", "-m", "paredown.optimizer.cli", "serve", str(folder), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("my_net at http://127.0.0.1:")
        port = int(line.split(":")[2].partition("/")[0])
        assert Client(port).infer({"inputs": [tensor(X1, data=[0] * 4)]})[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_client_that_leaves_early_leaves_no_traceback(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for client in started(folder, serve.Spec(port=0)):
        with socket.create_connection(("127.0.0.1", client.port)) as gone:
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
            gone.sendall(b"POST /v2/models/my_net/infer HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")
        assert client.ask("GET", "/v2/health/live")[0] == 200
    assert capfd.readouterr().err == ""
