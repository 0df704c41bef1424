"""Loaders that are read without a trace: each part on its own, what it remembers, and what is refused."""

# ruff: noqa: PT012 -- the work is to fail inside of the context
from __future__ import annotations

import gc
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from contract.modules import Batches, StatefulLoader
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
)

from lightning_compress.mechanisms.loaders import data_kept, independent_loaders


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(loader) -> list:
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in loader]


class Counting(Dataset):
    """Remembers in every way."""

    def __init__(self):
        self.count, self.seen, self.cache, self.known = 0, [], {}, {0}
        self.table = np.zeros(8)
        self.generators = (seeded(1), np.random.default_rng(1), np.random.RandomState(1), random.Random(1))
        self.torch, self.numpy, self.legacy, self.python = self.generators

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.count += 1
        self.seen.append(index)
        self.cache[index] = self.count
        self.known.add(index)
        drawn = (self.torch.initial_seed(), torch.rand(1, generator=self.torch).item(), self.numpy.random())
        return index + sum(drawn) + self.legacy.rand() + self.python.random()


# Copies


def test_copies_are_other_loaders_on_the_same_data():
    loader = DataLoader(range(8), batch_size=2)
    with independent_loaders([loader, loader]) as [first, second]:
        assert first is not loader
        assert first is not second
        assert first.dataset is loader.dataset
        assert first.batch_sampler is loader.batch_sampler
        assert values(first) == values(second) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_one_loader_can_be_read_while_its_copy_is():
    loader = DataLoader(range(4))
    with independent_loaders([loader]) as [copied]:
        ours, theirs = iter(loader), iter(copied)
        seen = [next(ours).item(), next(theirs).item(), next(theirs).item(), next(ours).item()]
    assert seen == [0, 0, 1, 1]
    assert next(ours).item() == 2


def test_a_stateful_loader_goes_on_where_it_was():
    loader = StatefulLoader(range(8), batch_size=2)
    running = iter(loader)
    assert [next(running).tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    before = loader.state_dict()
    with independent_loaders([loader]) as [copied]:
        assert values(copied) == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert copied.state_dict() == {"position": 0}
        assert loader.state_dict() == before
    assert loader.state_dict() == before == {"position": 2}
    assert next(running).tolist() == [4, 5]


def test_a_loader_that_is_to_be_resumed_still_is():
    loader = StatefulLoader(range(8), batch_size=2)
    loader.load_state_dict({"position": 3})
    with independent_loaders([loader]) as [copied]:
        assert values(copied) == [[6, 7]]
        assert len(values(copied)) == 4
    assert values(loader) == [[6, 7]]


@pytest.mark.slow
def test_persistent_workers_are_left_alone():
    loader = DataLoader(Batches(16), batch_size=4, num_workers=1, persistent_workers=True)
    running = iter(loader)
    first = next(running)[0]
    worker = loader._iterator._workers[0]
    with independent_loaders([loader]) as [copied]:
        assert copied._iterator is None
        assert torch.equal(next(iter(copied))[0], first)
        others = copied._iterator._workers
        assert others[0].pid != worker.pid
    assert loader._iterator is running
    assert worker.is_alive()
    assert len(list(running)) == 3
    del copied
    gc.collect()
    assert not any(other.is_alive() for other in others)


def test_what_is_no_loader_is_copied_as_well():
    class Batched:
        def __init__(self):
            self.epochs = 0

        def __iter__(self):
            self.epochs += 1
            return iter([1, 2, 3])

    batched = Batched()
    with independent_loaders([batched, [4, 5]]) as [first, second]:
        assert (list(first), list(first), list(second)) == ([1, 2, 3], [1, 2, 3], [4, 5])
        assert (first.epochs, batched.epochs) == (2, 0)


@pytest.mark.parametrize("make", [lambda: (n for n in range(3)), lambda: iter([1, 2]), lambda: iter(DataLoader([1]))])
def test_what_can_be_read_once_only_is_refused(make):
    once = make()
    name = type(once).__name__
    message = f"the training data is a {name}, which can be read only once, .*; give data that starts anew each time"
    with pytest.raises(ValueError, match=message), independent_loaders([DataLoader([1]), once]):
        pass
    assert next(iter(once)) in (0, 1)  # nothing was taken from it


class HandsOut(IterableDataset):
    """Gives the same iterator each time."""

    def __init__(self):
        self.asked, self.iterator = 0, iter(range(3))

    def __iter__(self):
        self.asked += 1
        return self.iterator


def test_a_stream_that_goes_on_where_it_was_is_refused_and_left_as_it_was():
    stream = HandsOut()
    message = "the training data is a HandsOut, which can be read only once"
    with pytest.raises(ValueError, match=message), independent_loaders([DataLoader(stream)]):
        pass
    assert (stream.asked, list(stream)) == (0, [0, 1, 2])


# What is put back


def test_everything_a_dataset_remembers_is_put_back():
    dataset = Counting()
    objects = dict(vars(dataset))
    once = values(DataLoader(Counting()))
    loader = DataLoader(dataset)
    for _ in range(3):
        with independent_loaders([loader]) as [copied]:
            assert values(copied) == once
            assert dataset.count == 8
            dataset.added = 1
    assert vars(dataset).keys() == objects.keys()
    assert all(vars(dataset)[name] is value for name, value in objects.items())
    assert (dataset.count, dataset.seen, dataset.cache, dataset.known) == (0, [], {}, {0})
    assert values(loader) == once


@pytest.mark.parametrize(
    "make",
    [
        lambda data: DataLoader(data, shuffle=True, generator=seeded()),
        lambda data: DataLoader(data, sampler=RandomSampler(data, generator=seeded())),
        lambda data: DataLoader(data, sampler=WeightedRandomSampler([1.0] * 8, 8, generator=seeded())),
        lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data, generator=seeded()), 2, False)),
        lambda data: DataLoader(Subset(data, [3, 1, 2])),
        lambda data: DataLoader(ConcatDataset([data, Counting()])),
        lambda data: DataLoader(ConcatDataset([Subset(data, [3, 1]), Subset(Counting(), [5])])),
    ],
)
def test_what_hangs_on_a_loader_is_put_back(make):
    loader = make(Counting())
    with independent_loaders([loader]) as [copied]:
        first = values(copied)
        assert values(copied) != first  # all generators have moved on
    with independent_loaders([loader]) as [copied]:
        assert values(copied) == first
    assert values(loader) == first


class Jitter:
    """Adds noise from a generator of its own."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __call__(self, value):
        return np.add(value, self.generator.random())


class Around(Dataset):
    """Changes what another dataset gives, which it keeps under a name of its own."""

    def __init__(self, inner, transform):
        self.inner, self.transform = inner, transform

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return self.transform(self.inner[index])


def test_datasets_inside_of_others_and_transforms_are_put_back():
    transform = torchvision.transforms.Compose([Jitter(), Jitter()])
    loader = DataLoader(Around(Around(Counting(), Jitter()), transform), collate_fn=Jitter())
    with independent_loaders([loader]) as [copied]:
        first, second = list(copied), list(copied)
    assert np.array_equal(list(loader), first)
    assert not np.array_equal(first, second)


class InPlace:
    """Shuffles what it holds, at every depth."""

    def __init__(self):
        self.buckets = [[0, 1, 2], [3, 4, 5]]
        self.array, self.tensor = np.arange(6, 12), torch.arange(12, 18)
        self.epochs = {"done": [0]}

    def __iter__(self):
        self.epochs["done"][0] += 1
        self.buckets.reverse()
        for bucket in self.buckets:
            bucket.reverse()
        self.array += 1
        self.tensor.add_(1)
        return iter([*self.buckets[0], *self.buckets[1], *self.array.tolist(), *self.tensor.tolist()])

    def __len__(self):
        return 18


def test_what_a_sampler_writes_into_is_put_back_at_every_depth():
    sampler = InPlace()
    inner, array = sampler.buckets[0], sampler.array
    loader = DataLoader(range(30), batch_size=None, sampler=sampler)
    once = [5, 4, 3, 2, 1, 0, *range(7, 13), *range(13, 19)]
    with independent_loaders([loader]) as [copied]:
        assert values(copied) == once
        assert values(copied) != once
    assert sampler.epochs == {"done": [0]}
    assert sampler.buckets[0] is inner
    assert sampler.array is array
    assert values(loader) == once


def test_a_stream_that_shuffles_its_files_is_put_back():
    class Stream(IterableDataset):
        def __init__(self):
            self.files, self.position = list(range(6)), 0

        def __iter__(self):
            self.files.reverse()
            self.position += 1
            return iter([file + 10 * self.position for file in self.files])

    loader = DataLoader(Stream())
    with independent_loaders([loader]) as [copied]:
        assert values(copied) == [[15], [14], [13], [12], [11], [10]]
        assert values(copied) == [[20], [21], [22], [23], [24], [25]]
    assert values(loader) == [[15], [14], [13], [12], [11], [10]]


def test_the_data_itself_is_neither_copied_nor_written_to():
    tensor, array = torch.zeros(4), np.zeros(4)
    data = SimpleNamespace(tensor=tensor, array=array, nested=[[0]], rows=[tensor])
    sampler = SimpleNamespace(data_source=[tensor, [0]], weights=torch.zeros(4))
    with data_kept([SimpleNamespace(dataset=data, sampler=sampler)]):
        for held in (tensor, sampler.weights):
            held += 1
        array += 1
        data.nested[0].append(1)
        data.rows.append(1)
        sampler.data_source[1].append(1)
    assert (tensor.sum().item(), array.sum()) == (4, 4)
    assert (data.nested, data.rows) == ([[0, 1]], [tensor])  # only the outermost list
    assert sampler.data_source[1] == [0, 1]
    assert sampler.weights.sum() == 0


def test_it_is_put_back_after_an_error_too():
    dataset = Counting()
    with pytest.raises(OSError, match="gone"), data_kept([DataLoader(dataset)]):
        dataset[0] + dataset[1]
        raise OSError("gone")
    assert (dataset.count, dataset.seen) == (0, [])
    assert values(DataLoader(dataset)) == values(DataLoader(Counting()))


def test_parts_that_lead_in_a_circle_are_met_once():
    one, other = SimpleNamespace(count=0), SimpleNamespace(count=0)
    one.dataset, other.sampler = other, one
    one.batch_sampler = [one, other, None]
    with data_kept([one, None]):
        one.count = other.count = 5
    assert (one.count, other.count) == (0, 0)


def test_generators_without_a_state_are_passed_over():
    dataset = SimpleNamespace(system=random.SystemRandom(), count=0)
    with data_kept([dataset]):
        dataset.count += dataset.system.random()
    assert dataset.count == 0


def test_global_random_states_are_left_to_others():
    state = torch.get_rng_state()
    with independent_loaders([DataLoader(range(4), shuffle=True)]) as [copied]:
        values(copied)
    assert not torch.equal(torch.get_rng_state(), state)
