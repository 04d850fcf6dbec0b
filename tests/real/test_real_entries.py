"""The entry files of the real checkpoints: strict loading, the README's figures, torch.export and ONNX export."""

from __future__ import annotations

import fnmatch
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

HERE = Path(__file__).parent
RECIPES = sorted((HERE / "recipes").glob("*.yaml"))
RECIPE_FILES = pytest.mark.parametrize("recipe_file", RECIPES, ids=[file.stem for file in RECIPES])
SLOW = pytest.mark.slow

pytestmark = pytest.mark.real


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: on a busy 2-core machine the whole file took 580 s with two threads and 245 s with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data_folder() -> Path:
    """Return the data folder; without it every test that needs it is skipped, with the reason counted by pytest -ra."""
    try:
        return module("data.py").folder()
    except FileNotFoundError as error:
        pytest.skip(f"real checkpoints not tested: {error}")


def module(name: str) -> ModuleType:
    """Import an entry file by its path, as a recipe does."""
    spec = importlib.util.spec_from_file_location(f"real_entry_{Path(name).stem}", HERE / name)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def entry(text: str) -> Callable[..., Any]:
    """Return the function that `../file.py:function` names."""
    file, name = text.split(":")
    assert (HERE / "recipes" / file).is_file()
    return getattr(module(Path(file).name), name)


def trained(recipe: dict[str, Any], data_folder: Path) -> nn.Module:
    """Build the recipe's model, check that the keys are the checkpoint's, and load it."""
    model = entry(recipe["model"]["entry"])()
    path = recipe["model"]["checkpoint"].replace("$PAREDOWN_DATA", str(data_folder))
    tensors = {key.removeprefix("module."): value for key, value in load_file(path).items()}
    wanted = {key: value.shape for key, value in model.state_dict().items() if "num_batches_tracked" not in key}
    assert wanted == {key: value.shape for key, value in tensors.items() if "num_batches_tracked" not in key}
    model.load_state_dict(tensors)
    return model.eval()


def calibration(recipe: dict[str, Any], samples: int, seed: int = 0) -> list[tuple[Tensor, ...]]:
    return entry(recipe["data"]["entry"])(samples, seed)


def shape_of(declared: Any) -> list[int | str]:
    return declared["shape"] if isinstance(declared, dict) else declared


def dynamic(recipe: dict[str, Any]) -> dict[str, dict[int, torch.export.Dim]]:
    """Return the named dimensions of the recipe's inputs; equal names are one dimension."""
    shapes = {name: shape_of(declared) for name, declared in recipe["model"]["inputs"].items()}
    named = {size for shape in shapes.values() for size in shape if isinstance(size, str)}
    dims = {name: torch.export.Dim(name) for name in named}
    return {name: {i: dims[s] for i, s in enumerate(shape) if s in dims} for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "figure", "wanted", "tolerance"),
    [
        # One sample in a classification metric may fall the other way on another machine's arithmetic.
        ("resnet20", "top1_lossless", 0.9150, 0.0011),
        pytest.param("resnet20", "top1_jpeg", 0.8103, 0.0003, marks=SLOW),
        ("resnet56", "top1_lossless", 0.9260, 0.0011),
        pytest.param("resnet56", "top1_jpeg", 0.8320, 0.0003, marks=SLOW),
        ("mobilenet", "top1_all", 0.6067, 0.0034),
        ("mobilenet", "top1", 0.6050, 0.0051),
        ("stories", "loss_all", 1.5133, 0.0001),
        ("stories", "likelihood", -1.5391, 0.0001),
        pytest.param("g2p", "rates_all", (0.0921, 0.2937), 0.0002, marks=SLOW),
        ("g2p", "accuracy", 0.9222, 0.0005),
        pytest.param("dncnn", "psnr", 30.397, 0.001, marks=SLOW),
        ("dncnn", "psnr_256", 30.330, 0.001),
        pytest.param("espnet", "miou", 0.5972, 0.0001, marks=SLOW),
        pytest.param("espnet", "pixel_accuracy", 0.8833, 0.0001, marks=SLOW),
        ("ultraface", "agreement", 1.0, 1e-5),
        ("dtln", "si_sdr_all", 9.69, 0.005),
        ("dtln", "si_sdr", 7.7165, 0.005),
    ],
)
def test_metric_is_the_readme_figure(
    name: str, figure: str, wanted: float | tuple[float, ...], tolerance: float, data_folder: Path
) -> None:
    recipe = yaml.safe_load((HERE / "recipes" / f"{name}.yaml").read_text())
    file, _ = recipe["model"]["entry"].split(":")
    scores = entry(f"{file}:{figure}")(trained(recipe, data_folder))
    found = scores.mean() if isinstance(scores, np.ndarray) else scores
    assert found == pytest.approx(wanted, abs=tolerance)


@RECIPE_FILES
def test_recipe_names_what_exists(recipe_file: Path, data_folder: Path) -> None:
    recipe = yaml.safe_load(recipe_file.read_text())
    model = trained(recipe, data_folder)
    assert list(recipe["model"]["inputs"]) == list(inspect.signature(model.forward).parameters)
    assert callable(entry(recipe["metric"]["entry"]))
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    for pattern in recipe["steps"][0]["quantize"]["override"]:
        assert fnmatch.filter(names, pattern), pattern


@RECIPE_FILES
def test_calibration_is_seeded_and_fits_the_inputs(recipe_file: Path, data_folder: Path) -> None:
    recipe = yaml.safe_load(recipe_file.read_text())
    samples = recipe["data"]["samples"]
    batches, again, other = (calibration(recipe, samples, seed) for seed in (0, 0, 1))
    assert sum(len(batch[0]) for batch in batches) == samples
    assert all(torch.equal(a, b) for x, y in zip(batches, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not all(torch.equal(x[0], y[0]) for x, y in zip(batches, other, strict=True))
    for tensor, declared in zip(batches[0], recipe["model"]["inputs"].values(), strict=True):
        assert tensor.dtype == getattr(torch, declared["dtype"] if isinstance(declared, dict) else "float32")
        assert all(n == size for n, size in zip(tensor.shape, shape_of(declared), strict=True) if isinstance(size, int))


@RECIPE_FILES
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")  # any nn.LSTM
def test_torch_export_gives_the_same_output(recipe_file: Path, data_folder: Path) -> None:
    recipe = yaml.safe_load(recipe_file.read_text())
    model = trained(recipe, data_folder)
    batch, other = (calibration(recipe, samples)[0] for samples in (2, 3))
    program = torch.export.export(model, batch, dynamic_shapes=dynamic(recipe))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*other), model(*other))


@SLOW
@RECIPE_FILES
@pytest.mark.filterwarnings("ignore")  # the exporter warns of its own deprecations, and of equal dimension names
def test_onnx_export_gives_the_same_output(recipe_file: Path, data_folder: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(recipe_file.read_text())
    model = trained(recipe, data_folder)
    batch, other = (calibration(recipe, samples)[0] for samples in (2, 3))
    program = torch.onnx.export(model, batch, dynamo=True, dynamic_shapes=dynamic(recipe), verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {name: tensor.numpy() for name, tensor in zip(recipe["model"]["inputs"], other, strict=True)}
    with torch.no_grad():
        wanted = model(*other)
    for found, output in zip(session.run(None, feeds), [wanted] if isinstance(wanted, Tensor) else wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), output, rtol=1e-3, atol=1e-4)
