"""Canaries: each private or version-bound use of torch and lightning in _compat.py still is what it was."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import torch
import torchmetrics
from jsonargparse import ArgumentParser
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader

from lightning_compress import _compat


def test_compiled_child_is_where_torch_compile_keeps_the_module():
    layer = nn.Linear(2, 2)
    children = dict(torch.compile(layer).named_children())
    assert children == {_compat.COMPILED_CHILD: layer}


NAMESPACES = ["lightning.pytorch", "pytorch_lightning"]


def _fitted(namespace, **settings):
    """A module and its Trainer after two epochs of three batches on loaders of their own."""
    package = import_module(namespace)

    class Module(import_module(f"{namespace}.demos.boring_classes").BoringModel):
        def __init__(self):
            super().__init__()
            self.metric = torchmetrics.MeanMetric()

        def validation_step(self, batch, batch_idx):
            self.metric.update(batch)
            self.log("mean", self.metric)

    module = Module()
    trainer = package.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    loaders = DataLoader(torch.randn(6, 32), batch_size=2), DataLoader(torch.randn(4, 32), batch_size=2)
    trainer.fit(module, *loaders)
    return module, trainer, loaders


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_trainer_source_progress_and_mode(namespace):
    module, trainer, loaders = _fitted(namespace, inference_mode=False)
    fresh = import_module(namespace).Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert _compat.attached_trainer(module) is trainer
    assert _compat.attached_trainer(type(module)()) is None
    assert _compat.attached_trainer(nn.Linear(1, 1)) is None
    assert _compat.validation_source(trainer) is loaders[1]
    assert _compat.validation_source(fresh) is None
    assert _compat.validates_in_inference_mode(trainer) is False
    assert _compat.validates_in_inference_mode(fresh) is True
    assert (fresh.current_epoch, fresh.global_step) == (0, 0)
    _compat.copy_progress(trainer, fresh)
    assert (fresh.current_epoch, fresh.global_step) == (trainer.current_epoch, trainer.global_step) == (2, 6)
    fresh.fit_loop.epoch_progress.current.processed = 9
    assert trainer.current_epoch == 2


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_trainer_that_takes_over_no_signals(namespace):
    handlers = []

    class Module(import_module(f"{namespace}.demos.boring_classes").BoringModel):
        def validation_step(self, batch, batch_idx):
            handlers.append(signal.getsignal(signal.SIGTERM))

    settings = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    own = signal.getsignal(signal.SIGTERM)
    for leave in (False, True):
        trainer = import_module(namespace).Trainer(fast_dev_run=1, accelerator="cpu", **settings)
        if leave:
            _compat.leave_signals(trainer)
        trainer.validate(Module(), verbose=False)
        assert signal.getsignal(signal.SIGTERM) is own
    assert [handler is own for handler in handlers] == [False, True]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_datamodule_of_a_trainer_is_an_attribute(namespace):
    package = import_module(namespace)
    data = package.LightningDataModule()
    trainer = package.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert trainer.datamodule is None
    _compat.attach(trainer, None, data)
    assert trainer.datamodule is data is data.trainer.datamodule


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_validation_source_is_the_module_where_it_has_the_loaders(namespace):
    module = import_module(f"{namespace}.demos.boring_classes").BoringModel()
    trainer = import_module(namespace).Trainer(
        fast_dev_run=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.validate(module, verbose=False)
    assert _compat.validation_source(trainer) is module


def test_lightning_keeps_metric_names_by_id():
    """In a copy made during a fit the table is wrong, and logging a metric object fails."""
    found = {}

    class Look(import_module("lightning.pytorch").Callback):
        def on_fit_end(self, trainer, pl_module):
            found.update(pl_module._metric_attributes)
            _compat.forget_metric_names_(pl_module)
            found["after"] = pl_module._metric_attributes

    module, _, _ = _fitted("lightning.pytorch", callbacks=[Look()])
    assert found == {id(module.metric): "metric", "after": None}


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_backward_of_the_module_s_own_is_told_from_lightnings(namespace):
    plain = import_module(f"{namespace}.demos.boring_classes").BoringModel

    class Own(plain):
        def backward(self, loss, *args, **kwargs):
            super().backward(loss, *args, **kwargs)

    class Inherited(Own):
        pass

    shadowed = plain()
    shadowed.backward = print  # as the mechanisms themselves do
    modules = (plain(), shadowed, nn.Linear(1, 1), Own(), Inherited())
    assert [_compat.has_own_backward(module) for module in modules] == [False, False, False, True, True]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_traces_of_compilation(namespace):
    compile_tools = import_module(f"{namespace}.utilities.compile")
    module = import_module(f"{namespace}.demos.boring_classes").BoringModel()
    assert _compat.compiled_state(module) is None
    wrapped = torch.compile(module, backend="eager")
    assert _compat.uncompiled(wrapped) is module
    assert _compat.uncompiled(module) is module
    compile_tools.from_compiled(wrapped)
    assert _compat.compiled_state(module)["compiler"] == "dynamo"
    replaced = {"forward", "training_step", "validation_step", "test_step", "predict_step"}
    assert replaced <= vars(module).keys()
    module.layer.compile(backend="eager")
    module.other = torch.compile(nn.Linear(1, 1), backend="eager")
    assert module.layer._compiled_call_impl is not None
    assert _compat.drop_compilation_(module) is module
    assert not replaced & vars(module).keys()
    assert _compat.compiled_state(module) is None
    assert module.layer._compiled_call_impl is None
    assert type(module.other) is nn.Linear


def test_process_group_can_be_hidden():
    with _compat.hidden_process_group():
        assert not torch.distributed.is_initialized()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        with _compat.hidden_process_group():
            assert not torch.distributed.is_initialized()
            assert not torchmetrics.metric.jit_distributed_available()
            with pytest.raises(ValueError, match="Default process group has not been initialized"):
                torch.distributed.all_reduce(torch.ones(1))
        assert torch.distributed.group.WORLD is group
        assert torch.distributed.get_world_size() == 1
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_fit_of_a_tuner_is_told_from_others(namespace):
    package, seen = import_module(namespace), []

    class Watch(package.Callback):
        def setup(self, trainer, pl_module, stage):
            seen.append(_compat.is_tuner_fit(trainer))

    module = import_module(f"{namespace}.demos.boring_classes").BoringModel()
    module.learning_rate = 0.1
    finder = package.callbacks.LearningRateFinder(num_training_steps=2)  # a real fit, which looks for the rate first
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"max_steps": 2, "enable_checkpointing": False, **quiet}
    trainer = package.Trainer(callbacks=[Watch()], **settings)
    import_module(f"{namespace}.tuner").Tuner(trainer).lr_find(module, num_training=2, update_attr=False)
    trainer.fit(module)
    package.Trainer(callbacks=[finder, Watch()], **settings).fit(module)
    assert seen == [True, False, False]


def test_a_lightning_module_keeps_its_placement_in_two_attributes():
    module = import_module("lightning.pytorch").LightningModule()
    assert set(_compat.placement(module)) == {"_device", "_dtype"}
    module.to(torch.bfloat16)
    assert _compat.placement(module)["_dtype"] == torch.bfloat16
    assert _compat.placement(torch.nn.Linear(1, 1)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("first", ["lightning.pytorch", "pytorch_lightning", "lightning_compress.callbacks.base"])
def test_importing_this_package_leaves_lightnings_notes_to_who_had_them(first):
    code = (
        f"import {first}, lightning_compress.callbacks.base, lightning_utilities.core.rank_zero as shared\n"
        "print(shared.log.name)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    owner = "pytorch_lightning" if first == "pytorch_lightning" else "lightning.pytorch"
    assert found == f"{owner}.utilities.rank_zero"


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_the_status_of_a_trainer_compares_with_its_name(namespace):
    states = import_module(f"{namespace}.trainer.states")
    trainer = SimpleNamespace(state=states.TrainerState(status=states.TrainerStatus.RUNNING))
    assert _compat.is_running(trainer)
    trainer.state.status = states.TrainerStatus.INTERRUPTED
    assert not _compat.is_running(trainer)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_package_of_a_trainer(namespace):
    package = import_module(namespace)

    class Mine(package.Trainer):
        pass

    for kind in (package.Trainer, Mine):
        assert _compat.package_of(kind(accelerator="cpu", logger=False, barebones=True)) == namespace
    assert _compat.package_of(SimpleNamespace()) == "lightning.pytorch"


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_loggers_can_be_silenced(namespace, tmp_path):
    package = import_module(namespace)
    loggers = import_module(f"{namespace}.loggers")
    module = import_module(f"{namespace}.demos.boring_classes").BoringModel()
    written = [loggers.CSVLogger(tmp_path, name=name) for name in ("a", "b")]
    trainer = package.Trainer(accelerator="cpu", logger=written)
    with _compat.silenced_loggers(module):  # of no Trainer
        pass
    module.trainer = trainer
    with pytest.raises(OSError, match="gone"), _compat.silenced_loggers(module):  # noqa: PT012 - to fail inside of it
        assert len(trainer.loggers) == 2
        for logger in (module.logger, *module.loggers):
            assert isinstance(logger, loggers.logger.Logger)
            logger.log_metrics({"a": 1.0}, step=0)
            logger.experiment.add_scalar("a", 1.0)  # whatever the experiment is asked for
            logger.experiment["a"] = 1
            logger.save()
        assert trainer.log_dir == str(written[0].log_dir)  # a step may make paths of it
        raise OSError("gone")
    assert trainer.loggers == written
    assert not list(tmp_path.iterdir())
    trainer.loggers = []
    with _compat.silenced_loggers(module):
        assert trainer.logger is None


def _looking(namespace, look, *data, module=None, **settings):
    """What ``look`` sees where the training starts, and the batches of the training that follows."""
    package, looked, given = import_module(namespace), [], []

    class Look(package.Callback):
        def on_train_start(self, trainer, pl_module):
            looked.append(look(trainer))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            given.append((batch, batch_idx))

    module = import_module(f"{namespace}.demos.boring_classes").BoringModel() if module is None else module
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    defaults = {"max_epochs": 1, "enable_checkpointing": False, "callbacks": [Look()], **quiet}
    trainer = package.Trainer(**{**defaults, **settings})
    trainer.fit(module, *data)
    return looked[0], given


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_silent_logger_says_of_itself_what_the_other_says(namespace, tmp_path):
    module = import_module(f"{namespace}.demos.boring_classes").BoringModel()
    loud = import_module(f"{namespace}.loggers").CSVLogger(tmp_path, name="a", version=3)
    module.trainer = import_module(namespace).Trainer(accelerator="cpu", logger=loud)
    said = [getattr(loud, name) for name in ("name", "version", "log_dir", "root_dir")]
    with _compat.silenced_loggers(module):
        assert [getattr(module.logger, name) for name in ("name", "version", "log_dir", "root_dir")] == said
        assert module.trainer.log_dir == said[2] == str(tmp_path / "a" / "version_3")


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize(
    ("settings", "stream", "count"),
    [
        ({}, False, 3),
        ({"limit_train_batches": 2}, False, 2),
        ({"limit_train_batches": 2}, True, 2),
        ({"max_steps": 4}, True, 4),
        ({"max_steps": 4, "accumulate_grad_batches": 2}, True, 8),
    ],
)
def test_how_many_batches_there_are(namespace, settings, stream, count):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(lambda: torch.ones(32), None)

    def look(trainer):
        batches = _compat.training_batches(trainer, _compat.training_loaders(trainer))
        return _compat.batches_an_epoch(trainer), len(list(batches))

    data = DataLoader(Endless() if stream else torch.randn(6, 32), batch_size=2)
    assert _looking(namespace, look, data, **settings)[0] == (count, count)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_stream_without_an_end_in_a_training_without_an_end(namespace):
    stream = [torch.ones(2, 32)] * 3

    class Source:
        def __iter__(self):
            return iter(stream)

    seen, _ = _looking(namespace, _compat.batches_an_epoch, Source())
    assert seen == float("inf")


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_samplers_are_told_the_epoch(namespace):
    class Told(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch):
            self.epoch = epoch

    def look(trainer):
        seen = []
        for loader, told in loaders:
            for epoch in ({"epoch": 5}, {}):
                next(_compat.training_batches(trainer, [loader], **epoch))
                seen.append(told.epoch)
        return seen

    data = torch.randn(6, 32)
    alone, batched = Told(data), Told(data)
    loaders = [
        (DataLoader(data, sampler=alone), alone),
        (DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(batched, 2, False)), batched),
    ]
    assert _looking(namespace, look, DataLoader(data))[0] == [5, 0, 5, 0]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_loaders_that_a_trainer_reads(namespace):
    combined = import_module(f"{namespace}.utilities").CombinedLoader
    first, second = (DataLoader(torch.randn(4, 32), batch_size=2) for _ in range(2))
    assert _looking(namespace, _compat.training_loaders, first)[0] == [first]
    module = import_module(f"{namespace}.demos.boring_classes").BoringModel()
    module.training_step = lambda batch, batch_idx: module.step(batch["a"]["x"])
    loaders, _ = _looking(
        namespace, _compat.training_loaders, combined({"a": {"x": first}, "b": second}), module=module
    )
    assert loaders == [first, second]


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize(("limit", "count"), [(1.0, 3), (2, 2)])
def test_batches_are_those_that_the_training_step_is_given(namespace, limit, count):
    boring = import_module(f"{namespace}.demos.boring_classes").BoringModel

    class Module(boring):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch + 1

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch * 2

    data = torch.randn(6, 32)

    def look(trainer):
        combined = trainer.fit_loop._combined_loader
        before = combined._iterator, combined.flattened, trainer.fit_loop._data_fetcher.fetched
        batches = list(_compat.training_batches(trainer, [DataLoader(data, batch_size=2)]))
        assert (combined._iterator, combined.flattened, trainer.fit_loop._data_fetcher.fetched) == before
        return batches

    precise = {"precision": "64-true"}  # converts the inputs
    seen, given = _looking(
        namespace, look, DataLoader(data, batch_size=2), module=Module(), limit_train_batches=limit, **precise
    )
    assert [(batch.tolist(), index) for batch, index in seen] == [(batch.tolist(), index) for batch, index in given]
    assert [batch.dtype for batch, _ in seen] == [torch.float64] * count
    assert torch.equal(seen[0][0], (data[:2].double() + 1) * 2)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_step_is_given_as_many_arguments_as_it_takes(namespace):
    boring = import_module(f"{namespace}.demos.boring_classes").BoringModel

    class One(boring):
        def training_step(self, batch):
            return self.step(batch)

    class Itself(boring):
        def training_step(self, dataloader_iter):
            return self.step(next(dataloader_iter)[0])

    data = DataLoader(torch.randn(6, 32), batch_size=2)

    def look(trainer):
        return list(_compat.training_batches(trainer, [data]))

    assert [len(entry) for entry in _looking(namespace, look, data, module=boring())[0]] == [2, 2, 2]
    assert [len(entry) for entry in _looking(namespace, look, data, module=One())[0]] == [1, 1, 1]

    def entries(trainer):
        return [[index for _, index, _ in iterator] for (iterator,) in _compat.training_batches(trainer, [data])]

    assert _looking(namespace, entries, data, module=Itself())[0] == [[0, 1, 2]]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_batches_end_when_their_reader_does(namespace):
    """The loader's iterator is let go of, and with it worker processes."""
    closed = []

    class Source:
        def __iter__(self):
            try:
                yield from torch.randn(6, 2, 32)
            finally:
                closed.append(True)

    def look(trainer):
        batches = _compat.training_batches(trainer, [Source()])
        assert next(batches)[0].shape == (2, 32)
        assert not closed
        batches.close()
        return list(closed)

    assert _looking(namespace, look, DataLoader(torch.randn(2, 32)))[0] == [True]


# --- compiled code, memory and recurrent layers under weight views ---


class _Compiled(nn.Sequential):
    """A module whose code is its own: torch 2.13 compiles no module of its own in place."""

    def forward(self, x):
        return self[1](self[0](x))


def _compiled_in_place():
    net = _Compiled(nn.Linear(2, 2), nn.ReLU())
    net.compile(backend="eager")
    return net


def _compiled_by_lightning(namespace):
    module = import_module(f"{namespace}.demos.boring_classes").BoringModel()
    return import_module(f"{namespace}.utilities.compile").from_compiled(torch.compile(module, backend="eager"))


@pytest.mark.parametrize(
    ("make", "compiled"),
    [
        (lambda: nn.Linear(2, 2), False),
        (lambda: torch.compile(nn.Linear(2, 2)), True),
        (_compiled_in_place, True),
        *((lambda namespace=namespace: _compiled_by_lightning(namespace), True) for namespace in NAMESPACES),
    ],
)
def test_compiled_code_is_found_wherever_it_is(make, compiled):
    found = make()
    assert _compat.holds_compiled_code(found) is compiled
    assert _compat.holds_compiled_code(nn.Sequential(nn.ReLU(), nn.ModuleList([found]))) is compiled


def test_compiled_code_does_not_know_later_hooks_until_it_is_reset(fresh_compiler):
    net, seen = _compiled_in_place(), []
    net(torch.ones(1, 2))
    net[0].register_forward_hook(lambda *args: seen.append(args))
    net(torch.ones(1, 2))
    assert seen == []  # else nothing would have to be reset
    _compat.reset_compiled_code()
    net(torch.ones(1, 2))
    assert len(seen) == 1


def test_compilations_are_told_when_they_begin_until_a_reset(fresh_compiler):
    started, net, inputs = [], _compiled_in_place(), torch.ones(1, 2)
    assert _compat.watch_compilations(started.append) is True
    assert _compat.watch_compilations(started.append) is False  # watched already
    _compat.reset_compiled_code()  # nothing was compiled, so nothing is reset
    assert _compat.watch_compilations(started.append) is False
    for _ in range(2):
        net(inputs)
        assert len(started) == 1  # once for both calls
    _compat.reset_compiled_code()
    assert _compat.watch_compilations(started.append) is True
    net(inputs)
    assert len(started) == 2
    _compat.unwatch_compilations(started.append)
    torch._dynamo.reset()
    net(inputs)
    assert len(started) == 2
    _compat.unwatch_compilations(started.append)  # which is not watched, and no error


@pytest.mark.parametrize("shadowed", [False, True])
def test_what_is_traced_and_which_parameters_it_reads(fresh_compiler, shadowed):
    layer, traced = nn.Linear(2, 2), []
    if shadowed:  # as a weight view does
        vars(layer)["weight"] = layer.weight * 2

    def function(x):
        return layer(x).sum()

    def started(event):
        traced.append(_compat.being_traced(event))

    _compat.watch_compilations(started)
    compiled = torch.compile(function, backend="eager", dynamic=False)
    for batch in (1, 2):
        compiled(torch.ones(batch, 2))
    assert [entry.code for entry in traced] == [function.__code__] * 2
    assert len({entry.version for entry in traced}) == 2
    for entry in traced:
        assert _compat.reads_parameters(entry, {"weight"}) is not shadowed
        assert _compat.reads_parameters(entry, {"weight", "bias"}) is True
        assert _compat.reads_parameters(entry, {"other"}) is False
    assert _compat.reads_parameters(traced[0]._replace(version="another"), {"weight"}) is False
    assert _compat.reads_parameters(traced[0]._replace(code=None), {"other"}) is True  # who knows


def test_memory_is_unshared_when_nothing_else_lies_on_it():
    weight, own = torch.ones(3, requires_grad=True), torch.ones(3)
    assert _compat.is_unshared(own)
    same = own  # another name is no other tensor
    assert _compat.is_unshared(same)
    for share in (torch.Tensor.detach, lambda tensor: tensor[1:], lambda tensor: tensor.view(3, 1), torch.Tensor.numpy):
        other = share(own)
        assert not _compat.is_unshared(own)
        del other
        assert _compat.is_unshared(own)
    loss = (weight * own.detach()).sum()  # autograd saves the factor
    assert not _compat.is_unshared(own)
    loss.backward()
    assert _compat.is_unshared(own)
    loss = (weight * own.detach()).sum()
    del loss
    assert _compat.is_unshared(own)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_read_a_list_of_their_weights(kind):
    """Which has to be made anew where an attribute is shadowed, with the weak references beside it."""
    layer = kind(3, 2, num_layers=2, bias=False)
    inputs, plain, doubled = torch.randn(4, 1, 3), kind(3, 2, num_layers=2, bias=False), 2 * layer.weight_hh_l1
    plain.load_state_dict({**layer.state_dict(), "weight_hh_l1": doubled.detach()})
    before, expected = layer(inputs)[0], plain(inputs)[0]
    kept = [weight.data_ptr() for weight in layer._flat_weights]
    vars(layer)["weight_hh_l1"] = doubled
    _compat.refresh_flat_weights(layer)
    assert layer._flat_weights[layer._flat_weights_names.index("weight_hh_l1")] is doubled
    assert [ref() for ref in layer._flat_weight_refs] == layer._flat_weights
    assert not layer._weights_have_changed()
    assert torch.equal(layer(inputs)[0], expected)
    del vars(layer)["weight_hh_l1"]
    assert layer._weights_have_changed()
    _compat.refresh_flat_weights(layer)
    assert not layer._weights_have_changed()
    assert [weight.data_ptr() for weight in layer._flat_weights] == kept
    assert torch.equal(layer(inputs)[0], before)
    assert not torch.equal(before, expected)


def test_layers_that_keep_no_list_of_weights_are_left_alone():
    for layer in (nn.Linear(2, 2), nn.LSTMCell(2, 2)):
        attributes = dict(vars(layer))
        _compat.refresh_flat_weights(layer)
        assert vars(layer) == attributes


# --- what a Trainer has seen, and where it runs ---


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("automatic", [True, False])
def test_batches_are_counted_over_all_epochs(namespace, automatic, tmp_path):
    package, seen, running = import_module(namespace), [], []

    class Watch(package.Callback):
        def look(self, trainer, *args):
            seen.append(_compat.batches_seen(trainer))
            running.append(_compat.is_in_step(trainer))

        on_train_start = on_train_batch_start = on_train_batch_end = look

    module = import_module(f"{namespace}.demos.boring_classes").BoringModel()
    module.automatic_optimization = automatic
    data = DataLoader(torch.randn(6, 32), batch_size=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = package.Trainer(max_epochs=2, enable_checkpointing=False, callbacks=[Watch()], **quiet)
    trainer.fit(module, data)
    assert seen == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert running == [False] + [True, False] * 6
    trainer.save_checkpoint(tmp_path / "end")
    seen.clear()
    running.clear()
    trainer = package.Trainer(max_epochs=3, enable_checkpointing=False, callbacks=[Watch()], **quiet)
    trainer.fit(module, data, ckpt_path=tmp_path / "end")
    assert seen == [6, 7, 7, 8, 8, 9, 9]
    assert running == [False] + [True, False] * 3


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize(
    ("strategy", "devices", "expected"),
    [("auto", 1, False), ("ddp", 2, False), ("ddp_spawn", 2, True), ("ddp_fork", 2, True), ("ddp_notebook", 1, True)],
)
def test_trainers_that_run_in_child_processes(namespace, strategy, devices, expected):
    trainer = import_module(namespace).Trainer(accelerator="cpu", strategy=strategy, devices=devices, barebones=True)
    assert _compat.runs_in_children(trainer) is expected


def test_a_hook_can_run_before_those_that_were_there():
    weight, seen = nn.Parameter(torch.ones(2)), []
    weight.register_hook(lambda gradient: gradient * 10)
    handle = _compat.hook_first(weight, lambda gradient: seen.append(gradient.tolist()))
    (weight * 2).sum().backward()
    assert (seen, weight.grad.tolist()) == ([[2, 2]], [20, 20])
    handle.remove()
    weight.grad = None
    (weight * 2).sum().backward()
    assert (len(seen), weight.grad.tolist(), len(weight._backward_hooks)) == (1, [20, 20], 1)


def test_batches_of_gradients_are_told():
    weight, seen = nn.Parameter(torch.ones(2, 2)), []
    weight.register_hook(lambda gradient: seen.append(_compat.is_batched(gradient)))
    output = weight @ torch.ones(2)
    torch.autograd.grad(output, weight, torch.eye(2), is_grads_batched=True, retain_graph=True)
    output.sum().backward()
    torch.func.vmap(lambda row: seen.append(_compat.is_batched(row)) or row)(torch.ones(2, 2))
    assert seen == [True, False, True]


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_end_of_a_backward_pass_is_told(reentrant):
    """Also where it runs others, whose ends are none."""
    weight, seen = nn.Parameter(torch.ones(1)), []
    weight.register_hook(lambda gradient: seen.append("gradient"))
    x = torch.ones(1, requires_grad=True)
    loss = torch.utils.checkpoint.checkpoint(lambda x: x * weight, x, use_reentrant=reentrant).sum()
    loss.register_hook(lambda gradient: _compat.after_backward(lambda: seen.append("end")))
    loss.backward()
    assert seen == ["gradient", "end"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_pass_within_a_backward_pass_is_told(reentrant):
    seen = []

    def forward(x):
        seen.append(_compat.runs_again())
        return x.sin().sin()

    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=reentrant).sum().backward()
    assert seen == [False, True]


def test_fused_optimizers_unscale_themselves():
    weight = torch.nn.Parameter(torch.ones(1))
    found = [_compat.unscales_itself(torch.optim.SGD([weight], lr=0.1, fused=fused)) for fused in (True, False)]
    assert found == [True, False]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_names_that_are_logged_are_known_in_the_sanity_check(namespace):
    L, names = import_module(namespace), []

    class Logs(L.LightningModule):
        def training_step(self, batch, batch_idx):
            pass

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val", batch.sum(), on_step=dataloader_idx == 1, on_epoch=True)
            self.log("step", batch.sum(), on_step=True, on_epoch=False)

        def on_validation_epoch_end(self):
            self.log("own", 1.0)

        def configure_optimizers(self):
            pass

        def on_validation_end(self):
            names.append(_compat.logged_names(self.trainer))

    data = DataLoader(torch.ones(2, 1))
    settings = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False, "enable_checkpointing": False}
    fitting = L.Trainer(**settings, max_epochs=1, enable_model_summary=False, num_sanity_val_steps=1)
    fitting.fit(Logs(), data, [data, data])
    expected = {"own", *(f"val{part}/dataloader_idx_{index}" for part, index in (("", 0), ("", 1), ("_epoch", 1)))}
    assert names == [expected, expected]


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize(
    ("settings", "best", "last"),
    [
        ({"monitor": "x"}, True, False),
        ({"monitor": "x", "save_last": True}, True, True),
        ({"monitor": "x", "save_top_k": -1}, True, True),
        ({"monitor": "step", "mode": "max"}, False, True),
        ({}, False, True),
        ({"monitor": "x", "save_top_k": 0}, False, False),
    ],
)
def test_what_a_model_checkpoint_keeps(namespace, settings, best, last):
    saver = import_module(f"{namespace}.callbacks").ModelCheckpoint(**settings)
    assert (_compat.keeps_best(saver), _compat.keeps_last(saver)) == (best, last)
    assert not _compat.keeps_best(object())
    assert not _compat.keeps_last(object())


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_can_be_forgotten(namespace, mode):
    def saver():
        return import_module(f"{namespace}.callbacks").ModelCheckpoint(monitor="x", mode=mode)

    trainer, fresh, used = import_module(namespace).Trainer(logger=False, accelerator="cpu"), saver(), saver()
    assert not _compat.forget_best(fresh)
    used.best_k_models, used.best_model_path, used.best_model_score = {"a": torch.tensor(1.0)}, "a", torch.tensor(1.0)
    used.kth_best_model_path, used.kth_value = "a", torch.tensor(1.0)
    assert not used.check_monitor_top_k(trainer, torch.tensor(1.0))
    assert _compat.forget_best(used)
    assert used.check_monitor_top_k(trainer, torch.tensor(1.0))
    assert used.state_dict() == fresh.state_dict()


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_training_data_are_set_up_in_a_validation_and_gone_afterwards(namespace):
    package, demos = import_module(namespace), import_module(f"{namespace}.demos.boring_classes")
    loaders, seen = DataLoader(torch.arange(6.0).unsqueeze(1).repeat(1, 32), batch_size=2), {}

    class Data(demos.BoringDataModule):
        def setup(self, stage):
            super().setup(stage)
            self.stage = stage

    class Look(package.Callback):
        def on_validation_start(self, trainer, pl_module):
            before = dict(vars(trainer.fit_loop)), trainer.val_check_batch, trainer.fit_loop._data_source.instance
            seen["made"] = _compat.made_loaders(trainer)
            seen["set up"] = [_compat.has_training_data(trainer)]
            with _compat.training_data(trainer, loaders):
                seen["set up"].append(_compat.has_training_data(trainer))
                seen["batches"] = [batch[0][:, 0].tolist() for batch in _compat.training_batches(trainer, [loaders])]
            seen["set up"].append(_compat.has_training_data(trainer))
            after = dict(vars(trainer.fit_loop)), trainer.val_check_batch, trainer.fit_loop._data_source.instance
            seen["as before"] = all(after[0][key] is value for key, value in before[0].items()), after[1:] == before[1:]
            seen["flags"] = _compat.training_flags(trainer)

    trainer = package.Trainer(
        fast_dev_run=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Look()],
    )
    module, data = demos.BoringModel(), Data()
    module.layer.eval()
    trainer.validate(module, datamodule=data, verbose=False)
    assert seen["set up"] == [False, True, False]
    assert seen["batches"] == [[0, 1], [2, 3]]
    assert seen["as before"] == (True, True)
    assert seen["flags"] == {"": True, "layer": False}
    assert (len(seen["made"].dataset), hasattr(data, "random_train"), data.stage) == (64, False, "validate")
    assert _compat.given_loaders(trainer) is None
    trainer.fit(module, loaders)
    assert _compat.given_loaders(trainer) is loaders
    assert (trainer.global_step, _compat.has_training_data(trainer)) == (2, True)


# --- how a network runs, and what a torch function mode sees of it ---


@pytest.mark.parametrize("in_place", [False, True])
def test_a_module_runs_through_its_entry_points(fresh_compiler, in_place):
    """An attribute of the instance takes the place of each; a compiled call is asked for first."""
    layer, seen = nn.Linear(2, 2), []
    if in_place:
        layer.compile(backend="eager")
    names = _compat.entry_points(layer)
    assert names == (["forward", "_compiled_call_impl"] if in_place else ["forward"])
    for name in names:
        original = getattr(layer, name)
        vars(layer)[name] = lambda x, name=name, original=original: seen.append(name) or original(x)
    _compat.reset_compiled_code()
    layer(torch.ones(1, 2))
    assert seen[0] == names[-1]
    assert len(seen) == len(names)


class Operations(torch.overrides.TorchFunctionMode):
    """Notes the name of each operation, of attention also of those inside."""

    def __init__(self, inside):
        super().__init__()
        self.names, self.inside = [], inside

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        if self.inside and func is torch.nn.functional.multi_head_attention_forward:
            with self, _compat.attention_in_python():
                return func(*args, **kwargs)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
def test_a_mode_sees_the_operations_of_attention(training):
    attention, x = nn.MultiheadAttention(4, 2).train(training), torch.randn(3, 2, 4)
    expected, _ = attention(x, x, x)
    seen = {}
    for inside in (False, True):
        with Operations(inside) as mode:
            output, _ = attention(x, x, x)
        torch.testing.assert_close(output, expected)
        seen[inside] = mode.names
    assert seen[False].count("linear") == 0  # else nothing would have to be done
    assert seen[True].count("linear") == 2
    assert [names.count("multi_head_attention_forward") for names in seen.values()] == [1, 1]
    assert torch.nn.functional.has_torch_function is torch.overrides.has_torch_function


def test_torch_looks_at_values_but_where_it_shall_not(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile turns it off for good
    detect = torch.nn.modules.transformer._detect_is_causal_mask
    mask, wrong = nn.Transformer.generate_square_subsequent_mask(3), torch.tensor([-1.0])
    assert detect(mask)
    with _compat.values_unseen():
        assert not torch.nn.modules.transformer._detect_is_causal_mask(mask, size=3)
        assert torch.nn.modules.transformer._detect_is_causal_mask(mask, True)
        assert torch.distributions.Normal(torch.zeros(1), wrong).scale is wrong
    assert torch.nn.modules.transformer._detect_is_causal_mask is detect
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        torch.distributions.Normal(torch.zeros(1), wrong)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_averages_are_found_in_the_callbacks_that_keep_them(namespace):
    package = import_module(namespace)
    callbacks = import_module(f"{namespace}.callbacks")
    module = import_module(f"{namespace}.demos.boring_classes").BoringModel()
    found = []

    class Look(package.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            found.append(_compat.averages_of(trainer, pl_module))

    averaging = [callbacks.EMAWeightAveraging(), callbacks.StochasticWeightAveraging(swa_lrs=0.1)]
    trainer = package.Trainer(max_epochs=1, limit_train_batches=1, callbacks=[*averaging, Look()], logger=False,
                              accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
                              enable_checkpointing=False)  # fmt: skip
    trainer.fit(module)
    assert [[type(own) for own in averages] for averages in found] == [[type(module)] * 2]
    assert all(own is not module for own in found[0])


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_strategy_wraps_its_model_anew(namespace):
    """What DDP remembers of shapes goes with the old wrapper; single devices have none."""
    strategy = import_module(f"{namespace}.strategies").DDPStrategy
    assert "self.model = self._setup_model(self.model)" in inspect.getsource(strategy.configure_ddp)
    assert "self._register_ddp_hooks()" in inspect.getsource(strategy.configure_ddp)
    wrapped = object.__new__(torch.nn.parallel.DistributedDataParallel)
    calls = []
    trainer = SimpleNamespace(
        lightning_module="module",
        strategy=SimpleNamespace(model=wrapped, configure_ddp=lambda: calls.append(trainer.strategy.model)),
    )
    with _compat.unwrapped(trainer):
        assert trainer.strategy.model == "module"
        assert calls == []
    assert calls == ["module"]
    alone = SimpleNamespace(strategy=SimpleNamespace(model="module"))
    with _compat.unwrapped(alone):
        assert alone.strategy.model == "module"


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_step_gets_what_the_trainer_would_pass(namespace):
    package = import_module(namespace)

    class WithIndex(package.LightningModule):
        def training_step(self, batch, batch_idx):
            return None

    class Without(package.LightningModule):
        def training_step(self, batch):
            return None

    trainer = package.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    assert _compat.step_arguments(trainer, WithIndex(), "batch", 3) == ("batch", 3)
    assert _compat.step_arguments(trainer, Without(), "batch", 3) == ("batch",)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_copy_can_be_told_its_trainer(namespace):
    module = import_module(namespace).LightningModule()
    trainer = import_module(namespace).Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    _compat.attach_trainer_(module, trainer)
    assert module.trainer is trainer
    _compat.attach_trainer_(module, None)
    assert _compat.attached_trainer(module) is None


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_what_a_wandb_logger_was_told(namespace, tmp_path):
    logger = import_module(f"{namespace}.loggers").WandbLogger
    plain = logger(save_dir=tmp_path, id="abc")
    assert _compat.wandb_settings(plain) == ("", "trainer/global_step", None)
    told = logger(save_dir=tmp_path, id="abc", prefix="mine", log_model="all", sync_tensorboard=True)
    assert _compat.wandb_settings(told) == ("mine-", "global_step", "model-abc")
    assert _compat.wandb_settings(logger(log_model=True, checkpoint_name="net")).checkpoints == "net"


@pytest.mark.slow
def test_an_offline_run_can_have_an_input(tmp_path, monkeypatch):
    import wandb
    from wandb_file import OfflineRun

    for name in ("DATA", "CACHE", "CONFIG", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "own"))
    file = tmp_path / "a.ckpt"
    file.write_text("abc")
    artifact = wandb.Artifact("weights", type="checkpoint")
    artifact.add_reference(file.as_uri(), name="a.ckpt")
    run = wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True))
    with pytest.raises(TypeError, match="offline"):
        run.use_artifact(artifact)  # once this works, the detour can go
    _compat.wandb_input(run, artifact)
    run.finish()
    found = OfflineRun(tmp_path).artifacts["weights"]
    assert (found.use_after_commit, found.user_created, list(found.aliases)) == (True, True, ["latest"])


KEY = "0123456789abcdef" * 3
KEYS = {
    "nothing": ({}, {}),
    "a key": ({"WANDB_API_KEY": KEY}, {}),
    "a token": ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, {}),
    "netrc": ({}, {".netrc": f"machine api.wandb.ai login user password {KEY}"}),
    "netrc of the other name": ({}, {"_netrc": f"machine api.wandb.ai login user password {KEY}"}),
    "netrc elsewhere": ({"NETRC": "own"}, {"own": f"default login user password {KEY}"}),
    "netrc that is not looked at": ({"NETRC": "own"}, {".netrc": f"default login user password {KEY}"}),
    "netrc that is none": ({}, {".netrc": "machine"}),
    "another host": ({}, {".netrc": f"machine example.org login user password {KEY}"}),
    "another server": (
        {"WANDB_BASE_URL": "https://wandb.example.org:8080"},
        {".netrc": f"machine api.wandb.ai login user password {KEY}"},
    ),
    "a key for another server": (
        {"WANDB_BASE_URL": "https://wandb.example.org:8080"},
        {".netrc": f"machine wandb.example.org:8080 login user password {KEY}"},
    ),
    "settings": ({}, {".config/wandb/settings": f"[default]\napi_key = {KEY}\n"}),
    "settings elsewhere": ({"WANDB_CONFIG_DIR": "own"}, {"own/settings": f"[default]\napi_key = {KEY}\n"}),
    "settings of the folder": ({}, {"wandb/settings": f"[default]\napi_key = {KEY}\n"}),
    "settings of a project": ({}, {"wandb/settings": "[default]\nproject = own\n"}),
}

IN_SETTINGS = ("settings", "settings elsewhere", "settings of the folder")
"""Where wandb up to 0.28 finds no key, and says so itself."""


@pytest.mark.parametrize("case", KEYS)
def test_wandb_finds_a_key_where_it_is_looked_for(case, tmp_path, monkeypatch):
    setup = import_module("wandb.sdk.wandb_setup")
    login, errors = import_module("wandb.sdk.wandb_login"), import_module("wandb.errors")
    variables, files = KEYS[case]
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    for name, value in {"HOME": str(tmp_path), **variables}.items():
        monkeypatch.setenv(name, value)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(setup, "_singleton", None)
    with suppress(ImportError):  # from wandb 0.24 on
        monkeypatch.setattr(import_module("wandb.sdk.lib.wbauth.authenticate"), "_session_auth", None)
    fails = _compat.wandb_would_fail()
    host = setup.singleton().settings.base_url
    assert "WANDB_BASE_URL" in variables or urlsplit(host).netloc in _compat.WANDB_HOSTS
    found = False
    with suppress(errors.UsageError):  # without a terminal it cannot ask for a key
        found, _ = login._login(_silent=True)
    assert not (fails and found)
    assert fails or found or case in IN_SETTINGS
    assert not _compat.wandb_would_fail()  # now it is set up


@pytest.mark.parametrize("variable", ["WANDB_MODE", "WANDB_DISABLED"])
def test_wandb_does_not_fail_where_it_is_not_online(variable, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(import_module("wandb.sdk.wandb_setup"), "_singleton", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    assert _compat.wandb_would_fail()
    monkeypatch.setenv(variable, "true")
    assert not _compat.wandb_would_fail()
    monkeypatch.delenv(variable)
    monkeypatch.setattr(os, "isatty", lambda _: True)
    assert not _compat.wandb_would_fail()


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_loggers_that_leave_it_to_wandb_whether_they_are_online(namespace, tmp_path):
    loggers = import_module(f"{namespace}.loggers")
    kind = type("Own", (loggers.WandbLogger,), {})
    assert _compat.asks_wandb(kind(save_dir=tmp_path))
    assert not _compat.asks_wandb(kind(save_dir=tmp_path, offline=True))
    assert not _compat.asks_wandb(kind(save_dir=tmp_path, mode="disabled"))
    assert not _compat.asks_wandb(loggers.CSVLogger(tmp_path))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_quietened_fit_writes_nothing(namespace, tmp_path, monkeypatch):
    """Loggers that begin a run to say their version are not asked; what it takes to find a learning rate is nothing."""
    package = import_module(namespace)
    monkeypatch.chdir(tmp_path)

    class Asked(package.loggers.logger.DummyLogger):
        experiment = version = name = property(lambda self: pytest.fail("the logger was asked"))

    finder = package.callbacks.LearningRateFinder()
    trainer = package.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=[Asked(), package.loggers.CSVLogger("csv")],
        callbacks=[finder, package.callbacks.OnExceptionCheckpoint("."), package.callbacks.ModelCheckpoint("kept")],
        profiler=package.profilers.SimpleProfiler("profile", "times"),
        default_root_dir="root",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    monkeypatch.setattr(finder, "optimal_lr", None)
    _compat.quieten_(trainer, str(tmp_path / "quiet"))
    module = import_module(f"{namespace}.demos.boring_classes").BoringModel()
    trainer.fit(module, DataLoader(torch.randn(4, 32), batch_size=2))
    assert finder.optimal_lr is None
    assert trainer.log_dir == trainer.default_root_dir == str(tmp_path / "quiet")
    assert [path.name for path in tmp_path.rglob("*")] == ["quiet"]
    again = pickle.loads(pickle.dumps(trainer.loggers))
    assert [type(logger).__name__ for logger in again] == ["SilentAsked", "SilentCSVLogger"]
    assert [(logger.save_dir, logger.experiment.add_scalar("a", 1)) for logger in again] == [
        (trainer.log_dir, None)
    ] * 2


def test_fits_are_wrapped_once(monkeypatch):
    trainers = [import_module(f"{namespace}.trainer.trainer").Trainer for namespace in NAMESPACES]
    for trainer in trainers:
        assert not hasattr(trainer.fit, "_lightning_compress")
        # to be put back; tools that log by themselves have wrapped it before us
        monkeypatch.setattr(trainer, "fit", functools.wraps(trainer.fit)(lambda *_: "another"))
    for _ in range(2):
        _compat.wrap_fits(lambda fit: lambda trainer, *args: ("wrapped", fit, *args))
    for trainer in trainers:
        assert trainer.fit(None, 1) == ("wrapped", trainer.fit.__wrapped__, 1)
        assert trainer.fit.__wrapped__(None, 1) == "another"
        assert list(inspect.signature(trainer.fit).parameters)[:2] == ["self", "model"]


def test_a_parser_makes_objects_of_what_it_has_parsed():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(_takes_a_module)
    made = _compat.instantiated(parser, parser.parse_object({"module": {"class_path": "torch.nn.Identity"}}))
    assert type(made["module"]) is nn.Identity


def _takes_a_module(module: nn.Module): ...


def test_a_failing_launch_is_noticed_before_any_hook():
    launchers = import_module("lightning.pytorch.strategies.launchers.multiprocessing")
    strategy = SimpleNamespace(num_processes=1)
    strategy.launcher = launchers._MultiProcessingLauncher(strategy, start_method="spawn")
    happened = []
    _compat.before_children_fail(SimpleNamespace(strategy=strategy), lambda: happened.append("noticed"))
    with pytest.raises(AttributeError, match="cluster_environment"):
        strategy.launcher.launch(print)
    assert happened == ["noticed"]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_hooks_with_which_a_profiler_names_layers_are_known(namespace):
    layers = nn.Sequential(nn.Linear(2, 2))
    handle = layers[0].register_forward_hook(lambda *_: None)
    with import_module(f"{namespace}.profilers.pytorch").RegisterRecordFunction(layers):
        hooks = [*layers[0]._forward_pre_hooks.values(), *layers[0]._forward_hooks.values()]
        assert [_compat.is_of_profiler(hook) for hook in hooks] == [True, False, True]
    handle.remove()


def test_what_fsdp2_puts_on_a_module_is_found_and_put_back():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        layer = nn.Linear(2, 2)
        handle = layer.register_forward_hook(lambda *_: None)
        before = set(vars(layer))
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        assert isinstance(layer, FSDPModule)
        assert type(layer).__module__.startswith(_compat.SHARDING)
        hooks = dict(layer._forward_pre_hooks)
        assert len(layer._forward_hooks) == 2
        with _compat.without_sharding(layer):
            assert type(layer) is nn.Linear
            assert set(vars(layer)) == before
            assert not layer._forward_pre_hooks
            assert list(layer._forward_hooks) == [handle.id]
        assert isinstance(layer, FSDPModule)
        assert layer._forward_pre_hooks == hooks
        assert len(layer._forward_hooks) == 2
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.sample
def test_fsdp2_gathers_what_is_presented_of_a_shard():
    """Where it keeps parameters and what it knows of them, and when it asks what is to be gathered."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh())
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        fully_shard(network, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        assert _compat.users_class(network) is nn.Sequential
        [known] = _compat.fsdp_parameters(network)
        weight = network[0].weight
        assert _compat.fsdp_names(network) == {"0.weight": known}
        assert (known.sharded_param is weight, _compat.why_not_gathered_as(known)) == (True, None)
        assert (_compat.gathered_parameter(known), known.mp_policy.param_dtype) == (None, torch.bfloat16)
        assert torch.equal(_compat.shard(weight), _compat.whole(weight))
        x = torch.ones(1, 2, dtype=torch.bfloat16)
        network(x)  # it has looked for what is to be presented, and found nothing
        network.reshard()
        with _compat.gathered_as(known, lambda shard: shard * 0) as shard:
            assert shard is _compat.shard(weight)
            assert not network(x).any()
            assert _compat.gathered_parameter(known) is network[0].weight is not weight
            network.reshard()
            assert network[0].weight is weight
        assert network(x).any()
        assert vars(shard) == {}
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [int | list[int] | None, list[str] | float])
def test_the_frame_that_refuses_a_value_has_what_was_raised_for_each_type(kind):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=kind)
    with pytest.raises(Exception, match="x") as error:
        parser.parse_object({"x": "half"})
    links, link = [], error.value
    while link is not None:
        links.append(link)
        link = link.__cause__
    (tried,) = filter(None, map(_compat.types_tried, links))
    said = {str(entry) for entry in tried}
    assert said == {f"Expected a {own}. Got value: half" for own in SHOWN[kind]}


SHOWN = {
    int | list[int] | None: (int, list, type(None)),
    list[str] | float: (list, float),
}


def test_all_other_exceptions_have_tried_no_types():
    assert _compat.types_tried(ValueError("never raised")) == []
    exceptions = [ValueError("of somebody else")]
    with pytest.raises(ValueError, match="else") as error:
        raise exceptions[0]
    assert _compat.types_tried(error.value) == []


# --- what torch does around modules and optimizers ---


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook", None])
def test_a_full_backward_hook_makes_copies_where_there_are_gradients(register):
    layer, x, seen = nn.Linear(2, 2), torch.ones(1, 2), []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    if register is None:
        layer.register_forward_pre_hook(lambda module, args: None)
    else:
        getattr(layer, register)(lambda module, *gradients: None)
    assert _compat.copies_its_tensors(layer) is (layer(x) is not seen[-1]) is (register is not None)
    with torch.no_grad():
        assert _compat.copies_its_tensors(layer) is (layer(x) is not seen[-1]) is False


def test_a_hook_of_a_step_is_called_by_torchs_call_of_the_step():
    optimizer, found = torch.optim.SGD([torch.ones(1)], lr=0.1), []
    for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
        register(lambda *_: found.append(_compat.call_of_step_hook()))
    optimizer.step()
    assert found[0] is found[1]
    assert found[0].f_code is type(optimizer).step.__code__


def test_torch_keeps_its_functions_in_three_places():
    for owner, name in zip(_compat.FUNCTION_OWNERS, ("relu", "gelu", "add"), strict=True):
        assert callable(getattr(owner, name))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_how_many_epochs_a_checkpoint_has_begun(namespace, tmp_path):
    """Written within the last epoch or after the fit, and with nothing but its number."""

    class Saving(import_module(namespace).Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "within.ckpt")

    trainer = _fitted(namespace, callbacks=[Saving()])[1]
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    within, after = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("within", "after"))
    assert (within["epoch"], after["epoch"]) == (1, 2)
    assert [_compat.epochs_in(own) for own in (within, after, {"epoch": 1}, {})] == [2, 2, 2, None]


def test_a_loader_keeps_its_workers_in_an_attribute():
    loader = DataLoader(range(4), num_workers=1, persistent_workers=True)
    assert "_iterator" in vars(loader)
    next(iter(loader))
    assert loader._iterator is not None
    other = copy.copy(loader)
    _compat.forget_workers_(other)
    assert other._iterator is None
    assert loader._iterator is not None


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_settled_module_is_on_no_mesh(namespace):
    class Lit(import_module(namespace).LightningModule):
        def configure_model(self):
            raise AssertionError("it has been configured")

    module = Lit()
    assert module._device_mesh is None
    module._device_mesh = object()
    _compat.settle_(module)
    assert module.device_mesh is None
    assert module.configure_model() is None


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_fit_may_have_nothing_to_validate_on(namespace):
    """Known once the data are set up; forgotten by the next fit."""
    package, seen = import_module(namespace), []

    class Look(package.Callback):
        def setup(self, trainer, pl_module, stage):
            seen.append(_compat.validates_nothing(trainer))

        def on_train_start(self, trainer, pl_module):
            seen.append(_compat.validates_nothing(trainer))

    loader = DataLoader(torch.zeros(4, 32), batch_size=2)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = package.Trainer(
        accelerator="cpu", max_epochs=1, enable_model_summary=False, callbacks=[Look()], **settings
    )
    for given in ([], DataLoader(torch.zeros(0, 32)), loader):
        trainer.fit(import_module(f"{namespace}.demos.boring_classes").BoringModel(), loader, given)
        trainer.fit_loop.max_epochs += 1
    assert seen == [False, True, False, True, False, False]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_how_a_trainer_reads_its_loaders(namespace):
    module = import_module(f"{namespace}.demos.boring_classes").BoringModel()
    combined = import_module(f"{namespace}.utilities").CombinedLoader
    loader = DataLoader(torch.zeros(4, 32))
    for given, expected in ((loader, [loader]), (combined([loader, loader], "min_size"), [loader, loader])):
        trainer = import_module(namespace).Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
        )
        assert _compat.validation_loaders(trainer) == []
        module.validation_step = lambda batch, batch_idx: None
        trainer.validate(module, given, verbose=False)
        assert _compat.validation_loaders(trainer) == expected
