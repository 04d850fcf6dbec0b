"""What all tests share: one thread per worker, shapes checked, and a count of what was skipped and why."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator

import jaxtyping
import pytest
from hypothesis import settings

from . import shapes

# Before the conftest of a folder imports the product, and with it torch and numpy, which read these variables.
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    for _library in ("OMP", "OPENBLAS"):
        os.environ.setdefault(f"{_library}_NUM_THREADS", "1")
shapes.install()


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile("fast", max_examples=25)
    if "not slow" in config.option.markexpr and not config.getoption("--hypothesis-profile"):
        settings.load_profile("fast")


def pytest_collection_finish() -> None:
    """Spare the modules that are imported now from every garbage collection to come: a third of all objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def unchecked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let a test that passes wrong tensors on purpose see our own error and not jaxtyping's."""
    shapes.seen.clear()
    off = jaxtyping.config.jaxtyping_disable
    wrong = any(word in request.node.name for word in shapes.WRONG_ON_PURPOSE)
    jaxtyping.config.update("jaxtyping_disable", off or wrong)
    yield
    jaxtyping.config.update("jaxtyping_disable", off)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests were skipped for each reason."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(_reason(report) for report in reports)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")


def _reason(report: pytest.TestReport) -> str:
    """Return why a test was skipped; `longrepr` is (file, line, reason)."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
