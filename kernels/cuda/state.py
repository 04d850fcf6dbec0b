"""What `optimize doctor` says of the CUDA kernels: driver, GPUs, where their code would come from, and what was run."""

from __future__ import annotations

from . import cubins, disk_cache, driver, load, nvrtc, units
from .sources import UNITS

NEVER_RUN = "the CUDA kernels are compiled and proven in emulation, but were never executed on a GPU"
"""To be deleted with the first figures of bench/gpu_kernels.py in bench/results."""


def examine() -> list[str]:
    """Return lines to print, each marked "ok" or "--"; nothing is compiled, and no memory of a GPU is taken."""
    try:
        count, version = driver.device_count(), driver.version()
    except driver.NoDriverError as error:
        return [f"--  CUDA kernels: {error}", *_sources(), f"--  {NEVER_RUN}"]
    lines = [_device(index, version) for index in range(count)] or ["--  CUDA kernels: the driver has no GPU"]
    return [*lines, *_sources(), f"--  {NEVER_RUN}; {len(_compiled())} units compiled by NVRTC are kept"]


def _device(index: int, version: tuple[int, int]) -> str:
    capability = driver.capability(index)
    name = f"GPU {index}, {driver.device_name(index)} ({capability / 10:.1f}, driver of CUDA {_dotted(version)})"
    device = load.Device(capability=capability, driver=version)
    entries = _current_cubins()
    missing = [unit for unit in UNITS if not load.best_cubin([e for e in entries if e.unit == unit], device)]
    if not missing:
        return f"ok  {name}: CUDA kernels from cubins"
    usable = [found for found in nvrtc.compilers() if found.version[0] <= version[0]]
    if usable:
        return f"ok  {name}: CUDA kernels compiled at first use by NVRTC {_dotted(usable[0].version)}"
    wheel = load.wheel_of(version[0])
    return f"--  {name}: no CUDA kernels; pip install {wheel}, or build the cubins. All runs on the reference"


def _sources() -> list[str]:
    built = cubins.manifest(cubins.FOLDER)
    if not built:
        return ["--  CUDA cubins: not built (python -m paredown.kernels.cuda.cubins builds them)"]
    stale = len(built) - len(_current_cubins())
    makers = ", ".join(sorted({entry.compiler for entry in built}))
    names = ", ".join(dict.fromkeys(entry.architecture for entry in built))
    if stale:
        return [
            f"--  CUDA cubins: {stale} of {len(built)} were made of other sources and are not used; build them anew"
        ]
    return [f"ok  CUDA cubins: {names}, by {makers}"]


def _current_cubins() -> list[cubins.Made]:
    digests = {unit: units.digest(units.read(unit)) for unit in UNITS}
    return [entry for entry in cubins.manifest(cubins.FOLDER) if digests.get(entry.unit) == entry.digest]


def _compiled() -> list[str]:
    return sorted(path.name for path in disk_cache.folder().glob(f"*{disk_cache.SUFFIX}"))


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
