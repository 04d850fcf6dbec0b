"""A module `tensorrt` for tests, copied to where it is imported from: an engine is the ONNX file and its profile, and
runs in onnxruntime on the memory whose addresses it is given. STANDIN in the environment says how a build ends.
"""

import ctypes
import enum
import json
import os
import signal
import sys
import time

import numpy as np
import onnx

__version__ = os.environ.get("STANDIN_VERSION", "10.3.0")
NAMES = {"float": "FLOAT", "float16": "HALF", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32, "BOOL": np.bool_}
DataType = enum.Enum("DataType", list(NUMPY))
TensorIOMode = enum.IntEnum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"], start=0)
NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", ["STRONGLY_TYPED"], start=1)


class Logger:
    WARNING = enum.IntEnum("Severity", ["WARNING"]).WARNING

    def __init__(self, least):
        self.least = least


class HostMemory(bytes):
    pass


class Tensor:
    def __init__(self, name):
        self.name = name


class Network:
    proto = None

    @property
    def num_inputs(self):
        return len(self.proto.graph.input)

    @property
    def num_layers(self):
        return len(self.proto.graph.node)

    def get_input(self, index):
        return Tensor(self.proto.graph.input[index].name)


class ParserError:
    def __init__(self, node):
        self._node = node

    def desc(self):
        return "Plugin not found, are the plugin name, version, and namespace correct?"

    def node_name(self):
        return self._node.name

    def node_operator(self):
        return self._node.op_type


class OnnxParser:
    def __init__(self, network, logger):
        self._network, self._errors = network, []

    def parse_from_file(self, path):
        self._network.proto = onnx.load(path)
        self._errors = [ParserError(n) for n in self._network.proto.graph.node if n.domain or n.op_type == "BitShift"]
        return not self._errors

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return self._errors[index]


class Profile(dict):
    def set_shape(self, name, least, usual, most):
        self[name] = [list(least), list(most)]


class TimingCache(bytes):
    def serialize(self):
        return HostMemory(self)


class Config:
    profile = None
    cache = None

    def add_optimization_profile(self, profile):
        self.profile = dict(profile)
        return 0

    def create_timing_cache(self, content):
        return TimingCache(content or b"standin")

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return ignore_mismatch or cache.startswith(b"standin")

    def get_timing_cache(self):
        return self.cache


class Builder:
    def __init__(self, logger):
        pass

    def create_network(self, flags):
        assert flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return Network()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        end = os.environ.get("STANDIN", "")
        if end in ("SIGKILL", "SIGABRT"):
            os.kill(os.getpid(), getattr(signal, end))
        if end == "hang":
            print("hanging", file=sys.stderr, flush=True)
            time.sleep(600)
        if end:
            print(f"[11/21/2026-18:00:00] [TRT] [E] {end}", file=sys.stderr)
            return None
        if config.cache is not None:
            config.cache = TimingCache(config.cache + b" timed")
        fed = {value.name for value in network.proto.graph.input}
        assert set(config.profile or {}) <= fed
        header = json.dumps(config.profile).encode()
        return HostMemory(header + b"\n" + network.proto.SerializeToString())


class Context:
    def __init__(self, session, profile):
        self._session, self._profile = session, profile
        self._shapes, self._addresses, self._results = {}, {}, {}

    def set_input_shape(self, name, shape):
        (value,) = [value for value in self._session.get_inputs() if value.name == name]
        low, high = (self._profile or {}).get(name, [value.shape, value.shape])
        self._shapes[name] = tuple(shape)
        return len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def infer_shapes(self):
        feeds = {v.name: self._memory(v).copy() for v in self._session.get_inputs()}
        names = [value.name for value in self._session.get_outputs()]
        self._results = dict(zip(names, self._session.run(names, feeds), strict=True))
        return []

    def get_tensor_shape(self, name):
        return self._results[name].shape

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        for name, value in self._results.items():
            ctypes.memmove(self._addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)
        return True

    def _memory(self, value):
        dtype, shape = np.dtype(NUMPY[kind(value)]), self._shapes[value.name]
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer(ctypes.string_at(self._addresses[value.name], size), dtype).reshape(shape)


class Engine:
    def __init__(self, session, profile):
        self._session, self._profile = session, profile
        self._values = {v.name: v for v in (*session.get_outputs(), *session.get_inputs())}

    @property
    def num_io_tensors(self):
        return len(self._values)

    def get_tensor_name(self, index):
        return list(self._values)[index]

    def get_tensor_mode(self, name):
        fed = {value.name for value in self._session.get_inputs()}
        return TensorIOMode.INPUT if name in fed else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DataType[kind(self._values[name])]

    def create_execution_context(self):
        return Context(self._session, self._profile)


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, content):
        header, _, model = content.partition(b"\n")
        if not model:
            return None
        import onnxruntime  # building needs none, and starts faster without

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        return Engine(session, json.loads(header))


def kind(value):
    return NAMES[value.type.removeprefix("tensor(").removesuffix(")")]
