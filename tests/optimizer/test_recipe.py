"""Recipes: strict reading, exact errors, and a dump that reads back equal."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paredown.optimizer import recipe, tree
from paredown.optimizer.errors import RecipeError
from paredown.optimizer.model import InputSpec

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    bits: int = 4
    group: int = field(default=0, metadata={"aliases": {"row": 0}})
    table: Literal["int8", "fp16"] = "int8"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise RecipeError(f"bits={self.bits} is not supported", fix="use 2, 3, 4 or 8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lnq:
    format: Grid
    rounds: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf:
    format: Grid = field(default_factory=lambda: Grid(bits=8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize:
    quantizer: str = "lnq"
    layers: tuple[str, ...] = ("*",)
    override: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fold: bool = True
    limit: float | None = None


def spec_types(fields: Mapping[str, Any]) -> tuple[type, ...]:
    known = {"lnq": Lnq, "nf": Nf}
    name = fields.get("quantizer", "lnq")
    if name not in known:
        raise RecipeError(f'unknown quantizer "{name}"', fix='did you mean "lnq"?')
    return Quantize, known[name]


@pytest.fixture(autouse=True)
def fake_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fake.step` is somebody else's step module."""
    step = types.ModuleType("fake.step")
    step.spec_types = spec_types  # type: ignore[attr-defined]
    plain = types.ModuleType("fake.plain")
    plain.Spec = Grid  # type: ignore[attr-defined]
    for name, module in {"fake": types.ModuleType("fake"), "fake.step": step, "fake.plain": plain}.items():
        monkeypatch.setitem(sys.modules, name, module)


def parse_step(text: str) -> recipe.Step:
    return recipe.parse(f"steps:\n  - fake.step: {text}\n", "r.yaml").steps[0]


def error_of(text: str, *settings: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.parse(text, "r.yaml", settings=settings)
    assert caught.value.exit_code == 2
    return str(caught.value)


FULL = """
model:
  entry: "net.py:build"
  checkpoint: $PAREDOWN_DATA/x/net.safetensors
  inputs:
    x: [batch, 3, 32, 32]
    ids: {shape: [batch, seq], dtype: int64}
  args: {width: 16}
data: {entry: "net.py:data", samples: 100, seed: 3}
metric: {entry: "net.py:top1"}
steps:
  - fake.step: {bits: 3, group: row, damping: 1e-3, override: {"conv1": {bits: 8}}}
  - fake.plain:
gates: {max_drop: 1, verify: true}
export: [onnx]
bench: {batch: [1, 32]}
"""


def test_full_recipe() -> None:
    read = recipe.parse(FULL, "r.yaml")
    assert read.model is not None
    assert read.data is not None
    assert read.bench is not None
    x, ids = (
        InputSpec(name="x", shape=("batch", 3, 32, 32)),
        InputSpec(name="ids", shape=("batch", "seq"), dtype="int64"),
    )
    assert read.model.inputs == (x, ids)
    assert read.model.args == {"width": 16}
    assert (read.data.samples, read.data.seed) == (100, 3)
    first, second = read.steps
    assert first.spec == Quantize(override={"conv1": {"bits": 8}})
    assert first.extras == (Lnq(format=Grid(bits=3, damping=0.001)),)
    assert (second.name, second.spec, second.extras) == ("fake.plain", Grid(), ())
    assert read.gates == recipe.Gates(max_drop=1.0)
    assert read.bench.batch == (1, 32)
    assert read.at("gates") == "r.yaml:14"
    assert first.where == "r.yaml:12"


@pytest.mark.parametrize("text", [FULL, "steps: []", "seed: 3", 'model: {checkpoint: "no"}', "{}"])
def test_dump_reads_back_equal(text: str) -> None:
    read = recipe.parse(text)
    assert recipe.parse(recipe.dump(read)) == read
    assert recipe.dump(recipe.parse(recipe.dump(read))) == recipe.dump(read)


@pytest.mark.parametrize("path", sorted(ROOT.glob("optimizer/recipes/*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes(path: Path) -> None:
    read = recipe.read(path)
    assert read.steps
    assert recipe.parse(recipe.dump(read)) == read


words = st.text(max_size=12) | st.sampled_from(
    ["no", "on", "1e3", "0x1f", "1:30", "~", "null", "2020-01-01", "<<", "=", "1_0"]
)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | numbers | words, lambda x: st.lists(x) | st.dictionaries(words, x), max_leaves=8
)


def listed(value: Any) -> Any:
    """Return nested tuples as lists: what YAML calls a list comes back as a tuple."""
    if isinstance(value, Mapping):
        return {key: listed(item) for key, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, list | tuple) else value


@given(st.dictionaries(words, plain, max_size=4))
def test_any_arguments_survive_the_dump(args: dict[str, Any]) -> None:
    made = recipe.Recipe(metric=recipe.MetricSpec(entry="m:f", args=args))
    back = recipe.parse(recipe.dump(made))
    assert back.metric is not None
    assert listed(back.metric.args) == listed(args)


def test_plain_values_are_those_of_yaml_1_2() -> None:
    read = recipe.parse("metric: {entry: 'm:f', args: {a: no, b: 1:30, c: 1e-3, d: 0x1f, e: 1_0, f: 2020-01-01, g: ~}}")
    assert read.metric is not None
    assert read.metric.args == {
        "a": "no",
        "b": "1:30",
        "c": 0.001,
        "d": "0x1f",
        "e": "1_0",
        "f": "2020-01-01",
        "g": None,
    }


def test_anchors_and_aliases() -> None:
    read = recipe.parse("data: &d {entry: 'm:f', args: &a {k: [1]}}\nmetric: {entry: 'm:g', args: *a}\n")
    assert read.data is not None
    assert read.metric is not None
    assert read.metric.args == read.data.args == {"k": (1,)}


def test_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    read = recipe.parse("seed: 0", base=Path("a/b"))
    assert read.path("net.pt") == Path("a/b/net.pt")
    assert read.path("/abs/net.pt") == Path("/abs/net.pt")
    monkeypatch.delenv("PAREDOWN_DATA", raising=False)
    assert read.path("$PAREDOWN_DATA/c/net.pt") == Path("../shared/data/c/net.pt")
    monkeypatch.setenv("PAREDOWN_DATA", "/d")
    assert read.path("$PAREDOWN_DATA/c/net.pt") == read.path("${PAREDOWN_DATA}/c/net.pt") == Path("/d/c/net.pt")


TOP = "use one of batch, device, runtime, scenario, threads"
BAD = {
    "": 'r.yaml: the recipe is empty; write at least "steps:"',
    "# only a comment": 'r.yaml: the recipe is empty; write at least "steps:"',
    "- a\n- b": 'r.yaml:1: a recipe is a mapping, got a list; begin with "model:" or "steps:"',
    "hello": 'r.yaml:1: a recipe is a mapping, got \'hello\'; begin with "model:" or "steps:"',
    "seed: 1\nstep: []": 'r.yaml:2: there is no key "step"; did you mean "steps"?',
    "seed: 1\nseed: 2": 'r.yaml:2: the key "seed" is there twice; remove one',
    "seed: one": "r.yaml:1: seed must be a whole number, got 'one'",
    "seed: 1.5": "r.yaml:1: seed must be a whole number, got 1.5",
    "seed: true": "r.yaml:1: seed must be a whole number, got true",
    "seed:": "r.yaml:1: seed must be a whole number, got nothing",
    "seed: -1": "r.yaml:1: seed=-1 is out of range; use 0 or more",
    "seed: 1\n\n\nobjective: speed": "r.yaml:4: objective must be one of latency, size, got 'speed'; "
    "use one of latency, size",
    "objective: latancy": "r.yaml:1: objective must be one of latency, size, got 'latancy'; did you mean \"latency\"?",
    "export: onnx": "r.yaml:1: export must be a list, got 'onnx'; write [onnx]",
    "export: [1]": "r.yaml:1: export[0] must be text, got 1",
    "gates: {max_drop: lots}": "r.yaml:1: max_drop must be a number, got 'lots'",
    "gates:\n  max_drop: -1": "r.yaml:2: max_drop=-1.0 is out of range; use 0 or more",
    "gates: {max_drop: .inf}": "r.yaml:1: max_drop must be a number, got '.inf'",
    "gates: {max_drop: 1e999}": "r.yaml:1: max_drop must be a number, got inf",
    "gates: {verify: yes}": "r.yaml:1: verify must be true or false, got 'yes'",
    "gates: [verify]": "r.yaml:1: gates must be a mapping, got a list",
    "bench: {batch: [0]}": "r.yaml:1: batch=0 is out of range; use 1 or more",
    "bench: {threads: []}": "r.yaml:1: threads is empty; write threads: [1]",
    "data: {samples: 3}": 'r.yaml:1: the key "entry" is missing',
    "data: {entry: f}": 'r.yaml:1: the entry "f" names no function; write "path.py:function" or "module:function"',
    "data: {entry: 3}": "r.yaml:1: entry must be text, got 3",
    "data:\n  entry: a:f\n  samples: 0": "r.yaml:3: samples=0 is out of range; use 1 or more",
    "model: {}": 'r.yaml:1: the model has neither entry nor checkpoint; write entry: "path.py:function"',
    "model: {checkpoint: a.pt, inputs: [x]}": "r.yaml:1: inputs must be a mapping, got a list",
    "model: {checkpoint: a.pt, inputs: {x: 3}}": "r.yaml:1: inputs.x must be a list, got 3; write [3]",
    "model: {checkpoint: a.pt, inputs: {x: [b, 1.5]}}": "r.yaml:1: inputs.x[1] must be a whole number or text, got 1.5",
    "model: {checkpoint: a.pt, inputs: {x: [b, 0]}}": 'r.yaml:1: input "x" has dimension 0; '
    "use positive sizes or names",
    "model: {checkpoint: a.pt, inputs: {x: {shape: [1], dtype: f4}}}": 'r.yaml:1: input "x" has unknown dtype "f4"; '
    "use float32, int64, ...",
    "model: {checkpoint: a.pt, inputs: {x: {shap: [1]}}}": 'r.yaml:1: there is no key "shap"; did you mean "shape"?',
    "model: {checkpoint: a.pt, inputs: {x: {dtype: int64}}}": 'r.yaml:1: input "x" has no shape; '
    "write x: [batch, 3, 32, 32]",
    "steps:": 'r.yaml:1: steps must be a list, got nothing; write "- quantize: {...}"',
    "steps: {quantize: {}}": 'r.yaml:1: steps must be a list, got a mapping; write "- quantize: {...}"',
    "steps:\n  - quantize": "r.yaml:2: a step is one name with its settings, got 'quantize'; "
    'write "- quantize: {bits: 4}"',
    "steps:\n  - a: {}\n    b: {}": "r.yaml:2: a step is one name with its settings, got a, b; "
    'write "- quantize: {bits: 4}"',
    "steps:\n  - quantise: {}": 'r.yaml:2: there is no step "quantise"; did you mean "quantize"?',
    "steps:\n  - recover: {}": 'r.yaml:2: the step "recover" is not available in this version; '
    "use prune, factorize, quantize",
    "steps:\n  - fake.none: {}": "r.yaml:2: the step \"fake.none\" cannot be imported: No module named 'fake.none'; "
    "'fake' is not a package; install its package",
    "steps:\n  - fake.step: 4": "r.yaml:2: fake.step must be a mapping, got 4",
    "steps:\n  - quantize: {quantizer: lnk}": 'r.yaml:2: unknown quantizer "lnk"; did you mean "lnq"?',
    "seed: [1": "r.yaml:1: this is not YAML: expected ',' or ']', but got '<stream end>'; mend the line",
    "seed: 1\n\tgates: {}": "r.yaml:2: this is not YAML: "
    "found character '\\t' that cannot start any token; mend the line",
    "seed: 1\n---\nseed: 2": "r.yaml:2: this is not YAML: but found another document; mend the line",
    "seed: *x": "r.yaml:1: this is not YAML: found undefined alias 'x'; mend the line",
    "seed: \x00": "r.yaml: this is not YAML: unacceptable character #x0000: special characters are not allowed",
    "seed: !!python/name:os.system": 'r.yaml:1: the tag "tag:yaml.org,2002:python/name:os.system" is not allowed; '
    "write a plain value",
    "seed: !!int x": "r.yaml:1: 'x' cannot be read as int",
    "export: &a [*a]": "r.yaml: values are nested too deeply",
    "[a]: 1": "r.yaml:1: a key must be text",
    "seed: " + "[" * 5000: "r.yaml: values are nested too deeply",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_bad_recipe(text: str) -> None:
    assert error_of(text) == BAD[text]


def test_aliases_that_blow_up() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    assert "aliases repeat without end; write the values out" in error_of("\n".join(lines))


BAD_STEPS = {
    "{bit: 4}": 'r.yaml:2: there is no key "bit"; did you mean "bits"?',
    "{bits: four}": "r.yaml:2: bits must be a whole number, got 'four'",
    "{bits: 5}": "r.yaml:2: bits=5 is not supported; use 2, 3, 4 or 8",
    "\n      fold: true\n      bits: 5": "r.yaml:4: bits=5 is not supported; use 2, 3, 4 or 8",
    "{group: rows}": "r.yaml:2: group must be a whole number, got 'rows'; or write row",
    "{table: fp61}": "r.yaml:2: table must be one of int8, fp16, got 'fp61'; did you mean \"fp16\"?",
    "{layers: conv1}": "r.yaml:2: layers must be a list, got 'conv1'; write [conv1]",
    "{fold: 1}": "r.yaml:2: fold must be true or false, got 1",
    "{quantizer: lnk}": 'r.yaml:2: unknown quantizer "lnk"; did you mean "lnq"?',
    "{quantizer: nf, rounds: 3}": 'r.yaml:2: there is no key "rounds"; did you mean "group"?',
    "{override: [conv1]}": "r.yaml:2: override must be a mapping, got a list",
    "{override: {conv1: 8}}": "r.yaml:2: conv1 must be a mapping, got 8",
    "{override: {conv1: {bit: 8}}}": 'r.yaml:2: there is no key "bit"; did you mean "bits"?',
    "\n      override:\n        conv1:\n          bits: 7": "r.yaml:5: bits=7 is not supported; use 2, 3, 4 or 8",
    "{override: {a: {override: {b: {}}}}}": "r.yaml:2: an override within an override; "
    "list the glob beside the other one",
}


@pytest.mark.parametrize("text", BAD_STEPS)
def test_bad_step(text: str) -> None:
    assert error_of(f"steps:\n  - fake.step: {text}\n") == BAD_STEPS[text]


def test_override_may_choose_another_quantizer() -> None:
    step = parse_step("{rounds: 2, override: {a: {quantizer: nf}, b: {group: row, rounds: 1}}}")
    assert step.spec.override == {"a": {"quantizer": "nf"}, "b": {"group": 0, "rounds": 1}}


def test_a_default_of_the_quantizer_holds_where_the_recipe_is_silent() -> None:
    assert parse_step("{quantizer: nf}").extras == (Nf(format=Grid(bits=8)),)
    assert parse_step("{quantizer: nf, group: 8}").extras == (Nf(format=Grid(bits=8, group=8)),)


def test_amend() -> None:
    step = parse_step("{bits: 3, limit: 2}")
    changed = recipe.amend(step, {"bits": 8})
    assert changed.extras == (Lnq(format=Grid(bits=8)),)
    assert changed.spec == step.spec
    with pytest.raises(RecipeError, match=r"^r.yaml:2: bits=5 is not supported; use 2, 3, 4 or 8$"):
        recipe.amend(step, {"bits": 5})


SETTINGS: dict[str, Any] = {
    "steps.0.fake.step.bits=8": 8,
    "steps.0.fake.step.group=row": 3,
    'steps.0."fake.step".bits=2': 2,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_set(setting: str) -> None:
    read = recipe.parse("steps:\n  - fake.step: {bits: 3}\n", settings=[setting])
    assert read.steps[0].extras[0].format.bits == SETTINGS[setting]


def test_set_makes_what_is_missing_and_finds_keys_with_dots() -> None:
    text = "steps:\n  - fake.step: {override: {layer3.0: {bits: 8}}}\n"
    settings = ["gates.max_drop=2", "export=[onnx]", "steps.0.fake.step.override.layer3.0.bits=2"]
    read = recipe.parse(text, settings=settings)
    assert read.gates.max_drop == 2.0
    assert read.export == ("onnx",)
    assert read.steps[0].spec.override == {"layer3.0": {"bits": 2}}


BAD_SETTINGS = {
    "seed": "--set seed: there is no value; write path.to.key=value",
    "=3": "--set =3: there is no value; write path.to.key=value",
    "sed=3": '--set sed=3: there is no key "sed"; did you mean "seed"?',
    "seed=x": "--set seed=x: seed must be a whole number, got 'x'",
    "seed.a=3": '--set seed.a=3: "a" lies within 1, which is no mapping; shorten the path',
    "steps.2.fake.step.bits=3": '--set steps.2.fake.step.bits=3: "2" is not a position in this list; use 0 to 0',
    "steps.x=3": '--set steps.x=3: "x" is not a position in this list; use 0 to 0',
    "steps.0.fake.step.bits=5": "--set steps.0.fake.step.bits=5: bits=5 is not supported; use 2, 3, 4 or 8",
    "seed=[1": "--set seed=[1: this is not YAML: expected ',' or ']', but got '<stream end>'; mend the line",
}


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_bad_set(setting: str) -> None:
    assert error_of("seed: 1\nsteps:\n  - fake.step: {bits: 3}\n", setting) == BAD_SETTINGS[setting]


def test_files(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("seed: x\n")
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xff\n")
    expected = {
        "demo.yaml": ":1: seed must be a whole number, got 'x'",
        "latin.yaml": ": is not text: byte 6 is not UTF-8",
        "dem.yaml": ': there is no such recipe; did you mean "demo.yaml"?',
        "no/dem.yaml": ": there is no such recipe; name a YAML file",
        "": ": is a folder; name the recipe file in it",
    }
    for name, text in expected.items():
        with pytest.raises(RecipeError) as caught:
            recipe.read(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}{text}"
    (tmp_path / "demo.yaml").write_text("seed: 3\n")
    assert recipe.read(tmp_path / "demo.yaml").base == tmp_path


def test_tree_round_trip() -> None:
    node = tree.of_plain({"a": [1, "b", None], "c": {"d": 1.5}}, "here")
    assert node.plain() == {"a": (1, "b", None), "c": {"d": 1.5}}


def test_keys_of_a_scenario_stay_with_their_lines_until_it_is_known() -> None:
    read = recipe.parse("bench:\n  batch: [2]\n  meter: rapl\n  state: {y: h}\n", "r.yaml")
    assert read.bench is not None
    assert {name: (node.plain(), node.where) for name, node in read.bench.settings.items()} == {
        "meter": ("rapl", "r.yaml:3"),
        "state": ({"y": "h"}, "r.yaml:4"),
    }
    again = recipe.parse(recipe.dump(read), "s.yaml")
    assert again.bench == read.bench
