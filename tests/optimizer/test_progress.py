"""Progress: lines for a file, a bar for a terminal, names with brackets as they are."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console

from paredown.optimizer.progress import Reporter


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def lines() -> tuple[Reporter, Clock, io.StringIO]:
    text, clock = io.StringIO(), Clock()
    return Reporter(console=Console(file=text, width=100), clock=clock), clock, text


def test_a_file_gets_a_line_for_each_stage_and_one_every_two_seconds() -> None:
    reporter, clock, text = lines()
    reporter.stage("calibrate [x]")
    for second in range(9):
        clock.now = float(second)
        reporter.update(second, 10, f"layer[{second}]")
    reporter.close()
    assert text.getvalue().splitlines() == [
        "calibrate [x] ...",
        "  20 %, about 8 s left layer[2]",
        "  40 %, about 6 s left layer[4]",
        "  60 %, about 4 s left layer[6]",
        "  80 %, about 2 s left layer[8]",
    ]


def test_a_short_stage_prints_one_line() -> None:
    reporter, clock, text = lines()
    reporter.stage("load")
    clock.now = 1.9
    reporter.update(1, 2)
    reporter.stage("write")
    reporter.close()
    assert text.getvalue().splitlines() == ["load ...", "write ..."]


def test_nothing_done_has_no_time_left() -> None:
    reporter, clock, text = lines()
    reporter.stage("load")
    clock.now = 5.0
    reporter.update(0, 0)
    clock.now = 8.0
    reporter.update(0, 4)
    assert text.getvalue().splitlines() == ["load ...", "  0 %", "  0 %"]


def test_a_terminal_gets_a_bar_and_the_time_that_it_took() -> None:
    text, clock = io.StringIO(), Clock()
    reporter = Reporter(console=Console(file=text, force_terminal=True, width=100, color_system=None), clock=clock)
    reporter.stage("quantize [/b]")
    reporter.update(1, 4, "blocks[0] [/x]")
    clock.now = 3.25
    reporter.stage("write")
    reporter.close()
    shown = text.getvalue()
    assert "quantize [/b] 3.2 s" in shown
    assert "write 0.0 s" in shown
    assert "...\n" not in shown


def test_closing_twice_is_fine() -> None:
    reporter, _, text = lines()
    reporter.close()
    reporter.stage("load")
    reporter.close()
    reporter.close()
    assert text.getvalue() == "load ...\n"
