"""What no loss over all pairs can do without, written by hand: the measure of its time."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

HEIGHTS, WIDTHS = (256, 1024), (512, 1024, 2048, 4096)
WHOLE = 2**27  # entries of a matrix that may be made at once


@dataclass(frozen=True)
class Floor:
    """One product of rows and columns, one exponential of each entry, one product back; no labels and no masks.

    Args:
        rows: B, or as many as are compared in its place.
        columns: the rows of the bank, the batch once more, or the class weights.
        dimension: D.
        both: whether columns get a gradient too, which takes another product.
    """

    rows: int
    columns: int
    dimension: int
    both: bool = False

    def best(self, device: str = "cpu") -> Callable[[], None]:
        """The floor in the tiles that are the fastest on a device, its memory allocated. They are chosen on a part."""
        part = replace(self, rows=min(self.rows, 2048), columns=min(self.columns, 32768))
        data = part._data(device)
        quickest = min(self.tiles(), key=lambda tile: _quickest(part._step(data, tile)))
        return self._step(self._data(device), quickest)

    def tiles(self) -> Iterable[tuple[int, int]]:
        """Their (height, width)."""
        heights = {min(self.rows, height) for height in HEIGHTS}
        tiles = {(height, min(self.columns, width)) for height in heights for width in WIDTHS}
        return sorted(tiles | ({(self.rows, self.columns)} if self.rows * self.columns <= WHOLE else set()))

    def _data(self, device: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        numbers = (torch.randn(number, self.dimension, generator=generator) for number in (self.rows, self.columns))
        rows, columns = (F.normalize(each).to(device) for each in numbers)
        return rows, columns

    def _step(self, data: tuple[Tensor, Tensor], tile: tuple[int, int]) -> Callable[[], None]:
        rows, columns = data
        height, width = tile
        of_rows, of_columns = torch.zeros_like(rows), torch.zeros_like(columns if self.both else columns[:0])
        buffer = rows.new_empty(min(self.rows, height) * min(self.columns, width))

        def step() -> None:
            of_rows.zero_()
            for top in range(0, self.rows, height):
                some = rows[top : top + height]
                for left in range(0, self.columns, width):
                    others = columns[left : left + width]
                    s = buffer[: len(some) * len(others)].view(len(some), len(others))
                    torch.mm(some, others.T, out=s)
                    of_rows[top : top + height].addmm_(s.exp_(), others)
                    if self.both:
                        of_columns[left : left + width].addmm_(s.T, some, beta=int(top > 0))

        return step


def seconds(step: Callable[[], object]) -> float:
    """How long a step takes, whatever device it is on."""
    begun = time.perf_counter()
    step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _quickest(step: Callable[[], None], times: int = 3) -> float:
    """The shortest of a few runs."""
    return min(seconds(step) for _ in range(times))
