"""What the techniques share whose result is a quantised network: validation, test and prediction show it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, ClassVar

from torch import nn

from lightning_compress.callbacks.calibrating import CalibratingCallback
from lightning_compress.callbacks.returned import Returned
from lightning_compress.callbacks.validating import own_names
from lightning_compress.export.evaluate import evaluate_quantized, has_validation
from lightning_compress.mechanisms.calibration import fingerprints
from lightning_compress.mechanisms.grids import Grids
from lightning_compress.mechanisms.quantization import GuardedCalls, QuantizationError, quantizing
from lightning_compress.mechanisms.rounding import Rounding
from lightning_compress.mechanisms.saved_grids import flaw_of_grids
from lightning_compress.mechanisms.selection import find_module, listing, plain_name
from lightning_compress.mechanisms.sharding import class_name
from lightning_compress.mechanisms.states import GRIDS


class QuantisedCallback(CalibratingCallback):
    """Base of the techniques that leave grids by which the network is quantised.

    Outside of a fit ``trainer.validate``, ``test`` and ``predict`` run the quantised network; the module and its
    checkpoints keep plain weights, the grids are in this callback's state.

    Args:
        settings: As in the base class.

    Attributes:
        quantization: The grids, once they are known.
        metrics: The metrics of the quantised network in the module's own validation, after a fit.
    """

    quantises = True
    holds: ClassVar[Mapping[str, Any]] = {"quantization": (GRIDS, None)}
    quantization = Returned[Grids | None](None)
    metrics = Returned[Mapping[str, float]](MappingProxyType({}))

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._evaluation = ExitStack()
        self._calls: GuardedCalls | None = None

    # For techniques

    def shown(self, trainer: Any, pl_module: Any) -> Grids | None:
        """The grids that an evaluation outside of a fit shows; None: the plain network."""
        return self.quantization

    # Life cycle

    def evaluate(self, trainer: Any, pl_module: Any) -> None:
        """Measure the quantised network in the module's own validation, on rank 0."""
        if not trainer.is_global_zero or self.quantization is None or not has_validation(pl_module, trainer):
            return
        others = [own.quantization for own in trainer.callbacks if isinstance(own, QuantisedCallback)]
        found = [self.quantization, *(own for own in others if own is not None and own is not self.quantization)]
        try:
            self.metrics = evaluate_quantized(pl_module, trainer, *found)
        except Exception as error:  # the user's validation may need what only the fit has
            warnings.warn(
                f"the validation of the quantised network failed: {type(error).__name__}: {error}", stacklevel=2
            )
            return
        numbers = {f"compress/{self.name}/val_{name}": value for name, value in own_names(self.metrics).items()}
        self.tracker(trainer).numbers(numbers)

    def remarks(self) -> list[str]:
        """What is quantised, and what is not."""
        return [] if self.quantization is None else [f"{self.name}: {self._summary(self.quantization)}."]

    def enter(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """End an evaluation that failed."""
        self._end_evaluation()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """As the base; two of these cannot quantise one network."""
        super().setup(trainer, pl_module, stage)
        for other in trainer.callbacks:
            if not isinstance(other, QuantisedCallback) or other is self:
                continue
            if type(other) is not type(self):
                raise ValueError(
                    f"'{self.name}' ({type(self).__name__}) and '{other.name}' ({type(other).__name__}) would both "
                    "quantise: QATCallback finds its grids itself and trains them, so leave PTQCallback out"
                )
            if None in (self.network, other.network):
                raise ValueError(
                    f"'{self.name}' and '{other.name}' quantise one network; keep one of them, or give each another "
                    "part of the module with network="
                )
            if other.network == self.network:
                raise ValueError(f"'{self.name}' and '{other.name}' both quantise '{self.network}'; keep one of them")
            if f"{other.network}.".startswith(f"{self.network}." if self.network else ""):
                raise ValueError(
                    f"'{other.name}' quantises '{other.network}', which lies in '{self.network or 'self'}' of "
                    f"'{self.name}', so it would be quantised twice; name parts that lie side by side"
                )

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Show the quantised network."""
        self._show(trainer, pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Show the quantised network."""
        self._show(trainer, pl_module)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Show the quantised network."""
        self._show(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Show the plain network again."""
        super().on_validation_end(trainer, pl_module)
        self._hide(pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Show the plain network again."""
        self._hide(pl_module)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Show the plain network again; what was predicted is not lost where that was never called."""
        try:
            self._hide(pl_module)
        except QuantizationError as error:
            warnings.warn(str(error), stacklevel=2)

    def leave(self) -> None:
        """As the base; show the plain network again."""
        super().leave()
        self._end_evaluation()

    def flaw(self, state: Mapping[str, Any]) -> str | None:
        """As the base; with the numbers of the grids."""
        grids = {place: state.get(place) for place in ("quantization", "start_grids")}
        flaws = (flaw_of_grids(own, place) for place, own in grids.items() if own is not None)
        return super().flaw(state) or next(filter(None, flaws), None)

    def extra_state(self) -> dict[str, Any]:
        """The scales."""
        return {"quantization": None if self.quantization is None else self.quantization.state()}

    # Private

    def _show(self, trainer: Any, pl_module: Any) -> None:
        if self._controller is not None:  # a fit, which sees to its validation itself
            return
        grids = self.shown(trainer, pl_module)
        if grids is not None:
            network = find_module(pl_module, grids.network, argument="network")
            self._calls = self._evaluation.enter_context(quantizing(network, Rounding(network, grids)))

    def _hide(self, pl_module: Any) -> None:
        calls = self._end_evaluation()
        if calls is not None and calls.count == 0:
            raise QuantizationError(
                f"{type(self).__name__} '{self.name}' had no effect: {class_name(pl_module)} never called "
                f"'{(self.quantization or Grids()).network or 'self'}', so what was measured is the plain network; "
                "name the part that it calls with network="
            )

    def _end_evaluation(self) -> GuardedCalls | None:
        """Show the plain network; what has counted the calls of the quantised one is given back."""
        calls, self._calls = self._calls, None
        self._evaluation.close()
        return calls

    def _belongs_to(self, grids: Grids, pl_module: nn.Module) -> bool:
        """Whether the module has the network, and that the weights, that grids were found for."""
        parts = pl_module.named_modules()
        network = next((part for own, part in parts if plain_name(own) == grids.network), None)
        return network is not None and fingerprints(network) == grids.fingerprints

    def _summary(self, grids: Grids) -> str:
        weights = _counted("weight", [grid.bits for grid in grids.weights.values()])
        activations = _counted("activation", [grid.bits for grid in grids.activations.values()])
        left = f"; left in float: {listing(grids.left_in_float)}" if grids.left_in_float else ""
        return f"{weights} and {activations} are quantised{left}"


def _counted(what: str, bits: Sequence[int]) -> str:
    """Such as "20 weights (18 of 4 bits, 2 of 8)"."""
    kinds = [f"{count} of {own}" for own, count in sorted(Counter(bits).items())]
    if not kinds:
        return f"no {what}s"
    number = f"{len(bits)} {what}{'' if len(bits) == 1 else 's'}"
    return f"{number} of {bits[0]} bits" if len(kinds) == 1 else f"{number} ({', '.join(kinds)} bits)"
