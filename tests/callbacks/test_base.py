"""The life cycle that all callbacks share, shown with small callbacks that exist in this file only."""

from __future__ import annotations

import pickle
import warnings
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import pytorch_lightning
import torch
from contract.modules import BATCH, Classifier, ManualClassifier, difference, fit, loader, made, small_network, trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from torch import nn

from lightning_compress import CompressionCallback, CompressionReport, DistillationCallback, PTQCallback
from lightning_compress.callbacks.ending import STAGES, run_end_of_fit
from lightning_compress.callbacks.ranks import together
from lightning_compress.mechanisms.capture import CaptureError
from lightning_compress.mechanisms.passes import Term


class Adding(CompressionCallback):
    """Adds a constant to the loss, and keeps a number in its state."""

    default_name = "adding"
    changes_step = True
    expected_effects = ("the term",)

    def __init__(self, amount: float = 0.0, *, layers: tuple[str, ...] = (), works: bool = True, name=None) -> None:
        super().__init__(name=name)
        self.amount, self.layers, self.works = amount, layers, works
        self.total = 0

    def attach(self, controller, stack, trainer, pl_module):
        stack.enter_context(controller.term(Term(self.name, self.term)))

    def term(self, passes):
        if not self.works:
            return None
        self.total += 1
        self.effects["the term"] += 1
        return torch.tensor(self.amount)

    def extra_state(self):
        return {"total": self.total}

    def load_extra_state(self, state):
        self.total = state["total"]


class Staged(CompressionCallback):
    """Writes down when each stage reaches it."""

    def __init__(self, diary: list, *, fails_at: str = "", name=None) -> None:
        super().__init__(name=name)
        self.diary = diary
        for stage in STAGES:
            setattr(self, stage, lambda *_, stage=stage: self.reached(stage, fails_at))

    def reached(self, stage, fails_at):
        self.diary.append((stage, self.name))
        if stage == fails_at:
            raise OSError(f"{stage} failed")


def untouched(module: nn.Module) -> bool:
    return not {key for key in vars(module) if "lightning_compress" in key or key.endswith("_step")} and all(
        not part._forward_hooks and not part._forward_pre_hooks for part in module.modules()
    )


# Names


def test_names():
    assert Adding().name == "adding"
    assert Adding(name="other").state_key == "Adding[other]"
    assert Adding().state_key == Adding(5.0).state_key
    for wrong in ("", "a/b", 5):
        with pytest.raises(ValueError, match="name must be a non-empty string without '/'"):
            Adding(name=wrong)


def test_two_callbacks_of_one_name_are_refused():
    module = made(Classifier)
    with pytest.raises(ValueError, match=r"two callbacks are named 'adding'; .* for example 'adding2'"):
        trainer(Adding(), Staged([], name="adding")).fit(module, loader())
    assert untouched(module)
    trainer(Adding(), Adding(name="adding2"), max_steps=1).fit(module, loader())
    assert module.trainer.callback_metrics["train_loss"] > 0


def test_it_is_a_callback_of_both_packages():
    assert isinstance(Adding(), L.Callback)
    assert isinstance(Adding(), pytorch_lightning.Callback)


# State


def test_a_newer_schema_is_refused():
    with pytest.raises(ValueError, match=r"state of 'adding' has schema 99, newer than 1, .*upgrade"):
        Adding().load_state_dict({"schema": 99})


def test_changed_arguments_are_named():
    state = Adding(1.0, layers=("a",)).state_dict()
    assert state == {"schema": 1, "arguments": {"amount": 1.0, "layers": ["a"], "works": True}, "total": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Adding(1.0, layers=("a",)).load_state_dict(state)
    with pytest.warns(UserWarning, match=r"'adding' resumes with other arguments .*: amount was 1.0 and is 2.0$"):
        Adding(2.0, layers=("a",)).load_state_dict(state)


def power(x, *, exponent):
    return x**exponent


def test_a_function_with_other_arguments_is_another():
    state = Adding(partial(power, exponent=3)).state_dict()
    assert state["arguments"]["amount"] == [f"{__name__}.power", [], {"exponent": 3}]
    Adding(partial(power, exponent=3)).load_state_dict(state)
    with pytest.warns(UserWarning, match=r"resumes with other arguments .*: amount was .*3.* and is .*2"):
        Adding(partial(power, exponent=2)).load_state_dict(state)


def test_a_resume_finds_the_state_whatever_the_arguments(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="last")
    trainer(Adding(1.0), keep, enable_checkpointing=True).fit(made(Classifier), loader())
    resumed = Adding(2.0)
    with pytest.warns(UserWarning, match="amount was 1.0 and is 2.0"):
        trainer(resumed, max_epochs=2).fit(
            made(Classifier), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )
    assert resumed.total == 16


def test_files_that_go_elsewhere_are_no_other_arguments(tmp_path, recwarn):
    def report(folder):
        return CompressionReport(path=tmp_path / folder, latency=False)

    path = tmp_path / "last.ckpt"
    first = trainer(Adding(1.0), report("a"))
    first.fit(made(Classifier), loader())
    first.save_checkpoint(path)
    trainer(Adding(1.0), report("b"), max_epochs=2).fit(made(Classifier), loader(), ckpt_path=path, weights_only=True)
    assert [str(own.message) for own in recwarn if "other arguments" in str(own.message)] == []


# Effects


def test_an_expected_effect_that_is_missing_stops_the_first_step():
    module = made(Classifier)
    with pytest.raises(RuntimeError, match="Adding 'adding': the term had no effect in the first step"):
        trainer(Adding(works=False)).fit(module, loader())
    assert module.global_step == 1
    assert untouched(module)


def test_a_step_that_somebody_replaced_is_noticed():
    class Replaces(L.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.training_step = lambda batch, batch_idx: type(pl_module).training_step(
                pl_module, batch, batch_idx
            )

    module = made(Classifier)
    message = r"Adding 'adding' had no effect: somebody replaced Classifier.training_step"
    with pytest.raises(RuntimeError, match=message):
        trainer(Adding(), Replaces()).fit(module, loader())


def test_skipped_batches_are_no_missing_effect():
    class Skips(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx < 3 else super().training_step(batch, batch_idx)

    callback = Adding(1.0)
    trainer(callback).fit(made(Skips), loader())
    assert callback.total == 5


def test_a_required_input_that_never_comes_stops_the_first_step():
    class Wants(CompressionCallback):
        def attach(self, controller, stack, trainer, pl_module):
            self.student_capture = controller.capture("unused")

    class Unused(Classifier):
        def build(self):
            super().build()
            self.unused = nn.Linear(1, 1)

    with pytest.raises(CaptureError, match="needs the network's input, and the first training step called no unused"):
        trainer(Wants()).fit(made(Unused), loader())


# The end of fit


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_every_stage_is_done_for_all_before_the_next(order):
    diary = []
    fit(Classifier, *[Staged(diary, name=name) for name in order])
    assert [stage for stage, _ in diary] == [stage for stage in STAGES for _ in order]
    assert set(zip(*[iter(name for _, name in diary)] * 2, strict=True)) == {order}


def test_the_step_is_bare_when_the_stages_begin():
    seen = []

    class Looks(CompressionCallback):
        def bake(self, trainer, pl_module):
            seen.append(untouched(pl_module))

    fit(Classifier, Looks(name="first"), Adding(1.0), Looks(name="last"))
    assert seen == [True, True]


def test_a_failing_stage_stops_the_sequence():
    diary = []
    run = SimpleNamespace(world_size=1, is_global_zero=True)
    callbacks = [Staged(diary, name="a", fails_at="calibrate"), Staged(diary, name="b")]
    with pytest.raises(OSError, match="calibrate failed"):
        run_end_of_fit(callbacks, run, None)
    assert diary[-1] == ("calibrate", "a")
    module = made(Classifier)
    with pytest.raises(OSError, match="calibrate failed"):
        trainer(*callbacks).fit(module, loader())
    assert untouched(module)


def test_a_file_that_cannot_be_written_does_not_keep_the_report_from_being_made():
    diary = []
    run = SimpleNamespace(world_size=1, is_global_zero=True)
    callbacks = [Staged(diary, name=name, fails_at="export") for name in ("a", "b")] + [Staged(diary, name="c")]
    with pytest.warns(UserWarning, match="one more file was not"), pytest.raises(OSError, match="export failed"):
        run_end_of_fit(callbacks, run, None)
    assert [stage for stage, _ in diary] == [stage for stage in STAGES for _ in callbacks]


def test_what_the_network_received_last_is_kept_for_the_end():
    callback = DistillationCallback(small_network())
    module = fit(Classifier, callback)
    assert callback.captured_sample.network == "model"
    assert torch.equal(callback.captured_sample.args[0], list(loader(rows=2 * BATCH))[-1][0])
    assert untouched(module)


# What is refused, and what is warned of


def test_manual_optimisation_is_refused_by_name():
    module = made(ManualClassifier)
    message = "Adding changes the step, and ManualClassifier optimises manually: .*lightning_compress.CompressionMixin"
    with pytest.raises(ValueError, match=message):
        trainer(Adding()).fit(module, loader())
    assert untouched(module)
    assert module.global_step == 0
    trainer(Staged([])).fit(module, loader())  # what does not change the loss is welcome
    assert module.global_step == 8


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy"])
def test_unsupported_strategies_are_refused(strategy):
    run = SimpleNamespace(callbacks=[], strategy=type(strategy, (), {})())
    with pytest.raises(ValueError, match=f"Adding does not support {strategy}; use one device or DDP$"):
        Adding().setup(run, made(Classifier), "fit")
    with pytest.raises(ValueError, match=r"use one device or DDP, or FSDP2 with ModelParallelStrategy$"):
        DistillationCallback(small_network()).setup(run, made(Classifier), "fit")
    Adding().setup(run, made(Classifier), "test")  # there is nothing to refuse outside of a fit
    run.strategy = type("SingleDeviceStrategy", (), {})()
    Adding().setup(run, made(Classifier), "fit")


def test_what_shows_another_network_in_evaluation_is_refused_there_too():
    run = SimpleNamespace(callbacks=[], strategy=type("FSDPStrategy", (), {})())
    with pytest.raises(ValueError, match="PTQCallback does not support FSDPStrategy"):
        PTQCallback().setup(run, made(Classifier), "validate")


def sharding(tensor_parallel=1):
    mesh = {"tensor_parallel": SimpleNamespace(size=lambda: tensor_parallel)}
    return SimpleNamespace(callbacks=[], strategy=type("ModelParallelStrategy", (), {"device_mesh": mesh})())


def test_shards_are_refused_unless_a_callback_says_that_it_can_work_on_them():
    with pytest.raises(ValueError, match=r"Adding .* does not work with ModelParallelStrategy \(FSDP2\): .*DDP"):
        Adding().setup(sharding(), made(Classifier), "fit")
    DistillationCallback(small_network()).setup(sharding(), made(Classifier), "fit")


def test_tensor_parallelism_is_refused_with_the_setting_that_turns_it_off():
    with pytest.raises(
        ValueError, match=r"tensor_parallel_size=4 .*: give it data_parallel_size=.* tensor_parallel_size=1"
    ):
        DistillationCallback(small_network()).setup(sharding(4), made(Classifier), "fit")


def test_a_learning_rate_finder_is_warned_of():
    run = SimpleNamespace(callbacks=[LearningRateFinder()], strategy=SimpleNamespace())
    with pytest.warns(UserWarning, match="LearningRateFinder sets all callbacks aside: .* without Adding"):
        Adding().setup(run, made(Classifier), "fit")


def test_barebones_works_and_logs_nothing():
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"))
    teacher = small_network()
    reference = fit(Classifier, DistillationCallback(teacher))
    module = made(Classifier)
    run = trainer(DistillationCallback(teacher), barebones=True, **silent)
    run.fit(module, loader())
    assert difference(module, reference) == 0
    assert not run.callback_metrics


def test_outside_of_a_fit_nothing_can_be_logged():
    with pytest.raises(RuntimeError, match="Adding is only active during a fit"):
        Adding().log_quantity("loss", 1.0, batch_size=1)


def test_a_callback_can_be_pickled_after_a_fit():
    """As a spawned child needs it."""
    callback = PTQCallback()
    module = fit(Classifier, callback)
    assert callback.has_fitted(module)
    assert not callback.has_fitted(made(Classifier))
    again = pickle.loads(pickle.dumps(callback))
    assert again.name == callback.name
    assert not again.has_fitted(module)


def test_work_that_fails_on_one_rank_fails_everywhere():
    def works(trainer, pl_module):
        return None

    with pytest.raises(RuntimeError, match="rank 1 failed: OSError: no room"):
        together(lambda message: "rank 1 failed: OSError: no room", works, SimpleNamespace(is_global_zero=False), None)
    told = []

    def fails(trainer, pl_module):
        raise OSError("no room")

    for rank_0 in (True, False):
        with pytest.raises(OSError, match="no room"):
            together(told.append, fails, SimpleNamespace(is_global_zero=rank_0), None)
    assert told == ["OSError: no room"] * 2


def test_a_failure_within_another_is_told_once():
    told = []

    def tell(message):
        told.append(message)

    def fails(trainer, pl_module):
        raise OSError("no room")

    def outer(trainer, pl_module):
        together(tell, fails, trainer, pl_module)

    with pytest.raises(OSError, match="no room"):
        together(tell, outer, SimpleNamespace(is_global_zero=True), None)
    assert told == ["OSError: no room"]


def test_a_strategy_derived_from_an_unsupported_one_is_refused():
    class FSDPStrategy:
        pass

    class Mine(FSDPStrategy):
        pass

    with pytest.raises(ValueError, match="does not support Mine"):
        Staged([]).setup(SimpleNamespace(callbacks=[], strategy=Mine()), None, "fit")
