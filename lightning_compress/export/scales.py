"""Where the scales of an integer file come from: a callback of the last fit, or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.functional.quantizers import quantization_grid
from lightning_compress.mechanisms.calibration import Settings, calibrate, fingerprints
from lightning_compress.mechanisms.grids import Grids, WeightGrid
from lightning_compress.mechanisms.selection import listing, plain_name

HOW = "add PTQCallback() or QATCallback() to the Trainer's callbacks, or name a checkpoint= with scales"


class Scales:
    """The scales that were found, before it is known for which network.

    Args:
        found: Those of whole networks.
        steps: Name of a weight in the module to the step and bits that it was trained for.
        ranges: Name of a weight to the bits that it was trained for, and whether each channel has a grid; the steps
            are those of its range.
        provisional: Whether weights may have changed since: what is written is only tried.
    """

    def __init__(
        self,
        found: Sequence[Grids] = (),
        steps: Mapping[str, tuple[Tensor, int]] = MappingProxyType({}),
        ranges: Mapping[str, tuple[int, bool, int]] = MappingProxyType({}),
        *,
        provisional: bool = False,
    ) -> None:
        self._found, self._steps, self._ranges = list(found), dict(steps), dict(ranges)
        self.provisional = provisional

    @classmethod
    def of(cls, module: nn.Module, checkpoint: Mapping[str, Any] | None, precision: str) -> Scales:
        """Those that a module's callbacks hold, or a checkpoint.

        Args:
            module: The LightningModule, or any other module.
            checkpoint: Contents of a Lightning checkpoint; None: ask the callbacks of the module's Trainer.
            precision: What for, for the error message.

        Returns:
            The scales.

        Raises:
            ValueError: If there are none.
        """
        scales = cls._of_callbacks(module) if checkpoint is None else cls._of_checkpoint(checkpoint)
        if not scales._found and not scales._steps and not scales._ranges:
            where = "its Trainer's callbacks hold" if checkpoint is None else "the checkpoint holds"
            raise ValueError(f"precision '{precision}' needs scales, and {where} none; {HOW}")
        return scales

    @classmethod
    def _of_callbacks(cls, module: nn.Module) -> Scales:
        found: list[Grids] = []
        steps: dict[str, tuple[Tensor, int]] = {}
        for callback in getattr(_compat.attached_trainer(module), "callbacks", None) or []:
            grids = getattr(callback, "quantization", None)
            found += [grids] if isinstance(grids, Grids) else []
            steps.update(given_steps(callback))
        return cls(found, steps)

    @classmethod
    def _of_checkpoint(cls, checkpoint: Mapping[str, Any]) -> Scales:
        states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, Mapping)]
        kept = [state["quantization"] for state in states if state.get("quantization") is not None]
        return cls([Grids.from_state(state) for state in kept], ranges=trained_ranges(checkpoint))

    @property
    def network(self) -> str | None:
        """The network that they were calibrated for; None where that is open."""
        return self._found[0].network if len(self._found) == 1 else None

    def for_network(self, name: str, network: nn.Module, run: Callable[[], object]) -> Grids:
        """The grids of a network.

        Args:
            name: Its dotted name in the module.
            network: A copy of it, in evaluation mode.
            run: Runs it once on the sample.

        Returns:
            Those that were calibrated, or weights alone on the grids that they were trained for.

        Raises:
            ValueError: If they were calibrated for another network.
        """
        if self._found:
            matching = [grids for grids in self._found if plain_name(grids.network) == plain_name(name)]
            if not matching:
                raise ValueError(
                    f"the scales were calibrated for {listing([grids.network for grids in self._found])}, not for "
                    f"'{name}'; name that network with network="
                )
            bound = matching[0].fingerprints  # none where a training goes on: scales and weights are of one checkpoint
            if bound and not self.provisional and bound != fingerprints(network):
                raise ValueError(
                    "the weights have changed since their scales were found; calibrate again, for instance with "
                    "trainer.validate, which does so"
                )
            return matching[0]
        prefix = f"{plain_name(name)}." if name else ""
        given = {key.removeprefix(prefix): grid for key, grid in self._weight_grids(prefix, network).items()}
        settings = Settings(weight_bits=max(grid.bits for grid in given.values()), activation_bits=None)
        grids = calibrate(network, lambda: iter([run()]), settings, selected=given.__contains__, given=given)
        grids.network = name
        return grids

    def _weight_grids(self, prefix: str, network: nn.Module) -> dict[str, WeightGrid]:
        found = {name: WeightGrid(step.float().cpu(), bits) for name, (step, bits) in self._steps.items()}
        parameters = {f"{prefix}{plain_name(name)}": value for name, value in network.named_parameters()}
        for name, (bits, channel, _) in self._ranges.items():
            if name in parameters:
                step = quantization_grid(parameters[name], bits, axis=0 if channel else None)
                found[name] = WeightGrid(step.float().cpu(), bits)
        found = {name: grid for name, grid in found.items() if name in parameters and parameters[name].ndim > 1}
        if not found:
            raise ValueError(f"none of the weights that have scales belongs to '{prefix.removesuffix('.')}'; {HOW}")
        return found


def trained_ranges(checkpoint: Mapping[str, Any]) -> dict[str, tuple[int, bool, int]]:
    """What ``PSGDCallback`` has trained the weights of a checkpoint for.

    Args:
        checkpoint: Its contents.

    Returns:
        Name of each weight to its bits, whether each channel has a grid, and the bits that were asked for.

    Example:
        >>> trained_ranges({"state_dict": {}})
        {}
    """
    found = {}
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, Mapping) and state.get("arguments", {}).get("target") == "grid":
            channel = state["arguments"]["granularity"] == "channel"
            asked = state["arguments"].get("bits", min(state["bits"].values(), default=0))
            found.update({name: (bits, channel, asked) for name, bits in state["bits"].items()})
    return found


def given_steps(callback: Any) -> dict[str, tuple[Tensor, int]]:
    """The grids that a callback has trained weights for.

    Args:
        callback: Any.

    Returns:
        Name of each weight to its step and bits; empty for callbacks that do nothing of the kind.

    Example:
        >>> given_steps(object())
        {}
    """
    found = getattr(callback, "grids", None)
    if not isinstance(found, dict) or not all(isinstance(entry, tuple) and len(entry) == 2 for entry in found.values()):
        return {}
    return found


def for_precision(grids: Grids, precision: str) -> Grids:
    """The grids that a file of some precision takes.

    Args:
        grids: Those of the network.
        precision: "int8", or "int4" for weights only.

    Returns:
        The same, or without activations.

    Raises:
        ValueError: If the weights have more bits than the file.
    """
    if precision == "int8":
        return grids
    wide = [name for name, grid in grids.weights.items() if grid.bits > 4]
    if len(wide) == len(grids.weights):
        raise ValueError(
            f"precision 'int4' needs weights of at most 4 bits, and those of the network have "
            f"{max(grid.bits for grid in grids.weights.values())}: calibrate with PTQCallback(weight_bits=4)"
        )
    return replace(grids, integer_activations=False, activations={})
