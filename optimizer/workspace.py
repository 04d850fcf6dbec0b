"""The output folder while it is being made: a hidden sibling with a cache, renamed into place when complete.

A killed run leaves both, and `--resume` goes on from what the cache holds. Every cache entry is written whole or not at
all, under a fingerprint of all that it depends on. A lock in the cache keeps a second run away;
it ends with its process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import store
from .errors import Error, ExportError, RecipeError
from .model import Model
from .weight import Weight, rebuild

LOCK = "lock"
OURS = ("model.json", "report.json")
"""Files by which a folder is known as one that optimize made: no other is ever replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """`out` is where the result goes, `folder` where it is made, `cache` what a resumed run starts from."""

    out: Path
    lock: IO[str] | None = None

    @property
    def folder(self) -> Path:
        return self.out.with_name(f".{self.out.name}.partial")

    @property
    def cache(self) -> Path:
        return self.out.with_name(f".{self.out.name}.cache")

    @property
    def old(self) -> Path:
        """Where a folder that is being replaced stays until the new one is in place."""
        return self.out.with_name(f".{self.out.name}.old")

    def finish(self) -> None:
        """Move the finished folder into place and drop the cache."""
        if self.out.exists():
            self.out.rename(self.old)
        self.folder.rename(self.out)
        shutil.rmtree(self.old, ignore_errors=True)
        shutil.rmtree(self.cache, ignore_errors=True)

    def discard_unless_costly(self) -> bool:
        """Leave nothing but finished steps or layers, which a resumed run starts from; return whether there are any."""
        shutil.rmtree(self.folder, ignore_errors=True)
        costly = any(self.cache.glob("*/layers/[!.]*")) or any(self.cache.glob("*/model"))
        if not costly:
            shutil.rmtree(self.cache, ignore_errors=True)
        return costly

    def keep_failed(self) -> Path:
        """Move what was made aside as `<out>.failed` and return where it is."""
        failed = self.out.with_name(f"{self.out.name}.failed")
        if failed.exists() and not _is_ours(failed):
            failed = Path(tempfile.mkdtemp(prefix=f"{failed.name}-", dir=failed.parent))
        shutil.rmtree(failed, ignore_errors=True)
        self.folder.rename(failed)
        shutil.rmtree(self.cache, ignore_errors=True)
        return failed

    def close(self) -> None:
        """Let another run have the folder."""
        if self.lock is not None:
            self.lock.close()

    def layers(self, fingerprint: str) -> LayerCache:
        return LayerCache(folder=self.cache / fingerprint / "layers")

    def put_model(self, fingerprint: str, model: Model, extra: Any) -> None:
        """Keep the model after a step, and JSON data about the step."""
        with _whole(self.cache / fingerprint / "model") as folder:
            folder.mkdir()
            store.save(model, folder)
            (folder / "extra.json").write_text(json.dumps(extra))

    def get_model(self, fingerprint: str) -> tuple[Model, Any] | None:
        """Return what `put_model` kept; None where there is nothing or it cannot be read (it is made again)."""
        folder = self.cache / fingerprint / "model"
        with contextlib.suppress(Error, OSError, ValueError):
            return (store.load(folder), json.loads((folder / "extra.json").read_text())) if folder.is_dir() else None
        return None

    def put_json(self, fingerprint: str, value: Any) -> None:
        with _whole(self.cache / f"{fingerprint}.json") as path:
            path.write_text(json.dumps(value))

    def get_json(self, fingerprint: str) -> Any:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.cache / f"{fingerprint}.json").read_text())
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """Finished layers of one step, one file each."""

    folder: Path

    def get(self, key: str) -> Weight | None:
        """Return a finished layer; None where there is none or it cannot be read (it is made again)."""
        path = self.folder / _safe(key)
        with contextlib.suppress(Error, OSError, ValueError, KeyError, TypeError, SafetensorError):
            tensors = load_file(path)
            meta = json.loads(bytes(tensors.pop("meta").tolist()))
            return rebuild(meta, tensors)
        return None

    def put(self, key: str, weight: Weight) -> None:
        meta = torch.tensor(list(json.dumps(weight.meta()).encode()), dtype=torch.uint8)
        tensors = {name: tensor.contiguous() for name, tensor in weight.tensors().items()}
        with _whole(self.folder / _safe(key)) as path:
            save_file({**tensors, "meta": meta}, path)


def open_workspace(out: Path, *, resume: bool, force: bool) -> Workspace:
    """Prepare a place to write and lock it.

    Raises RecipeError where `out` exists and neither --resume nor --force was given, where it is not a folder that
    optimize made, or where another run is writing to it.
    """
    out = Path(os.path.realpath(out))
    _check(out, resume=resume, force=force)
    with disk_errors(out):
        work = Workspace(out=out, lock=_lock(out))
        try:
            _recover(work)
            _check(out, resume=resume, force=force)
            if not resume:
                _clear(work.cache)
            shutil.rmtree(work.folder, ignore_errors=True)
            work.folder.mkdir()
        except BaseException:
            work.discard_unless_costly()
            work.close()
            raise
    return work


def shown(path: Path) -> str:
    """Return a path relative to the current folder where it lies within."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path)


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn a full disk, a size limit or a missing permission into an ExportError."""
    try:
        yield
    except Error:
        raise
    except Exception as error:
        number = _disk_error(error)
        if not number:
            raise
        raise ExportError(
            f'cannot write to the output folder "{out.name}": {os.strerror(number).lower()}',
            fix="free some space or use another --out",
        ) from error


def fingerprint(*parts: Any) -> str:
    """Return a short hash of plain data, texts and tensors."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"\0" + (_tensor_bytes(part) if isinstance(part, Tensor) else str(part).encode()))
    return digest.hexdigest()[:24]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_sha256() -> str:
    """Return a hash of our own source: what an edited or another version had finished is not used."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _check(out: Path, *, resume: bool, force: bool) -> None:
    if out.exists() and not force:
        what = f'the output folder "{out.name}" exists already'
        raise RecipeError(what, fix="it is complete; use --force to replace it, or another --out" if resume else _FORCE)
    if out.exists() and not out.is_dir():
        raise RecipeError(f'"{out.name}" is a file', fix="use another --out")
    if out.exists() and not _is_ours(out):
        raise RecipeError(f'the folder "{out.name}" was not made by optimize', fix="use another --out")
    if not out.parent.is_dir():
        raise RecipeError(f'the folder "{shown(out.parent)}" for the output does not exist', fix="make it first")


def _is_ours(folder: Path) -> bool:
    """Return whether a folder is empty or was made by optimize, and may be replaced."""
    if not folder.is_dir():
        return False
    return not any(folder.iterdir()) or any((folder / name).is_file() for name in OURS)


_FORCE = "use --force or another --out"


def _lock(out: Path) -> IO[str]:
    """Return an open file in the cache that this process alone has locked."""
    path = Workspace(out=out).cache / LOCK
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            file = path.open("w")
        except FileNotFoundError:  # a run that finished just now has dropped its cache
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            what = f'another run is writing to the output folder "{out.name}"'
            raise RecipeError(what, fix="wait for it, or use another --out") from error
        except OSError:
            return file  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _recover(work: Workspace) -> None:
    """Put back the folder that a run was killed while replacing."""
    if work.old.is_dir() and not work.out.exists():
        work.old.rename(work.out)
    shutil.rmtree(work.old, ignore_errors=True)


def _clear(cache: Path) -> None:
    for item in cache.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name != LOCK:
            item.unlink()


def _tensor_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().flatten()
    return str((tensor.dtype, tuple(tensor.shape))).encode() + flat.view(torch.uint8).numpy().tobytes()


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    for stale in (temporary, path):
        if stale.is_dir():
            shutil.rmtree(stale)
    yield temporary
    temporary.rename(path)


def _safe(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


_DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO)


def _disk_error(error: BaseException) -> int:
    """Return the number of a disk's error, 0 for any other; libraries give it in their text."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _DISK else 0
    found = re.search(r"os error (\d+)", str(error))
    if found:
        return int(found[1]) if int(found[1]) in _DISK else 0
    return next((number for number in _DISK if os.strerror(number) in str(error)), 0)


def put_in_place(made: Path, path: Path, old: Path) -> None:
    """Move a folder to its name, and the one that was there away; nothing is lost where that fails."""
    if path.exists():
        path.rename(old)
    try:
        made.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
