"""Grid searches over alpha and lambda, extended while the best setting lies on the border."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from .training import Cell

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .store import Machine, Store

LARGEST = {"lr": 1.0, "weight_decay": 10.0}  # beyond, a grid is not extended
SMALLEST = {"lr": 1e-7, "weight_decay": 1e-7}


@dataclasses.dataclass
class Grid:
    """The settings of one optimizer on one network.

    Attributes:
        base: everything but ``lr`` and ``weight_decay``.
        lrs, weight_decays: ascending.
    """

    base: Cell
    lrs: list[float]
    weight_decays: list[float]

    @property
    def name(self) -> str:
        """The optimizer's, and its options."""
        return ", ".join(filter(None, (self.base.optimizer, self.base.options)))

    def cell(self, lr: float, weight_decay: float, seed: int | None = None) -> Cell:
        """The cell with this setting, of the grid's seed or another one."""
        seed = self.base.seed if seed is None else seed
        return dataclasses.replace(self.base, lr=lr, weight_decay=weight_decay, seed=seed)

    def cells(self) -> list[Cell]:
        """All of them."""
        return [self.cell(lr, decay) for lr in self.lrs for decay in self.weight_decays]

    def best(self, store: Store) -> Cell:
        """See :func:`best`."""
        return best(self.cells(), store)

    def on_border(self, store: Store) -> list[str]:
        """Where the best setting has a neighbour on one side only; 0 needs none below it."""
        best = self.best(store)
        sides = []
        for axis, values in (("lr", self.lrs), ("weight_decay", self.weight_decays)):
            value = getattr(best, axis)
            if value == values[-1] and value < LARGEST[axis]:
                sides.append(f"{axis} above {value:g}")
            if value == values[0] and value > SMALLEST[axis]:
                sides.append(f"{axis} below {value:g}")
        return sides

    def extend(self, store: Store) -> bool:
        """Adds a neighbour on each such side, on the scale 1, 5, 10; whether there was one."""
        sides = self.on_border(store)
        for side in sides:
            axis, direction, _ = side.split()
            values = self.lrs if axis == "lr" else self.weight_decays
            if direction == "above":
                values.append(neighbour(values[-1], up=True))
            else:
                values.insert(0, neighbour(values[0], up=False))
        return bool(sides)


def best(cells: Iterable[Cell], store: Store) -> Cell:
    """The smallest final error, of equals the smallest loss.

    It is the test error, as the paper chooses, or of images that are held out.
    """

    def rank(cell: Cell) -> tuple[float, float]:
        result = store[cell]
        loss = result.train_loss
        error = result.validation_error if cell.validation > 0 else result.test_error
        return (math.inf, 0.0) if math.isnan(loss) else (error, loss)

    return min(cells, key=rank)


def neighbour(value: float, up: bool) -> float:
    """The next number of ..., 0.1, 0.5, 1, 5, 10, ...; of 0.2, 0.5 above and 0.1 below."""
    exponent = math.floor(math.log10(value) + 1e-9)
    mantissa = value / 10.0**exponent
    if up:
        return float(f"5e{exponent}") if mantissa < 4.99 else float(f"1e{exponent + 1}")
    if mantissa > 5.01:
        return float(f"5e{exponent}")
    return float(f"1e{exponent}") if mantissa > 1.01 else float(f"5e{exponent - 1}")


def search(
    grids: Sequence[Grid], store: Store, machine: Machine, title: str, extensions: int
) -> None:
    """Trains all cells, then those of extended grids, at most so often."""
    for extension in range(extensions + 1):
        named = title if extension == 0 else f"{title}, extension {extension}"
        store.fill([cell for grid in grids for cell in grid.cells()], machine, named)
        if extension < extensions:
            extended = [grid.extend(store) for grid in grids]  # all of them
            if not any(extended):
                break
