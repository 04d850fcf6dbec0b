"""The command line reaches a scenario by its name; an option of another scenario is an error."""

from __future__ import annotations

import pytest

from paredown.bench import command, edge
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
    request = command.Request(artifacts=(), settings={"min_secs": 1.0})
    with pytest.raises(RecipeError, match="the scenario edge has no --min-secs"):
        command._spec(edge, request)
