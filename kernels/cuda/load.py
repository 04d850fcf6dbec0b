"""The CUDA kernels of a device: a cubin made ahead of time, else NVRTC (once, then from the disk), else the PTX.

Loading allocates and waits, so that it must be over before a CUDA graph is captured; `loaded` keeps every module for
the life of the process.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from . import cubins, disk_cache, driver, image, nvrtc, units
from .sources import ARCHITECTURES, FLAGS

_LOCK = threading.Lock()


class NoKernelsError(driver.CudaError):
    """There is a GPU, but nothing that it could run; the message says why, and what to install."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What decides which code can be loaded: the compute capability (87) and the CUDA version of the driver."""

    capability: int
    driver: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """Code for a device, and in words where it comes from."""

    data: bytes
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A unit on a device, and where its code came from."""

    module: driver.Module
    origin: str


def loaded(unit: str, device: int) -> Loaded:
    """Return a unit of the kernels on the GPU that torch calls `device`, loading it at the first call.

    NoKernelsError if nothing here suits the device; CudaError if the driver refuses.
    """
    with _LOCK:  # one thread compiles and loads, the others wait for it
        return _loaded(unit, device)


@functools.cache
def function(unit: str, name: str, device: int, shared: int) -> driver.Function:
    """Return a kernel of a unit that is started with so many bytes of dynamic shared memory."""
    return loaded(unit, device).module.function(name, shared)


def find_image(unit: str, device: Device) -> Image:
    """Return the code for a device: a cubin, else compiled by NVRTC, else PTX; NoKernelsError if there is none."""
    source = units.read(unit)
    digest = units.digest(source)
    built = [entry for entry in cubins.manifest(cubins.FOLDER) if entry.unit == unit and entry.digest == digest]
    cubin = best_cubin(built, device)
    if cubin is not None:
        return _read(cubin)
    image_, refusals = _compiled(source, digest, device)
    if image_ is not None:
        return image_
    for entry in built:
        if entry.architecture == cubins.VIRTUAL and entry.driver <= device.driver and device.capability >= 80:
            return _read(entry)
    raise NoKernelsError(_nothing(device, bool(built), refusals))


def best_cubin(entries: Sequence[cubins.Made], device: Device) -> cubins.Made | None:
    """Return the cubin for the nearest architecture that the device runs and its driver loads."""
    usable = [
        entry
        for entry in entries
        if entry.architecture != cubins.VIRTUAL
        and entry.driver <= device.driver
        and image.runs_on(entry.architecture, device.capability)
    ]
    return max(usable, key=lambda entry: image.capability(entry.architecture), default=None)


def architecture_of(device: Device) -> str:
    """Return for what to compile: sm_90a for an H100, because we name it so; plain sm_.. where we name none."""
    ours = {image.capability(name): name for name in ARCHITECTURES}
    return ours.get(device.capability, f"sm_{device.capability}")


def wheel_of(major: int) -> str:
    """Return the package that has NVRTC for a driver of this major version of CUDA."""
    return "nvidia-cuda-nvrtc" if major >= 13 else f"nvidia-cuda-nvrtc-cu{major}"


@functools.cache
def _loaded(unit: str, device: int) -> Loaded:
    capability = driver.capability(device)
    code = find_image(unit, Device(capability=capability, driver=driver.version()))
    return Loaded(module=driver.load(code.data, device), origin=code.origin)


def _compiled(source: nvrtc.Source, digest: str, device: Device) -> tuple[Image | None, list[str]]:
    """Compile by the newest NVRTC whose cubins the driver loads, or say why each could not."""
    target, refusals = architecture_of(device), []
    for compiler in nvrtc.compilers():
        version = ".".join(map(str, compiler.version))
        if compiler.version[0] > device.driver[0]:
            refusals.append(f"NVRTC {version} is too new for the driver")
            continue
        name = disk_cache.key(digest, target, version)
        try:
            data = disk_cache.cached(name, functools.partial(nvrtc.compile_cubin, source, target, FLAGS, compiler))
        except nvrtc.NvrtcError as error:
            refusals.append(str(error))
            continue
        return Image(data=data, origin=f"{target}, compiled here by NVRTC {version}"), refusals
    return None, refusals or ["there is no NVRTC"]


def _read(entry: cubins.Made) -> Image:
    data = (cubins.FOLDER / entry.file).read_bytes()
    return Image(data=data, origin=f"{entry.architecture}, built ahead by {entry.compiler}")


def _nothing(device: Device, built: bool, refusals: Sequence[str]) -> str:
    cubin = "none of the built cubins suits it" if built else "no cubins were built"
    return (
        f"no CUDA kernels for compute capability {device.capability / 10:.1f} with a driver of CUDA "
        f"{'.'.join(map(str, device.driver))}: {cubin}; {'; '.join(refusals)}. "
        f"pip install {wheel_of(device.driver[0])}, or build the cubins"
    )
