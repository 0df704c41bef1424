"""A killed and resumed run equals the uninterrupted one, bit for bit, wherever the run without our callback does.

Each test has a control arm without the callback, which must be exact too: otherwise it shows nothing about us.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from cases import CASES, each_case
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils._pytree import tree_leaves

from lightning_compress import PruningCallback
from lightning_compress.mechanisms.checkpoints import SECTION

from .grid import each_case_and_some_modules
from .modules import AUTOMATIC, BATCH, Classifier, MixinClassifier, difference, loader, made, trainer, twin

[PRUNING] = [case for case in CASES if case.name == "PruningCallback"]
CONTROL = pytest.param(None, id="control")
ROWS = [
    CONTROL,
    *(pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case is not CASES[0])) for case in CASES),
]


class SavesEarly(L.Callback):
    """Saves in the end of a batch, before those that come later in the list have seen it."""

    def __init__(self, at_step: int, path: Path, *, weights_only: bool = False) -> None:
        self.at_step, self.path, self.weights_only = at_step, path, weights_only

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at_step:
            trainer.save_checkpoint(self.path, weights_only=self.weights_only)


class Unplug(L.Callback):
    """After so many steps the dataset can no longer be read."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at_step:
            trainer.train_dataloader.dataset.fails_at = BATCH * (batch_idx + 1)


def build(case, folder, kind=Classifier):
    """The callback of a row, or those of a combination, in a list; none for the control arm."""
    built = [] if case is None else case.build(folder, kind)
    return built if isinstance(built, list) else [built]


def exact_fit(kind, folder, callbacks, *, ckpt_path=None, stateful=False, epochs=4, rows=16, steps=None, **settings):
    """A fit whose settings resume exactly in Lightning itself: no shuffle, no dropout, with validation."""
    module = made(kind)
    saving = ModelCheckpoint(
        folder, filename="{step}", save_top_k=-1, every_n_train_steps=steps, every_n_epochs=None if steps else 1
    )
    fitting = trainer(*callbacks, saving, max_epochs=epochs, enable_checkpointing=True, **settings)
    data = loader(kind, rows=rows, stateful=stateful)
    fitting.fit(
        module, data, loader(kind, rows=2 * BATCH), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None
    )
    fitting.save_checkpoint(folder / "end.ckpt")
    return module, fitting


def assert_same_checkpoints(first, second, case, callbacks, but=()):
    """Weights, optimizer, scheduler, our own state, and dense weights where there are some."""
    ours, theirs = (torch.load(folder / "end.ckpt", weights_only=True) for folder in (first, second))
    assert (SECTION in ours, SECTION in theirs) == (case is not None and (case.keeps_dense or case.shrinks),) * 2
    pairs = [(ours[key], theirs[key]) for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")]
    for own in callbacks:
        states = (ours["callbacks"][own.state_key], theirs["callbacks"][own.state_key])
        pairs.append(tuple({key: value for key, value in state.items() if key not in but} for state in states))
    pairs.append((ours.get(SECTION), theirs.get(SECTION)))
    for first_tree, second_tree in pairs:
        for a, b in zip(tree_leaves(first_tree), tree_leaves(second_tree), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def resumed_at_the_end_of_an_epoch(case, kind, folder):
    whole, resumed = folder / "whole", folder / "resumed"
    exact_fit(kind, whole, build(case, folder, kind))
    callbacks = build(case, folder, kind)
    _, fitting = exact_fit(kind, resumed, callbacks, ckpt_path=whole / "step=4.ckpt")
    assert fitting.global_step == 8
    assert_same_checkpoints(whole, resumed, case, callbacks)


@each_case_and_some_modules()
@pytest.mark.sample
def test_from_the_end_of_an_epoch(case, kind, tmp_path):
    resumed_at_the_end_of_an_epoch(case, kind, tmp_path)


@pytest.mark.parametrize("kind", AUTOMATIC)
def test_from_the_end_of_an_epoch_without_us(kind, tmp_path):
    """The control arm of the test above, once for each kind of module."""
    resumed_at_the_end_of_an_epoch(None, kind, tmp_path)


# After an exception in the middle of an epoch, below, every row resumes in the fast tests.
@pytest.mark.parametrize("case", ROWS)
def test_from_the_middle_of_an_epoch_with_a_stateful_loader(case, tmp_path):
    settings = {"stateful": True, "epochs": 2, "rows": 64, "steps": 3}
    exact_fit(Classifier, tmp_path / "whole", build(case, tmp_path), **settings)
    callbacks = build(case, tmp_path)
    _, fitting = exact_fit(
        Classifier, tmp_path / "resumed", callbacks, ckpt_path=tmp_path / "whole" / "step=3.ckpt", **settings
    )
    assert fitting.global_step == 16
    assert_same_checkpoints(tmp_path / "whole", tmp_path / "resumed", case, callbacks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, id=f"{'control' if case is None else case.name}-{kind.__name__}")
        for case in (None, *CASES)
        for kind in (Classifier, MixinClassifier)
        if kind is Classifier or case is None or case.name not in ("DCILCallback", "StructuredPruningCallback")
    ],
)
def test_from_a_checkpoint_that_somebody_saved_before_our_turn(case, kind, tmp_path):
    settings = {"stateful": True, "epochs": 2, "rows": 64}
    saver = SavesEarly(3, tmp_path / "early.ckpt")
    exact_fit(kind, tmp_path / "whole", [saver, *build(case, tmp_path, kind)], **settings)
    callbacks = build(case, tmp_path, kind)
    exact_fit(kind, tmp_path / "resumed", callbacks, ckpt_path=tmp_path / "early.ckpt", **settings)
    # one loss fewer was looked at for whether it grows
    assert_same_checkpoints(tmp_path / "whole", tmp_path / "resumed", case, callbacks, but=("watch",))


@pytest.mark.slow
@pytest.mark.parametrize("rewind", ["weights", "lr"])
def test_from_a_checkpoint_that_somebody_saved_before_our_turn_to_rewind(rewind, tmp_path):
    """The weights, or the learning rate, go back while the checkpoint is made: all of it is of the same moment."""
    settings = {"stateful": True, "epochs": 2, "rows": 64}

    def pruning():
        return PruningCallback(0.5, schedule="one_shot", start=3 / 16, rewind=rewind)

    saver = SavesEarly(3, tmp_path / "early.ckpt")
    exact_fit(Classifier, tmp_path / "whole", [saver, pruning()], **settings)
    callbacks = [pruning()]
    exact_fit(Classifier, tmp_path / "resumed", callbacks, ckpt_path=tmp_path / "early.ckpt", **settings)
    assert_same_checkpoints(tmp_path / "whole", tmp_path / "resumed", PRUNING, callbacks)


@pytest.mark.slow
def test_weights_alone_that_somebody_saved_before_our_turn_are_masked(tmp_path):
    saver = SavesEarly(3, tmp_path / "early.ckpt", weights_only=True)
    pruning = PruningCallback(0.5, schedule="one_shot", start=3 / 8)
    exact_fit(Classifier, tmp_path, [saver, pruning], epochs=1, rows=8 * BATCH)
    saved = torch.load(tmp_path / "early.ckpt", weights_only=True)["state_dict"]
    assert sum(int((saved[name] == 0).sum()) for name in pruning.masks) == sum(
        int((~mask).sum()) for mask in pruning.masks.values()
    )


# Each row with the checkpoint saved before its turn, and one row also with it saved after.
ROWS_AND_ORDERS = [
    pytest.param(
        case,
        first,
        id=f"{case.name if case else 'control'}-saved {'before' if first else 'after'} us",
        marks=[pytest.mark.slow] * (case is not None and (case.heavy or not (first or case is CASES[0]))),
    )
    for case in (None, *CASES)
    for first in (True, False)
]


@pytest.mark.parametrize(("case", "first"), ROWS_AND_ORDERS)
def test_from_the_exception_checkpoint(case, first, tmp_path):
    """The loader fails, with three batches of the second epoch done."""
    settings = {"stateful": True, "epochs": 2, "rows": 32}
    exact_fit(Classifier, tmp_path / "whole", build(case, tmp_path), **settings)
    ours, saver = build(case, tmp_path), OnExceptionCheckpoint(tmp_path)
    order = [saver, *ours] if first else [*ours, saver]
    with pytest.raises(OSError, match="the disk is gone"):
        exact_fit(Classifier, tmp_path / "broken", [*order, Unplug(at_step=7)], **settings)
    crashed = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert crashed["global_step"] == 7
    twin(Classifier, crashed)

    callbacks = build(case, tmp_path)
    _, fitting = exact_fit(
        Classifier, tmp_path / "resumed", callbacks, ckpt_path=tmp_path / "on_exception.ckpt", **settings
    )
    assert fitting.global_step == 8
    assert_same_checkpoints(tmp_path / "whole", tmp_path / "resumed", case, callbacks)


@each_case(heavy_is_slow=True)
def test_a_resume_with_the_callback_from_a_run_without_it_and_back(case, tmp_path):
    """A checkpoint of either kind is good for both: that is what plain keys are for."""
    exact_fit(Classifier, tmp_path / "plain", [])
    with_it, _ = exact_fit(
        Classifier, tmp_path / "a", build(case, tmp_path), ckpt_path=tmp_path / "plain" / "step=4.ckpt"
    )
    smaller = pytest.raises(RuntimeError, match="size mismatch") if case.shrinks else nullcontext()
    with smaller:
        without, _ = exact_fit(Classifier, tmp_path / "b", [], ckpt_path=tmp_path / "a" / "step=6.ckpt")
        assert (difference(without, with_it) > 0) == case.changes_loss
    assert (difference(with_it, torch.load(tmp_path / "plain/end.ckpt", weights_only=True)["state_dict"]) > 0) == (
        case.changes_loss
    )


def test_other_arguments_are_named_on_resume(tmp_path):
    from lightning_compress import DistillationCallback

    teacher = torch.nn.Linear(8, 3)
    exact_fit(Classifier, tmp_path, [DistillationCallback(teacher, temperature=2.0)])
    with pytest.warns(UserWarning, match=r"'kd' resumes with other arguments.*temperature was 2.0 and is 3.0"):
        exact_fit(
            Classifier,
            tmp_path / "b",
            [DistillationCallback(teacher, temperature=3.0)],
            ckpt_path=tmp_path / "step=4.ckpt",
        )


KILLED = """
    import json, os, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import lightning.pytorch as L
    import torch
    torch.set_num_threads(1)
    torch.manual_seed(0)  # as in the whole run: what a callback trains beside the network begins from the seed
    from cases import CASES
    from contract.modules import Classifier
    from contract.test_resume import build, exact_fit
    name, folder, kill_at, resume = json.loads(sys.argv[2])
    case = next((case for case in CASES if case.name == name), None)

    class Kill(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    folder = Path(folder)
    exact_fit(Classifier, folder, [*build(case, folder.parent), Kill()], ckpt_path=resume)
"""


def in_a_process(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(Path(__file__).parents[1]), json.dumps(arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", ROWS)
def test_after_sigkill_of_a_real_process(case, tmp_path):
    name, killed, resumed = None if case is None else case.name, tmp_path / "killed", tmp_path / "resumed"
    exact_fit(Classifier, tmp_path / "whole", build(case, tmp_path))
    code, errors = in_a_process(name, str(killed), 5, None)
    assert code == -signal.SIGKILL, errors
    assert sorted(path.name for path in killed.glob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt"]
    code, errors = in_a_process(name, str(resumed), 99, str(killed / "step=4.ckpt"))
    assert code == 0, errors
    assert_same_checkpoints(tmp_path / "whole", resumed, case, build(case, tmp_path))
