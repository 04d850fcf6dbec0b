"""The output folder while it is being made: a hidden sibling with a cache, renamed into place when complete.

A killed run leaves the sibling, and `--resume` goes on from what its cache holds. Every cache entry is written whole or
not at all, under a fingerprint of all that it depends on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import store
from .errors import Error, ExportError, RecipeError
from .model import Model
from .weight import Weight, rebuild


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """`out` is where the result goes, `folder` where it is made, `cache` what a resumed run starts from."""

    out: Path
    replaces: bool = False

    @property
    def folder(self) -> Path:
        return self.out.with_name(f".{self.out.name}.partial")

    @property
    def cache(self) -> Path:
        return self.folder.with_name(f".{self.out.name}.cache")

    def finish(self) -> None:
        """Move the finished folder into place and drop the cache."""
        old = self.out.with_name(f".{self.out.name}.old")
        if self.out.exists():
            self.out.rename(old)
        self.folder.rename(self.out)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.cache, ignore_errors=True)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.cache, ignore_errors=True)

    def discard_unless_costly(self) -> None:
        """Leave nothing after an error, but for finished steps or layers that a resumed run can start from."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if not any(self.cache.glob("*/*/*")):
            shutil.rmtree(self.cache, ignore_errors=True)

    def keep_failed(self) -> Path:
        """Move what was made aside as `<out>.failed` and return where it is."""
        failed = self.out.with_name(f"{self.out.name}.failed")
        shutil.rmtree(failed, ignore_errors=True)
        self.folder.rename(failed)
        shutil.rmtree(self.cache, ignore_errors=True)
        return failed

    def layers(self, fingerprint: str) -> LayerCache:
        return LayerCache(folder=self.cache / fingerprint / "layers")

    def put_model(self, fingerprint: str, model: Model, extra: Any) -> None:
        """Keep the model after a step, and JSON data about the step."""
        with _whole(self.cache / fingerprint / "model") as folder:
            folder.mkdir()
            store.save(model, folder)
            (folder / "extra.json").write_text(json.dumps(extra))

    def get_model(self, fingerprint: str) -> tuple[Model, Any] | None:
        folder = self.cache / fingerprint / "model"
        if not folder.is_dir():
            return None
        return store.load(folder), json.loads((folder / "extra.json").read_text())

    def put_json(self, fingerprint: str, value: Any) -> None:
        with _whole(self.cache / f"{fingerprint}.json") as path:
            path.write_text(json.dumps(value))

    def get_json(self, fingerprint: str) -> Any:
        path = self.cache / f"{fingerprint}.json"
        return json.loads(path.read_text()) if path.is_file() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """Finished layers of one step, one file each."""

    folder: Path

    def get(self, key: str) -> Weight | None:
        path = self.folder / _safe(key)
        if not path.is_file():
            return None
        tensors = load_file(path)
        meta = json.loads(bytes(tensors.pop("meta").tolist()))
        return rebuild(meta, tensors)

    def put(self, key: str, weight: Weight) -> None:
        meta = torch.tensor(list(json.dumps(weight.meta()).encode()), dtype=torch.uint8)
        tensors = {name: tensor.contiguous() for name, tensor in weight.tensors().items()}
        with _whole(self.folder / _safe(key)) as path:
            save_file({**tensors, "meta": meta}, path)


def open_workspace(out: Path, *, resume: bool, force: bool) -> Workspace:
    """Prepare a place to write; RecipeError where `out` exists and neither --resume nor --force was given."""
    out = Path(os.path.abspath(out))
    if out.exists() and not force:
        fix = (
            "it is complete; use --force to replace it, or another --out" if resume else "use --force or another --out"
        )
        raise RecipeError(f'the output folder "{out.name}" exists already', fix=fix)
    if out.exists() and not out.is_dir():
        raise RecipeError(f'"{out.name}" is a file', fix="use another --out")
    if not out.parent.is_dir():
        raise RecipeError(f'the folder "{out.parent.name}" for the output does not exist', fix="make it first")
    work = Workspace(out=out)
    shutil.rmtree(work.folder, ignore_errors=True)
    if not resume:
        shutil.rmtree(work.cache, ignore_errors=True)
    with disk_errors(out):
        work.folder.mkdir()
        work.cache.mkdir(exist_ok=True)
    return work


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn a full disk, a size limit or a missing permission into an ExportError."""
    try:
        yield
    except Error:
        raise
    except Exception as error:
        if not _is_disk(error):
            raise
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "no space left on device"
        raise ExportError(
            f'cannot write to the output folder "{out.name}": {reason.lower()}',
            fix="free some space or use another --out",
        ) from error


def fingerprint(*parts: Any) -> str:
    """Return a short hash of plain data, texts and tensors."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"\0" + (_tensor_bytes(part) if isinstance(part, Tensor) else str(part).encode()))
    return digest.hexdigest()[:24]


def _tensor_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().flatten()
    return str((tensor.dtype, tuple(tensor.shape))).encode() + flat.view(torch.uint8).numpy().tobytes()


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    yield temporary
    temporary.rename(path)


def _safe(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


_DISK = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO}


def _is_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _DISK
    return any(f"os error {number}" in str(error) or os.strerror(number) in str(error) for number in _DISK)
