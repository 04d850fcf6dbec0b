"""The command line reaches a scenario by its name; an option of another scenario is an error."""

from __future__ import annotations

import pytest

from paredown.bench import command, edge, server, stages
from paredown.optimizer import recipe
from paredown.optimizer.errors import RecipeError


def test_a_scenario_is_a_module_with_spec_and_run() -> None:
    for name in command.SCENARIOS:
        module = command.scenario(name, "--scenario")
        assert callable(module.run)
        assert module.Spec().batch


def test_an_unknown_scenario_gets_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r'there is no scenario "egde" in this version.*edge'):
        command.scenario("egde", "--scenario")


def test_an_option_of_another_scenario_is_an_error() -> None:
    with pytest.raises(RecipeError, match="the scenario edge has no --min-secs"):
        command._check_settings([edge], {"min_secs": 1.0})


def test_pairs_of_the_command_line_are_mappings() -> None:
    settings = {"state": ("stateN=state",), "inputs": ("sr=16000", "gain=0.5"), "frame_ms": 32.0, "meter": "none"}
    spec = command._spec(edge, command.Request(artifacts=(), settings=settings))
    assert (spec.state, spec.inputs) == ({"stateN": "state"}, {"sr": 16000, "gain": 0.5})
    assert (spec.frame_ms, spec.meter) == (32.0, "none")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"state": ("stateN",)}, r'^--state: "stateN" is not a pair; write --state NAME=VALUE$'),
        ({"inputs": ("sr=",)}, r'^--input: "sr=" is not a pair; write --input NAME=VALUE$'),
        ({"inputs": ("sr=fast",)}, r'^--input: "fast" is not a number; write --input sr=16000$'),
    ],
)
def test_pairs_that_are_none_are_told(settings: dict[str, tuple[str, ...]], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        command._spec(edge, command.Request(artifacts=(), settings=settings))


def test_a_recipe_has_the_keys_of_its_scenario() -> None:
    text = "bench: {batch: [2, 4], meter: none, frame_ms: 8, state: {y: h}, inputs: {sr: 16000}, min_seconds: 2}"
    bench = recipe.parse(text, "r.yaml").bench
    assert bench is not None
    spec = command.recipe_spec(bench, 7, "r.yaml:1")
    assert (spec.batch, spec.threads, spec.seed) == ((2, 4), (1,), 7)
    assert (spec.meter, spec.frame_ms, spec.min_seconds) == ("none", 8.0, 2.0)
    assert (spec.state, spec.inputs) == ({"y": "h"}, {"sr": 16000})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("bench: {metr: none}", r'^r.yaml:1: there is no key "metr"; did you mean "meter"\?$'),
        ("bench: {seed: 3}", r'^r.yaml:1: there is no key "seed"'),
        ("bench: {min_seconds: 0}", r"^r.yaml:1: min_seconds=0.0 is not positive"),
        ("bench: {fresh: thread}", r"^r.yaml:1: fresh must be one of process, session, got 'thread'"),
    ],
)
def test_a_key_that_the_scenario_lacks_is_told_with_its_line(line: str, says: str) -> None:
    bench = recipe.parse(line, "r.yaml").bench
    assert bench is not None
    with pytest.raises(RecipeError, match=says):
        command.recipe_spec(bench, 0, "r.yaml:1")


def test_an_option_may_belong_to_one_of_several_scenarios() -> None:
    settings = {"p99_ms": 5.0}
    command._check_settings([edge, server], settings)
    assert command._spec(server, command.Request(artifacts=(), settings=settings)).p99_ms == 5
    assert command._spec(edge, command.Request(artifacts=(), settings=settings)) == edge.Spec()
    with pytest.raises(RecipeError, match="none of edge, stages has --p99-ms"):
        command._check_settings([edge, stages], settings)
