"""Nothing stays behind, however the fit ends."""

from __future__ import annotations

import copy
import functools
import pickle

import lightning.pytorch as L
import pytest
import torch
from cases import CASES, each_case
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from torch.utils.data import DataLoader, default_collate

from lightning_compress import PruningCallback, StructuredPruningCallback
from lightning_compress.callbacks.base import CompressionCallback

from .grid import each_case_and_some_modules
from .modules import BATCH, STEPS, Classifier, NormClassifier, difference, interrupted, loader, made, trainer
from .traces import condition, is_portable, traces


class Failing(L.Callback):
    """Somebody else's callback, which raises in one hook."""

    def __init__(self, hook: str) -> None:
        self._fails_in = hook
        setattr(self, hook, self._fail)

    def _fail(self, *_, **__):
        raise RuntimeError("another callback is broken")


ENDS = {
    "the step": RuntimeError,
    "validation": RuntimeError,
    "the loader": OSError,
    "a callback before": RuntimeError,
    "a callback after": RuntimeError,
    "the start of a callback after": RuntimeError,
    "Ctrl-C": SystemExit,  # Lightning catches KeyboardInterrupt and exits
}


def broken_fit(end, *callbacks, kind=Classifier):
    """A fit that ends in one of the ways of ENDS; the module and the loader are whole again afterwards."""
    module = made(kind)
    order = {
        "a callback before": [Failing("on_train_batch_end"), *callbacks],
        "a callback after": [*callbacks, Failing("on_train_batch_end")],
        "the start of a callback after": [*callbacks, Failing("on_fit_start")],
    }.get(end, list(callbacks))
    if end in ("the step", "Ctrl-C"):
        module.fails_at = 3
    if end == "Ctrl-C":
        module.failure = interrupted
    module.fails_in_validation = end == "validation"
    batches = loader(kind, fails_at=3 * BATCH) if end == "the loader" else loader(kind)
    with pytest.raises(ENDS[end]):
        trainer(*order).fit(module, batches, loader(kind, rows=2 * BATCH))
    module.fails_at, module.fails_in_validation = None, False
    return module


@functools.cache
def untouched(kind):
    """A module after a fit without any callback of ours; only looked at."""
    module = made(kind)
    trainer().fit(module, loader(kind), loader(kind, rows=2 * BATCH))
    return module


@functools.cache
def broken_without_us(end):
    """A module after such an end without any callback of ours; only looked at."""
    return broken_fit(end)


@each_case_and_some_modules(heavy_is_slow=False)
def test_after_a_fit_nothing_stays(case, kind, tmp_path):
    plain, module = untouched(kind), made(kind)
    trainer(case.build(tmp_path, kind)).fit(module, loader(kind), loader(kind, rows=2 * BATCH))
    assert traces(module) == traces(plain)
    assert is_portable(module)


# The first row meets all ends, and each row the first and the last of them; the others are slow.
ROWS_AND_ENDS = [
    pytest.param(
        case,
        end,
        id=f"{case.name}-{end}",
        marks=[pytest.mark.slow] * (case is not CASES[0] and end not in ("the step", "Ctrl-C")),
    )
    for case in CASES
    for end in ENDS
]


@pytest.mark.parametrize(("case", "end"), ROWS_AND_ENDS)
def test_after_an_exception_nothing_stays(case, end, tmp_path):
    plain = broken_without_us(end)
    callback = case.build(tmp_path, Classifier)
    module = broken_fit(end, callback)
    assert traces(module) == traces(plain)
    assert is_portable(module)
    assert not list(tmp_path.rglob("*.onnx*"))  # no half-written file either


@each_case("DistillationCallback")
def test_after_an_exception_the_same_objects_train_as_fresh_ones(case, tmp_path):
    callback = case.build(tmp_path, NormClassifier)
    broken_fit("the step", callback, kind=NormClassifier)
    again, fresh = made(NormClassifier), made(NormClassifier)
    trainer(callback).fit(again, loader(), loader())
    trainer(case.build(tmp_path, NormClassifier)).fit(fresh, loader(), loader())
    assert difference(again, fresh) == 0


@each_case()
def test_after_an_exception_in_its_own_attach_nothing_stays(case, tmp_path, monkeypatch):
    callback = case.build(tmp_path, Classifier)
    attach, inside = type(callback).attach, []

    def failing(self, controller, stack, trainer, pl_module):
        attach(self, controller, stack, trainer, pl_module)
        inside.append("training_step" in vars(pl_module))
        raise RuntimeError("attach is broken")

    monkeypatch.setattr(type(callback), "attach", failing)
    module = made(Classifier)
    before = traces(module)
    with pytest.raises(RuntimeError, match="attach is broken"):
        trainer(callback).fit(module, loader(), loader())
    assert inside == [True]
    assert {"training_step", "validation_step", "forward"}.isdisjoint(vars(module))
    assert {key: entry[2] for key, entry in traces(module).items() if isinstance(entry, tuple)} == {
        key: entry[2] for key, entry in before.items() if isinstance(entry, tuple)
    }
    assert is_portable(module)
    assert difference(module, made(Classifier)) == 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("end", [None, "the step", "Ctrl-C"])
@each_case("DistillationCallback")
def test_the_teacher_gets_back_what_it_was(case, end, precision, tmp_path, monkeypatch):
    callback = case.build(tmp_path, Classifier)
    teacher = callback.teacher_network
    teacher.train()
    teacher[1].eval()
    teacher[0].weight.requires_grad_(False)
    before, module = condition(teacher), made(Classifier)
    module.fails_at, module.failure = (None if end is None else 3), (interrupted if end == "Ctrl-C" else module.failure)
    seen = []
    teacher[0].register_forward_hook(lambda part, args, out: seen.append((part.training, out.requires_grad, out.dtype)))
    before["hooks"] = traces(teacher)
    fitting = trainer(callback, precision=precision)
    if end is None:
        fitting.fit(module, loader(), loader())
    else:
        with pytest.raises(ENDS[end]):
            fitting.fit(module, loader(), loader())
    assert set(seen) == {(False, False, torch.float32 if precision == "32-true" else torch.bfloat16)}
    assert condition(teacher) == before


def test_the_interrupt_above_is_a_real_one():
    """Lightning turns it into SystemExit; the callbacks are told of a KeyboardInterrupt."""
    told = []

    class Listener(L.Callback):
        def on_exception(self, trainer, pl_module, exception):
            told.append(type(exception))

    broken_fit("Ctrl-C", Listener())
    assert told == [KeyboardInterrupt]


@each_case("DistillationCallback", "CompressionReport")
def test_a_module_with_its_own_hooks_and_wrapped_step_keeps_them(case, tmp_path):
    module, calls = made(Classifier), []
    step = module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx)
    module.model[0].register_forward_hook(lambda *_: calls.append(1))
    mine, before = vars(module)["training_step"], traces(module)
    trainer(case.build(tmp_path, Classifier)).fit(module, loader(), loader())
    assert vars(module)["training_step"] is mine
    assert traces(module)["model.0"] == before["model.0"]
    assert len(calls) >= STEPS + STEPS + 2  # steps, validation and its sanity check; the report's copies may add some
    assert case.name == "CompressionReport" or len(calls) == STEPS + STEPS + 2


class Copied(L.Callback):
    """Somebody else's, which keeps a copy of the module, and one that was pickled, in the midst of a fit."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            self.copies = copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))


@pytest.mark.slow
@each_case_and_some_modules(heavy_is_slow=True)
def test_a_copy_in_the_midst_of_a_fit_is_one_of_its_own(case, kind, tmp_path):
    """It runs its own step with its own weights, and nothing of ours is on it."""
    module, kept = made(kind), Copied()
    trainer(case.build(tmp_path, kind), kept).fit(module, loader(kind), loader(kind, rows=2 * BATCH))
    plain = parts(made(kind))
    for copied in kept.copies:
        assert case.shrinks or parts(copied) == plain
        for parameter in copied.parameters():
            parameter.grad = None
        [batch, *_] = loader(kind)
        found = copied.training_step(batch, 0)
        (found["loss"] if isinstance(found, dict) else found).backward()
        assert all(own.grad is None for own in module.parameters())
        assert any(own.grad is not None for own in copied.parameters())


class Data(L.LightningDataModule):
    """Whose bound methods a loader's workers may be given: with the Trainer, and its callbacks."""

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(rows=2 * BATCH)

    test_dataloader = val_dataloader


class AsSpawning(DataLoader):
    """Pickles what it would give to workers that it spawns."""

    def __iter__(self):
        pickle.dumps((self.dataset, self.collate_fn))
        return super().__iter__()


class Spawning(Data):
    def collate(self, rows):
        return default_collate(rows)

    def train_dataloader(self, rows=STEPS * BATCH):
        return AsSpawning(loader(rows=rows).dataset, batch_size=BATCH, collate_fn=self.collate)

    def val_dataloader(self):
        return self.train_dataloader(2 * BATCH)

    test_dataloader = val_dataloader


class CopiesData(L.Callback):
    """Somebody else's, which copies the data, and the Trainer with them, wherever it can."""

    copies = ()

    def look(self, trainer, *_):
        if trainer.datamodule is not None:
            self.copies = ()  # which are copied with the Trainer
            self.copies = copy.deepcopy(trainer.datamodule), pickle.loads(pickle.dumps(trainer.datamodule))

    on_train_batch_start = on_train_batch_end = on_validation_batch_end = on_train_epoch_end = look
    on_fit_end = on_validation_start = look


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(no checkpoint is kept before|the best checkpoints so far):UserWarning")
@each_case(heavy_is_slow=True)
def test_the_data_can_be_copied_in_the_midst_of_a_fit(case, tmp_path):
    module, reference, kept = made(Classifier), made(Classifier), CopiesData()
    others = [ModelCheckpoint(tmp_path, monitor="val_loss"), EarlyStopping("val_loss")]
    settings = {"enable_checkpointing": True, "max_epochs": 2}
    trainer(case.build(tmp_path, Classifier), *others, kept, **settings).fit(module, Data())
    trainer(case.build(tmp_path, Classifier), **settings).fit(reference, Data())
    assert difference(module, reference) == 0
    assert len(kept.copies) == 2
    for copied in kept.copies:
        [own] = [one for one in copied.trainer.callbacks if isinstance(one, CompressionCallback)]
        trainer(own, **settings).fit(reference := made(Classifier), Data())
        assert difference(module, reference) == 0  # a copy begins as the original did


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(acts in a fit|no checkpoint is kept before):UserWarning")
@each_case(heavy_is_slow=True)
def test_data_whose_workers_are_spawned(case, tmp_path):
    """In all that reads them: the fit, what is measured at its end, a test and a failed fit."""
    module, run = made(Classifier), trainer(case.build(tmp_path, Classifier))
    run.fit(module, Spawning())
    assert "val_loss" in run.validate(module, Spawning(), verbose=False)[0]
    run.test(module, Spawning(), verbose=False)
    again = case.build(tmp_path, Classifier)
    module = made(Classifier)
    module.fails_at = 3
    with pytest.raises(RuntimeError):
        trainer(again).fit(module, Spawning())
    copy.deepcopy(again)
    pickle.dumps((again, module))


@pytest.mark.slow
@pytest.mark.parametrize(
    "build", [lambda: PruningCallback(0.5), lambda: StructuredPruningCallback(0.5, min_channels=1)]
)
def test_an_average_of_the_weights_that_is_made_before_the_fit_is_plain(build):
    average, module = WeightAveraging(), made(Classifier)
    trainer(build(), average).fit(module, loader(), loader(rows=2 * BATCH))
    copied = average._average_model.module
    assert parts(copied) == parts(module)
    assert not {"on_save_checkpoint", "on_load_checkpoint", "__getstate__"} & {*vars(copied)}
    pickle.dumps(copied)


def parts(module):
    """What each part of a module has, without what Lightning leaves on it while it fits."""
    found = {name: own for name, own in traces(module).items() if isinstance(own, tuple) and "(tensor)" not in name}
    return {name: own[:3] for name, own in found.items() if name}


class Anything:
    """It can be called, and has any attribute, as a mock."""

    def __call__(self):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self


@pytest.mark.slow
def test_what_has_any_attribute_is_no_wrapper_of_ours():
    module, kept = made(Classifier), Copied()
    module.helper = Anything()
    trainer(CASES[0].build(None, Classifier), kept).fit(module, loader(Classifier))
    assert [type(copied.helper) for copied in kept.copies] == [Anything, Anything]


class Saves(L.Callback):
    """Saves again and again."""

    def __init__(self, callback, path):
        self._callback, self._path, self.files = callback, path, []

    def on_train_start(self, trainer, pl_module):
        trainer.save_checkpoint(self._path, weights_only=True)
        self.files.append(torch.load(self._path, weights_only=True)["state_dict"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.on_train_start(trainer, pl_module)


class SharesIt(Saves):
    """The same; before, it gives somebody's callback to another Trainer, and bears the refusal."""

    def on_train_start(self, trainer, pl_module):
        self._share()
        super().on_train_start(trainer, pl_module)

    def _share(self):
        other = L.Trainer(accelerator="cpu", logger=False, callbacks=[self._callback])
        before = vars(self._callback).copy()
        with pytest.raises(RuntimeError, match="is at work in another Trainer's fit"):
            other.validate(made(Classifier, seed=7), loader())
        after = vars(self._callback)
        assert {*after} == {*before}
        for name, value in before.items():
            assert after[name] == value if name in ("log", "log_dict") else after[name] is value, name


class SharesItBefore(SharesIt):
    """Between set-up and the start, when it acts on files already."""

    def on_fit_start(self, trainer, pl_module):
        self._share()

    def on_train_start(self, trainer, pl_module):
        Saves.on_train_start(self, trainer, pl_module)


class Validates(L.Callback):
    """Gives the callback that is at work in a validation to another one, and bears the refusal."""

    def __init__(self, callback):
        self._callback = callback

    def on_validation_batch_start(self, trainer_, pl_module, batch, batch_idx, dataloader_idx=0):
        other = L.Trainer(accelerator="cpu", logger=False, callbacks=[self._callback])
        with pytest.raises(RuntimeError, match="is at work in another Trainer's validate"):
            other.validate(made(Classifier, seed=7), loader())


@pytest.mark.sample
@each_case()
def test_a_callback_that_is_refused_within_a_validation_goes_on(case, tmp_path):
    callback, module = case.build(tmp_path, Classifier), made(Classifier)
    trainer(callback).fit(module, loader(), loader(rows=2 * BATCH))
    plain, refused = (
        trainer(callback, *others).validate(module, loader(rows=2 * BATCH), verbose=False)
        for others in ([], [Validates(callback)])
    )
    assert plain == refused


@pytest.mark.sample
@each_case()
@pytest.mark.parametrize("shares", [SharesIt, SharesItBefore])
def test_a_callback_that_is_refused_to_another_trainer_goes_on(shares, case, tmp_path):
    def twice(kind):
        callback = case.build(tmp_path / kind.__name__, Classifier)
        module, other = made(Classifier), kind(callback, tmp_path / "weights.ckpt")
        for _ in range(2):
            trainer(other, callback).fit(module, loader(), loader(rows=2 * BATCH))
        return module, other.files

    (refused, files), (plain, expected) = twice(shares), twice(Saves)
    assert difference(refused, plain) == 0
    assert [difference(*pair) for pair in zip(files, expected, strict=True)] == [0] * len(files)
