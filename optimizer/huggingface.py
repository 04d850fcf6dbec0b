"""Hugging Face folders: the architecture that config.json names, built with transformers, without network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import InputError, RuntimeMissingError
from .model import SourceFile

CONFIG = "config.json"


def build(path: Path) -> nn.Module:
    """Build the architecture of a Hugging Face folder from its config.json, with random weights, without network.

    Raises RuntimeMissingError without transformers, InputError for a folder that it cannot build.
    """
    config = _config(path)
    try:
        import transformers
    except ImportError as error:
        fix = "pip install 'paredown[hf]'"
        raise RuntimeMissingError("transformers is not installed", where=str(path), fix=fix) from error
    names = config.get("architectures") if isinstance(config, dict) else None
    if not names:
        raise InputError('config.json names no "architectures"', where=str(path), fix="give the model an entry")
    cls = getattr(transformers, str(names[0]), None)
    if cls is None:
        raise InputError(f'transformers has no class "{names[0]}"', where=str(path), fix="give the model an entry")
    try:
        settings = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        settings.use_cache = False  # the outputs of an export are values, not the state of a generation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = cls(settings)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"transformers cannot build {names[0]}: {first}", where=str(path)) from error
    assert isinstance(module, nn.Module)
    return module.eval()


def files(path: Path) -> tuple[SourceFile, ...]:
    """Return the file of a Hugging Face folder that `build` needs."""
    return (SourceFile(name=CONFIG, text=(path / CONFIG).read_text(encoding="utf-8")),)


def _config(path: Path) -> Any:
    try:
        return json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"there is no {CONFIG}", where=str(path), fix="give the model an entry") from error
    except ValueError as error:
        raise InputError("this is not JSON", where=str(path / CONFIG), fix="copy it again") from error
