"""The part of Triton's inference.ModelConfig that we write, with the numbers and types of tritonclient 2.73.

The client itself pins an older ml_dtypes than ours, so that it cannot be installed beside the package.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

Field = descriptor_pb2.FieldDescriptorProto
TYPES = {
    "int32": Field.TYPE_INT32,
    "int64": Field.TYPE_INT64,
    "uint32": Field.TYPE_UINT32,
    "uint64": Field.TYPE_UINT64,
    "string": Field.TYPE_STRING,
    "bool": Field.TYPE_BOOL,
}
ENUMS = {
    "DataType": (
        *("INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
        *("FP16", "FP32", "FP64", "STRING", "BF16"),
    ),
    "Kind": ("AUTO", "GPU", "CPU", "MODEL"),
}
PREFIX = {"DataType": "TYPE_", "Kind": "KIND_"}
MESSAGES = {
    "ModelTensorReshape": ["shape 1 int64*"],
    "ModelInput": ["name 1 string", "data_type 2 DataType", "dims 4 int64*", "reshape 5 ModelTensorReshape"],
    "ModelOutput": ["name 1 string", "data_type 2 DataType", "dims 3 int64*", "reshape 5 ModelTensorReshape"],
    "ModelInstanceGroup": ["count 2 int32", "kind 4 Kind"],
    "ModelDynamicBatching": ["preferred_batch_size 1 int32*", "max_queue_delay_microseconds 2 uint64"],
    "ModelOperations": ["op_library_filename 1 string*"],
    "WarmupInput": ["data_type 1 DataType", "dims 2 int64*", "zero_data 3 bool", "random_data 4 bool"],
    "WarmupEntry": ["key 1 string", "value 2 WarmupInput"],
    "ModelWarmup": ["name 1 string", "batch_size 2 uint32", "inputs 3 WarmupEntry*"],
    "ModelConfig": [
        *("name 1 string", "platform 2 string", "backend 17 string", "default_model_filename 8 string"),
        *("max_batch_size 4 int32", "input 5 ModelInput*", "output 6 ModelOutput*"),
        *("instance_group 7 ModelInstanceGroup*", "dynamic_batching 11 ModelDynamicBatching"),
        *("model_operations 18 ModelOperations", "model_warmup 16 ModelWarmup*"),
    ],
}


def parse(text: str) -> Any:
    """Return a configuration; raise text_format.ParseError where Triton would refuse it."""
    return text_format.Parse(text, _config())


def _config() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="inference", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=PREFIX[name] + value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields:
            _add(message, *field.split())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()


def _add(message: Any, name: str, number: str, kind: str) -> None:
    field = message.field.add(name=name, number=int(number))
    field.label = Field.LABEL_REPEATED if kind.endswith("*") else Field.LABEL_OPTIONAL
    kind = kind.removesuffix("*")
    field.type = TYPES.get(kind, Field.TYPE_ENUM if kind in ENUMS else Field.TYPE_MESSAGE)
    if kind not in TYPES:
        field.type_name = f".inference.{kind}"
