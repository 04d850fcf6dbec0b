"""Checkpoints: weights read from what people have, without running any code, and matched to an architecture.

* `.safetensors`, and a folder or index of several: memory-mapped, read when used.
* `.pt .pth .th .bin`: torch.load(weights_only=True), memory-mapped where the file is a zip.
* `.pt2` (torch.export): weights only, memory-mapped raw bytes that JSON describes. The archive's sample inputs are a
  pickle that `torch.export.load` falls back to executing, and its graph is evaluated as text, so neither is read: the
  recipe needs an entry. Weights that are themselves pickled (tensor subclasses) are refused.
* a Hugging Face folder: its safetensors (`huggingface` builds the network).
"""

from __future__ import annotations

import json
import mmap
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import InputError, nearest
from .model import aliases, persistent_buffers

State: TypeAlias = dict[str, Tensor]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PREFIXES = ("module.", "_orig_mod.", "model.")
WRAPPERS = ("state_dict", "model", "model_state_dict")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CHUNK = 1 << 22
"""Values looked at together when searching NaN: a mapped checkpoint never has to be in memory as a whole."""
COPY, SAVE = "copy it again", "save the state dict alone: torch.save(model.state_dict(), path)"
TRAINED = "build the architecture that was trained"
SHOWN = 3
"""How many names an error lists."""
_PT2_DTYPES: Mapping[int, torch.dtype] = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
"""torch._export.serde.schema.ScalarType, fixed by the file format."""


def read(path: Path) -> State:
    """Read a checkpoint into named tensors on the CPU.

    Raises InputError for a file that is missing, cut short, corrupt, of an unknown kind, or would run code.
    """
    if path.is_dir():
        return _read_folder(path)
    _require(path)
    if path.name.endswith(".safetensors.index.json"):
        return _read_index(path)
    if path.suffix not in _READERS:
        kinds = ", ".join(_READERS)
        raise InputError(f'a checkpoint cannot end in "{path.suffix}"', where=str(path), fix=f"use one of {kinds}")
    return _READERS[path.suffix](path)


def read_safetensors(path: Path) -> State:
    """Read a .safetensors file, memory-mapped; InputError as `read`."""
    _require(path)
    names = _check_safetensors(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise InputError(f"this is not a safetensors file: {error}", where=str(path), fix=COPY) from error


def match(state: Mapping[str, Tensor], module: nn.Module) -> State:
    """Return one tensor per canonical name of the module's parameters and persistent buffers.

    One of PREFIXES is stripped where all keys carry it and fit better without; either name of a tied parameter will
    do; a missing `num_batches_tracked` is the module's own. Raises InputError naming keys that are missing, surplus, of
    another shape or dtype, or not finite.
    """
    wanted: dict[str, Tensor] = {**dict(module.named_parameters()), **persistent_buffers(module)}
    other = {name: first for name, first in aliases(module).items() if first in wanted}
    ignored = {name for name in module.state_dict() if name.endswith("_extra_state")}
    found = _untie(_strip(state, {*wanted, *other}), other)
    surplus = [name for name in found if name not in wanted and name not in ignored]
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    if missing:
        raise _missing_error(missing, surplus, len(wanted))
    if surplus:
        raise _surplus_error(surplus)
    _check_shapes({name: (found[name], like) for name, like in wanted.items() if name in found})
    for name in (name for name in wanted if name in found):
        _check_values(name, found[name], wanted[name])
    return {name: found.get(name, like.detach()) for name, like in wanted.items()}


def _require(path: Path) -> None:
    """Raise an InputError unless the path is a file that can be read and is not empty."""
    if not path.exists():
        beside = [item.name for item in path.parent.glob("*") if item.suffix in _READERS]
        fix = nearest(path.name, beside) if beside else f"there is none in {path.parent}"
        raise InputError("there is no such checkpoint", where=str(path), fix=fix)
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror}", where=str(path), fix="name another file") from error
    if empty:
        raise InputError("the file is empty", where=str(path), fix=COPY)


def _check_safetensors(path: Path) -> list[str]:
    """Return the names in a file whose header and length agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or length > size - 8:
            what = f"the file is cut short: {size} bytes do not hold a header of {length or 8} bytes"
            raise InputError(what, where=str(path), fix=COPY)
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"this is not a safetensors file: its header of {length} bytes cannot be read"
        raise InputError(what, where=str(path), fix=COPY) from error
    if end != size - 8 - length:
        what = f"the header promises {end} bytes of tensors, the file holds {size - 8 - length}"
        raise InputError(what, where=str(path), fix=COPY)
    return list(entries)


def _unique(pairs: Sequence[tuple[str, Any]], path: Path) -> dict[str, Any]:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise InputError(f'"{name}" is there twice', where=str(path), fix="save the checkpoint again")
        seen.add(name)
    return dict(pairs)


def _read_folder(path: Path) -> State:
    if (path / INDEX).exists():
        return _read_index(path / INDEX)
    if (path / SINGLE).exists():
        return read_safetensors(path / SINGLE)
    raise InputError(f"the folder holds neither {SINGLE} nor {INDEX}", where=str(path), fix="name the checkpoint file")


def _read_index(path: Path) -> State:
    """Read a sharded checkpoint; shards lie beside the index."""
    index = _json(path)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise InputError('the index has no "weight_map" of file names', where=str(path), fix="download it again")
    files = sorted(set(shards.values()))
    for file in files:
        if Path(file).name != file or "\\" in file:
            what = f'the shard "{file}" lies outside the folder'
            raise InputError(what, where=str(path), fix="name files beside the index")
    absent = [file for file in files if not (path.parent / file).exists()]
    if absent:
        what = f"of {len(files)} shards {len(absent)} are missing: {_some(absent)}"
        raise InputError(what, where=str(path), fix="download them")
    state: State = {}
    for file in files:
        state |= read_safetensors(path.parent / file)
    lost = [name for name in shards if name not in state]
    if lost:
        raise InputError(f"no shard holds {_some(lost)}", where=str(path), fix="download the checkpoint again")
    return state


def _read_pickle(path: Path) -> State:
    zipped = _is_torch_zip(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, of files that are refused anyway
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        raise _load_error(error, path) from error
    return _unwrap(loaded, path)


def _is_torch_zip(path: Path) -> bool:
    """Return whether a file is a whole zip, as torch.save writes since 1.6; an InputError for other zips."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                raise InputError("the file is cut short: its zip directory is missing", where=str(path), fix=COPY)
        return False
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise InputError("refused: would run code (a TorchScript archive)", where=str(path), fix=SAVE)
    return True


def _load_error(error: Exception, path: Path) -> InputError:
    name = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if name:
        return InputError(f"refused: would run code (global {name[1]})", where=str(path), fix=SAVE)
    return InputError("torch.load cannot read it", where=str(path), fix=SAVE)


def _unwrap(loaded: Any, path: Path) -> State:
    """Return the state dict itself, or the one under one of WRAPPERS."""
    if _is_state(loaded):
        return dict(loaded)
    inner = [key for key in WRAPPERS if isinstance(loaded, Mapping) and _is_state(loaded.get(key))]
    if len(inner) == 1:
        return dict(loaded[inner[0]])
    if inner:
        raise InputError(f"it holds several state dicts: {', '.join(inner)}", where=str(path), fix="save one of them")
    got = f"a dict of {_some(list(map(str, loaded)))}" if isinstance(loaded, Mapping) else type(loaded).__name__
    fix = 'save a state dict, or one under "state_dict"'
    raise InputError(f"it holds no state dict but {got}", where=str(path), fix=fix)


def _is_state(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(k, str) and (isinstance(v, Tensor) or k.endswith("_extra_state")) for k, v in value.items())


def _read_pt2(path: Path) -> State:
    """Read the weights of a torch.export archive from their raw bytes; see the top of this file."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            names = archive.namelist()
            configs = [name for name in names if re.search(r"/data/weights/[^/]+_weights_config\.json$", name)]
            if len(configs) != 1:
                what = f"the archive holds the weights of {len(configs)} models in the format of torch 2.8 or newer"
                raise InputError(what, where=str(path), fix="save one program: torch.export.save(program, path)")
            entries = json.loads(archive.read(configs[0]))["config"]
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            folder = configs[0].rsplit("/", 1)[0]
            return {name: _pt2_tensor(archive, f"{folder}/", entries[name], mapped) for name in entries}
    except InputError as error:
        raise InputError(error.what, where=str(path), fix=error.fix) from error
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError, struct.error, RuntimeError) as error:
        what = f"this is not a readable torch.export archive ({type(error).__name__})"
        raise InputError(what, where=str(path), fix="save it again: torch.export.save(program, path)") from error


def _pt2_tensor(archive: zipfile.ZipFile, folder: str, entry: Mapping[str, Any], mapped: mmap.mmap) -> Tensor:
    """Return a view of the mapped archive, whose entries are stored as they are."""
    if entry["use_pickle"]:
        raise InputError("refused: would run code (a pickled weight)", fix="export a model of plain tensors")
    info, meta = archive.getinfo(folder + entry["path_name"]), entry["tensor_meta"]
    if info.compress_type != zipfile.ZIP_STORED or meta["dtype"] not in _PT2_DTYPES:
        raise InputError("the archive holds a compressed weight, or one of an unknown dtype")
    dtype, start = _PT2_DTYPES[meta["dtype"]], info.header_offset
    name_bytes, extra_bytes = struct.unpack("<HH", mapped[start + 26 : start + 30])
    raw = memoryview(mapped)[start + 30 + name_bytes + extra_bytes :][: info.file_size]
    sizes, strides = ([int(item["as_int"]) for item in meta[key]] for key in ("sizes", "strides"))
    offset = int(meta["storage_offset"]["as_int"])
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if min([offset, *sizes, *strides]) < 0 or (0 not in sizes and (last + 1) * dtype.itemsize > len(raw)):
        raise ValueError("a weight lies outside its bytes")
    if 0 in sizes:
        return torch.empty(sizes, dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).as_strided(sizes, strides, offset)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"there is no {path.name}", where=str(path.parent)) from error
    except ValueError as error:
        raise InputError("this is not JSON", where=str(path), fix=COPY) from error


def _strip(state: Mapping[str, Tensor], wanted: set[str]) -> State:
    """Strip prefixes that all keys carry, as long as that makes more keys fit."""
    best = dict(state)
    for _ in PREFIXES:
        for prefix in PREFIXES:
            if best and all(name.startswith(prefix) for name in best):
                bare = {name.removeprefix(prefix): tensor for name, tensor in best.items()}
                if len(wanted & set(bare)) >= len(wanted & set(best)):
                    best = bare
    return best if len(wanted & set(best)) > len(wanted & set(state)) else dict(state)


def _untie(state: Mapping[str, Tensor], other: Mapping[str, str]) -> State:
    """Return the state under canonical names; both names of a tied parameter must agree."""
    found = {name: tensor for name, tensor in state.items() if name not in other}
    for name, first in other.items():
        if name not in state:
            continue
        if first in found and not torch.equal(found[first], state[name]):
            what = f'"{first}" and "{name}" are one parameter in the architecture but differ in the checkpoint'
            raise InputError(what, fix="untie them in the entry's code, or save the checkpoint again")
        found.setdefault(first, state[name])
    return found


def _missing_error(missing: Sequence[str], surplus: Sequence[str], total: int) -> InputError:
    what = f"the checkpoint lacks {len(missing)} of the architecture's {total} tensors: {_some(missing)}"
    if not surplus:
        return InputError(what, fix=TRAINED)
    return InputError(f"{what}; it has {_some(surplus)}", fix=nearest(missing[0], surplus))


def _surplus_error(surplus: Sequence[str]) -> InputError:
    count = "1 tensor" if len(surplus) == 1 else f"{len(surplus)} tensors"
    return InputError(f"the checkpoint has {count} that the architecture lacks: {_some(surplus)}", fix=TRAINED)


def _check_shapes(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    other = [name for name, (tensor, like) in pairs.items() if tensor.shape != like.shape]
    if other:
        shapes = {name: [list(tensor.shape) for tensor in pairs[name]] for name in other[:SHOWN]}
        texts = [f'"{name}" is {a} in the checkpoint, {b} in the architecture' for name, (a, b) in shapes.items()]
        more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
        verb = "tensor has" if len(other) == 1 else "tensors have"
        raise InputError(f"{len(other)} {verb} another shape: {', '.join(texts)}{more}", fix=TRAINED)


def _check_values(name: str, tensor: Tensor, like: Tensor) -> None:
    floating = like.is_floating_point()
    if (tensor.dtype not in FLOATS) if floating else (tensor.is_floating_point() or tensor.is_quantized):
        what = f'"{name}" is {_dtype(tensor)} in the checkpoint, {_dtype(like)} in the architecture'
        fix = "give the weights as they were before quantization" if floating else "save the checkpoint again"
        raise InputError(what, fix=fix)
    bad = _not_finite(tensor) if floating else 0
    if bad:
        what = f'"{name}" has {bad} of {tensor.numel()} values that are NaN or infinite'
        raise InputError(what, fix="use a checkpoint from before training diverged")


def _not_finite(tensor: Tensor) -> int:
    flat = tensor.detach().reshape(-1)
    parts = (flat[first : first + CHUNK] for first in range(0, flat.numel(), CHUNK))
    return sum(int((~torch.isfinite(part)).sum()) for part in parts)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _some(names: Iterable[str]) -> str:
    """Return the first few names, and how many more there are."""
    every = [f'"{name}"' for name in names]
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


_READERS: Mapping[str, Callable[[Path], State]] = {
    ".safetensors": read_safetensors,
    ".pt": _read_pickle,
    ".pth": _read_pickle,
    ".th": _read_pickle,
    ".bin": _read_pickle,
    ".pt2": _read_pt2,
}
