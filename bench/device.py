"""A board that is reached by ssh: its address, the command that reaches it, and what ssh's complaints mean."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..optimizer.errors import Error, ExportError, RecipeError, RuntimeMissingError

SSH_OPTIONS = "PAREDOWN_SSH_OPTIONS"
"""More options of ssh, as a shell would read them: "-F my_config -J jump"."""
BOARD_PYTHON = "PAREDOWN_BOARD_PYTHON"
"""The command of Python on the board, python3 by default."""
OPTIONS = (
    *("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    # A dead link ends ssh after 15 s. INFO: it says at this level that the other side closed the link.
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3", "-o", "LogLevel=INFO"),
)
FORM = "write ssh://user@host or ssh://user@host:22"
LOST = (
    "closed by remote host",
    "Connection reset",
    "Broken pipe",
    "Timeout, server",
    "client_loop",
    "Connection closed",
)
NOT_FOUND, SSH_FAILED = 127, 255

COMPLAINTS: tuple[tuple[str, str, str], ...] = (
    ("Could not resolve hostname", "there is no host of this name", "check it, or name the host in ~/.ssh/config"),
    ("IDENTIFICATION HAS CHANGED", "its host key is not the one that is known", "if you know why, ssh-keygen -R HOST"),
    ("Host key verification failed", "its host key is not known yet", "connect once by ssh HOST and confirm the key"),
    (
        "Permission denied",
        "it does not let you in",
        "ssh must work without a password: add your key to it or to an agent",
    ),
    ("Too many authentication failures", "it does not let you in", "name the key to use in ~/.ssh/config"),
    ("Connection refused", "it refuses connections", "start its ssh server, or write the port: ssh://user@host:22"),
    ("timed out", "it does not answer", "check that it is on, and that the network reaches it"),
    ("No route to host", "it does not answer", "check that it is on, and that the network reaches it"),
    ("Network is unreachable", "it does not answer", "check that it is on, and that the network reaches it"),
    ("Bad configuration option", "ssh refuses its configuration", f"mend it, or {SSH_OPTIONS}"),
)
"""A part of what ssh says, what it means, what to do; the first that fits counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A board. `host` is what ssh gets, which may be a name of the user's configuration."""

    host: str
    user: str = ""
    port: int | None = None

    @property
    def url(self) -> str:
        at, port = f"{self.user}@" if self.user else "", "" if self.port is None else f":{self.port}"
        return f"ssh://{at}{f'[{self.host}]' if ':' in self.host else self.host}{port}"

    def command(self, remote: str) -> list[str]:
        """Return the command that runs a line of shell on the board; the user's configuration and keys count."""
        port = [] if self.port is None else ["-p", str(self.port)]
        destination = f"{self.user}@{self.host}" if self.user else self.host
        return ["ssh", *shlex.split(os.environ.get(SSH_OPTIONS, "")), *OPTIONS, *port, "--", destination, remote]


def parse(text: str, where: str = "--device") -> Device:
    """Read ssh://user@host:port; RecipeError for anything else."""
    try:
        found = urlsplit(text)
        host, port = found.hostname or "", found.port
    except ValueError as error:
        raise RecipeError(f'"{text}" is no address: {error}', where=where, fix=FORM) from error
    if found.password:
        raise RecipeError("an address holds no password", where=where, fix="use a key: ssh must work without one")
    # urlsplit gives the host in small letters, and names of a configuration are told apart by them.
    exact = re.search(re.escape(host), found.netloc.rpartition("@")[2], re.IGNORECASE)
    if found.scheme != "ssh" or not host or host[0] == "-" or found.path not in ("", "/") or exact is None:
        raise RecipeError(f'"{text}" is no address of a board', where=where, fix=FORM)
    return Device(host=exact[0], user=found.username or "", port=port)


def refused(device: Device, said: str, code: int) -> Error:
    """Return the error for a connection that was never made, or found no Python."""
    if code == NOT_FOUND:
        python = os.environ.get(BOARD_PYTHON, "python3")
        fix = f"install Python 3.8 or later there, or name it in {BOARD_PYTHON}"
        return RuntimeMissingError(f"there is no {python} on the board", where=device.url, fix=fix)
    for part, what, fix in COMPLAINTS:
        if part in said:
            shown = fix.replace("HOST", device.host)
            return RuntimeMissingError(f"the board cannot be reached: {what}", where=device.url, fix=shown)
    lines = [line for line in said.strip().splitlines() if line.strip()] or [f"ssh ended with {code}"]
    fix = f"try ssh {device.host}"
    return RuntimeMissingError(f"the board cannot be reached: {lines[-1].strip()}", where=device.url, fix=fix)


def is_lost(said: str) -> bool:
    """Whether ssh said that the link broke, which it does not where a process on the board ended."""
    return any(part in said for part in LOST)


def from_board(device: Device, message: dict[str, object]) -> Error:
    """Return the error that the board reported, with its exit code."""
    kinds: dict[object, type[Error]] = {2: RecipeError, 6: ExportError}
    return kinds.get(message["code"], RuntimeMissingError)(
        str(message["what"]), where=device.url, fix=str(message["fix"])
    )
