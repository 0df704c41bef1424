from __future__ import annotations

import functools
import threading

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.profilers.pytorch import RegisterRecordFunction
from torch import nn

from lightning_compress.export.copying import independent_copy
from lightning_compress.export.errors import ExportError

from .networks import NAMESPACES, Conv, datamodule, dataset, lightning_module, loader, mlp, trainer


def test_copy_shares_no_tensor_and_keeps_flags():
    network = Conv()
    network.history = {"losses": [network.conv.weight.sum() * 2]}
    network.norm.eval()
    duplicate = independent_copy(network)
    with torch.no_grad():
        for tensor in [*duplicate.parameters(), *duplicate.buffers()]:
            tensor.add_(1)
    assert all(
        not torch.equal(mine, theirs) for mine, theirs in zip(duplicate.parameters(), network.parameters(), strict=True)
    )
    assert torch.equal(duplicate.last, network.last)
    assert network.last.grad_fn is not None
    assert duplicate.last.grad_fn is None
    assert duplicate.history["losses"][0].grad_fn is None
    assert [part.training for part in duplicate.modules()] == [part.training for part in network.modules()]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_data_and_trainer_are_shared(namespace):
    module = lightning_module(namespace)
    module.rows, module.loaders, module.data = dataset(), [loader()], datamodule(namespace)
    module.owner = trainer(namespace)
    module.trainer = module.owner
    duplicate = independent_copy(module)
    assert duplicate.rows is module.rows
    assert duplicate.loaders[0] is module.loaders[0]
    assert duplicate.data is module.data
    assert duplicate.owner is module.owner
    assert duplicate._trainer is None
    assert module.trainer is module.owner


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_data_that_holds_the_module_holds_the_copy_in_the_copy(namespace):
    """As a task does that gives the data, and runs the step of the module that it belongs to."""
    module, data = lightning_module(namespace), datamodule(namespace)
    module.data, data.model, data.kept = data, module, []
    duplicate = independent_copy(module)
    assert (data.model, duplicate.data.model) == (module, duplicate)
    assert duplicate.data.kept is data.kept


def test_a_part_that_is_a_callback_too_is_copied():
    class Normaliser(nn.Module, L.Callback):
        """As preprocessing is that a module gives its Trainer."""

    network = mlp()
    network.add_module("normaliser", Normaliser())
    duplicate = independent_copy(network).eval()
    assert duplicate.normaliser is not network.normaliser
    assert network.normaliser.training


def test_our_hooks_are_absent_and_the_users_are_there():
    network, seen = mlp(), []

    class Recorder:
        _lightning_compress = True

        def __init__(self):
            self.lock = threading.Lock()  # would make the copy fail if it were copied

        def __call__(self, *arguments):
            seen.append("ours")

    network.register_forward_hook(lambda *arguments: seen.append("user"))
    network.register_forward_hook(Recorder(), always_call=True)
    network[0].register_forward_pre_hook(Recorder(), with_kwargs=True)
    duplicate = independent_copy(network)
    duplicate(torch.ones(2, 6))
    assert seen == ["user"]
    assert not duplicate._forward_hooks_always_called
    assert not duplicate[0]._forward_pre_hooks_with_kwargs
    network(torch.ones(2, 6))
    assert seen == ["user", "ours", "user", "ours"]


def test_our_step_wrapper_gives_way_to_what_was_there():
    module = lightning_module("lightning.pytorch")

    def wrapper(*arguments):
        return "wrapped"

    wrapper._lightning_compress = True
    wrapper._lightning_compress_original_entry = None
    module.__dict__["training_step"] = wrapper
    own_entry = functools.partial(wrapper)
    own_entry._lightning_compress = True
    own_entry._lightning_compress_original_entry = module.validation_step
    module.__dict__["validation_step"] = own_entry
    module.__dict__["test_step"] = len  # the user's own
    duplicate = independent_copy(module)
    assert "training_step" not in vars(duplicate)
    assert duplicate.validation_step.__self__ is duplicate
    assert duplicate.validation_step.__func__ is type(module).validation_step
    assert duplicate.test_step is len
    assert module.training_step() == "wrapped"


@pytest.mark.parametrize("how", ["wrapped child", "compiled child", "lightning"])
def test_the_copy_is_not_compiled(how):
    from lightning.pytorch.utilities.compile import from_compiled

    module = lightning_module("lightning.pytorch", "itself")
    keys = list(module.state_dict())
    if how == "wrapped child":
        module.model = torch.compile(module.model, backend="eager")
    elif how == "compiled child":
        module.compile(backend="eager")
    else:
        module = from_compiled(torch.compile(module, backend="eager"))
    duplicate = independent_copy(module).eval()
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    assert list(duplicate.state_dict()) == keys
    assert duplicate(torch.ones(2, 6)).abs().max() == 0  # compiled code would still use the original's weights
    assert duplicate.validation_step.__self__ is duplicate
    assert not any(isinstance(part, torch._dynamo.OptimizedModule) for part in duplicate.modules())


def test_tied_and_hidden_modules():
    network = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    network["b"].weight = network["a"].weight
    hidden = nn.Linear(2, 2)
    hidden.last = hidden(torch.ones(1, 2))
    network.hidden = [hidden]
    network.hidden.append(network.hidden)  # a list that holds itself
    duplicate = independent_copy(network)
    assert duplicate["a"].weight is duplicate["b"].weight
    assert duplicate["a"].weight is not network["a"].weight
    assert duplicate.hidden[0].last.grad_fn is None
    assert duplicate.hidden[1] is duplicate.hidden


def test_what_cannot_be_copied_is_named():
    network = mlp()
    network[2].guard = {"lock": threading.Lock()}
    with pytest.raises(
        ExportError, match=r"Sequential cannot be copied because of its attribute '2\.guard': TypeError"
    ):
        independent_copy(network)


def test_a_hook_that_closes_over_the_module_belongs_to_the_copy():
    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen, self.calls = nn.Linear(2, 1), None, 0

            def keep(module, args, output, owner=self):
                self.seen = output
                owner.calls += 1

            self.layer.register_forward_hook(keep)
            self.twice = lambda x: self.layer(self.layer.weight + x)

        def forward(self, x):
            return self.layer(x)

    module = Remembering()
    duplicate = independent_copy(module)
    duplicate(torch.ones(3, 2))
    assert (module.seen, module.calls) == (None, 0)
    assert (tuple(duplicate.seen.shape), duplicate.calls) == ((3, 1), 1)
    with torch.no_grad():
        duplicate.layer.weight.zero_()
        duplicate.layer.bias.fill_(7.0)
    assert duplicate.twice(torch.ones(1, 2)).item() == 7
    assert module.twice(torch.ones(1, 2)).item() != 7


def test_a_module_that_cannot_be_put_back_wholly_is_never_emptied(tmp_path):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lightning_compress.mechanisms.isolation import module_kept

    module = nn.Linear(2, 1)
    with FakeTensorMode():
        module.seen = torch.ones(2)
    names = set(vars(module))
    with module_kept(module):
        module.added = 1
    assert set(vars(module)) == names
    assert module(torch.ones(1, 2)).shape == (1, 1)


def test_the_hooks_of_a_profiler_stay_where_they_are():
    network = nn.Sequential(nn.Linear(2, 2))
    with RegisterRecordFunction(network):
        duplicate = independent_copy(network)
        assert len(network[0]._forward_hooks) == 1
        network(torch.zeros(1, 2))  # which holds what cannot be copied from now on
        again = independent_copy(network)
    assert not any(
        table for copied in (duplicate[0], again[0]) for table in (copied._forward_hooks, copied._forward_pre_hooks)
    )
