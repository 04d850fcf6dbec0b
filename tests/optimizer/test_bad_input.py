"""Whatever is wrong with what a user gives: the documented exit code, one sentence, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from .tiny import edit, listing, optimize, project, reweight

Prepare = Callable[[Path], object]
RUN = ("run", "recipe.yaml", "--out", "out")
SAID = "torch.export must accept it: no Python branches on tensor values, inputs as the recipe says"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is done to the tiny project, the command, its exit code and its sentence."""

    code: int
    says: str
    prepare: tuple[Prepare, ...] = ()
    args: tuple[str, ...] = RUN


def recipe(old: str, new: str) -> Prepare:
    return lambda folder: edit(folder / "recipe.yaml", old, new)


def net(old: str, new: str) -> Prepare:
    return lambda folder: edit(folder / "net.py", old, new)


def code(text: str) -> Prepare:
    """Add to the entry's file; a later definition wins."""
    return lambda folder: (folder / "net.py").write_text((folder / "net.py").read_text() + text)


def put(name: str, content: str | bytes) -> Prepare:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, size: int) -> Prepare:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def step(text: str) -> Prepare:
    return recipe("quantizer: kmeans, bits: 4", text)


def weight(name: str, value: torch.Tensor | None) -> Prepare:
    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {key: tensor for key, tensor in state.items() if key != name}
        return kept if value is None else {**kept, name: value}

    return lambda folder: reweight(folder, change)


def renamed(old: str, new: str) -> Prepare:
    return lambda folder: reweight(folder, lambda s: {new if key == old else key: value for key, value in s.items()})


def plan(text: str) -> Prepare:
    return put("plan.yaml", f"schema: paredown.plan/1\nsteps: {text}\n")


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def evil_pickle(folder: Path) -> None:
    torch.save({"conv1.weight": _Evil()}, folder / "net.pt")
    edit(folder / "recipe.yaml", "net.safetensors", "net.pt")


def evil_archive(folder: Path) -> None:
    entry = {"path_name": "weight_0", "is_param": True, "use_pickle": True, "tensor_meta": None}
    with zipfile.ZipFile(folder / "net.pt2", "w") as archive:
        archive.writestr("net/data/weights/model_weights_config.json", json.dumps({"config": {"conv1.weight": entry}}))
        archive.writestr("net/data/weights/weight_0", pickle.dumps(_Evil()))
    edit(folder / "recipe.yaml", "net.safetensors", "net.pt2")


KEPT = "the layers that are finished are kept for --resume"
NAN = torch.full((8, 3, 3, 3), torch.nan)
NAN[1:] = 0.5
REPLAY = (*RUN, "--plan", "plan.yaml")
TAKEN = (
    'layer "conv1" is compressed already by the step at recipe.yaml:5; name it in one step only, with layers or skip'
)

CHECKPOINTS = {
    "cut short": Case(
        prepare=(cut("net.safetensors", 300),),
        code=3,
        says="net.safetensors: the file is cut short: 300 bytes do not hold a header of 704 bytes; copy it again",
    ),
    "cut in the tensors": Case(
        prepare=(cut("net.safetensors", 3000),),
        code=3,
        says="net.safetensors: the header promises 6352 bytes of tensors, the file holds 2288; copy it again",
    ),
    "corrupt header": Case(
        prepare=(put("net.safetensors", b"\x08" + bytes(7) + b"{]}nope!" + bytes(64)),),
        code=3,
        says="net.safetensors: this is not a safetensors file: its header of 8 bytes cannot be read; copy it again",
    ),
    "empty file": Case(
        prepare=(put("net.safetensors", b""),), code=3, says="net.safetensors: the file is empty; copy it again"
    ),
    "pickle that runs code": Case(
        prepare=(evil_pickle,),
        code=3,
        says="net.pt: refused: would run code (global posix.system); "
        "save the state dict alone: torch.save(model.state_dict(), path)",
    ),
    "pt2 with a pickle": Case(
        prepare=(evil_archive,),
        code=3,
        says="net.pt2: refused: would run code (a pickled weight); export a model of plain tensors",
    ),
    "missing": Case(
        prepare=(recipe("net.safetensors", "nett.safetensors"),),
        code=3,
        says='nett.safetensors: there is no such checkpoint; did you mean "net.safetensors"?',
    ),
    "unknown kind": Case(
        prepare=(recipe("net.safetensors", "net.h5"), put("net.h5", "x")),
        code=3,
        says='net.h5: a checkpoint cannot end in ".h5"; use one of .safetensors, .pt, .pth, .th, .bin, .pt2',
    ),
    "missing key": Case(
        prepare=(weight("linear.bias", None),),
        code=3,
        says='net.safetensors: the checkpoint lacks 1 of the architecture\'s 10 tensors: "linear.bias"; '
        "build the architecture that was trained",
    ),
    "renamed key": Case(
        prepare=(renamed("linear.weight", "lineer.weight"),),
        code=3,
        says='net.safetensors: the checkpoint lacks 1 of the architecture\'s 10 tensors: "linear.weight"; '
        'it has "lineer.weight"; did you mean "lineer.weight"?',
    ),
    "surplus key": Case(
        prepare=(weight("head.weight", torch.ones(2)),),
        code=3,
        says='net.safetensors: the checkpoint has 1 tensor that the architecture lacks: "head.weight"; '
        "build the architecture that was trained",
    ),
    "other shape": Case(
        prepare=(weight("conv1.weight", torch.ones(8, 3, 5, 5)),),
        code=3,
        says='net.safetensors: 1 tensor has another shape: "conv1.weight" is [8, 3, 5, 5] in the checkpoint, '
        "[8, 3, 3, 3] in the architecture; build the architecture that was trained",
    ),
    "NaN weights": Case(
        prepare=(weight("conv1.weight", NAN),),
        code=3,
        says='net.safetensors: "conv1.weight" has 27 of 216 values that are NaN or infinite; '
        "use a checkpoint from before training diverged",
    ),
    "infinite weights": Case(
        prepare=(weight("linear.bias", torch.full((10,), -torch.inf)),),
        code=3,
        says='net.safetensors: "linear.bias" has 10 of 10 values that are NaN or infinite; '
        "use a checkpoint from before training diverged",
    ),
    "integer weights": Case(
        prepare=(weight("conv1.weight", torch.ones(8, 3, 3, 3, dtype=torch.int8)),),
        code=3,
        says='net.safetensors: "conv1.weight" is int8 in the checkpoint, float32 in the architecture; '
        "give the weights as they were before quantization",
    ),
    "a folder that is no model": Case(
        prepare=(recipe('entry: "net.py:build", checkpoint: net.safetensors', "checkpoint: ."),),
        code=3,
        says=".: there is no config.json; give the model an entry",
    ),
}

ENTRIES = {
    "no such file": Case(
        prepare=(recipe("net.py:build", "nett.py:build"),),
        code=2,
        says='entry "nett.py:build": there is no file nett.py; did you mean "net.py"?',
    ),
    "no such function": Case(
        prepare=(recipe("net.py:build", "net.py:bild"),),
        code=2,
        says='entry "net.py:bild": there is no function "bild" in it; did you mean "build"?',
    ),
    "no such module": Case(
        prepare=(recipe("net.py:build", "nowhere_here:build"),),
        code=2,
        says='entry "nowhere_here:build": there is no module "nowhere_here"; install it, or write "path.py:function"',
    ),
    "names no function": Case(
        prepare=(recipe("net.py:build", "net.py"),),
        code=2,
        says='recipe.yaml:1: the entry "net.py" names no function; write "path.py:function" or "module:function"',
    ),
    "raises": Case(
        prepare=(net("return Net()", "return Net(1)"),),
        code=3,
        says='entry "net.py:build": net.py:19 raised TypeError: Net.__init__() takes 1 positional argument but 2 were '
        "given; mend the entry's code",
    ),
    "leaves": Case(
        prepare=(net("return Net()", "raise SystemExit(9)"),),
        code=3,
        says='entry "net.py:build": net.py:19 raised SystemExit: 9; mend the entry\'s code',
    ),
    "syntax error": Case(
        prepare=(net("return Net()", "return Net("),),
        code=3,
        says="entry \"net.py:build\": net.py:19 raised SyntaxError: '(' was never closed; mend the entry's code",
    ),
    "no network": Case(
        prepare=(net("return Net()", "return {}"),),
        code=2,
        says='entry "net.py:build": it returned dict, not a torch.nn.Module; return the built network',
    ),
    "branches on values": Case(
        prepare=(net("return self.linear(", "x = x + 1 if x.sum() > 0 else x\n        return self.linear("),),
        code=6,
        says=f"net.py:16: the network cannot be captured: it branches in Python on the values of a tensor; {SAID}",
    ),
    "does not run": Case(
        prepare=(net("x.mean((2, 3))", "x.mean((2, 3))[:, :3]"),),
        code=6,
        says="net.py:16: the network cannot be captured: a and b must have same reduction dim, but got [16, 3] X "
        f"[16, 10]; {SAID}",
    ),
    "operator without an ONNX form": Case(
        prepare=(
            net("return self.linear(", "x = torch.special.bessel_j0(x)\n        return self.linear("),
            recipe("export: [onnx]", "export: [onnx]\nbench: {}"),
        ),
        code=6,
        says="operator prims.bessel_j0 has no ONNX form; replace it by other operators",
    ),
}

DATA = {
    "empty": Case(
        prepare=(code("\ndef calibration(): return []\n"),),
        code=3,
        says="the data entry: it gave no samples; return at least one batch",
    ),
    "NaN": Case(
        prepare=(code("\ndef calibration(samples): return torch.full((samples, 3, 12, 12), torch.nan)\n"),),
        code=3,
        says='the data entry: batch 0, input "x" has 6912 of 6912 values that are NaN or infinite; '
        "remove them in the entry",
    ),
    "other shape": Case(
        prepare=(code("\ndef calibration(samples): return torch.ones(samples, 3, 12)\n"),),
        code=3,
        says='the data entry: batch 0, input "x" has shape [16, 3, 12], the recipe says [batch, 3, 12, 12]; '
        "return batches of that shape, or mend inputs in the recipe",
    ),
    "too few": Case(
        prepare=(code("\ndef calibration(): return torch.ones(5, 3, 12, 12)\n"),),
        code=3,
        says="the data entry: asked for 16 samples, it gave 5; set samples: 5",
    ),
    "one sample": Case(
        prepare=(recipe("samples: 16", "samples: 1"),),
        code=3,
        says="the data entry: 1 samples cannot be split with 0.125 of them held out; "
        "give more samples, or a fraction between 0 and 1",
    ),
    "other dtype": Case(
        prepare=(code("\ndef calibration(samples): return torch.ones(samples, 3, 12, 12).long()\n"),),
        code=3,
        says='the data entry: batch 0, input "x" is int64, the recipe says float32; '
        "convert it in the entry, or write dtype: int64",
    ),
    "raises": Case(
        prepare=(net("generator=torch.Generator().manual_seed(seed)", "generator=seed"),),
        code=3,
        says=r"regex:recipe\.yaml:2: net\.py:22 raised TypeError: randn\(\).*; mend the entry's code",
    ),
    "too few inputs": Case(
        prepare=(recipe("{x: [batch, 3, 12, 12]}", "{x: [batch, 3, 12, 12], y: [batch, 3]}"),),
        code=3,
        says="the data entry: batch 0 holds 1 tensor, the network has 2 inputs; return one tensor per input: x, y",
    ),
    "more inputs than the network takes": Case(
        prepare=(
            recipe("{x: [batch, 3, 12, 12]}", "{x: [batch, 3, 12, 12], y: [batch, 3]}"),
            code("\ndef calibration(samples): return torch.ones(samples, 3, 12, 12), torch.ones(samples, 3)\n"),
        ),
        code=6,
        says=f"recipe.yaml:1: the network cannot be captured: too many positional arguments; {SAID}",
    ),
    "text": Case(
        prepare=(code("\ndef calibration(): return 'cats'\n"),),
        code=3,
        says="the data entry: it returned str; return a tensor, or an iterable of batches",
    ),
    "unknown argument": Case(
        prepare=(recipe("samples: 16", "samples: 16, args: {size: 3}"),),
        code=2,
        says='recipe.yaml:2: calibration() takes no argument "size"; did you mean "seed"?',
    ),
}

RECIPES = {
    "unknown key": Case(
        prepare=(recipe("steps:", "stepz:"),),
        code=2,
        says='recipe.yaml:4: there is no key "stepz"; did you mean "steps"?',
    ),
    "typo in a step": Case(
        prepare=(step("quantizer: kmeans, bit: 4"),),
        code=2,
        says='recipe.yaml:5: there is no key "bit"; did you mean "bits"?',
    ),
    "unknown step": Case(
        prepare=(recipe("quantize:", "quantise:"),),
        code=2,
        says='recipe.yaml:5: there is no step "quantise"; did you mean "quantize"?',
    ),
    "step of a later version": Case(
        prepare=(recipe("- quantize:", "- recover: {steps: 5}\n  - quantize:"),),
        code=2,
        says='recipe.yaml:5: the step "recover" is not available in this version; use prune, factorize, quantize',
    ),
    "unknown quantizer": Case(
        prepare=(step("quantizer: kmean, bits: 4"),),
        code=2,
        says='recipe.yaml:5: unknown quantizer "kmean"; did you mean "kmeans"?',
    ),
    "layers match nothing": Case(
        prepare=(step('quantizer: kmeans, bits: 4, layers: ["con1"]'),),
        code=2,
        says='recipe.yaml:5: "con1" matches no layer; did you mean "conv1"?',
    ),
    "skip matches nothing": Case(
        prepare=(step('quantizer: kmeans, bits: 4, skip: ["layer3.*"]'),),
        code=2,
        says='recipe.yaml:5: "layer3.*" matches no layer; use one of conv1, conv2, linear',
    ),
    "override matches nothing": Case(
        prepare=(step("quantizer: kmeans, bits: 4, override: {lineer: {bits: 8}}"),),
        code=2,
        says='recipe.yaml:5: "lineer" matches no layer; did you mean "linear"?',
    ),
    "typo in an override": Case(
        prepare=(step("quantizer: kmeans, bits: 4, override: {linear: {bitz: 8}}"),),
        code=2,
        says='recipe.yaml:5: there is no key "bitz"; did you mean "bits"?',
    ),
    "bits out of range": Case(
        prepare=(step("quantizer: kmeans, bits: 5"),),
        code=2,
        says="recipe.yaml:5: bits=5 is not supported; use 2, 3, 4 or 8",
    ),
    "bits in words": Case(
        prepare=(step("quantizer: kmeans, bits: four"),),
        code=2,
        says="recipe.yaml:5: bits must be a whole number, got 'four'",
    ),
    "negative group": Case(
        prepare=(step("quantizer: kmeans, bits: 4, group: -8"),),
        code=2,
        says="recipe.yaml:5: group=-8 is negative; use 0 (one scale per row) or inputs per scale",
    ),
    "group in words": Case(
        prepare=(step("quantizer: kmeans, bits: 4, group: column"),),
        code=2,
        says="recipe.yaml:5: group must be a whole number, got 'column'; or write row",
    ),
    "table rows": Case(
        prepare=(step("quantizer: kmeans, bits: 4, table_rows: 7"),),
        code=2,
        says="recipe.yaml:5: table_rows=7 is not supported; use 0 (one table per tensor) or 16 (one per 16 rows)",
    ),
    "negative damping": Case(
        prepare=(step("quantizer: kmeans, bits: 4, damping: -1"),),
        code=2,
        says="recipe.yaml:5: damping=-1.0 is out of range; use a fraction such as 0.01",
    ),
    "held out": Case(
        prepare=(step("quantizer: kmeans, bits: 4, held_out: 1.5"),),
        code=2,
        says="recipe.yaml:5: held_out=1.5 is out of range; use a part between 0 and 1",
    ),
    "a list for a number": Case(
        prepare=(recipe("samples: 16", "samples: [16]"),),
        code=2,
        says="recipe.yaml:2: samples must be a whole number, got a list",
    ),
    "text for a mapping": Case(
        prepare=(recipe('metric: {entry: "net.py:score"}', "metric: net.py:score"),),
        code=2,
        says="recipe.yaml:3: metric must be a mapping, got 'net.py:score'",
    ),
    "duplicate key": Case(
        prepare=(recipe("export: [onnx]", "export: [onnx]\nexport: []"),),
        code=2,
        says='recipe.yaml:7: the key "export" is there twice; remove one',
    ),
    "not YAML": Case(
        prepare=(recipe("bits: 4}", "bits: 4"),),
        code=2,
        says="recipe.yaml:6: this is not YAML: expected ',' or '}', but got ':'; mend the line",
    ),
    "empty": Case(
        prepare=(put("recipe.yaml", "# later\n"),),
        code=2,
        says='recipe.yaml: the recipe is empty; write at least "steps:"',
    ),
    "missing": Case(
        args=("run", "recipes.yaml", "--out", "out"),
        code=2,
        says='recipes.yaml: there is no such recipe; did you mean "recipe.yaml"?',
    ),
    "a folder": Case(args=("run", ".", "--out", "out"), code=2, says=".: is a folder; name the recipe file in it"),
    "bytes": Case(
        prepare=(put("recipe.yaml", b"\xff\xfe"),), code=2, says="recipe.yaml: is not text: byte 0 is not UTF-8"
    ),
    "no model": Case(
        prepare=(put("recipe.yaml", 'data: {entry: "net.py:calibration"}\nsteps: []\n'),),
        code=2,
        says="recipe.yaml: the recipe names no model; "
        "write model: {entry: ..., checkpoint: ..., inputs: {x: [batch, 3, 32, 32]}}",
    ),
    "no data": Case(
        prepare=(recipe('data: {entry: "net.py:calibration", samples: 16}\n', ""),),
        code=2,
        says='recipe.yaml: the recipe names no data; write data: {entry: "path.py:function"}',
    ),
    "no inputs": Case(
        prepare=(recipe(", inputs: {x: [batch, 3, 12, 12]}", ""),),
        code=2,
        says="recipe.yaml:1: the model has no inputs; "
        "write model: {entry: ..., checkpoint: ..., inputs: {x: [batch, 3, 32, 32]}}",
    ),
    "no entry": Case(
        prepare=(recipe('entry: "net.py:build", ', ""),),
        code=2,
        says='recipe.yaml:1: the model has no entry; write entry: "path.py:function"',
    ),
    "unknown input dtype": Case(
        prepare=(recipe("{x: [batch, 3, 12, 12]}", "{x: {shape: [batch, 3, 12, 12], dtype: float33}}"),),
        code=2,
        says='recipe.yaml:1: input "x" has unknown dtype "float33"; use float32, int64, ...',
    ),
    "unknown target": Case(
        prepare=(recipe("[onnx]", "[onxx]"),),
        code=2,
        says='recipe.yaml:6: there is no export target "onxx"; did you mean "onnx"?',
    ),
    "unknown scenario": Case(
        prepare=(recipe("export: [onnx]", "export: [onnx]\nbench: {scenario: edgy}"),),
        code=2,
        says='recipe.yaml:7: there is no scenario "edgy" in this version; did you mean "edge"?',
    ),
    "unknown runtime": Case(
        prepare=(recipe("export: [onnx]", "export: [onnx]\nbench: {runtime: tensorrt}"),),
        code=7,
        says='recipe.yaml:7: there is no runtime "tensorrt" in this version; use one of onnxruntime',
    ),
    "unknown key of a scenario": Case(
        prepare=(recipe("export: [onnx]", "export: [onnx]\nbench:\n  batch: [1]\n  metr: rapl"),),
        code=2,
        says='recipe.yaml:9: there is no key "metr"; did you mean "meter"?',
    ),
    "value of a scenario's key": Case(
        prepare=(recipe("export: [onnx]", "export: [onnx]\nbench: {frame_ms: soon}"),),
        code=2,
        says="recipe.yaml:7: frame_ms must be a number, got 'soon'",
    ),
    "no address of a device": Case(
        prepare=(recipe("export: [onnx]", "export: [onnx]\nbench: {device: me@board}"),),
        code=2,
        says='recipe.yaml:7: "me@board" is no address of a board; write ssh://user@host or ssh://user@host:22',
    ),
    "bench of nothing": Case(
        prepare=(recipe("export: [onnx]", "bench: {}"),),
        code=2,
        says="recipe.yaml:6: there is no file to measure; write export: [onnx]",
    ),
    "bench of another batch": Case(
        prepare=(
            recipe("[batch, 3, 12, 12]", "[16, 3, 12, 12]"),
            recipe("export: [onnx]", "export: [onnx]\nbench: {batch: [1, 16]}"),
        ),
        code=2,
        says="recipe.yaml:7: batch [1, 16] does not fit the inputs, which fix it at 16; "
        "write batch: [16], or name the dimension",
    ),
    "max_drop without a metric": Case(
        prepare=(recipe('metric: {entry: "net.py:score"}', "gates: {max_drop: 1}"),),
        code=2,
        says='recipe.yaml:3: max_drop needs a metric; write metric: {entry: "path.py:function"}',
    ),
    "two steps on a layer": Case(
        prepare=(recipe("export: [onnx]", "  - quantize: {bits: 8, layers: [conv1]}\nexport: [onnx]"),),
        code=2,
        says=f"recipe.yaml:6: {TAKEN}",
    ),
    "set without a value": Case(
        args=(*RUN, "--set", "seed"), code=2, says="--set seed: there is no value; write path.to.key=value"
    ),
    "set of an unknown key": Case(
        args=(*RUN, "--set", "steps.0.quantize.bitz=3"),
        code=2,
        says='--set steps.0.quantize.bitz=3: there is no key "bitz"; did you mean "bits"?',
    ),
    "set of a step that is not there": Case(
        args=(*RUN, "--set", "steps.3.quantize.bits=3"),
        code=2,
        says='--set steps.3.quantize.bits=3: "3" is not a position in this list; use 0 to 0',
    ),
}

METRICS = {
    "raises": Case(
        prepare=(code("\ndef score(model): return 1 / 0\n"),),
        code=3,
        says="recipe.yaml:3: net.py:29 raised ZeroDivisionError: division by zero; mend the entry's code",
    ),
    "a matrix": Case(
        prepare=(code("\ndef score(model): return torch.zeros(3, 4)\n"),),
        code=3,
        says='metric "net.py:score": the metric returned an array of shape (3, 4); '
        "return one number, or one score per sample",
    ),
    "NaN": Case(
        prepare=(code("\ndef score(model): return float('nan')\n"),),
        code=3,
        says='metric "net.py:score": 1 of 1 scores are not finite; look at the model\'s outputs',
    ),
    "nothing": Case(
        prepare=(code("\ndef score(model): return []\n"),),
        code=3,
        says='metric "net.py:score": the metric returned no scores; give it at least one sample',
    ),
    "text": Case(
        prepare=(code("\ndef score(model): return 'good'\n"),),
        code=3,
        says='metric "net.py:score": the metric returned str, which is not numbers; '
        "return one number, or one score per sample",
    ),
    "no such function": Case(
        prepare=(recipe("net.py:score", "net.py:scores"),),
        code=2,
        says='entry "net.py:scores": there is no function "scores" in it; did you mean "score"?',
    ),
}

OUTPUTS = {
    "existing folder": Case(
        prepare=(lambda folder: (folder / "out").mkdir(),),
        code=2,
        says='the output folder "out" exists already; use --force or another --out',
    ),
    "existing folder and resume": Case(
        prepare=(lambda folder: (folder / "out").mkdir(),),
        args=(*RUN, "--resume"),
        code=2,
        says='the output folder "out" exists already; it is complete; use --force to replace it, or another --out',
    ),
    "somebody's folder": Case(
        args=("run", "recipe.yaml", "--out", ".", "--force"),
        code=2,
        says=r'regex:the folder ".*" was not made by optimize; use another --out',
    ),
    "a file": Case(
        prepare=(put("out", "x"),),
        args=(*RUN, "--force"),
        code=2,
        says='"out" is a file; use another --out',
    ),
    "parent missing": Case(
        args=("run", "recipe.yaml", "--out", "a/b/out"),
        code=2,
        says='the folder "a/b" for the output does not exist; make it first',
    ),
    "plan of another model": Case(
        prepare=(plan("[{quantize: {conv9.weight: {quantizer: kmeans, bits: 4}}}]"),),
        args=REPLAY,
        code=2,
        says='plan.yaml: the model has no layer "conv9.weight"; did you mean "conv2.weight"?',
    ),
    "plan of another recipe": Case(
        prepare=(plan("[{quantize: {}}, {quantize: {}}]"),),
        args=REPLAY,
        code=2,
        says="plan.yaml: it plans quantize, quantize, the recipe quantize; use the plan of this recipe",
    ),
    "plan with a hole": Case(
        prepare=(plan("[{quantize: {conv1.weight: {keep: by hand}, linear.weight: {keep: by hand}}}]"),),
        args=REPLAY,
        code=2,
        says='plan.yaml: it says nothing about layer "conv2.weight"; write {keep: "by hand"} to leave it dense',
    ),
    "plan with a number": Case(
        prepare=(plan("[{quantize: {conv1.weight: 4}}]"),),
        args=REPLAY,
        code=2,
        says='plan.yaml: layer "conv1.weight" is planned without keys; write {keep: "by hand"} to leave it dense',
    ),
    "plan with bad bits": Case(
        prepare=(
            plan(
                "[{quantize: {conv1.weight: {quantizer: kmeans, bits: 5}, "
                "conv2.weight: {keep: by hand}, linear.weight: {keep: by hand}}}]"
            ),
        ),
        args=REPLAY,
        code=2,
        says="plan.yaml, conv1.weight: bits=5 is not supported; use 2, 3, 4 or 8",
    ),
    "plan that is not YAML": Case(
        prepare=(put("plan.yaml", "a: [b"),),
        args=REPLAY,
        code=2,
        says="plan.yaml:1: this is not YAML: expected ',' or ']', but got '<stream end>'; mend the line",
    ),
    "plan that is a list": Case(
        prepare=(put("plan.yaml", "[1, 2]"),),
        args=REPLAY,
        code=2,
        says='plan.yaml: schema is "None", not "paredown.plan/1"; name a plan.yaml of optimize',
    ),
    "plan missing": Case(args=REPLAY, code=2, says="plan.yaml: cannot be read; name a plan.yaml that optimize wrote"),
}

NO_FOLDER = "is not an output folder; it must hold model.json and model.safetensors"
COMMANDS = {
    "unknown verb": Case(args=("rnu", "recipe.yaml"), code=2, says='there is no command "rnu"; did you mean "run"?'),
    "recipe without a verb": Case(
        args=("recipe.yaml",),
        code=2,
        says='"recipe.yaml" is a recipe, not a checkpoint; write optimize run recipe.yaml',
    ),
    "missing argument": Case(args=("run",), code=2, says="missing argument 'RECIPE'; see optimize run --help"),
    "unknown option": Case(
        args=("plan", "recipe.yaml", "--explian"),
        code=2,
        says="no such option '--explian'. Did you mean '--explain'?; see optimize plan --help",
    ),
    "bad seed": Case(
        args=(*RUN, "--seed", "-1"),
        code=2,
        says="invalid value for '--seed': -1 is not in the range x>=0; see optimize run --help",
    ),
    "verify no folder": Case(args=("verify", "nowhere"), code=3, says=f'"nowhere" {NO_FOLDER}'),
    "verify a file": Case(args=("verify", "net.py"), code=3, says=f'"net.py" {NO_FOLDER}'),
    "export no folder": Case(args=("export", "nowhere"), code=3, says=f'"nowhere" {NO_FOLDER}'),
    "export an unknown target": Case(
        args=("export", "nowhere", "--target", "onxx"),
        code=2,
        says='--target: there is no export target "onxx"; did you mean "onnx"?',
    ),
    "show no folder": Case(
        args=("show", "nowhere"), code=3, says="nowhere: there is no report; name the --out folder of a run"
    ),
    "show something else": Case(
        args=("show", "net.py"),
        code=3,
        says="net.py: this is not JSON (Expecting value: line 2 column 1 (char 1)); run again to write it anew",
    ),
    "diff no folder": Case(
        args=("diff", "nowhere", "net.py"), code=3, says="nowhere: there is no report; name the --out folder of a run"
    ),
    "bench no file": Case(
        args=("bench", "nothing.onnx"), code=3, says="nothing.onnx: there is no such artifact; export first"
    ),
    "bench something else": Case(
        args=("bench", "net.py"),
        code=3,
        says="net.py: is not an ONNX file; name .onnx files, the original first",
    ),
    "bench a corrupt file": Case(
        prepare=(put("model.onnx", "hello"),),
        args=("bench", "model.onnx"),
        code=6,
        says=r"regex:model\.onnx: onnxruntime does not load it: .*INVALID_PROTOBUF.*; else export it again",
    ),
    "bench batches in words": Case(
        prepare=(put("model.onnx", "hello"),),
        args=("bench", "model.onnx", "--batch", "one"),
        code=2,
        says='--batch: "one" is not a list of whole numbers; write 1,32',
    ),
    "bench into a file": Case(
        prepare=(put("model.onnx", "hello"),),
        args=("bench", "model.onnx", "--out", "net.py"),
        code=2,
        says='--out: "net.py" is a file; name a folder to write',
    ),
    "checkpoint without inputs": Case(
        args=("net.safetensors", "--entry", "net.py:build", "--data", "net.py:calibration"),
        code=2,
        says="--input: the inputs are not named; write --input x=batch,3,32,32",
    ),
    "checkpoint with a bad input": Case(
        args=("net.safetensors", "--entry", "net.py:build", "--data", "net.py:calibration", "--input", "x"),
        code=2,
        says='--input: "x" names no shape; write --input x=batch,3,32,32',
    ),
    "checkpoint without data": Case(
        args=("net.safetensors", "--entry", "net.py:build"),
        code=2,
        says="missing option '--data'; see optimize CHECKPOINT --help",
    ),
    "checkpoint missing": Case(
        args=(
            "nett.safetensors",
            "--entry",
            "net.py:build",
            "--data",
            "net.py:calibration",
            "--input",
            "x=batch,3,12,12",
        ),
        code=3,
        says=r'regex:.*nett\.safetensors: there is no such checkpoint; did you mean "net\.safetensors"\?',
    ),
}

FAMILIES = {
    "checkpoint": CHECKPOINTS,
    "entry": ENTRIES,
    "data": DATA,
    "recipe": RECIPES,
    "metric": METRICS,
    "output": OUTPUTS,
    "command": COMMANDS,
}
CASES = {f"{family}: {name}": case for family, cases in FAMILIES.items() for name, case in cases.items()}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_told_in_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.chdir(project(tmp_path))
    for prepare in case.prepare:
        prepare(tmp_path)
    before = listing(tmp_path)
    outcome = optimize(monkeypatch, *case.args)
    assert len(outcome.error) == 1, outcome.err
    _assert_says(outcome.error[0], case.says)
    assert outcome.code == case.code
    assert listing(tmp_path) == before


def _assert_says(line: str, wanted: str) -> None:
    if not wanted.startswith("regex:"):
        assert line == f"optimize: {wanted}"
        return
    assert re.fullmatch(f"optimize: {wanted.removeprefix('regex:')}", line), line


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with its output folder."""
    folder = project(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert optimize(patch, *RUN).code == 0
    return folder


def spoil_json(change: Callable[[dict[str, object]], object]) -> Prepare:
    def prepare(folder: Path) -> None:
        path = folder / "out" / "model.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return prepare


def climb(data: dict[str, object]) -> None:
    data["files"] = [{"name": "../../net.py", "sha256": "0"}]


ANEW = "copy the folder again"
FOLDERS = {
    "no model.onnx": Case(
        prepare=(lambda folder: (folder / "out/model.onnx").unlink(),),
        args=("verify", "out"),
        code=3,
        says="out/model.onnx: is missing; run optimize export out",
    ),
    "corrupt model.onnx": Case(
        prepare=(cut("out/model.onnx", 500),),
        args=("verify", "out"),
        code=6,
        says=r"regex:model\.onnx: onnxruntime does not load it: .*; else export it again",
    ),
    "another model's file": Case(
        prepare=(lambda folder: (folder / "out/model.onnx").write_bytes(_other_onnx(folder)),),
        args=("verify", "out"),
        code=6,
        says=r"regex:model\.onnx in onnxruntime.*: outputs differ from torch by .* of their range at batch 1, 1e-04 is "
        r"allowed, first in linear \(.*",
    ),
    "another runtime": Case(
        args=("verify", "out", "--runtime", "onnxruntim"),
        code=7,
        says='--runtime: there is no runtime "onnxruntim" in this version; did you mean "onnxruntime"?',
    ),
    "existing file": Case(
        args=("export", "out"), code=2, says='the file "model.onnx" exists already; use --force or another --out'
    ),
    "export into no folder": Case(
        args=("export", "out", "--out", "a/b.onnx"),
        code=2,
        says='--out: the folder "a" does not exist; name a file to write',
    ),
    "export onto a folder": Case(
        args=("export", "out", "--out", "out", "--force"), code=2, says='--out: "out" is a folder; name a file to write'
    ),
    "cut weights": Case(
        prepare=(cut("out/model.safetensors", 700),),
        args=("verify", "out"),
        code=3,
        says=r"regex:out/model\.safetensors: .*; copy it again",
    ),
    "weights missing": Case(
        prepare=(lambda folder: (folder / "out/model.safetensors").unlink(),),
        args=("export", "out", "--force"),
        code=3,
        says=r"regex:out/model\.safetensors: there is no such checkpoint; .*",
    ),
    "source edited": Case(
        prepare=(lambda folder: edit(folder / "out/source/net.py", "relu", "tanh"),),
        args=("verify", "out"),
        code=3,
        says="out/source/net.py: was changed after it was saved; restore it or run optimize again",
    ),
    "source missing": Case(
        prepare=(lambda folder: shutil.rmtree(folder / "out/source"),),
        args=("export", "out", "--force"),
        code=3,
        says="out/source/net.py: is missing; copy the whole folder",
    ),
    "source outside": Case(
        prepare=(spoil_json(climb),),
        args=("verify", "out"),
        code=3,
        says='out/model.json: source file "../../net.py" would lie outside the folder',
    ),
    "model.json is no JSON": Case(
        prepare=(put("out/model.json", "{"),),
        args=("verify", "out"),
        code=3,
        says=r"regex:out/model\.json: is not JSON: .*",
    ),
    "model.json of another kind": Case(
        prepare=(put("out/model.json", "[]"),),
        args=("verify", "out"),
        code=3,
        says='out/model.json: schema "None" is not "paredown.model/1"; run optimize again',
    ),
    "model.json lacks a part": Case(
        prepare=(spoil_json(lambda data: data.pop("weights")),),
        args=("verify", "out"),
        code=3,
        says=f"out/model.json: does not fit model.safetensors: KeyError 'weights'; {ANEW}",
    ),
    "unknown edit": Case(
        prepare=(spoil_json(lambda data: data.update(edits=[{"edit": "widen"}])),),
        args=("verify", "out"),
        code=3,
        says='out/model.json: unknown edit "widen"; use the version of paredown that wrote it',
    ),
    "report missing": Case(
        prepare=(lambda folder: (folder / "out/report.json").unlink(),),
        args=("show", "out"),
        code=3,
        says="out/report.json: there is no report; name the --out folder of a run",
    ),
    "report of another kind": Case(
        prepare=(put("out/report.json", "[]"),),
        args=("diff", "out", "out"),
        code=3,
        says='out/report.json: schema is "None", not "paredown.report/1"; run again with this version',
    ),
    "report cut": Case(
        prepare=(cut("out/report.json", 50),),
        args=("show", "out"),
        code=3,
        says=r"regex:out/report\.json: this is not JSON .*; run again to write it anew",
    ),
    "bench with a batch of nothing": Case(
        args=("bench", "out/model.onnx", "--batch", "0"),
        code=2,
        says="bench: batch=[0]; list numbers of at least 1",
    ),
    "bench with a size in words": Case(
        args=("bench", "out/model.onnx", "--dim", "seq=long"),
        code=2,
        says='--dim: "seq=long" is not a size; write --dim seq=64',
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_bad_folder_is_told_in_one_sentence(
    name: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = FOLDERS[name]
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for prepare in case.prepare:
        prepare(tmp_path)
    before = listing(tmp_path)
    outcome = optimize(monkeypatch, *case.args)
    assert len(outcome.error) == 1, outcome.err
    _assert_says(outcome.error[0], case.says)
    assert outcome.code == case.code
    assert listing(tmp_path) == before


def test_an_operator_without_an_onnx_form_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project(tmp_path))
    edit(tmp_path / "net.py", "return self.linear(", "x = torch.special.bessel_j0(x)\n        return self.linear(")
    before = listing(tmp_path)
    outcome = optimize(monkeypatch, *RUN)
    told = f"operator prims.bessel_j0 has no ONNX form; replace it by other operators; {KEPT}"
    assert (outcome.code, outcome.error) == (6, [f"optimize: {told}"])
    assert {name.split("/")[0] for name in listing(tmp_path) - before} == {".out.cache"}


def test_a_bug_is_shown_whole_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paredown.optimizer import planning

    def broken(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.chdir(project(tmp_path))
    monkeypatch.setattr(planning, "plan", broken)
    monkeypatch.setattr(sys, "argv", ["optimize", *RUN])
    before = listing(tmp_path)
    from paredown.optimizer import cli

    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.main()
    assert listing(tmp_path) == before


LIMITED = """
import resource, sys
from paredown.optimizer import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
cli.main()
"""


@pytest.mark.slow
def test_a_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    project(tmp_path)
    before = listing(tmp_path)
    command = [sys.executable, "-c", LIMITED, "300", *RUN]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    told = 'cannot write to the output folder "out": file too large; free some space or use another --out'
    assert (done.returncode, _errors(done.stderr)) == (6, [f"optimize: {told}"])
    assert listing(tmp_path) == before


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20k", "none", disk], check=False).returncode
    ):
        pytest.skip("mounting a small disk needs root and the right to mount")
    try:
        project(tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            outcome = optimize(patch, "run", "recipe.yaml", "--out", "disk/out")
        told = 'cannot write to the output folder "out": no space left on device; free some space or use another --out'
        assert outcome.code == 6
        assert outcome.error == [f"optimize: {told}"] or outcome.error == [f"optimize: {told}; {KEPT}"]
        assert listing(disk) == set() or outcome.error[0].endswith(KEPT)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project(tmp_path))
    (tmp_path / "locked").mkdir(mode=0o500)
    outcome = optimize(monkeypatch, "run", "recipe.yaml", "--out", "locked/out")
    told = 'cannot write to the output folder "out": permission denied; free some space or use another --out'
    assert (outcome.code, outcome.error) == (6, [f"optimize: {told}"])


def _errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("optimize:") or "Traceback" in line]


def _other_onnx(folder: Path) -> bytes:
    """Return the file with another value in one weight."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(folder / "out/model.onnx")
    bias = next(item for item in model.graph.initializer if item.name == "linear.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, bias.name))
    return model.SerializeToString()
