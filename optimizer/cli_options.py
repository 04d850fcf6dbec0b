"""Groups of options that verbs of the command share, as decorators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)
_AT_LEAST_1 = click.IntRange(min=1)


def _together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return one decorator for several options, which `--help` shows in this order."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


graph = _together(
    click.option(
        "--profile",
        multiple=True,
        metavar="NAME=LEAST:USUAL:LARGEST",
        help="tensorrt: sizes of a named dimension.  [default: 1:8:32 of the first one]",
    ),
    click.option(
        "--precision", type=click.Choice(("fp16", "bf16", "fp32")), help="tensorrt: of what is float.  [fp16]"
    ),
    click.option("--keep", multiple=True, metavar="LAYER", help="tensorrt: a layer that stays in float32."),
    click.option("--fp8", is_flag=True, help="tensorrt: int8 layers as floats of 8 bits (from SM 8.9 on)."),
)

engine = _together(
    click.option("--library", help="tensorrt: tensorrt, or rtx for TensorRT-RTX.  [default: what is installed]"),
    click.option("--plugin", is_flag=True, help="tensorrt: linear layers by our CUDA kernels; never run on a GPU."),
    click.option("--sm", metavar="86,89", help="tensorrt: GPUs of an engine of TensorRT-RTX.  [default: any]"),
    click.option("--timing-cache", type=_PATH, help="tensorrt: file of measured kernels to read and write back."),
    click.option("--memory-limit", type=click.IntRange(1, 2**40), metavar="MIB", help="tensorrt: of the builder."),
)

served = _together(
    click.option("--platform", type=click.Choice(("onnxruntime", "tensorrt")), help="triton: what runs it."),
    click.option("--max-batch", type=click.IntRange(min=1), help="triton: rows of one execution.  [32]"),
    click.option("--max-delay-ms", type=click.FloatRange(min=0), help="triton: wait for a fuller batch.  [1]"),
    click.option("--instances", type=click.IntRange(min=1), help="triton: executions at the same time.  [1]"),
    click.option("--mount", help="triton: where the server sees the repository.  [/models]"),
    click.option("--portable", is_flag=True, help="triton: leave our library out."),
)

load = _together(
    click.option("--min-queries", type=_AT_LEAST_1, help="LoadGen: least queries of each.  [default: 1500]"),
    click.option("--max-batch", type=_AT_LEAST_1, help="LoadGen: samples in a batch.  [default: 8]"),
    click.option("--max-delay-ms", type=float, help="LoadGen: how long a sample waits for others.  [default: 1]"),
    click.option("--workers", type=_AT_LEAST_1, help="LoadGen: threads that call the runtime.  [default: 1]"),
    click.option("--samples-per-query", type=_AT_LEAST_1, help="multistream.  [default: 8]"),
    click.option("--p99-ms", type=float, help="server: the bound on the latency.  [default: 15]"),
    click.option("--rate-per-s", type=float, help="server: run at this rate, search none."),
    click.option("--concurrency", metavar="1,2,4", help="server: clients of a sweep that waits for answers."),
    click.option("--pipeline", metavar="path.py:function", help="stages: what happens before and after the model."),
)

out = _together(
    click.option("--out", type=_PATH, help="Folder to make.  [default: the recipe's name]"),
    click.option("--force", is_flag=True, help="Replace an existing folder."),
    click.option("--resume", is_flag=True, help="Go on from what a killed run had finished."),
    click.option("--strict", is_flag=True, help="Fail instead of falling back on a layer."),
    click.option("--dry-run", is_flag=True, help="Print the plan and what it will cost; write nothing."),
    click.option("--seed", type=click.IntRange(min=0), help="Seed of everything random."),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a value of the recipe."),
)
