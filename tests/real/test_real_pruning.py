"""Pruning the real checkpoints: the groups that a reader finds, and a cut network computes what the masked one does."""

from __future__ import annotations

import functools
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paredown.optimizer import cut, planning, prune, recipe, widths
from paredown.optimizer.groups import Group, Unit
from paredown.optimizer.prune import Analysis, Spec
from paredown.optimizer.walk import Batch

HERE = Path(__file__).parent
DRAWS = 4
"""Random prunings of each checkpoint, every group in each of them."""

ESPNET = {
    "encoder.level1.conv": 16,
    **{f"encoder.{block}.c1.conv": 12 for block in ("level2_0", "level2.0", "level2.1")},
    "encoder.level2_0.d2.conv": 12,  # running sums join d2 to d16 of a block, the residual those of all blocks
    "encoder.level2_0.d1.conv": 16,
    **{f"encoder.{block}.c1.conv": 25 for block in ("level3_0", *(f"level3.{i}" for i in range(8)))},
    "encoder.level3_0.d2.conv": 25,
    "encoder.level3_0.d1.conv": 28,
    **dict.fromkeys(("encoder.classifier.conv", "level3_C.conv", "up_l3.0", "up_l2.0", "conv.conv"), 12),
    "combine_l2_l3.1.c1.conv": 2,
    "combine_l2_l3.1.d2.conv": 2,
    "combine_l2_l3.1.d1.conv": 4,
}
MOBILENET = (16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)
ULTRAFACE = (32, 32, 32, 64, 64, 64, 64, 128, 128, 128, 256, 256)
WIDTHS = {
    # A shortcut without weights pads a wider stage with zeros: one residual width for all stages, the pads stay.
    "resnet20": {"conv1": 16, **{f"layer{i}.{j}.conv1": 8 * 2**i for i in (1, 2, 3) for j in range(3)}},
    "mobilenet": {"conv1": 8, **{f"conv_pw_{i}": width for i, width in enumerate(MOBILENET, 1)}},
    "dncnn": {f"dncnn.{place}": 64 for place in (0, *range(2, 47, 3))},
    "espnet": ESPNET,
    "ultraface": {
        "base_net.0.0": 16,
        **{f"base_net.{i}.3": width for i, width in enumerate(ULTRAFACE, 1)},
        "extras.0.0": 64,
        "extras.0.2.2": 256,
    },
    # The normalized width and what a mask multiplies stay.
    "dtln": {f"sep{i}.lstm{j}.weight_ih_l0": 128 for i in (1, 2) for j in (1, 2)},
    # The decoder starts from the encoder's state.
    "g2p": {"enc_emb": 256, "enc_w_ih": 256, "dec_emb": 256},
    # Key heads, each with its two query heads.
    "stories": {f"layers.{i}.{n}": w for i in range(5) for n, w in (("attention.wq", 4), ("feed_forward.w1", 172))},
}
"""Checkpoint -> group -> its units: what a person finds by reading the networks."""
CHECKPOINTS = pytest.mark.parametrize("name", WIDTHS)

pytestmark = pytest.mark.real


@pytest.fixture(scope="module", autouse=True)
def data_folder() -> Iterator[None]:
    """Name the data folder to recipes; without it every test is skipped, with the reason counted by pytest -ra."""
    known = runpy.run_path(str(HERE / "data.py"))
    try:
        found = known["folder"]()
    except FileNotFoundError as error:
        pytest.skip(f"real checkpoints not tested: {error}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(known["VARIABLE"], str(found))
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def analysed(name: str) -> tuple[Analysis, Batch]:
    """Return a checkpoint as its recipe loads it, followed on two samples of its calibration data, and these."""
    read = recipe.read(HERE / "recipes" / f"{name}.yaml")
    assert read.data is not None
    job = planning.load(replace(read, data=replace(read.data, samples=2)))
    return prune.analyse(job.model, Spec(), job.graph, job.calibration), job.calibration.batches[0]


def drawn(group: Group, generator: torch.Generator) -> list[Unit]:
    """Return random units of a group, as many of each cell."""
    count = int(torch.randint(1, group.width, (), generator=generator))
    return [cell[i] for cell in group.cells for i in torch.randperm(len(cell), generator=generator)[:count].tolist()]


@CHECKPOINTS
def test_groups_are_those_that_a_reader_finds(name: str) -> None:
    found, _ = analysed(name)
    assert {group.name: len(group.units) for group in found.groups} == WIDTHS[name]
    assert not found.fit.refused


@CHECKPOINTS
def test_a_cut_checkpoint_computes_what_the_masked_one_does(name: str) -> None:
    found, batch = analysed(name)
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        chosen = {group.name: drawn(group, generator) for group in found.groups}
        attributes: dict[str, Any] = {}
        for group, own in chosen.items():
            attributes |= widths.values(found.model, found.channels, own, found.fit.attributes.get(group, ()))
        units = [unit for own in chosen.values() for unit in own]
        small, masked = cut.cut(found.model, units, attributes), cut.masked(found.model, units)
        assert small.parameters() < 0.95 * found.model.parameters()
        assert widths.difference(masked, small, batch) <= 1e-4
        assert widths.difference(found.model, masked, batch) > 1e-2
