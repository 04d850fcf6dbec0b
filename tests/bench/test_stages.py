"""Scenario stages: a pipeline of stages that take a known time on a fake clock, and the shipped one for images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paredown.bench import images, stages
from paredown.bench.pipeline import Pipeline, checked, feeds_of, resolve
from paredown.optimizer.errors import InputError, RecipeError

if TYPE_CHECKING:
    from .conftest import World

TOOK = {"decode": 0.004, "resize": 0.002, "normalise": 0.001, "post": 0.0005}


def _pipeline(world: World) -> Pipeline:
    def stage(name: str, result: object) -> object:
        world.now += TOOK[name]
        return result

    image = np.zeros((1, 3, 8, 8), np.float32)
    before = {name: lambda value, name=name: stage(name, image) for name in ("decode", "resize", "normalise")}
    return Pipeline(items=[b"1", b"2"], before=before, after={"post": lambda value: stage("post", value)})


def test_the_stages_are_what_each_took_and_sum_to_the_whole(world: World) -> None:
    paths = [world.add("a.onnx", lambda _: 0.020), world.add("b.onnx", lambda _: 0.003)]
    spec = stages.Spec(pipeline=_pipeline(world), min_seconds=0.5)
    before, after = stages.run(paths, spec, world.open, clock=lambda: world.now)
    assert before.stages is not None
    assert after.stages is not None
    assert list(before.stages) == ["decode", "resize", "normalise", "queue", "compute", "post"]
    for row, compute in ((before, 20.0), (after, 3.0)):
        expected = {name: 1e3 * took for name, took in TOOK.items()} | {"queue": 0.0, "compute": compute}
        assert row.stages == pytest.approx(expected, rel=0.05)
        assert row.details["stage_sum_to_end_to_end"] == pytest.approx(1, abs=0.1)
        assert row.details["stage_sum_within_10_percent"] is True
    assert (before.details["dominant_stage"], after.details["dominant_stage"]) == ("compute", "decode")
    assert after.ratio_to_baseline == pytest.approx(10.5 / 27.5, rel=0.02)
    assert "most in decode" in str(after.details["summary"])


PIPELINE = """
import numpy as np
def images():
    return {"items": lambda: [b"ab", b"c"],
            "before": {"decode": lambda item: np.full((1, 3, 8, 8), len(item), np.float32)},
            "after": {"post": lambda scores: int(scores.argmax())}}
def wrong():
    return [1, 2]
"""


def test_an_entry_gives_a_pipeline(tmp_path: Path, world: World) -> None:
    (tmp_path / "mine.py").write_text(PIPELINE)
    found = resolve("mine.py:images", tmp_path)
    assert found.items == [b"ab", b"c"]
    spec = stages.Spec(pipeline=found, min_seconds=0.1)
    (row,) = stages.run([world.add("a.onnx", lambda _: 0.01)], spec, world.open, clock=lambda: world.now)
    assert list(row.stages or {}) == ["decode", "queue", "compute", "post"]
    assert {float(feeds["x"][0, 0, 0, 0]) for _, feeds in world.feeds} == {1.0, 2.0}
    with pytest.raises(RecipeError, match=r'mine.py:wrong": it returned list; return \{"items"'):
        resolve("mine.py:wrong", tmp_path)


def test_a_pipeline_that_does_not_fit_is_told(world: World) -> None:
    path = world.add("a.onnx", lambda _: 0.01)
    with pytest.raises(
        RecipeError, match="--pipeline: the scenario stages needs to know what happens around the model"
    ):
        stages.run([path], stages.Spec(), world.open)
    with pytest.raises(RecipeError, match="it has no items; return at least one"):
        checked({"items": [], "before": {}}, "x")
    with pytest.raises(RecipeError, match="its stages are queue; name each once, and none queue, compute"):
        checked({"items": [1], "before": {"queue": len}}, "x")
    with pytest.raises(RecipeError, match="the last stage before the model gave bytes; the model takes x"):
        feeds_of(b"", world.runners["a.onnx"])
    with pytest.raises(RecipeError, match=r"batch=\[2\]; stages runs one item at a time"):
        stages.Spec(batch=(2,))


def _encoded(size: tuple[int, int], kind: str = "PNG") -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def test_the_image_pipeline_is_what_torch_users_write() -> None:
    """An image of the size that is cut keeps its pixels, so the arrays are known."""
    from PIL import Image

    spec = images.Spec(resize=24, crop=24, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    found = images.pipeline([_encoded((24, 24))], spec)
    value: object = found.items[0]
    for stage in found.before.values():
        value = stage(value)
    pixels = np.asarray(Image.open(io.BytesIO(found.items[0])), np.float64)  # type: ignore[arg-type]
    expected = ((pixels / 255 - spec.mean) / spec.std).transpose(2, 0, 1)[None]
    assert isinstance(value, np.ndarray)
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, expected, atol=1e-6)


@pytest.mark.parametrize("size", [(40, 30), (30, 57), (500, 20), (24, 24)])
def test_the_centre_of_the_resized_image_is_cut(size: tuple[int, int]) -> None:
    image = images.decode(_encoded(size, "JPEG"))
    assert images.resize(image, images.Spec(resize=32, crop=28)).size == (28, 28)


def test_the_best_classes_come_first_with_their_probabilities() -> None:
    scores = np.log(np.array([[0.1, 0.6, 0.3]], np.float32))
    assert [(index, round(share, 5)) for index, share in images.best(scores, 2)] == [(1, 0.6), (2, 0.3)]


def test_a_broken_image_names_the_entry(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def images():\n    raise OSError('no such folder')\n")
    with pytest.raises(InputError, match=r"bad.py:2 raised OSError: no such folder"):
        resolve("bad.py:images", tmp_path)
    with pytest.raises(RecipeError, match="images: crop=300 and resize=256; a crop lies within"):
        images.Spec(crop=300)
