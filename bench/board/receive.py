#!/usr/bin/env python3
"""Say what this board has, take the files that it lacks, become agent.py: what ssh starts, in any Python 3.

It reads from descriptor 0 without a buffer, so that agent.py goes on where it stops, and keeps the lock as it becomes
that. Silence ends it: a link that broke without a word must not keep the lock. PAREDOWN_BOOT_ID names another file
with the number of the boot, for tests.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import select
import shutil
import sys
from typing import Any, Optional, Sequence

CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "paredown")
BOOT_ID = os.environ.get("PAREDOWN_BOOT_ID") or "/proc/sys/kernel/random/boot_id"
LEAST = (3, 8)
SILENCE = 60.0
"""Seconds without a byte after which the host is taken to be gone."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FAILED, NO_RUNTIME = 6, 7
MB = 1e6


class BoardError(Exception):
    """What was wrong and what to do, with the exit code."""

    def __init__(self, code: int, what: str, fix: str = "") -> None:
        Exception.__init__(self, what)
        self.code, self.fix = code, fix


def say(kind: str, **values: Any) -> None:
    """Send one message to the host."""
    sys.stdout.write(json.dumps(dict(values, kind=kind)) + "\n")
    sys.stdout.flush()


def read(count: int) -> bytes:
    """Return up to `count` bytes from the host; the process ends where there will be none."""
    ready, _, _ = select.select([0], [], [], SILENCE)
    found = os.read(0, count) if ready else b""
    if not found:
        sys.exit(1)
    return found


def read_line() -> Any:
    """Return the next line that is not empty, and not a byte behind it."""
    line = b""
    while not line.endswith(b"\n") or not line.strip():
        line = (b"" if line == b"\n" else line) + read(1)
    return json.loads(line.decode())


def boot_id() -> str:
    """Return what changes with every boot, "" where the system does not say."""
    try:
        with open(BOOT_ID) as file:
            return file.read().strip()
    except OSError:
        return ""


def version(name: str) -> Optional[str]:
    """Return the version of a package, None where it is not installed."""
    import importlib.metadata
    import importlib.util

    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # as those that a system packages otherwise
        return "unknown"


def hello() -> None:
    """Say what the host decides by what to send."""
    if sys.version_info < LEAST:
        have, least = ("%d.%d" % tuple(found[:2]) for found in (sys.version_info, LEAST))
        fix = "install a newer one, and name it in PAREDOWN_BOARD_PYTHON"
        raise BoardError(NO_RUNTIME, "the board's python3 is Python %s, measuring needs %s" % (have, least), fix)
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    say(
        "hello",
        boot_id=boot_id(),
        machine=platform.machine(),
        glibc=platform.libc_ver()[1],
        compiler=next((name for name in compilers if name and shutil.which(name)), ""),
        packages={name: version(name) for name in ("numpy", "onnxruntime", "tensorrt")},
    )


def digest(path: str) -> str:
    """Return the SHA-256 of a file, "" where there is none."""
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for part in iter(lambda: file.read(1 << 20), b""):
                found.update(part)
    except OSError:
        return ""
    return found.hexdigest()


def take_lock() -> None:
    """Hold the one lock of the board until this process has ended, however it ends; agent.py inherits it.

    The system drops it with the process, so that a file which a crash or a reboot left behind keeps nobody out; what
    stands in it names the holder only.
    """
    os.makedirs(CACHE, exist_ok=True)
    lock = os.open(os.path.join(CACHE, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(lock, 200).decode().partition(" ")[0] or "unknown"
        what = "another measurement runs on the board (process %s)" % holder
        raise BoardError(NO_RUNTIME, what, "two at once would slow each other down; wait for it") from error
    os.ftruncate(lock, 0)
    os.write(lock, ("%d %s\n" % (os.getpid(), boot_id())).encode())
    os.set_inheritable(lock, True)


def receive(folder: str, files: Sequence[Any]) -> None:
    """Write the files that are missing or differ; each is there whole or not at all."""
    wanted = [entry for entry in files if digest(os.path.join(folder, entry[0])) != entry[2]]
    say("want", names=[entry[0] for entry in wanted])
    for name, size, known in wanted:
        part = os.path.join(folder, name + ".part")
        try:
            os.makedirs(os.path.dirname(part), exist_ok=True)
            copied = receive_one(part, size)
            if copied != known:
                raise BoardError(FAILED, "%s arrived damaged" % name, "run it again")
            os.replace(part, os.path.join(folder, name))
        finally:
            if os.path.exists(part):
                os.remove(part)


def receive_one(path: str, size: int) -> str:
    """Write `size` bytes from the host to a file and return their SHA-256."""
    found = hashlib.sha256()
    with open(path, "wb") as file:
        while size:
            part = read(min(size, 1 << 20))
            file.write(part)
            found.update(part)
            size -= len(part)
    return found.hexdigest()


def become_agent() -> None:
    """Take the files, then run agent.py in place of this."""
    hello()
    take_lock()
    order = read_line()
    folder = os.path.join(CACHE, order["folder"])
    try:
        os.makedirs(folder, exist_ok=True)
        receive(folder, order["files"])
    except OSError as error:
        if error.errno not in FULL:
            raise BoardError(FAILED, "the board cannot write to %s: %s" % (folder, error.strerror)) from error
        free = shutil.disk_usage(CACHE).free / MB
        need = sum(entry[1] for entry in order["files"]) / MB
        what = "the board's disk is full: %.1f MB are free, all files are %.1f MB" % (free, need)
        raise BoardError(
            FAILED, what, "free some space and run it again; the files that arrived whole are kept"
        ) from error
    os.chdir(folder)
    say("ready")
    os.execv(sys.executable, [sys.executable, "-B", os.path.join("board", "agent.py")])


def main() -> None:
    """Run; what was wrong goes to the host as a message."""
    try:
        become_agent()
    except BoardError as error:
        say("error", code=error.code, what=str(error), fix=error.fix)
        sys.exit(error.code)


if __name__ == "__main__":
    main()
