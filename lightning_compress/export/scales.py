"""Where the scales of an integer file come from: a callback of the last fit, or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.functional.quantizers import quantization_grid
from lightning_compress.mechanisms.calibration import Settings, calibrate, fingerprints
from lightning_compress.mechanisms.grids import Grids, WeightGrid
from lightning_compress.mechanisms.moving_grids import as_they_are
from lightning_compress.mechanisms.selection import listing, plain_name

Entry = TypeVar("Entry")
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
        scales = cls._of_callbacks(module) if checkpoint is None else cls.of_checkpoint(checkpoint)
        if scales.empty:
            where = "its Trainer's callbacks hold" if checkpoint is None else "the checkpoint holds"
            how = HOW
            if checkpoint is not None and any("quantization" in state for state in _states(checkpoint)):
                how = (
                    "it was saved before they were found; save one when the fit has ended, with "
                    "trainer.save_checkpoint, or calibrate with trainer.validate(module, ckpt_path=...) and export "
                    "without checkpoint="
                )
            raise ValueError(f"precision '{precision}' needs scales, and {where} none; {how}")
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
    def of_checkpoint(cls, checkpoint: Mapping[str, Any]) -> Scales:
        """Those of a checkpoint, which may be none.

        Args:
            checkpoint: Contents of a Lightning checkpoint.

        Returns:
            The scales.
        """
        kept = [own["quantization"] for own in _states(checkpoint) if own.get("quantization") is not None]
        return cls([Grids.from_state(state) for state in kept], ranges=trained_ranges(checkpoint))

    @property
    def empty(self) -> bool:
        """Whether there are none."""
        return not self._found and not self._steps and not self._ranges

    @property
    def weights_only(self) -> bool:
        """Whether they are grids that weights were trained for, and nothing is known of activations."""
        return not self._found and not self.empty

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
            return as_they_are(matching[0], network)
        given = self._weight_grids(name, network)
        settings = Settings(weight_bits=max(grid.bits for grid in given.values()), activation_bits=None)
        grids = calibrate(network, lambda: iter([run()]), settings, selected=given.__contains__, given=given)
        grids.network = name
        return grids

    def _weight_grids(self, name: str, network: nn.Module) -> dict[str, WeightGrid]:
        parameters = {plain_name(own): value for own, value in network.named_parameters() if value.ndim > 1}
        found = grids_of_steps(inside(name, self._steps)) | grids_of_ranges(inside(name, self._ranges), parameters)
        found = {own: grid for own, grid in found.items() if own in parameters}
        if not found:
            raise ValueError(f"none of the weights that have scales belongs to '{name}'; {HOW}")
        return found


def _states(checkpoint: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those of the callbacks."""
    return [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, Mapping)]


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
    for state in _states(checkpoint):
        if state.get("arguments", {}).get("target") == "grid":
            channel = state["arguments"]["granularity"] == "channel"
            asked = state["arguments"].get("bits", min(state["bits"].values(), default=0))
            found.update({name: (bits, channel, asked) for name, bits in state["bits"].items()})
    return found


def inside(network: str, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """What belongs to a network, by the names inside it.

    Args:
        network: Its dotted name in the module; "" for the module.
        entries: Name in the module to anything.

    Returns:
        Name in the network to the same.

    Example:
        >>> inside("net", {"net.0.weight": 1, "head.weight": 2})
        {'0.weight': 1}
    """
    prefix = f"{plain_name(network)}." if plain_name(network) else ""
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}


def grids_of_steps(steps: Mapping[str, tuple[Tensor, int]]) -> dict[str, WeightGrid]:
    """The grids of steps that weights were trained for.

    Args:
        steps: Name to step and bits.

    Returns:
        Name to grid, on the CPU.

    Example:
        >>> import torch
        >>> grids_of_steps({"weight": (torch.tensor(0.5), 4)})["weight"].bits
        4
    """
    return {name: WeightGrid(step.float().cpu(), bits) for name, (step, bits) in steps.items()}


def grids_of_ranges(
    ranges: Mapping[str, tuple[int, bool, int]], weights: Mapping[str, Tensor]
) -> dict[str, WeightGrid]:
    """The grids over the ranges of weights that were trained for such.

    Args:
        ranges: As :func:`trained_ranges` gives them.
        weights: Name to weight.

    Returns:
        Name to grid, of those that are in both and have two dimensions or more.

    Example:
        >>> import torch
        >>> grids_of_ranges({"weight": (4, False, 4)}, {"weight": torch.tensor([[0.7, -0.1]])})["weight"].step
        tensor(0.1000)
    """
    steps = {
        name: (quantization_grid(weights[name], bits, axis=0 if channel else None), bits)
        for name, (bits, channel, _) in ranges.items()
        if name in weights and weights[name].ndim > 1
    }
    return grids_of_steps(steps)


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
    return dict(getattr(callback, "trained_steps", {}))


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
            f"{max(grid.bits for grid in grids.weights.values())}: give PTQCallback or QATCallback weight_bits=4, and "
            "no edge_bits above"
        )
    floats = (*grids.left_in_float, *(["all activations"] if grids.activations else []))
    return replace(grids, integer_activations=False, activations={}, left_in_float=floats)
