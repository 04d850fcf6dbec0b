"""One connection to a board: JSON lines and file contents over the standard streams of ssh, with a heart that beats."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..optimizer.errors import Error, RuntimeMissingError
from . import device as devices
from .device import Device

BEAT_SECONDS = 5.0
END_SECONDS = 10.0
RECEIVE = Path(__file__).with_name("board") / "receive.py"
AGAIN = "run the same command again: what was copied and the cells that were finished are kept"


class Link:
    """A connection whose other end is `board/receive.py`, which later becomes `board/agent.py`."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.greeted = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        python = os.environ.get(devices.BOARD_PYTHON, "python3")
        remote = f"exec {shlex.quote(python)} -c {shlex.quote(RECEIVE.read_text(encoding='utf-8'))}"
        try:
            self._process = subprocess.Popen(
                device.command(remote), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
            )
        except FileNotFoundError as error:
            self._errors.close()
            raise RuntimeMissingError("there is no ssh here", fix="install openssh-client") from error
        self._stop, self._writing = threading.Event(), threading.Lock()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def say(self, values: dict[str, Any]) -> None:
        """Send a line."""
        self.write(json.dumps(values).encode() + b"\n")

    def write(self, content: bytes) -> None:
        """Send bytes; where the board ended instead of reading them, `messages` says why."""
        assert self._process.stdin is not None
        try:
            with self._writing:
                self._process.stdin.write(content)
                self._process.stdin.flush()
        except OSError:
            self._stop.set()

    def start_heart(self) -> None:
        """Let the board know from now on that this end is alive."""
        self._heart.start()

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield what the board says; the error that it reports, or that ended the connection, is raised."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = _message(line)
            if message is None:  # what a shell's start-up files print
                continue
            if message["kind"] == "error":
                raise devices.from_board(self.device, message)
            self.greeted = True
            yield message

    def expect(self, kind: str) -> dict[str, Any]:
        """Return the next message, which must be of this kind."""
        for message in self.messages():
            if message["kind"] == kind:
                return message
        raise self.failure()

    def failure(self) -> Error:
        """Return the error for a connection that ended before the work did."""
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")
        if not self.greeted:
            return devices.refused(self.device, said, code)
        if devices.is_lost(said):
            return LinkLost("the link to the board broke", where=self.device.url, fix=AGAIN)
        last = (said.strip().splitlines() or [f"ssh ended with {code}"])[-1].strip()
        what = f"the measuring process on the board was ended: {last}"
        return RuntimeMissingError(what, where=self.device.url, fix=f"see whether its memory is short; {AGAIN}")

    def close(self) -> None:
        """End the connection; the board's process ends with it."""
        self._stop.set()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        for stream in (self._process.stdin, self._process.stdout):
            with _whatever_is_left():
                stream.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self.write(b"\n")


class LinkLost(RuntimeMissingError):
    """The network or the board went away."""


@contextmanager
def open_link(device: Device) -> Iterator[Link]:
    """Connect, and end the connection however the body ends."""
    link = Link(device)
    try:
        yield link
    finally:
        link.close()


@contextmanager
def _whatever_is_left() -> Iterator[None]:
    """Close a stream whose other end may be gone already."""
    try:
        yield
    except OSError:
        return


def _message(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "kind" in found else None
