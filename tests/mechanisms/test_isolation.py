"""Work that leaves no trace: what is put back, to the object and to the bit, and what is not looked into."""

# ruff: noqa: PT012 -- the work is to fail inside of the context
from __future__ import annotations

import logging
import random
import sys
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.mechanisms.isolation import (
    RandomState,
    attributes_kept,
    device_of,
    drawn_from,
    evaluating,
    generator_restorer,
    module_kept,
    quiet,
    random_state_kept,
)


def drawn() -> tuple[float, float, float]:
    return torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002


# Random states


def test_random_states_are_put_back():
    state = RandomState()
    first = drawn()
    assert drawn() != first
    for _ in range(2):
        state.restore()
        assert drawn() == first


def test_random_states_are_put_back_after_an_error():
    state = RandomState()
    first = drawn()
    state.restore()
    with pytest.raises(OSError, match="gone"), random_state_kept():
        drawn()
        raise OSError("gone")
    assert drawn() == first


@pytest.mark.parametrize("device", [None, torch.device("cpu"), torch.device("meta")])
def test_devices_without_a_state_of_their_own_are_taken(device):
    state = RandomState(device)
    first = drawn()
    state.restore()
    assert drawn() == first


@pytest.mark.parametrize(("kind", "named"), [("cuda", True), ("xpu", True), ("mps", False)])
def test_the_state_of_an_accelerator_is_put_back(monkeypatch, kind, named):
    """Of "mps" there is one, whose functions take no device; a device of other kinds is named to them."""
    states, asked = {"now": 1}, []

    def get(*device):
        asked.append(device)
        return states["now"]

    def put(state, *device):
        asked.append(device)
        states["now"] = state

    module = SimpleNamespace(get_rng_state=get, set_rng_state=put)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    device = torch.device(kind, 0)
    with random_state_kept(device):
        states["now"] = 2
    assert states["now"] == 1
    assert asked == ([(device,)] * 2 if named else [(), ()])


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: torch.Generator().manual_seed(1), lambda own: torch.rand(1, generator=own).item()),
        (lambda: np.random.default_rng(1), lambda own: own.random()),
        (lambda: np.random.Generator(np.random.MT19937(1)), lambda own: own.random()),
        (lambda: np.random.RandomState(1), lambda own: own.rand()),
        (lambda: random.Random(1), lambda own: own.random()),
        (lambda: random.Random(1), lambda own: own.gauss(0, 1)),
    ],
)
def test_a_generator_goes_back(make, draw):
    own = make()
    draw(own)
    restore = generator_restorer(own)
    first = [draw(own) for _ in range(3)]
    for _ in range(2):
        restore()
        assert [draw(own) for _ in range(3)] == first


@pytest.mark.parametrize("value", [None, 3, torch.ones(1), np.random, random, random.SystemRandom(), [random.Random()]])
def test_what_has_no_state_to_go_back_to(value):
    assert generator_restorer(value) is None


def test_numbers_drawn_from_a_seed_leave_the_global_ones_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda *_: pytest.fail("the devices' states are the user's"))
    state = RandomState()
    first = drawn()
    state.restore()
    with torch.inference_mode(), drawn_from(3):
        ours = nn.Linear(2, 2)
    assert drawn() == first
    with drawn_from(3):
        again = nn.Linear(2, 2)
    with drawn_from(4):
        other = nn.Linear(2, 2)
    assert torch.equal(ours.weight, again.weight)
    assert not torch.equal(ours.weight, other.weight)
    ours(torch.ones(1, 2)).sum().backward()  # made for training, in spite of the inference mode around it
    assert ours.weight.grad.tolist() == [[1.0, 1.0]] * 2


def test_the_device_of_a_module_is_that_of_its_first_parameter():
    assert device_of(nn.Linear(1, 1, device="meta")) == torch.device("meta")
    assert device_of(nn.Sequential(nn.ReLU(), nn.Linear(1, 1))) == torch.device("cpu")
    assert device_of(nn.BatchNorm1d(2, affine=False)) is None
    assert device_of(nn.ReLU()) is None


# Output


def test_quiet_silences_and_gives_back(capsys):
    name = "lightning_compress_test_isolation"
    logger, messages = logging.getLogger(f"{name}.below"), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    logging.getLogger(name).setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(OSError, match="gone"), quiet([name]):
                print("hidden")
                print("hidden", file=sys.stderr)
                warnings.warn("hidden", stacklevel=1)
                logger.critical("hidden")
                raise OSError("gone")
            with quiet([name], streams=False):
                print("shown")
                logger.critical("hidden")
            warnings.warn("shown", stacklevel=1)
        logger.info("shown")
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr() == ("shown\n", "")
    assert [str(warning.message) for warning in caught] == ["shown"]
    assert messages == ["shown"]
    assert logging.getLogger(name).level == logging.INFO


def test_evaluating_puts_each_flag_back():
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2)))
    network[1].eval()
    network[1][1].train()
    flags = [module.training for module in network.modules()]
    with pytest.raises(OSError, match="gone"), evaluating(network):
        assert not any(module.training for module in network.modules())
        assert not torch.is_grad_enabled()
        network.train()
        raise OSError("gone")
    assert [module.training for module in network.modules()] == flags == [True, True, False, False, True]
    assert torch.is_grad_enabled()


# Attributes of plain objects


def test_attributes_are_put_back_with_what_is_in_their_containers():
    inner, generator = [1], random.Random(0)
    owner = SimpleNamespace(a=1, gone=2, order=[3, inner], table={"x": 1}, some={1}, last=deque([1], 2), own=generator)
    objects = dict(vars(owner))
    expected = random.Random(0).random()
    with attributes_kept(owner):
        owner.a, owner.new = 5, 6
        del owner.gone
        owner.order.clear()
        owner.table["y"] = 2
        owner.some = {9}
        owner.last.extend([2, 3])
        inner.append(2)
        generator.random()
    assert vars(owner).keys() == objects.keys()
    assert all(vars(owner)[name] is value for name, value in objects.items())
    assert (owner.a, owner.gone, owner.table, owner.some, owner.last) == (1, 2, {"x": 1}, {1}, deque([1]))
    assert (owner.last.maxlen, owner.own.random()) == (2, expected)
    assert owner.order == [3, [1, 2]]  # what is further inside counts only if asked for
    assert owner.order[1] is inner


def test_whole_attributes_are_put_back_at_every_depth_except_for_data():
    owner = SimpleNamespace(order=[[1], torch.zeros(2)], array=np.zeros(2), data=[[1], torch.zeros(2)])
    with attributes_kept(owner, whole=True, data=("data",)):
        for name in ("order", "data"):
            entries = getattr(owner, name)
            entries[0].append(2)
            entries[1] += 1
            entries.append(3)
        owner.array += 1
    assert (owner.order[0], owner.order[1].tolist(), len(owner.order)) == ([1], [0.0, 0.0], 2)
    assert (owner.data[0], owner.data[1].tolist(), len(owner.data)) == ([1, 2], [1.0, 1.0], 2)
    assert owner.array.tolist() == [0.0, 0.0]


def test_a_list_that_is_met_deeper_first_is_put_back_too():
    shared = [1]
    owner = SimpleNamespace(rows=[shared], current=shared)
    with attributes_kept(owner):
        shared.append(2)
    assert owner.rows == [[1]]
    assert owner.current is shared


def test_long_lists_are_put_back_but_not_looked_into():
    rows = [[index] for index in range(10_001)]
    owner = SimpleNamespace(rows=rows)
    with attributes_kept(owner, whole=True):
        rows[0].append(1)
        rows.reverse()
        rows.pop()
    assert owner.rows is rows
    assert [row[0] for row in rows] == list(range(10_001))
    assert rows[0] == [0, 1]


# Modules


class Holder(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("make", "write"),
    [
        (lambda: [1, [2, {"a": 3}]], lambda held: (held[1][1].update(a=9), held[1].append(1), held.insert(0, 0))),
        (lambda: {"a": {"b": [1]}}, lambda held: (held["a"]["b"].append(2), held.update(c=1))),
        (lambda: OrderedDict(a=1, b=2), lambda held: held.move_to_end("a")),
        (lambda: defaultdict(list, a=[1]), lambda held: (held["new"], held["a"].append(1))),
        (lambda: Counter(a=2), lambda held: held.update("ab")),
        (lambda: {1, 2}, lambda held: held.add(3)),
        (lambda: deque([1, 2], maxlen=2), lambda held: held.append(3)),
    ],
)
def test_containers_are_put_back_in_place(make, write):
    held, expected = make(), make()
    module = Holder(held=held)
    with module_kept(module):
        write(module.held)
        assert held != expected or list(held) != list(expected)
        module.held = None
    assert module.held is held
    assert held == expected
    assert list(held) == list(expected)
    assert type(held) is type(expected)


def test_tensors_are_put_back_to_the_bit():
    module = Holder(plain=torch.tensor([1.0, float("nan")]), inside=[torch.zeros(2)], grown=torch.zeros(2))
    module.register_buffer("count", torch.tensor(3))
    objects = {"weight": module.layer.weight, "plain": module.plain, "count": module.count, "inside": module.inside[0]}
    places = {name: tensor.data_ptr() for name, tensor in objects.items()}
    before = {name: tensor.detach().numpy().tobytes() for name, tensor in objects.items()}
    with module_kept(module), torch.no_grad():
        module.layer.weight.zero_()
        module.layer.weight.data = torch.ones(1, 2)
        module.layer.weight = nn.Parameter(torch.ones(1, 2))
        module.plain += 1
        module.count = module.count + 1
        module.inside[0].fill_(5)
        module.grown.resize_(7)
        module.other = nn.Linear(1, 1)
    after = {"weight": module.layer.weight, "plain": module.plain, "count": module.count, "inside": module.inside[0]}
    assert all(after[name] is tensor for name, tensor in objects.items())
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == places
    assert {name: tensor.detach().numpy().tobytes() for name, tensor in after.items()} == before
    assert "other" not in dict(module.named_modules())


def test_a_tensor_that_is_expanded_over_many_places_is_put_back():
    layer, numbers = nn.Linear(1, 1), torch.arange(3.0)
    layer.seen = numbers[:, None].expand(3, 4)
    with module_kept(layer):
        numbers += 1
    assert layer.seen.tolist() == [[0.0] * 4, [1.0] * 4, [2.0] * 4]
    assert layer.seen.stride() == (1, 0)


def test_a_tensor_that_carries_a_graph_is_kept_as_it_is():
    module = Holder()
    module.seen = module.layer(torch.ones(1, 2))
    seen, value = module.seen, module.seen.item()
    with module_kept(module):
        module.seen = None
    assert module.seen is seen
    assert (seen.item(), seen.requires_grad) == (value, True)


@pytest.mark.parametrize("parameters", [True, False])
def test_what_is_trained_stays_what_it_was(parameters):
    """A step with several optimizers sets parameters aside, and may be stopped before it takes them back."""
    module = Holder()
    module.layer.bias.requires_grad_(False)
    with module_kept(module, parameters=parameters):
        module.layer.weight.requires_grad_(False)
        module.layer.bias.requires_grad_(True)
    assert (module.layer.weight.requires_grad, module.layer.bias.requires_grad) == (True, False)


def test_parameters_can_be_left_out():
    module = nn.BatchNorm1d(2)
    with module_kept(module, parameters=False), torch.no_grad():
        module.weight.fill_(7)
        module.running_mean.fill_(7)
        module.extra = 1
    assert module.weight.tolist() == [7.0, 7.0]
    assert module.running_mean.tolist() == [0.0, 0.0]
    assert not hasattr(module, "extra")


def test_generators_and_arrays_are_put_back():
    module = Holder(own=torch.Generator().manual_seed(1), numpy=np.random.default_rng(1), table=np.zeros(2))
    module.fixed = np.zeros(2)
    module.fixed.flags.writeable = False
    table = module.table

    def draw():
        return torch.rand(1, generator=module.own).item(), module.numpy.random()

    with module_kept(module):
        first = draw()
        module.table += 1
    assert draw() == first
    assert module.table is table
    assert table.tolist() == [0.0, 0.0]


class Meter:
    """A plain object of the user's, which knows another and is known by it."""

    def __init__(self):
        self.total, self.values, self.kept = 0, [], torch.zeros(2)
        self.other = SimpleNamespace(back=self, count={"a": 1})


def test_plain_objects_of_the_users_are_put_back():
    module = Holder(meter=Meter(), meters={"in": [Meter()]})
    meters = [module.meter, module.meters["in"][0]]
    with module_kept(module):
        for meter in meters:
            meter.total += 1
            meter.values.append(1)
            meter.kept += 1
            meter.other.count["a"] += 1
            meter.new = 1
        module.meter = None
    assert module.meter is meters[0]
    for meter in meters:
        assert (meter.total, meter.values, meter.kept.tolist(), meter.other.count) == (0, [], [0.0, 0.0], {"a": 1})
        assert not hasattr(meter, "new")
        assert meter.other.back is meter


class Records(torch.utils.data.Dataset):
    def __init__(self):
        self.seen = []


def test_modules_that_are_no_children_are_put_back():
    listed, held = nn.Sequential(nn.BatchNorm1d(2)), nn.BatchNorm1d(2)
    module = Holder(hidden=[listed], meter=Meter())
    module.meter.average = held
    with module_kept(module):
        for norm in (listed[0], held):
            norm(torch.rand(4, 2))
            norm.train(False)
        with torch.no_grad():
            held.weight.zero_()
        listed.append(nn.ReLU())
    assert len(listed) == 1
    assert held.weight.tolist() == [1.0, 1.0]
    for norm in (listed[0], held):
        assert (norm.num_batches_tracked.item(), norm.running_mean.tolist(), norm.training) == (0, [0.0, 0.0], True)


def test_what_a_tuple_holds_is_put_back():
    inner, kept, fixed = [1], torch.zeros(2), (1, "a")
    module = Holder(pair=(inner, kept, ({"a": 1},)), fixed=fixed)
    pair = module.pair
    with module_kept(module):
        inner.append(2)
        kept += 1
        pair[2][0]["a"] = 2
        module.pair = ()
    assert module.pair is pair
    assert (inner, kept.tolist(), pair[2]) == ([1], [0.0, 0.0], ({"a": 1},))
    assert module.fixed is fixed


def test_what_is_no_plain_object_of_the_users_is_only_kept():
    """Data may be large, and what libraries hold is not looked into."""
    records, handler = Records(), logging.NullHandler()
    module = Holder(data=records, handler=handler, kind=Meter, tools=random)
    with module_kept(module):
        records.seen.append(1)
        handler.level = 7
        Meter.shared = 1
        module.data = module.handler = None
    assert (module.data, module.handler) == (records, handler)
    assert (records.seen, handler.level) == ([1], 7)
    assert Meter.shared == 1
    del Meter.shared


def test_hooks_flags_and_children_are_put_back():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    module[1].eval()
    keep = module.register_forward_hook(lambda *_: None)
    child = module[0]
    with module_kept(module):
        keep.remove()
        module[0].register_forward_pre_hook(lambda *_: None)
        module.train()
        module[0] = nn.Linear(2, 3)
        module.append(nn.ReLU())
    assert len(module) == 2
    assert module[0] is child
    assert len(module._forward_hooks) == 1
    assert not child._forward_pre_hooks
    assert (module.training, module[1].training) == (True, False)


def test_a_module_is_put_back_after_an_error():
    module = Holder(seen=[])
    with pytest.raises(OSError, match="gone"), module_kept(module):
        module.seen.append(1)
        raise OSError("gone")
    assert module.seen == []


def test_a_module_that_is_cast_comes_back():
    module = Holder()
    weight = module.layer.weight
    with module_kept(module):
        module.to(torch.bfloat16)
        assert module.layer.weight.dtype == torch.bfloat16
    assert module.layer.weight is weight
    assert weight.dtype == torch.float32
