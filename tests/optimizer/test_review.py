"""What a first user found: units, input order, dtypes, folders that are not ours, entries that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paredown.optimizer import entry, metric, planning, recipe, steps, summary, workspace
from paredown.optimizer.errors import InputError, RecipeError
from paredown.optimizer.steps import LayerResult

SOURCE = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x, y):
        return self.fc(x - 2 * y)

def two():
    return Two()

def one():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
"""


def written(folder: Path, model: str) -> recipe.Recipe:
    (folder / "net.py").write_text(SOURCE)
    return recipe.parse(f"model: {model}\n", "r.yaml", folder)


def test_a_rounding_error_above_one_does_not_change_the_unit_of_a_drop() -> None:
    before = metric.evaluate(np.array([1.0000001, 0.9, 1.0]))
    lost = metric.drop(before, metric.evaluate(np.array([0.9, 0.8, 0.9])), seed=0)
    assert (round(lost.value, 3), lost.unit) == (10.0, "points")


def test_a_result_below_zero_does_not_shrink_a_drop() -> None:
    assert metric.drop(metric.evaluate(0.9), metric.evaluate(-0.05), seed=0).value == pytest.approx(95.0)


def test_inputs_in_another_order_than_forward_takes_them_are_refused(tmp_path: Path) -> None:
    found = written(tmp_path, '{entry: "net.py:two", inputs: {y: [batch, 4], x: [batch, 4]}}')
    with pytest.raises(RecipeError, match=r'input "y" is number 1, forward\(x, y\) takes it as number 2; list the'):
        planning.load_model(found)


def test_a_checkpoint_of_another_dtype_makes_the_network_one(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).bfloat16()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    model = '{entry: "net.py:one", checkpoint: net.pt, inputs: {x: {shape: [batch, 4], dtype: bfloat16}}}'
    loaded = planning.load_model(written(tmp_path, model))
    x = torch.ones(3, 4, dtype=torch.bfloat16)
    assert torch.equal(loaded.module()(x), net(x))
    with pytest.raises(RecipeError, match='the checkpoint is bfloat16, the input "x" is float32; write x: '):
        planning.load_model(written(tmp_path, '{entry: "net.py:one", checkpoint: net.pt, inputs: {x: [batch, 4]}}'))


@pytest.mark.parametrize("text", ["os:system", "subprocess:run", "/tmp/anything.py:main"])
def test_a_folder_without_source_names_no_code_of_python_itself(text: str) -> None:
    with pytest.raises(InputError, match="refused: it would run code that the folder does not hold"):
        entry.resolve_from_files(text, ())


def test_a_failed_run_spares_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "out.failed").mkdir()
    (tmp_path / "out.failed" / "notes.txt").write_text("mine")
    work = workspace.open_workspace(tmp_path / "out", resume=False, force=False)
    kept = work.keep_failed()
    work.close()
    assert (tmp_path / "out.failed" / "notes.txt").read_text() == "mine"
    assert kept.name.startswith("out.failed-")


def test_an_output_that_is_a_link_leads_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    work = workspace.open_workspace(tmp_path / "link", resume=False, force=True)
    work.finish()
    work.close()
    assert (tmp_path / "link").is_symlink()
    assert work.out == tmp_path / "real"


def test_each_layer_is_reported_once_by_the_step_that_compressed_it() -> None:
    first = [LayerResult(layer="a", error_rel=0.1), LayerResult(layer="b", error_rel=0.0, reason="not now")]
    second = [LayerResult(layer="b", error_rel=0.2), LayerResult(layer="a", error_rel=0.0, reason="not now")]
    assert [(r.layer, r.error_rel) for r in summary.merged(first, second)] == [("a", 0.1), ("b", 0.2)]


def test_a_name_with_brackets_is_a_glob_that_means_itself() -> None:
    assert steps.matches("m.a[red]", "m.a[red].weight")
    assert not steps.matches("m.a[red]", "m.b.weight")


def test_an_exported_file_tells_a_metric_its_device() -> None:
    class Runner:
        inputs = ()

        def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return feeds

    class Job:
        graph = None

        class model:  # noqa: N801
            inputs = ()
            skeleton = nn.Identity()

    from paredown.optimizer.artifact import as_module

    probe: Tensor = next(as_module(Runner(), Job()).parameters())  # type: ignore[arg-type]
    assert probe.device.type == "cpu"
