"""A board for tests: a real sshd on a port of the loopback, run by the current user, with keys of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
ABSENT = "no remote board: sshd (openssh-server) or ssh is not installed"
CONFIG = """
Host board
  HostName 127.0.0.1
  Port {port}
  User {user}
Host *
  IdentityFile {folder}/client
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
"""


@dataclass(slots=True, kw_only=True)
class Loopback:
    """A board; `environment` is what its sessions see from the next `start` on."""

    folder: Path
    port: int
    environment: dict[str, str]
    sshd: subprocess.Popen[bytes] | None = None
    refused: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return "ssh://board"

    @property
    def cache(self) -> Path:
        return self.folder / "cache" / "paredown"

    @property
    def boot_id(self) -> Path:
        return self.folder / "boot_id"

    @property
    def interpreter(self) -> Path:
        return self.folder / "bin" / "python3"

    def python(self, text: str) -> None:
        """Write the Python of the board. It sets the path: what a shell's start-up files say must not count."""
        program(self.interpreter, f"export PATH={self.folder}/bin:/usr/bin:/bin\n{text}\n")

    def start(self) -> None:
        """Start sshd; it listens when this returns."""
        # The options of a session's environment are one line: the first SetEnv counts.
        values = " ".join(f'"{name}={value}"' for name, value in self.environment.items())
        options = {
            "Port": self.port,
            "ListenAddress": "127.0.0.1",
            "HostKey": self.folder / "host",
            "AuthorizedKeysFile": self.folder / "authorized",
            "PidFile": "none",
            "UsePAM": "no",
            "StrictModes": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PermitRootLogin": "yes",
            "SetEnv": values,
        }
        config = self.folder / "sshd_config"
        config.write_text("".join(f"{name} {value}\n" for name, value in options.items()))
        with (self.folder / "sshd.log").open("ab") as log:
            command = [str(SSHD), "-D", "-e", "-f", str(config)]
            self.sshd = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self.sshd.poll() is not None:
                break
            time.sleep(0.02)
        pytest.skip(f"no remote board: sshd does not run here: {(self.folder / 'sshd.log').read_text()[-300:]}")

    def stop(self) -> None:
        """End sshd; sessions go on."""
        if self.sshd is not None:
            self.sshd.terminate()
            self.sshd.wait()
            self.sshd = None

    def restart(self, **changed: str) -> None:
        self.environment.update(changed)
        self.stop()
        self.start()

    def cut(self) -> None:
        """Kill the processes that serve the sessions, and nothing that they started."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("sshd") and any(f":{self.port}" in c for c in sockets(process)):
                    process.kill()

    def running(self) -> list[psutil.Process]:
        """Return the processes on the board that measure or receive."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("PAREDOWN_BOOT_ID") == str(self.boot_id) and "sshd" not in process.name():
                    found.append(process)
        return found

    def wait_until_idle(self, seconds: float = 10.0) -> list[psutil.Process]:
        """Return what still runs on the board after so long, [] as soon as nothing does."""
        end = time.monotonic() + seconds
        while (left := self.running()) and time.monotonic() < end:
            time.sleep(0.05)
        return left


def sockets(process: psutil.Process) -> list[str]:
    """Return the local ends of a process's connections that are made, as address:port."""
    made = [found for found in process.net_connections("tcp") if found.status == psutil.CONN_ESTABLISHED]
    return [f"{found.laddr.ip}:{found.laddr.port}" for found in made]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def program(path: Path, text: str) -> None:
    """Write a shell script that can be run."""
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def generate_key(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


@contextlib.contextmanager
def loopback(folder: Path) -> Iterator[Loopback]:
    """Run a board in a folder; a skip where there is no sshd."""
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip(ABSENT)
    if os.getuid() == 0:  # where sshd shuts itself in before somebody is let in
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    for name in ("host", "client"):
        generate_key(folder / name)
    shutil.copy(folder / "client.pub", folder / "authorized")
    board = Loopback(folder=folder, port=free_port(), environment={})
    board.boot_id.write_text("first boot\n")
    (folder / "bin").mkdir()
    board.python(f'exec {sys.executable} "$@"')
    host = " ".join((folder / "host.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{board.port} {host}\n")
    user = psutil.Process().username()
    (folder / "config").write_text(CONFIG.format(port=board.port, user=user, folder=folder))
    board.environment = {
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PAREDOWN_BOOT_ID": str(board.boot_id),
        "OMP_NUM_THREADS": "1",
    }
    board.start()
    try:
        yield board
    finally:
        board.cut()
        board.stop()
        for process in board.running():
            process.send_signal(signal.SIGKILL)
