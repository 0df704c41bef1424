"""The teacher: frozen while it is used, unchanged afterwards; made from a path, or from a checkpoint."""

from __future__ import annotations

import argparse
import copy
import sys
import types
from contextlib import ExitStack

import lightning.pytorch as L
import pytest
import torch
from torch import nn

import lightning_compress
from lightning_compress.mechanisms.capture import NetworkCall
from lightning_compress.mechanisms.loading import build_module, import_path, teacher_from_checkpoint
from lightning_compress.mechanisms.teacher import Teacher

X = torch.ones(3, 2)
VERSION = {"pytorch-lightning_version": L.__version__}


def call(*args, **kwargs) -> NetworkCall:
    return NetworkCall(args, kwargs, None)


def norm_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


class Lit(L.LightningModule):
    """Saves its hyperparameters; the network is a child."""

    def __init__(self, width: int = 2, *, bias: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Linear(2, width, bias=bias)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch):
        return self(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OneArgument(L.LightningModule):
    """The old way: all hyperparameters in one argument."""

    def __init__(self, hparams) -> None:
        super().__init__()
        self.save_hyperparameters(hparams)
        self.model = nn.Linear(2, self.hparams.width)

    def forward(self, x):
        return self.model(x)

    training_step = Lit.training_step
    configure_optimizers = Lit.configure_optimizers


class NoForward(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)


# While it is used


def test_it_runs_without_a_graph_in_evaluation_mode_and_moves_no_statistics():
    network = norm_network()
    before = copy.deepcopy(network.state_dict())
    teacher = Teacher(network)
    with teacher.prepared():
        first, second = teacher(call(X)), teacher(call(X))
        network[2].train()  # somebody calls train() on a part
        third = teacher(call(X))
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not first.requires_grad
    assert not first.is_inference()
    assert teacher.forwards == 3
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_everything_is_put_back():
    network = norm_network()
    network[0].eval()
    network[3].weight.requires_grad_(False)
    network[3].bias.grad = torch.full((2,), 5.0)
    tensors = [*network.parameters(), *network.buffers()]
    before = [(tensor, tensor.data_ptr(), tensor.dtype, tensor.requires_grad) for tensor in tensors]
    flags = [module.training for module in network.modules()]
    with Teacher(network).prepared("cpu", lambda module: module.to(torch.bfloat16)) as teacher:
        assert {tensor.dtype for tensor in network.parameters()} == {torch.bfloat16}
        assert not any(tensor.requires_grad for tensor in network.parameters())
        assert not any(module.training for module in network.modules())
        assert teacher(call(X.bfloat16())).dtype == torch.bfloat16
    after = [*network.parameters(), *network.buffers()]
    assert [(tensor, tensor.data_ptr(), tensor.dtype, tensor.requires_grad) for tensor in after] == before
    assert [module.training for module in network.modules()] == flags
    assert network[3].bias.grad.tolist() == [5.0, 5.0]
    assert network[3].bias.grad.dtype == torch.float32


def test_a_lightning_module_remembers_its_own_dtype():
    lit = Lit()
    with Teacher(lit).prepared(None, lambda module: module.to(torch.bfloat16)):
        assert lit.dtype == torch.bfloat16
    assert lit.dtype == torch.float32


def test_it_is_put_back_after_an_exception_too():
    network = norm_network()

    def fail(module):
        module.to(torch.bfloat16)
        raise OSError("no")

    with pytest.raises(OSError, match="no"), Teacher(network).prepared(None, fail):
        pass
    assert network.training
    assert network[0].weight.dtype == torch.float32
    assert network[0].weight.requires_grad


@pytest.mark.parametrize(
    "give",
    [
        lambda a, b: a + b,
        lambda a, b: (a + b,),
        lambda a, b: {"input": a + b},
    ],
)
def test_a_transform_makes_the_input(give):
    class Transform(nn.Module):
        def forward(self, a, *, b):
            return give(a, b)

    network = nn.Linear(2, 2)
    transform = Transform()
    teacher = Teacher(network, transform)
    with teacher.prepared():
        assert not transform.training
        output = teacher(call(X, b=X * 2))
    assert torch.equal(output, network(X * 3))
    assert transform.training


def test_a_teacher_that_writes_into_its_input_leaves_the_users_batch_alone():
    teacher = Teacher(nn.Sequential(nn.ReLU(inplace=True), nn.Identity()))
    with teacher.prepared():
        for _ in range(3):
            x = -X
            assert teacher(call(x)).sum() == 0
            assert torch.equal(x, -X)


def test_a_teacher_that_writes_from_the_second_step_on_is_refused():
    class Late(nn.Module):
        steps = 0

        def forward(self, x):
            self.steps += 1
            return x if self.steps == 1 else x.mul_(2)

    teacher = Teacher(Late())
    with teacher.prepared():
        teacher(call(X.clone()))
        with pytest.raises(RuntimeError, match="the teacher Late wrote into its input in this step and in none before"):
            teacher(call(X.clone()))


def test_a_failing_forward_names_the_shapes_and_the_arguments_that_may_help():
    teacher = Teacher(nn.Linear(5, 2))
    message = r"the teacher Linear failed on .*shapes \[\(3, 2\)\]\): RuntimeError: .*teacher_transform.*see student"
    with teacher.prepared(), pytest.raises(RuntimeError, match=message):
        teacher(call(X))
    with teacher.prepared(), pytest.raises(RuntimeError, match=r"TypeError: .*mask"):
        teacher(call(X, mask=X))


def test_what_cannot_be_called_is_refused():
    with pytest.raises(ValueError, match=r"teacher NoForward has no forward, .* the network inside it \(net\)"):
        Teacher(NoForward())
    with pytest.raises(ValueError, match="teacher ModuleList has no forward"):
        Teacher(nn.ModuleList())
    with pytest.raises(TypeError, match=r"teacher_transform must be a torch.nn.Module, got function"):
        Teacher(nn.Linear(2, 2), lambda x: x)
    patched = NoForward()
    patched.forward = lambda x: patched.net(x)
    assert Teacher(patched)(call(X)).shape == (3, 2)


# What its layers return


def test_watched_layers_are_recorded_in_the_same_forward():
    network = norm_network()
    teacher = Teacher(network)
    with teacher.prepared(), ExitStack() as stack:
        teacher.watch("1", stack, argument="pairs")
        teacher.watch("3", stack, argument="pairs")
        for factor in (1.0, 2.0):
            output = teacher(call(X * factor))
            assert sorted(teacher.layers) == ["1", "3"]
            [normed], [last] = teacher.layers["1"], teacher.layers["3"]
            assert last.output is output
            assert torch.equal(normed.output, network[1](network[0](X * factor)))
            assert not normed.output.requires_grad
    assert teacher.forwards == 2
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def test_a_layer_is_watched_once_however_many_ask_and_until_the_first_is_done():
    network = norm_network()
    teacher = Teacher(network)
    with teacher.prepared():
        with ExitStack() as first, ExitStack() as second:
            teacher.watch("0", first, argument="pairs")
            teacher.watch("0", second, argument="pairs")
            teacher(call(X))
            assert len(network[0]._forward_hooks) == 1
            assert len(teacher.layers["0"]) == 1
        assert teacher(call(X)).shape == (3, 2)
        assert teacher.layers == {}
        with ExitStack() as again:
            teacher.watch("0", again, argument="pairs")
            teacher(call(X))
            assert len(teacher.layers["0"]) == 1


def test_a_layer_may_run_twice_or_not_at_all():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.often, self.never, self.parts = nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU()

        def forward(self, x):
            return self.often(self.parts(self.often(x)))

    teacher = Teacher(Net())
    with teacher.prepared(), ExitStack() as stack:
        for name in ("often", "never", ""):
            teacher.watch(name, stack, argument="pairs")
        output = teacher(call(X))
        assert [len(teacher.layers[name]) for name in ("often", "never", "")] == [2, 0, 1]
        assert teacher.layers["often"][1].output is teacher.layers[""][0].output is output
    assert "forward" not in vars(teacher.module)


def test_a_layer_that_does_not_exist_is_refused():
    teacher = Teacher(nn.Sequential(nn.Linear(2, 2)))
    with ExitStack() as stack, pytest.raises(ValueError, match=r"pairs names '1', not a module of Sequential"):
        teacher.watch("1", stack, argument="pairs")
    with ExitStack() as stack:
        teacher.watch("0", stack, argument="pairs")
    assert not teacher.module[0]._forward_hooks


@pytest.mark.sample
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("in_place", [False, True])
def test_layers_of_a_compiled_teacher_that_ran_before_are_recorded(in_place):
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).eval()
    compiled = network if in_place else torch.compile(network, backend="eager")
    if in_place:
        network.compile(backend="eager")
    teacher = Teacher(compiled)
    with teacher.prepared(), ExitStack() as stack:
        teacher(call(X))
        teacher.watch("0", stack, argument="pairs")
        for _ in range(2):
            output = teacher(call(X))
            assert torch.equal(teacher.layers["0"][0].output.tanh(), output)


def test_a_failing_forward_is_no_record_of_the_next():
    teacher = Teacher(norm_network())
    with teacher.prepared(), ExitStack() as stack:
        teacher.watch("0", stack, argument="pairs")
        with pytest.raises(RuntimeError, match="the teacher Sequential failed"):
            teacher(call(torch.ones(3, 5)))
        teacher(call(X))
        assert [tuple(entry.output.shape) for entry in teacher.layers["0"]] == [(3, 4)]


# Gradients by its input


def test_a_loss_can_be_differentiated_by_what_it_was_given():
    network = nn.Linear(2, 1, bias=False)
    network.weight.data = torch.tensor([[1.0, -2.0]])
    teacher = Teacher(network)
    with teacher.prepared():
        for _ in range(3):  # the first input is copied
            given = X.clone().requires_grad_()
            output = teacher(call(given), gradients=True)
            [gradient] = torch.autograd.grad(output.square().sum(), [given])
            assert gradient.tolist() == [[-2.0, 4.0]] * 3  # 2 (x w) w, with x w = -1
            assert not teacher(call(given)).requires_grad
            assert not teacher(call(X), gradients=True).requires_grad  # nothing given carries a gradient
    assert network.weight.grad is None


def test_so_it_can_through_a_transform():
    class Double(nn.Module):
        def forward(self, x):
            return {"input": x * 2}

    network = nn.Linear(2, 2)
    teacher = Teacher(network, Double())
    with teacher.prepared(), ExitStack() as stack:
        teacher.watch("", stack, argument="pairs")
        given = X.clone().requires_grad_()
        [gradient] = torch.autograd.grad(teacher(call(given), gradients=True).sum(), [given])
        assert teacher.layers == {}  # nothing of this graph is held
    assert torch.allclose(gradient, 2 * network.weight.sum(dim=0).expand(3, 2))


# From a path


def test_a_module_is_built_from_what_yaml_can_say():
    spec = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2}, "dict_kwargs": {"out_features": 5}}
    assert build_module(spec, argument="teacher").out_features == 5
    assert isinstance(build_module("torch.nn.ReLU", argument="teacher"), nn.ReLU)
    assert isinstance(build_module({"class_path": "torch.nn.ReLU", "init_args": None}, argument="teacher"), nn.ReLU)
    network = nn.Linear(2, 2)
    assert build_module(network, argument="teacher") is network


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (nn.Linear, TypeError, r"teacher must be a module, got the class Linear; call it: Linear\(...\)"),
        (5, TypeError, "teacher must be a torch.nn.Module, or a class_path with init_args, got int: 5"),
        ({"init_args": {}}, TypeError, "got dict"),
        ({"class_path": "torch.nn.Linear", "init_arg": {}}, ValueError, "has the key 'init_arg'; .*mean 'init_args'"),
        ("Linear", ValueError, "names 'Linear', which is not a dotted path such as"),
        ("torch.nn.Linaer", ValueError, "'torch.nn' has no class or function 'Linaer'; did you mean 'Linear'"),
        ("torch.n.Linear", ValueError, "'torch.n' cannot be imported: ModuleNotFoundError.*did you mean 'torch.nn'"),
        ("toch.nn.Linear", ValueError, "'toch.nn' cannot be imported: .*did you mean 'torch"),
        ("torch.nn.functional", ValueError, "has no class or function 'functional'"),
        ("..Linear", ValueError, "cannot be imported"),
        (
            "torch.nn.Linear",
            ValueError,
            r"could not be built: torch.nn.Linear\(\*\*\{\}\) raised TypeError: .*in_features",
        ),
        ("torch.zeros", ValueError, "could not be built"),
        (
            {"class_path": "torch.ones", "init_args": {"size": [2]}},
            TypeError,
            "torch.ones returned Tensor, not a torch",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        build_module(source, argument="teacher")


def test_a_module_whose_import_fails_is_named(monkeypatch, tmp_path):
    (tmp_path / "broken_net.py").write_text("raise RuntimeError('half installed')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="'broken_net' cannot be imported: RuntimeError: half installed"):
        import_path("broken_net.Net", argument="teacher")


# From a checkpoint


@pytest.fixture
def mine(monkeypatch):
    """A package that YAML can name."""
    module = types.ModuleType("mine")
    module.Lit, module.Net, module.OneArgument = Lit, nn.Linear, OneArgument
    monkeypatch.setitem(sys.modules, "mine", module)


def saved(module: L.LightningModule, path, *callbacks) -> str:
    trainer = L.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(2, 2)))
    trainer.save_checkpoint(path)
    return str(path)


@pytest.mark.sample
def test_a_lightning_module_with_its_hyperparameters(tmp_path, mine):
    lit = Lit(7, bias=False)
    path = saved(lit, tmp_path / "t.ckpt")
    for class_path in (Lit, "mine.Lit"):
        teacher = teacher_from_checkpoint(class_path, path)
        assert isinstance(teacher, Lit)
        assert torch.equal(teacher.model.weight, lit.model.weight)
        assert teacher.model.bias is None
        assert not teacher.training
        network = teacher_from_checkpoint(class_path, path, submodule="model")
        assert isinstance(network, nn.Linear)
        assert torch.equal(network.weight, lit.model.weight)


def test_a_lightning_module_that_takes_all_hyperparameters_in_one_argument(tmp_path):
    path = saved(OneArgument({"width": 6}), tmp_path / "t.ckpt")
    assert teacher_from_checkpoint(OneArgument, path).model.out_features == 6


def test_a_lightning_module_that_leaves_weights_out_of_its_checkpoint(tmp_path):
    lit = Lit(7)
    path = saved(lit, tmp_path / "t.ckpt")
    contents = torch.load(path, weights_only=True)
    del contents["state_dict"]["model.bias"]
    torch.save(contents, path)
    with pytest.raises(ValueError, match=r"could not be built: [\s\S]*Missing key"):
        teacher_from_checkpoint(Lit, path)
    assert torch.equal(teacher_from_checkpoint(Lenient, path).model.weight, lit.model.weight)
    contents["state_dict"] = {"net.weight": lit.model.weight}
    torch.save(contents, path)
    with pytest.raises(ValueError, match="do not fit Lenient: it has none of their names"):
        teacher_from_checkpoint(Lenient, path)


class Lenient(Lit):
    """Says that it does so."""

    strict_loading = False


def test_a_plain_network_from_the_checkpoint_of_the_module_around_it(tmp_path):
    lit = Lit(7)
    path = saved(lit, tmp_path / "t.ckpt")
    arguments = {"in_features": 2, "out_features": 7}
    network = teacher_from_checkpoint(nn.Linear, path, init_args=arguments, submodule="model")
    assert torch.equal(network.weight, lit.model.weight)
    with pytest.raises(ValueError, match=r"submodule names 'modle', .*holds no weights below it; did you mean 'model'"):
        teacher_from_checkpoint(nn.Linear, path, init_args=arguments, submodule="modle")


class SelfCompiling(Lit):
    """Compiles its network itself."""

    def __init__(self, width: int = 2, *, bias: bool = True) -> None:
        super().__init__(width, bias=bias)
        self.model = torch.compile(self.model, backend="eager")


@pytest.mark.parametrize("kind", ["plain", "masked", "quantised"])
@pytest.mark.parametrize("cls", [Lit, SelfCompiling])
@pytest.mark.sample
def test_a_checkpoint_of_a_compiled_network(tmp_path, kind, cls):
    callbacks = {
        "masked": [lightning_compress.PruningCallback(0.5, schedule="one_shot")],
        "quantised": [lightning_compress.QATCallback(layers=None)],
    }
    lit = cls(8, bias=False)
    if cls is Lit:
        lit.model = torch.compile(lit.model, backend="eager")
    path = saved(lit, tmp_path / "t.ckpt", *callbacks.get(kind, []))
    [(name, weight)] = torch.load(path, weights_only=True)["state_dict"].items()
    assert name == "model._orig_mod.weight"
    assert kind != "masked" or weight.eq(0).float().mean() == 0.5
    loaded = teacher_from_checkpoint(cls, path)
    assert type(loaded) is cls
    assert torch.equal(loaded.model.weight, weight)
    network = teacher_from_checkpoint(
        nn.Linear, path, init_args={"in_features": 2, "out_features": 8, "bias": False}, submodule="model"
    )
    assert torch.equal(network.weight, weight)


def test_a_file_of_plain_weights(tmp_path):
    network = norm_network()
    torch.save(network.state_dict(), tmp_path / "w.pt")
    module = types.SimpleNamespace(make=norm_network)
    teacher = teacher_from_checkpoint(module.make, tmp_path / "w.pt")
    assert torch.equal(teacher[3].weight, network[3].weight)
    assert not teacher[1].training
    assert isinstance(teacher_from_checkpoint(module.make, tmp_path / "w.pt", submodule="1"), nn.BatchNorm1d)
    torch.save(Lit(3).state_dict(), tmp_path / "lit.pt")
    assert teacher_from_checkpoint(Lit, tmp_path / "lit.pt", init_args={"width": 3}).model.out_features == 3


def test_what_needs_unpickling_is_refused_unless_it_is_asked_for(tmp_path):
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "args": argparse.Namespace(a=1)}, tmp_path / "w.pt")
    arguments = {"in_features": 2, "out_features": 2}
    with pytest.raises(ValueError, match=r"w.pt' holds objects other than tensors, .*weights_only=False un"):
        teacher_from_checkpoint(nn.Linear, tmp_path / "w.pt", init_args=arguments)
    teacher = teacher_from_checkpoint(nn.Linear, tmp_path / "w.pt", init_args=arguments, weights_only=False)
    assert teacher.weight.shape == (2, 2)


@pytest.mark.sample
def test_a_checkpoint_whose_hyperparameters_need_unpickling(tmp_path):
    lit = Lit(4)
    path = saved(lit, tmp_path / "t.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"] = {"theirs": argparse.Namespace(a=1)}
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="weights_only=False"):
        teacher_from_checkpoint(Lit, path)
    assert torch.equal(teacher_from_checkpoint(Lit, path, weights_only=False).model.weight, lit.model.weight)


@pytest.mark.parametrize(
    ("content", "class_path", "init_args", "error", "message"),
    [
        (None, nn.ReLU, {}, FileNotFoundError, r"ckpt_path: there is no file .*w\.pt"),
        (b"nonsense", nn.ReLU, {}, ValueError, r"ckpt_path .*w\.pt. is not a file that torch\.load can read"),
        (torch.ones(2), nn.ReLU, {}, ValueError, "holds a Tensor, not a checkpoint"),
        ({"wrong": torch.ones(2)}, nn.ReLU, {}, ValueError, r"the weights in .*w\.pt do not fit ReLU: .*\s.*wrong"),
        ({}, nn.Linear, {}, ValueError, "class_path could not be built: torch.nn.modules.linear.Linear.*in_features"),
        (
            {},
            nn.Linear,
            {"in_feature": 2},
            ValueError,
            "init_args has 'in_feature', which .*did you mean 'in_features'",
        ),
        ({}, "torch.nn.Linaer", {}, ValueError, "class_path names 'torch.nn.Linaer', .*did you mean 'Linear'"),
        ({}, Lit, {"widht": 2}, ValueError, "init_args has 'widht', which .*did you mean 'width'"),
        (
            {"state_dict": Lit(2).state_dict(), **VERSION},
            Lit,
            {"width": 3},
            ValueError,
            r"could not be built: [\s\S]*size mismatch[\s\S]*What .*w\.pt does not hold goes into init_args",
        ),
        (
            {"state_dict": Lit(2).state_dict(), "hyper_parameters": {"width": 2}, **VERSION},
            Lit,
            {"width": 3},
            ValueError,
            r"could not be built: [\s\S]*size mismatch[\s\S]*; it was saved with width=2, which they overrule",
        ),
        (
            nn.Sequential(*(nn.Linear(2, 2) for _ in range(40))).state_dict(),
            Lit,
            {"width": 3},
            ValueError,
            r"the weights in .*w\.pt do not fit Lit: .*\n.*Missing key.*\n\s*Unexpected key.{130,140} \.\.\.$",
        ),
        (
            {"state_dict": {}, **VERSION},
            OneArgument,
            {},
            ValueError,
            "could not be built.*does not hold goes into init_args",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused(tmp_path, content, class_path, init_args, error, message):
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(error, match=message):
        teacher_from_checkpoint(class_path, path, init_args=init_args)


def test_from_yaml_through_build_module(tmp_path, mine):
    lit = Lit(5)
    path = saved(lit, tmp_path / "t.ckpt")
    spec = {
        "class_path": "lightning_compress.teacher_from_checkpoint",
        "init_args": {"class_path": "mine.Lit", "ckpt_path": path, "submodule": "model"},
    }
    assert torch.equal(build_module(spec, argument="teacher").weight, lit.model.weight)
    assert lightning_compress.teacher_from_checkpoint is teacher_from_checkpoint
    spec["init_args"]["ckpt_path"] = "gone.ckpt"
    with pytest.raises(ValueError, match=r"teacher could not be built: .* FileNotFoundError: .*no file gone\.ckpt"):
        build_module(spec, argument="teacher")
