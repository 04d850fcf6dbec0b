"""The boards that a bundle can be made for: their GPUs, and what software they come with."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.cuda import image
from ..kernels.cuda.cubins import Made
from ..optimizer.errors import RecipeError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A kind of machine.

    architectures: of its GPUs, as nvcc names them. tensorrt: the first version that is used, and the first that is not.
    driver: the least CUDA version of its driver.
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    tensorrt: tuple[str, str]
    driver: tuple[int, int]
    needs: str

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Return compute capabilities, as "8.7"."""
        numbers = [image.capability(name) for name in self.architectures]
        return tuple(f"{number // 10}.{number % 10}" for number in numbers)

    def takes(self, made: Made) -> bool:
        """Whether a compiled unit is for a GPU of this board, and its driver loads it."""
        return made.architecture in self.architectures and made.driver <= self.driver


BOARDS = {
    board.name: board
    for board in (
        Board(
            name="jetson-orin",
            title="Jetson Orin",
            architectures=("sm_87",),
            tensorrt=("10.3", "12.0"),
            driver=(12, 6),
            needs="JetPack 6.1 or 6.2 (TensorRT 10.3, CUDA 12.6), or a later one",
        ),
        Board(
            name="jetson-thor",
            title="Jetson Thor",
            architectures=("sm_110",),
            tensorrt=("10.16", "12.0"),
            driver=(13, 0),
            needs="JetPack 7.2 (TensorRT 10.16.2, later 11.4; CUDA 13)",
        ),
        Board(
            name="server",
            title="server",
            architectures=("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120"),
            tensorrt=("10.3", "12.0"),
            driver=(12, 0),
            needs="a driver of CUDA 12 or 13 (12.0 needs TensorRT 10.8)",
        ),
    )
}


def find(name: str) -> Board:
    """Return the board of that name."""
    if name not in BOARDS:
        raise RecipeError(f'there is no board "{name}"', where="--target", fix=nearest(name, BOARDS))
    return BOARDS[name]
