"""The command's help, names and speed, the Python API, and Hugging Face folders."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import paredown.optimizer
from paredown.optimizer import cli, store

from .tiny import optimize, project

VERBS = ("bench", "bundle", "demo", "diff", "doctor", "export", "plan", "run", "serve", "show", "verify")
HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "yaml", "rich", "safetensors", "transformers")
LIGHT = f"""
import sys
from paredown.optimizer import cli
try:
    cli.main()
finally:
    print("HEAVY", *sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)
"""


@pytest.mark.parametrize("args", [("--help",), ("run", "--help"), ("--version",)], ids=" ".join)
def test_help_is_fast_and_imports_nothing_heavy(args: tuple[str, ...]) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", LIGHT, *args], capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        assert (done.returncode, done.stderr) == (0, "HEAVY\n")
    assert min(seconds) < 1


def test_every_verb_has_help(monkeypatch: pytest.MonkeyPatch) -> None:
    overview = optimize(monkeypatch, "--help")
    assert overview.code == 0
    assert sorted(cli.cli.commands) == sorted(VERBS)
    for verb in (*VERBS, "CHECKPOINT"):
        outcome = optimize(monkeypatch, verb, "--help")
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out.startswith(f"Usage: optimize {verb} [OPTIONS]")
        if verb != "CHECKPOINT":
            assert f"\n  {verb} " in overview.out


def test_every_option_says_what_it_does() -> None:
    for command in (*cli.cli.commands.values(), cli._checkpoint):
        assert command.help
        silent = [param.name for param in command.params if isinstance(param, click.Option) and not param.help]
        assert not silent, command.name


def test_without_a_verb_there_is_help(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = optimize(monkeypatch)
    assert outcome.code == 2
    assert "optimize run RECIPE" in outcome.err


def test_the_version_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import version

    outcome = optimize(monkeypatch, "--version")
    assert (outcome.code, outcome.out) == (0, f"optimize, version {version('paredown')}\n")


def test_a_report_is_printed_in_any_locale(tmp_path: Path) -> None:
    from .example_report import full_report

    (tmp_path / "report.json").write_text(json.dumps(full_report()))
    command = [sys.executable, "-c", "from paredown.optimizer import cli; cli.main()", "show", tmp_path]
    done = subprocess.run(command, capture_output=True, env={"PYTHONIOENCODING": "ascii"}, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"conv1" in done.stdout


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    from .example_report import full_report

    (tmp_path / "report.json").write_text(json.dumps(full_report()))
    command = f'{sys.executable} -c "from paredown.optimizer import cli; cli.main()" show {tmp_path} | true'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_public_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert paredown.optimizer.__all__ == sorted(paredown.optimizer.__all__)
    assert paredown.optimizer.load is store.load
    assert set(paredown.optimizer.__all__) <= set(dir(paredown.optimizer))
    for name in paredown.optimizer.__all__:
        assert inspect.getdoc(getattr(paredown.optimizer, name)), name
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        paredown.optimizer.lode  # noqa: B018
    importing = "import sys, paredown.optimizer; print(sorted(set(sys.modules) & {'torch', 'numpy', 'click'}))"
    done = subprocess.run([sys.executable, "-c", importing], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_pipeline_as_functions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from paredown.optimizer import Options, load, read_recipe, run_recipe

    recipe = read_recipe(project(tmp_path) / "recipe.yaml", ["export=[]"])
    found = run_recipe(recipe, Options(out=tmp_path / "out"))
    assert found["final"]["size_bytes"] < found["baseline"]["size_bytes"] / 4
    assert load(tmp_path / "out").module()(torch.zeros(2, 3, 12, 12)).shape == (2, 10)
    assert capsys.readouterr() == ("", "")


def test_a_runner_may_call_the_command() -> None:
    result = CliRunner().invoke(cli.cli, ["doctor"])
    assert result.exit_code == 0


BERT = {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "num_labels": 3}
BERT |= {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
BERT |= {"vocab_size": 40, "max_position_embeddings": 16}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
LLAMA |= {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
LLAMA |= {"vocab_size": 40, "max_position_embeddings": 16, "num_hidden_layers": 1}
DATA = """
import torch

def calibration(samples):
    ids = torch.randint(0, 40, (samples, 8), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids)

@torch.no_grad()
def score(model):
    ids, mask = calibration(12)
    return (model(input_ids=ids, attention_mask=mask).logits.flatten(1).argmax(1) % 2).double()
"""
HF_RECIPE = """
model:
  checkpoint: hf
  inputs: {input_ids: {shape: [batch, 8], dtype: int64}, attention_mask: {shape: [batch, 8], dtype: int64}}
data: {entry: "data.py:calibration", samples: 32}
metric: {entry: "data.py:score"}
steps:
  - quantize: {quantizer: kmeans, bits: 4}
export: [onnx]
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("config", [pytest.param(BERT, id="bert"), pytest.param(LLAMA, id="llama")])
def test_a_hugging_face_folder(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="Hugging Face folders need transformers")
    from paredown.optimizer import huggingface

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    state = {name: value.clone() for name, value in huggingface.build(tmp_path / "hf").state_dict().items()}
    save_file(state, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "data.py").write_text(DATA)
    (tmp_path / "recipe.yaml").write_text(HF_RECIPE)
    outcome = optimize(monkeypatch, "run", "recipe.yaml", "--out", "out")
    assert (outcome.code, outcome.error) == (0, [])
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert found["final"]["size_bytes"] < found["baseline"]["size_bytes"] / 3
    assert found["final"]["metric"]["n"] == 12
    assert {path.name for path in (tmp_path / "out/source").iterdir()} == {"config.json"}
    (tmp_path / "hf").rename(tmp_path / "moved")
    module = store.load(tmp_path / "out").module()
    assert type(module).__name__ == config["architectures"][0]
    ids = torch.arange(16).view(2, 8)
    before = huggingface.build(tmp_path / "moved")
    before.load_state_dict(state)
    with torch.no_grad():
        want, have = (net(ids, torch.ones_like(ids)).logits for net in (before, module))
    assert 0 < float((have - want).norm() / want.norm()) < 0.5
    assert optimize(monkeypatch, "verify", "out").code == 0
    quick = ("--set", "bench=null", "--set", "export=[]", "--set", "steps.0.quantize.quantizer=kmeans")
    shapes = ("--input", "input_ids=batch,8:int64", "--input", "attention_mask=batch,8:int64")
    outcome = optimize(monkeypatch, "moved", "--data", "data.py:calibration", "--samples", "16", *shapes, *quick)
    assert (outcome.code, outcome.error) == (0, [])
