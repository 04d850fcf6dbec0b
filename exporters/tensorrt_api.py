"""All that is called of TensorRT, as types: one Protocol per class, of what 10.3 to 11.4 and RTX have in common.

mypy holds every call in this package to these types, and a test holds these types to the bindings of each version
(`tests/exporters/test_tensorrt_api.py`), so that what is called exists. Arguments are passed by position. A Protocol
whose name begins with "Rtx" is of TensorRT-RTX alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias


class Enumerator(Protocol):
    """A member of an enumeration of the library."""

    @property
    def name(self) -> str: ...

    def __int__(self) -> int: ...


class ILogger(Protocol): ...


class Logger(Protocol):
    """The class itself: called, it gives a logger that writes to the standard error stream."""

    @property
    def WARNING(self) -> Enumerator: ...  # noqa: N802

    def __call__(self, least: Enumerator, /) -> ILogger: ...


class NetworkDefinitionCreationFlag(Protocol):
    @property
    def STRONGLY_TYPED(self) -> Enumerator: ...  # noqa: N802


class TensorIOMode(Enumerator, Protocol):
    """The enumeration, and its members."""

    @property
    def INPUT(self) -> TensorIOMode: ...  # noqa: N802


class RtxComputeCapability(Protocol):
    """The enumeration: members "NONE", "CURRENT", "SM86", ..."""

    @property
    def __members__(self) -> Mapping[str, Enumerator]: ...


class IHostMemory(Protocol):
    """Bytes that the library owns."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class ITimingCache(Protocol):
    def serialize(self) -> IHostMemory: ...


class IOptimizationProfile(Protocol):
    def set_shape(self, name: str, least: Sequence[int], usual: Sequence[int], most: Sequence[int], /) -> None: ...


class IBuilderConfig(Protocol):
    def add_optimization_profile(self, profile: IOptimizationProfile, /) -> int: ...

    def create_timing_cache(self, content: bytes, /) -> ITimingCache | None: ...

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool, /) -> bool: ...

    def get_timing_cache(self) -> ITimingCache: ...


class RtxIBuilderConfig(IBuilderConfig, Protocol):
    num_compute_capabilities: int

    def set_compute_capability(self, capability: Enumerator, index: int, /) -> bool: ...


class ITensor(Protocol):
    @property
    def name(self) -> str: ...


class INetworkDefinition(Protocol):
    @property
    def num_inputs(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    def get_input(self, index: int, /) -> ITensor: ...


class Builder(Protocol):
    def create_network(self, flags: int, /) -> INetworkDefinition: ...

    def create_builder_config(self) -> IBuilderConfig: ...

    def create_optimization_profile(self) -> IOptimizationProfile: ...

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig, /
    ) -> IHostMemory | None: ...


class ParserError(Protocol):
    def desc(self) -> str: ...

    def node_name(self) -> str: ...

    def node_operator(self) -> str: ...


class OnnxParser(Protocol):
    @property
    def num_errors(self) -> int: ...

    def parse_from_file(self, path: str, /) -> bool: ...

    def get_error(self, index: int, /) -> ParserError: ...


class IExecutionContext(Protocol):
    def set_input_shape(self, name: str, shape: Sequence[int], /) -> bool: ...

    def infer_shapes(self) -> Sequence[str]: ...

    def get_tensor_shape(self, name: str, /) -> Sequence[int]: ...

    def set_tensor_address(self, name: str, address: int, /) -> bool: ...

    def execute_async_v3(self, stream: int, /) -> bool: ...


class ICudaEngine(Protocol):
    @property
    def num_io_tensors(self) -> int: ...

    def get_tensor_name(self, index: int, /) -> str: ...

    def get_tensor_mode(self, name: str, /) -> TensorIOMode: ...

    def get_tensor_dtype(self, name: str, /) -> Enumerator: ...

    def create_execution_context(self) -> IExecutionContext | None: ...


class Runtime(Protocol):
    def deserialize_cuda_engine(self, content: bytes, /) -> ICudaEngine | None: ...


LoggerClass: TypeAlias = Logger
CreationFlags: TypeAlias = NetworkDefinitionCreationFlag
IOModes: TypeAlias = TensorIOMode
MakeBuilder: TypeAlias = Callable[[ILogger], Builder]
MakeOnnxParser: TypeAlias = Callable[[INetworkDefinition, ILogger], OnnxParser]
MakeRuntime: TypeAlias = Callable[[ILogger], Runtime]


class TensorRT(Protocol):
    """The module: `tensorrt`, or `tensorrt_rtx`."""

    __version__: str
    Logger: LoggerClass
    NetworkDefinitionCreationFlag: CreationFlags
    TensorIOMode: IOModes
    Builder: MakeBuilder
    OnnxParser: MakeOnnxParser
    Runtime: MakeRuntime


class RtxTensorRT(TensorRT, Protocol):
    ComputeCapability: RtxComputeCapability
