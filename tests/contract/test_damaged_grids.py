"""What a checkpoint holds inside of QAT's state, damaged or of another network: refused before any of it is used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress import QATCallback

from .modules import Classifier, NormClassifier, difference, loader, made, trainer
from .traces import traces

SIZES = ("mse", "observed", "learned")
KEY = "QATCallback[qat]"
OURS = ("quantization", "start_grids", "highest_lr", "moving", "top_lr", "watch", "froze", "waits", "clipped", "run")
FREE = ("fingerprints", "left_in_float", "seen", "top_lr")
"""Lists and mappings that may well have fewer entries."""
BY_NAME = [(key,) for key in ("activations", "sites", "folds", "biases", "statistics", "divisors", "factors")]
LATER = ("following", "shared", "training_only", "highest_lr")
"""Entries that older checkpoints do not have."""


def qat(size: str) -> QATCallback:
    return QATCallback(weight_bits=4, step_size=size)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints from the middle of a training, one for each way of the steps; only looked at."""
    folder, found = tmp_path_factory.mktemp("checkpoints"), {}
    for size in SIZES:
        saving = ModelCheckpoint(folder, filename=size, save_top_k=-1)
        trainer(qat(size), saving, enable_checkpointing=True).fit(made(Classifier), loader())
        found[size] = torch.load(folder / f"{size}.ckpt", weights_only=True)
    return found


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each entry of a state, from the outside to the inside."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, entry in inside:
        yield (*path, key)
        yield from places(entry, (*path, key))


def edited(state: Any, path: tuple[Any, ...], change: Any) -> Any:
    """A copy in which one entry is another, or is missing if ``change`` is ``...``."""
    if not path:
        return change
    copied = list(state) if isinstance(state, (list, tuple)) else dict(state)
    if len(path) == 1 and change is ...:
        del copied[path[0]]
    else:
        copied[path[0]] = edited(copied[path[0]], path[1:], change)
    return copied


def refusal(callback: QATCallback, state: dict[str, Any]) -> str:
    """What is said of a state; nothing where it is taken."""
    try:
        callback.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return ""


def wrong(value: Any) -> list[Any]:
    """Entries of another type; None where one may be missing is not among them."""
    return [7] if isinstance(value, str) else ["zz", {"zz": 1}] if not isinstance(value, dict) else ["zz", [1]]


@pytest.mark.sample
@pytest.mark.parametrize("size", SIZES)
def test_every_entry_of_another_type_or_missing_is_refused(size, checkpoints):
    state = checkpoints[size]["callbacks"][KEY]
    own = {key: state[key] for key in OURS}
    tried = 0
    for path in places(own):
        value = own
        for key in path:
            value = value[key]
        changes = wrong(value)
        if isinstance(path[-1], str) and not set(path) & {*FREE, *LATER} and path[-2:-1] not in BY_NAME:
            changes.append(...)
        for change in changes:
            if value is None or (len(path) == 1 and change is ... and path[0] == "moving"):
                continue  # where it may be missing
            damaged, callback = edited(state, path, change), qat(size)
            with pytest.raises(
                ValueError, match=rf"the checkpoint's state of 'qat' .*is damaged: .*{path[0]}"
            ) as raised:
                callback.load_state_dict(damaged)
            assert callback.quantization is None, raised.value
            tried += 1
    assert tried > 100


def steps(shape: tuple[int, ...], value: float = 0.1) -> torch.Tensor:
    return torch.full(shape, value)


WEIGHT, BITS = ("quantization", "weights", "0.weight", "step"), ("quantization", "weights", "0.weight", "bits")
Path = tuple[Any, ...]


def first_site(state: dict[str, Any]) -> Path:
    """The name of the weight that an operation uses; operations are numbered as they are called."""
    return ("quantization", "sites", next(iter(state["quantization"]["sites"])), 0)


NUMBERS: list[tuple[str, Path | Callable[[dict[str, Any]], Path], Any, str]] = [
    *[(size, BITS, bits, f"bits' must be from 2 to 8, got {bits}") for size in SIZES for bits in (1, 9)],
    *[
        (size, WEIGHT, step, r"step' must be a positive number, or some in a row")
        for size in SIZES
        for step in (steps((4,), 0.0), steps((4,), -1.0), steps((4,), float("nan")), steps((4, 1)), torch.ones(4).int())
    ],
    ("mse", first_site, "other.weight", "must be rows of a weight that has a grid"),
    ("mse", ("run",), ["other.weight"], "'run' names 'other.weight', which has no grid"),
    ("mse", ("quantization",), None, "'quantization' is None beside 'moving'"),
    *[
        (size, ("clipped",), share, f"'clipped' must be from 0 to 1, got {share}")
        for size in SIZES
        for share in (-0.5, 1.5, float("nan"))
    ],
    *[
        ("mse", ("watch", "first"), loss, f"'watch.first' must be a finite number or None, got {loss}")
        for loss in (float("nan"), float("inf"))
    ],
    *[("mse", ("watch", "batches"), count, f"'watch.batches' must be from 0 to 19, got {count}") for count in (-1, 20)],
    ("learned", ("watch", "batches"), 0, r"'watch.seen' must have no more losses than 'watch.batches', 0, got [1-9]"),
    ("observed", ("moving",), {}, "'moving.frozen' is missing"),
    ("observed", ("moving", "ranges"), {}, r"'moving.ranges' must be of \["),
    ("learned", ("moving",), {}, "'moving.begun' is missing"),
    ("learned", ("factors",), {}, "'factors.module' is missing"),
    ("learned", ("factors", "module", "factors"), steps((1,)), r"'factors.module.factors' must be \d+ finite numbers"),
    ("learned", ("factors", "module", "factors"), "zz", "'factors.module.factors' must be a tensor, got 'zz'"),
    ("learned", ("factors", "optimizer", "state", 0, "exp_avg"), steps((3,)), r"exp_avg' must be of shape \("),
    ("learned", ("factors", "optimizer", "param_groups"), 3, "'factors.optimizer.param_groups' must be a list"),
    ("learned", ("moving", "begun", "weights"), {}, "'moving.begun.weights' must be those of 'quantization'"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "path", "value", "message"), NUMBERS)
def test_numbers_that_cannot_be_are_refused(size, path, value, message, checkpoints):
    state = checkpoints[size]["callbacks"][KEY]
    damaged = edited(state, path(state) if callable(path) else path, value)
    with pytest.raises(ValueError, match=message):
        qat(size).load_state_dict(damaged)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("what", ["rows", "names"])
def test_grids_of_another_network_are_refused_and_nothing_has_changed(size, what, checkpoints, tmp_path):
    """The same callback of another network: with other rows, or with batch norm between."""
    whole = copy.deepcopy(checkpoints[size])
    for grids in (whole["callbacks"][KEY]["quantization"], whole["callbacks"][KEY]["start_grids"]):
        weights = grids["weights"]
        if what == "rows":
            weights["0.weight"]["step"] = weights["0.weight"]["step"].repeat(2)
        else:
            weights["9.weight"] = weights.pop("0.weight")
            for site in grids["sites"].values():
                site[0] = site[0].replace("0.weight", "9.weight")
    if what == "names":
        whole["callbacks"][KEY]["run"] = []
    message = "has 8 steps in the checkpoint, and 4 rows" if what == "rows" else "the network has no weight '9.weight'"
    if size == "learned":  # where they began, and how many there are, is said before that
        message = f"{message}|must be those of 'quantization'"
    torch.save(whole, tmp_path / "foreign.ckpt")
    module, callback = made(Classifier), qat(size)
    before = traces(module)
    for run in ("fit", "validate"):
        with pytest.raises(ValueError, match=message):
            getattr(trainer(callback, max_epochs=2), run)(
                module, loader(), ckpt_path=tmp_path / "foreign.ckpt", weights_only=True
            )
        assert not {"training_step", "forward", "on_save_checkpoint"} & set(vars(module))
        assert not any("forward" in vars(part) for part in module.modules())
    assert before.keys() == traces(module).keys()


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_what_is_whole_goes_on(size, checkpoints, tmp_path):
    torch.save(checkpoints[size], tmp_path / "whole.ckpt")
    module = made(Classifier)
    trainer(qat(size), max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "whole.ckpt", weights_only=True)
    assert difference(module, made(Classifier)) > 0
    other = made(NormClassifier)
    with pytest.raises(RuntimeError, match=r"Error.* in loading state_dict"):  # Lightning looks at the weights first
        trainer(qat(size), max_epochs=2).fit(other, loader(), ckpt_path=tmp_path / "whole.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", ["quantization", "start_grids"])
def test_parts_that_are_missing_are_damage(place, size, tmp_path):
    """Also one fold, or one activation, of which nothing else in these grids tells."""
    saving = ModelCheckpoint(tmp_path, filename="whole", save_top_k=-1)
    trainer(qat(size), saving, enable_checkpointing=True).fit(made(NormClassifier), loader())
    whole = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    grids = whole["callbacks"][KEY][place]
    assert grids["folds"]
    changes = [(part, {}) for part in ("weights", "sites", "activations", "folds")]
    changes += [(part, dict(list(grids[part].items())[1:])) for part in ("sites", "activations")]
    for part, change in [*changes, ("network", "nonsense")]:
        broken = {**whole, "callbacks": {KEY: edited(whole["callbacks"][KEY], (place, part), change)}}
        torch.save(broken, tmp_path / "broken.ckpt")
        for run in ("fit", "validate") if (place, size) == ("quantization", "mse") else ("fit",):
            module = made(NormClassifier)
            with pytest.raises(ValueError, match=r"the checkpoint's state of 'qat' \(QATCallback\) is damaged: "):
                getattr(trainer(qat(size), max_epochs=2), run)(
                    module, loader(), ckpt_path=tmp_path / "broken.ckpt", weights_only=True
                )
            assert not {"training_step", "forward"} & set(vars(module))
