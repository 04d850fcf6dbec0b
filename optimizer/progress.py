"""Progress for people: a bar with the time left on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 2.0


@dataclass(slots=True, kw_only=True)
class Reporter:
    """Tells what is going on. `console` goes to standard error, so that results can be piped."""

    console: Console
    clock: Callable[[], float] = time.monotonic
    _bar: Progress | None = field(default=None, init=False)
    _label: str = field(default="", init=False)
    _started: float = field(default=0.0, init=False)
    _printed: float = field(default=-1e9, init=False)

    def stage(self, label: str) -> None:
        """Begin a stage, ending the one before."""
        self.close()
        self._label, self._started, self._printed = label, self.clock(), -1e9
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._bar.add_task(escape(label), total=None)
        else:
            self.console.print(f"{label} ...", highlight=False, markup=False)

    def update(self, done: float, total: float, detail: str = "") -> None:
        """Say how far the stage is."""
        if self._bar is not None:
            text = f"{self._label}: {detail}" if detail else self._label
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=escape(text))
        elif self.clock() - self._printed >= LINE_EVERY_SECONDS and self.clock() - self._started >= LINE_EVERY_SECONDS:
            self._printed = self.clock()
            self.console.print(f"  {self._line(done, total)} {detail}".rstrip(), highlight=False, markup=False)

    def close(self) -> None:
        """End the stage; one line says how long it took if that was worth a mention."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self.console.print(
                f"{escape(self._label)} [dim]{self.clock() - self._started:.1f} s[/dim]", highlight=False
            )
        self._label = ""

    def _line(self, done: float, total: float) -> str:
        share = done / total if total else 0.0
        passed = self.clock() - self._started
        left = f", about {passed * (1 - share) / share:.0f} s left" if share > 0 else ""
        return f"{100 * share:.0f} %{left}"
