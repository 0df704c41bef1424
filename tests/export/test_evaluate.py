from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler, TensorDataset

from lightning_compress.export import EvaluationError, Sample, evaluate, to_onnx
from lightning_compress.export.evaluate import evaluate_forward, repeatedly, samples_validated

from . import networks
from .networks import CLASSES, FEATURES, NAMESPACES

KINDS = ["itself", "child", "keywords"]
# Each kind of module is tried in one namespace, and one kind in both; the rest is slow.
KINDS_AND_NAMESPACES = [
    pytest.param(kind, name, marks=[pytest.mark.slow] * (kind != "child" and name != NAMESPACES[0]))
    for kind in KINDS
    for name in NAMESPACES
]


@pytest.fixture(scope="module")
def fitted():
    """A trained module of each kind and namespace with its Trainer, made when first asked for."""
    made = {}

    def get(namespace, kind="child"):
        if (namespace, kind) not in made:
            torch.manual_seed(0)
            module, trainer = networks.lightning_module(namespace, kind), networks.trainer(namespace)
            trainer.fit(module, networks.loader(), networks.loader(batch_size=7))
            made[namespace, kind] = module, trainer
        return made[namespace, kind]

    return get


def exported(module, kind, path):
    sample = torch.randn(4, FEATURES)
    if kind == "itself":
        return to_onnx(module, path, sample)
    if kind == "keywords":
        return to_onnx(module, path, Sample(kwargs={"features": sample}), network="model")
    return to_onnx(module, path, sample, network="model")


def own_metrics(module, namespace, data=None):
    """What `trainer.validate` of a separate Trainer says."""
    fresh = networks.trainer(namespace)
    return fresh.validate(module, data or networks.loader(batch_size=7), verbose=False)[0]


def state(module):
    """Everything about a module that an evaluation must not change."""
    return {
        "values": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "attributes": [{name: id(value) for name, value in vars(part).items()} for part in module.modules()],
        "metrics": (module.accuracy.update_count, module.val_confusion.update_count, module.val_confusion.mean_value),
        "flags": [part.training for part in module.modules()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        "environment": dict(os.environ),
    }


def assert_same(before, after):
    assert all(torch.equal(before["values"][name], after["values"][name]) for name in before["values"])
    for part in ("attributes", "metrics", "flags", "random", "environment"):
        assert before[part] == after[part], part


@pytest.mark.parametrize(("kind", "namespace"), KINDS_AND_NAMESPACES)
@pytest.mark.sample
def test_metrics_of_the_file_are_those_of_validate(fitted, tmp_path, capfd, caplog, namespace, kind, monkeypatch):
    module, trainer = fitted(namespace, kind)
    exported(module, kind, tmp_path / "n.onnx")
    module.model.train()
    module.val_confusion.update(7.0)
    trainer_state, metrics = (
        (trainer.state.fn, trainer.state.status, trainer.state.stage),
        dict(trainer.callback_metrics),
    )
    monkeypatch.setenv("LIGHTNING_COMPRESS_RUN", "recipe.yaml")
    capfd.readouterr()
    caplog.clear()
    before = state(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(tmp_path / "n.onnx", module, trainer)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert_same(before, state(module))
    assert module.trainer is trainer
    assert (trainer.state.fn, trainer.state.status, trainer.state.stage) == trainer_state
    assert trainer.callback_metrics == metrics
    monkeypatch.delenv("LIGHTNING_COMPRESS_RUN")
    module.val_confusion.reset()
    expected = own_metrics(module, namespace)
    module.trainer = trainer
    assert found.keys() == expected.keys()
    assert all(type(value) is float for value in found.values())
    for name in ("val_loss", "val_acc"):
        assert found[name] == pytest.approx(expected[name], abs=1e-4)
    assert (found["val_epoch"], found["val_step"]) == (2.0, 8.0)  # of the user's Trainer: 2 epochs of 4 batches


def test_the_file_is_what_is_measured(fitted, tmp_path):
    module, trainer = fitted("lightning.pytorch")
    worse = networks.lightning_module("lightning.pytorch")
    with torch.no_grad():
        worse.model[-1].weight.zero_()
        worse.model[-1].bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    to_onnx(worse, tmp_path / "worse.onnx", torch.ones(2, FEATURES), network="model")
    ones = (networks.dataset().tensors[1] == 1).float().mean().item()
    assert evaluate(tmp_path / "worse.onnx", module, trainer)["val_acc"] == pytest.approx(ones)
    assert evaluate_forward(module, trainer)["val_acc"] != pytest.approx(ones)


def test_a_validation_computes_in_full_float32(fitted, rounded_float32):
    seen = set()

    def forward(x):
        seen.update(rounded_float32())
        return torch.zeros(len(x), CLASSES)

    evaluate_forward(*fitted(NAMESPACES[0]), "model", forward)
    assert seen == {"ieee"}


def test_sources_of_data(fitted):
    namespace = "lightning.pytorch"
    module, trainer = fitted(namespace)
    loaders = [networks.loader(7), networks.loader(20)]
    sizes = {"trainer": 20, "loader": 7, "loaders": (7, 20), "datamodule": 20, "module": 5}
    seen = []

    def forward(x):
        seen.append(len(x))
        return torch.zeros(len(x), CLASSES)

    def rows(source, owner=module):
        seen.clear()
        evaluate_forward(owner, source, "model", forward)
        return sum(seen)

    assert rows(trainer) == sizes["trainer"]
    assert rows(loaders[0]) == sizes["loader"]
    assert rows(networks.datamodule(namespace)) == sizes["datamodule"]
    with pytest.raises(EvaluationError, match="Classifier has no val_dataloader; pass a Trainer that was given"):
        rows(None)
    with pytest.raises(EvaluationError, match="nothing to validate on"):
        rows(networks.trainer(namespace))

    class Own(type(module)):
        def val_dataloader(self):
            return networks.loader(5)

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_mean", self(batch[0]).mean())

    own = Own()
    assert rows(None, own) == sizes["module"]
    run = networks.trainer(namespace, max_epochs=1)
    run.fit(own, networks.loader())
    assert rows(run, own) == sizes["module"]
    assert rows(loaders, own) == sum(sizes["loaders"])
    assert evaluate_forward(own, loaders).keys() == {"val_mean/dataloader_idx_0", "val_mean/dataloader_idx_1"}


def test_limits_and_inference_mode_of_the_trainer(fitted):
    module, _ = fitted("lightning.pytorch")
    seen = []

    def forward(x):
        seen.append(torch.is_inference_mode_enabled())
        return torch.zeros(len(x), CLASSES)

    for inference in (True, False):
        trainer = networks.trainer("lightning.pytorch", limit_val_batches=2, inference_mode=inference)
        trainer.validate(module, networks.loader(), verbose=False)
        seen.clear()
        evaluate_forward(module, trainer, "model", forward)
        assert seen == [inference] * 2
    with pytest.raises(EvaluationError, match="limit_val_batches=0"):
        evaluate_forward(module, networks.trainer("lightning.pytorch", limit_val_batches=0))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(torch.zeros(10, 3), torch.zeros(10, dtype=torch.long)))


class Ready:
    """Batches that no loader has made."""

    def __iter__(self):
        return iter([(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))])

    def __len__(self):
        return 1


class Endless(Sampler):
    """Says by an error of its own that it has no length."""

    def __iter__(self):
        return iter(range(10))

    def __len__(self):
        raise NotImplementedError


def batches_of(size, *, dropping=False):
    data = TensorDataset(torch.zeros(10, 3), torch.zeros(10, dtype=torch.long))
    return DataLoader(data, batch_size=size, drop_last=dropping)


@pytest.mark.parametrize(
    ("loaders", "limit", "samples"),
    [
        (batches_of(4), 1.0, 10),
        (batches_of(4, dropping=True), 1.0, 8),
        (batches_of(4), 2, 8),
        (batches_of(4), 3, 10),
        ({"a": batches_of(4), "b": [batches_of(5), batches_of(1)]}, 2, None),
        (DataLoader(Stream(), batch_size=4), 2, None),
        (DataLoader([(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))] * 3, batch_size=None), 1.0, None),
        (Ready(), 1.0, None),
        (DataLoader(batches_of(1).dataset, batch_size=4, sampler=Endless()), 2, None),
        (CombinedLoader([batches_of(4), batches_of(5)], "max_size"), 2, None),
    ],
)
@pytest.mark.parametrize("namespace", [NAMESPACES[0], pytest.param(NAMESPACES[1], marks=pytest.mark.slow)])
def test_how_many_samples_are_validated(loaders, limit, samples, namespace):
    seen = []

    class Counting(import_module(namespace).LightningModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            seen.append(0 if isinstance(batch, list) and isinstance(batch[0], list) else len(batch[0]))

    trainer = networks.trainer(namespace, limit_val_batches=limit)
    assert samples_validated(trainer) is None
    trainer.validate(Counting(), loaders, verbose=False)
    assert samples_validated(trainer) == samples
    assert samples in (None, sum(seen))


def test_datamodule_is_put_back(fitted):
    module, _ = fitted("pytorch_lightning")
    data = networks.datamodule("pytorch_lightning")
    trainer = networks.trainer("pytorch_lightning", max_epochs=1)
    other = networks.lightning_module("pytorch_lightning")
    trainer.fit(other, datamodule=data)
    data.rows = networks.dataset(3)
    before = dict(vars(data))
    assert evaluate_forward(module, trainer)["val_acc"] == evaluate_forward(module, networks.loader())["val_acc"]
    assert vars(data) == before
    assert data.trainer is trainer
    assert data.history == ["fit"]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_again_and_again_on_a_copy(fitted, namespace):
    """The copy may be changed in between; module, datamodule and Trainer are as they were."""
    module, trainer = fitted(namespace)
    data, before = networks.datamodule(namespace), {name: value.clone() for name, value in module.state_dict().items()}
    expected = own_metrics(module, namespace, networks.datamodule(namespace))
    with repeatedly(module, data, trainer=trainer) as validation:
        assert data.history == ["validate"]
        first = validation.run()
        assert validation.run() == first
        assert {**first, "val_epoch": 0.0, "val_step": 0.0} == {**expected, "val_epoch": 0.0, "val_step": 0.0}
        assert validation.run(batches=1)["val_loss"] != expected["val_loss"]
        with torch.no_grad():
            next(validation.module.parameters()).zero_()
        assert validation.run()["val_loss"] != expected["val_loss"]
        assert data.history == ["validate"]
    assert data.history == []
    assert not hasattr(data, "rows")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with repeatedly(module, networks.loader(), batches=2) as validation:
        assert validation.run() == validation.run(batches=2) != validation.run(batches=1)
    module.trainer = trainer  # own_metrics gave it another, and other tests share the module


def test_ctrl_c_in_a_repeated_validation(fitted):
    """Lightning makes an exit of it, and ignores what follows."""
    module, _ = fitted(NAMESPACES[0])
    handler = signal.getsignal(signal.SIGINT)
    with repeatedly(module, networks.loader()) as validation:
        plain = validation.run()
        hook = validation.module.model.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            validation.run()
        assert signal.getsignal(signal.SIGINT) is handler
        hook.remove()
        assert validation.run() == plain


@pytest.mark.parametrize(
    ("with_datamodule", "namespace"),
    [
        (False, NAMESPACES[0]),
        (True, NAMESPACES[1]),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in ((False, NAMESPACES[1]), (True, NAMESPACES[0]))),
    ],
)
def test_inside_on_fit_end(tmp_path, namespace, with_datamodule):
    results = {}

    class AtTheEnd(import_module(namespace).Callback):
        def on_fit_end(self, trainer, pl_module):
            to_onnx(pl_module, tmp_path / "n.onnx", torch.ones(2, FEATURES))
            before, metrics = state(pl_module), dict(trainer.callback_metrics)
            results["file"] = evaluate(tmp_path / "n.onnx", pl_module, trainer)
            results["module"] = evaluate_forward(pl_module, trainer)
            assert_same(before, state(pl_module))
            assert trainer.callback_metrics == metrics
            assert pl_module.trainer is trainer
            assert trainer.state.fn == "fit"
            assert trainer.lightning_module is pl_module

    module = networks.lightning_module(namespace, "itself")
    trainer = networks.trainer(namespace, callbacks=[AtTheEnd()])
    if with_datamodule:
        trainer.fit(module, datamodule=networks.datamodule(namespace))
        assert trainer.datamodule.rows is None  # the user's own teardown came last
        assert trainer.datamodule.trainer is trainer
    else:
        trainer.fit(module, networks.loader(), networks.loader())
    assert trainer.state.finished
    assert module.trainer is trainer
    expected = own_metrics(module, namespace, networks.loader())
    for name in ("val_loss", "val_acc"):
        assert results["file"][name] == pytest.approx(expected[name], abs=1e-4)
        assert results["module"][name] == pytest.approx(expected[name], abs=1e-6)
        assert results["module"][name] == pytest.approx(trainer.callback_metrics[name].item(), abs=1e-6)
    pickled = {name for name in vars(module) if name in ("forward", "configure_callbacks")}
    assert not pickled


def test_a_module_that_cannot_be_copied_is_put_back(fitted):
    module = networks.lightning_module("lightning.pytorch")
    module.guard = threading.Lock()
    module.notes = {"seen": []}
    module.model[1].eval()
    compiled = torch.compile(module.model, backend="eager")
    module.model = compiled
    module.val_confusion.update(3.0)
    expected = own_metrics(networks_copy(module), "lightning.pytorch")
    before = state(module)

    def forward(x):
        module.notes["seen"].append(len(x))
        module.model[1].running_mean.add_(1.0)
        return module.model[4](torch.ones(len(x), 8))

    evaluate_forward(module, networks.loader(), "model", forward)
    assert_same(before, state(module))
    assert module.model is compiled
    assert module.notes == {"seen": []}
    found = evaluate_forward(module, networks.loader(batch_size=7))
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-6)
    assert_same(before, state(module))


def networks_copy(module):
    """The same weights in a module that was never compiled."""
    other = networks.lightning_module("lightning.pytorch")
    other.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()})
    return other


@pytest.fixture(scope="module")
def uncompiled(tmp_path_factory):
    """Weights, what a validation says of them, and the file of their network; only read."""
    torch.manual_seed(0)
    module, path = networks.lightning_module("lightning.pytorch"), tmp_path_factory.mktemp("uncompiled") / "n.onnx"
    to_onnx(module, path, torch.ones(2, FEATURES), network="model")
    return module.state_dict(), own_metrics(module, "lightning.pytorch"), path


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapped child", "compiled child", "lightning", "compiled module"])
def test_compiled_modules(uncompiled, how):
    from lightning.pytorch.utilities.compile import from_compiled

    weights, expected, path = uncompiled
    module = networks.lightning_module("lightning.pytorch", "child")
    module.load_state_dict(weights)
    if how == "wrapped child":
        module.model = torch.compile(module.model, backend="eager")
    elif how == "compiled child":
        module.model.compile(backend="eager")
    elif how == "lightning":
        module = from_compiled(torch.compile(module, backend="eager"))
    else:
        module = torch.compile(module, backend="eager")
    found = evaluate(path, module, networks.loader(batch_size=7))
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)


def test_callbacks_of_the_module_and_bfloat16(tmp_path):
    class Own(type(networks.lightning_module("lightning.pytorch"))):
        def configure_callbacks(self):
            raise AssertionError("the user's callbacks must not be attached")

    module = Own()
    expected = own_metrics(networks_copy(module), "lightning.pytorch")
    module.to(torch.bfloat16)
    found = evaluate_forward(module, networks.loader(batch_size=7))
    assert module.model[0].weight.dtype == torch.bfloat16
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=0.02)


def test_double_precision_trainer():
    module = networks.lightning_module("lightning.pytorch")
    trainer = networks.trainer("lightning.pytorch", precision="64-true", max_epochs=1)
    trainer.fit(module, networks.loader(), networks.loader())
    assert module.model[0].weight.dtype == torch.float64
    metric = trainer.callback_metrics["val_loss"].item()
    assert evaluate_forward(module, trainer)["val_loss"] == pytest.approx(metric, abs=1e-6)


def test_structure_of_the_output_is_the_networks(tmp_path):
    """The validation of a module reads attributes, keys and tuples of what its network gives."""

    class Own(type(networks.lightning_module("lightning.pytorch"))):
        def __init__(self):
            super().__init__()
            self.model = networks.Structured("dataclass")

        def validation_step(self, batch, batch_idx):
            prediction = self.model(batch[0])
            assert type(prediction) is networks.Prediction
            assert prediction.note == "plain"
            self.log("val_mean", (prediction.logits.sum() + prediction.embedding.mean()))

    module = Own()
    to_onnx(module, tmp_path / "n.onnx", torch.ones(2, FEATURES), network="model")
    found = evaluate(tmp_path / "n.onnx", module, networks.loader())
    assert found["val_mean"] == pytest.approx(evaluate_forward(module, networks.loader())["val_mean"], abs=1e-4)


# Bad input


@pytest.mark.sample
def test_a_forward_that_is_never_called(fitted, tmp_path):
    module = networks.lightning_module("lightning.pytorch", "layers")
    to_onnx(module, tmp_path / "n.onnx", torch.ones(2, FEATURES), network="model")
    with pytest.raises(EvaluationError, match=r"Classifier\.validation_step never called 'model'.*calls layers inside"):
        evaluate(tmp_path / "n.onnx", module, networks.loader())
    with pytest.raises(EvaluationError, match="never called 'self'"):
        evaluate_forward(module, networks.loader(), "", lambda x: x)


@pytest.mark.sample
def test_a_file_for_another_call(fitted, tmp_path):
    module, _ = fitted("lightning.pytorch", "keywords")
    features = torch.ones(2, FEATURES)
    to_onnx(module, tmp_path / "n.onnx", Sample(kwargs={"features": features, "scale": 2.0}), network="model")
    with pytest.raises(EvaluationError, match=r"calls the network with scale=1\.0, but .* exported with scale=2\.0"):
        evaluate(tmp_path / "n.onnx", module, networks.loader())
    to_onnx(module, tmp_path / "n.onnx", features, network="model.body")
    with pytest.raises(EvaluationError, match=r"with \['features'\], but .* was exported with \['input'\]; export it"):
        evaluate(tmp_path / "n.onnx", module, networks.loader(), network="model")
    assert evaluate(tmp_path / "n.onnx", module, networks.loader()).keys() >= {"val_acc"}


@pytest.mark.slow
def test_a_fixed_batch_and_a_last_batch_that_is_shorter(fitted, tmp_path):
    module, _ = fitted("lightning.pytorch")
    to_onnx(module, tmp_path / "n.onnx", torch.ones(6, FEATURES), network="model", dynamic_batch=False)
    assert evaluate(tmp_path / "n.onnx", module, networks.loader(12)).keys() >= {"val_acc"}
    with pytest.raises(EvaluationError, match=r"of shape \{'input': \(2, 6\)\}; it declares \{'input': \(6, 6\)\}"):
        evaluate(tmp_path / "n.onnx", module, networks.loader(20))


def test_other_bad_arguments(fitted, tmp_path):
    module, trainer = fitted("lightning.pytorch")
    with pytest.raises(TypeError, match=r"module must be a LightningModule.*got Sequential"):
        evaluate_forward(networks.mlp(), networks.loader())
    with pytest.raises(ValueError, match=r"network names 'modl', not .*did you mean 'model'"):
        evaluate_forward(module, trainer, "modl", lambda x: x)
    with pytest.raises(FileNotFoundError, match=r"none\.onnx' is not a file"):
        evaluate(tmp_path / "none.onnx", module, trainer)
    with pytest.raises(EvaluationError, match="the validation ran no batch"):
        evaluate_forward(module, DataLoader([]))

    class NoValidation(type(module)):
        validation_step = type(module).__mro__[1].validation_step

    with pytest.raises(EvaluationError, match="NoValidation has no validation_step"):
        evaluate_forward(NoValidation(), networks.loader())


def test_an_error_in_the_forward_leaves_nothing_behind(fitted, monkeypatch):
    module, trainer = fitted("pytorch_lightning")
    monkeypatch.setenv("LIGHTNING_COMPRESS_RUN", "recipe.yaml")
    before = state(module)

    def forward(x):
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        evaluate_forward(module, trainer, "model", forward)
    assert_same(before, state(module))
    assert module.trainer is trainer


def test_a_loader_for_several_ranks_is_reported(fitted):
    module, _ = fitted("lightning.pytorch")
    data = networks.dataset()
    loader = DataLoader(data, batch_size=5, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    with pytest.warns(UserWarning, match="a DistributedSampler for 2 ranks; the metrics are those of one rank's share"):
        evaluate_forward(module, loader)


# Two ranks


def run_on_two_ranks(script, tmp_path, **environment):
    """Run one script on two gloo ranks, and give what each wrote to its file."""
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = str(Path(__file__).parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, "script.py", str(rank)],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([root, str(Path(__file__).parent)]),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "WORLD_SIZE": "2",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        logs = [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], logs
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_one_rank_of_a_process_group_evaluates_alone(tmp_path):
    """The environment is torchrun's; metrics with states to synchronise, and a prepare_data with a barrier."""
    script = """
        import sys
        import networks
        import torch
        import torch.distributed as dist
        from lightning_compress.export import evaluate, to_onnx
        from lightning_compress.export.evaluate import evaluate_forward

        rank = int(sys.argv[1])
        torch.set_num_threads(1)
        torch.manual_seed(0)
        module, data = networks.lightning_module("lightning.pytorch"), networks.datamodule("lightning.pytorch")
        alone = evaluate_forward(module, data)
        dist.init_process_group("gloo")
        seen = []
        def forward(x):
            seen.append(dist.is_initialized())
            return module.model(x)
        results = {"alone": alone}
        if rank == 0:
            to_onnx(module, "n.onnx", torch.ones(2, networks.FEATURES), network="model")
            results["module"] = evaluate_forward(module, data)
            results["file"] = evaluate("n.onnx", module, data)
            evaluate_forward(module, data, "model", forward)
        results["hidden"], results["initialised"] = seen, dist.is_initialized()
        total = torch.tensor(rank + 1.0)
        dist.all_reduce(total)
        results["total"] = total.item()
        torch.save(results, f"{rank}.pt")
        dist.destroy_process_group()
    """
    first, second = run_on_two_ranks(script, tmp_path, TORCHELASTIC_RUN_ID="none", GROUP_RANK="0", LOCAL_WORLD_SIZE="2")
    assert first["module"] == first["alone"] == second["alone"]
    assert first["file"]["val_loss"] == pytest.approx(first["alone"]["val_loss"], abs=1e-4)
    assert first["hidden"] == [False] * 4
    assert first["initialised"] is second["initialised"] is True
    assert first["total"] == second["total"] == 3.0


@pytest.mark.slow
def test_at_the_end_of_a_distributed_fit(tmp_path):
    script = """
        import sys
        import lightning.pytorch as pl
        import networks
        import torch
        from lightning_compress.export import evaluate, to_onnx
        from lightning_compress.export.evaluate import evaluate_forward

        rank = int(sys.argv[1])
        torch.set_num_threads(1)
        torch.manual_seed(0)
        results = {}

        class AtTheEnd(pl.Callback):
            def on_fit_end(self, trainer, pl_module):
                if rank == 0:
                    to_onnx(pl_module, "n.onnx", torch.ones(2, networks.FEATURES), network="model")
                    results["file"] = evaluate("n.onnx", pl_module, trainer)
                    results["module"] = evaluate_forward(pl_module, trainer)
                trainer.strategy.barrier()

        module = networks.lightning_module("lightning.pytorch")
        trainer = networks.trainer("lightning.pytorch", devices=2, strategy="ddp", callbacks=[AtTheEnd()])
        trainer.fit(module, networks.loader(), networks.loader())
        torch.save({**results, "weights": module.state_dict()}, f"{rank}.pt")
    """
    first, second = run_on_two_ranks(script, tmp_path, TORCHELASTIC_RUN_ID="none", GROUP_RANK="0", LOCAL_WORLD_SIZE="2")
    module = networks.lightning_module("lightning.pytorch")
    module.load_state_dict(first["weights"])
    expected = own_metrics(module, "lightning.pytorch", networks.loader())  # all 20 rows, not one rank's 10
    assert first["module"]["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-6)
    assert first["module"]["val_acc"] == pytest.approx(expected["val_acc"], abs=1e-6)
    assert first["file"]["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)
    assert torch.equal(first["weights"]["model.0.weight"], second["weights"]["model.0.weight"])
