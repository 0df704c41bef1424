"""What masks did to each layer over a training, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lightning_compress.report.heatmap import HeatMap, heat_map_picture
from lightning_compress.report.pictures import report_picture
from lightning_compress.report.table import Picture
from lightning_compress.tracking.tracker import Tracker

PICTURES = 20
"""The most times that a history is drawn before the end of the training."""


class LayerHistory:
    """Sparsity and churn of each layer at each update of the masks.

    Of more updates than there are columns, neighbours share one: it has the last sparsity and the mean churn of them.

    Args:
        names: Of the layers.
        most: Columns that are kept; even.

    Example:
        >>> history = LayerHistory(["fc.weight"])
        >>> history.add(10, [0.5], [0.5])
        >>> history.maps("dcil", until=20)[0].values.tolist(), history.maps("dcil", until=20)[0].steps
        ([[0.5]], [10, 20])
    """

    def __init__(self, names: Sequence[str], most: int = 128) -> None:
        self.names, self.most = list(names), most
        self._steps: list[int] = []  # of the first update of each column
        self._sparsity: list[npt.NDArray[np.float32]] = []
        self._churn: list[npt.NDArray[np.float32]] = []  # sums
        self._updates: list[int] = []  # in each column
        self._together = 1  # updates that share a column
        self._drawn = -1  # the part of the training in which it was drawn last
        self._until: int | None = None  # step at which it was
        self._last = 0  # step that is known of

    def __len__(self) -> int:
        """How many columns there are."""
        return len(self._steps)

    def add(self, step: int, sparsity: Sequence[float], churn: Sequence[float]) -> None:
        """Take down an update.

        Args:
            step: Optimizer steps so far.
            sparsity: Share of zeros in each layer, in [0, 1].
            churn: Share of each layer's mask that changed, in [0, 1].
        """
        zeros, changed = np.asarray(sparsity, np.float32), np.asarray(churn, np.float32)
        if self._updates and (self._updates[-1] < self._together or self._steps[-1] == step):
            self._sparsity[-1], self._churn[-1] = zeros, self._churn[-1] + changed
            self._updates[-1] += 1
            return
        if len(self) == self.most:
            self._halve()
        self._steps.append(step)
        self._sparsity.append(zeros)
        self._churn.append(changed)
        self._updates.append(1)

    def maps(self, name: str, until: int) -> tuple[HeatMap, HeatMap]:
        """Sparsity and churn, to be drawn; there must have been an update.

        Args:
            name: Of the callback.
            until: Optimizer steps so far.
        """
        steps = [*self._steps, max(until, self._steps[-1] + 1)]
        churn = np.stack(self._churn, axis=1) / np.asarray(self._updates, np.float32)
        return (
            HeatMap(f"{name}: sparsity of each layer", self.names, steps, np.stack(self._sparsity, axis=1)),
            HeatMap(f"{name}: share of each layer's mask that an update changed", self.names, steps, churn, full=None),
        )

    def show(self, tracker: Tracker, name: str, step: int, fraction: float | None = None) -> None:
        """Give loggers the pictures ``compress/<name>/sparsity_map`` and ``churn_map``, if there is something new.

        Args:
            tracker: That of the fit.
            name: Of the callback.
            step: Optimizer steps so far.
            fraction: Of the training, in [0, 1]: in each twentieth of it they are drawn once. None: it has ended.
        """
        self._last = step
        part = -1 if fraction is None else int(fraction * PICTURES)
        seen = step == self._until or (part == self._drawn and fraction is not None)
        if seen or not self._steps or not tracker.takes_pictures:
            return
        self._drawn, self._until = part, step
        for quantity, map_ in zip(("sparsity", "churn"), self.maps(name, step), strict=True):
            tracker.picture(f"compress/{name}/{quantity}_map", heat_map_picture(map_), newest=True)

    def pictures(self, name: str) -> list[Picture]:
        """The same for a report, up to the step that was told last; none where no mask was ever updated.

        Args:
            name: Of the callback.
        """
        if not self._steps:
            return []
        legends = (
            "A row for each layer; bright: many zeros.",
            "A row for each layer; bright: much of its mask changed.",
        )
        drawn = zip(self.maps(name, self._last), legends, strict=True)
        return [report_picture(map_.title, legend, heat_map_picture(map_)) for map_, legend in drawn]

    def _halve(self) -> None:
        """Let two neighbours share a column."""
        self._steps, self._sparsity = self._steps[::2], self._sparsity[1::2]
        self._churn = [first + second for first, second in zip(self._churn[::2], self._churn[1::2], strict=True)]
        self._updates = [sum(pair) for pair in zip(self._updates[::2], self._updates[1::2], strict=True)]
        self._together *= 2
