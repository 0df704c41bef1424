"""The paraphraser's training against a hand-written loop, to the bit; and what is refused."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lightning_compress.mechanisms.paraphrasing import paraphraser_from, train_paraphraser
from lightning_compress.modules import Paraphraser, Translator


def drawn(seed: int = 0, channels: int = 4, ratio: float = 0.5) -> Paraphraser:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Paraphraser(channels, ratio)


def batches(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 4, 5, 3, generator=generator) for size in sizes]


def by_hand(paraphraser: nn.Module, features, epochs: int) -> list[float]:
    """SGD with momentum and weight decay, written out."""
    velocity = {name: None for name, _ in paraphraser.named_parameters()}
    errors = []
    for _ in range(epochs):
        error = size = 0.0
        for feature in features:
            loss = (paraphraser(feature) - feature).abs().mean()
            gradients = torch.autograd.grad(loss, list(paraphraser.parameters()))
            with torch.no_grad():
                for (name, parameter), gradient in zip(paraphraser.named_parameters(), gradients, strict=True):
                    step = gradient.add(parameter, alpha=5e-4)
                    velocity[name] = step if velocity[name] is None else velocity[name] * 0.9 + step
                    parameter.add_(velocity[name], alpha=-0.1)
            error += loss.item() * len(feature)
            size += feature.abs().mean().item() * len(feature)
        errors.append(error / size)
    return errors


def assert_same_bits(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert {name: value.numpy().tobytes() for name, value in ours.items()} == {
        name: value.numpy().tobytes() for name, value in theirs.items()
    }


@pytest.mark.parametrize("epochs", [1, 3])
def test_it_equals_a_loop_by_hand_to_the_bit(epochs):
    ours, theirs = drawn(), drawn()
    before = copy.deepcopy(theirs)
    features = batches(4, 4, 2)  # the last of an epoch is smaller, and counts less
    errors = train_paraphraser(ours, lambda epoch: features, epochs=epochs)
    assert errors == pytest.approx(by_hand(theirs, features, epochs), rel=1e-6)
    assert_same_bits(ours, theirs)
    assert not torch.equal(before.encoder[0].weight, ours.encoder[0].weight)


@pytest.mark.sample
def test_it_learns():
    features = [torch.arange(1.0, 5.0).view(1, 4, 1, 1).expand(2, 4, 5, 3)] * 4
    errors = train_paraphraser(drawn(), lambda epoch: features, epochs=30)
    assert len(errors) == 30
    assert errors[0] > 0.5
    assert min(errors[-5:]) < 0.2


def test_the_error_is_relative_to_the_features():
    feature = batches(4)[0]
    paraphraser = drawn()
    with torch.no_grad():
        expected = ((paraphraser(feature) - feature).abs().sum() / feature.abs().sum()).item()
        for parameter in paraphraser.parameters():
            parameter.zero_()
    assert train_paraphraser(paraphraser, lambda epoch: [feature], epochs=1) == [pytest.approx(1.0)]  # zeros
    assert train_paraphraser(drawn(), lambda epoch: [feature], epochs=1) == [pytest.approx(expected, rel=1e-5)]


def test_batches_count_by_their_samples():
    paraphraser = drawn()
    with torch.no_grad():
        for parameter in paraphraser.parameters():
            parameter.zero_()
    one, three = torch.full((1, 4, 2, 2), 1.0), torch.full((3, 4, 2, 2), 5.0)
    errors = train_paraphraser(paraphraser, lambda epoch: [one, three], epochs=1)
    # Of zeros only the last bias learns: .1 (rate) * .1 (slope of the leaky ReLU) / 4 (channels) in the first step.
    assert errors == pytest.approx([(1 * 1 + 3 * (5 - 0.0025)) / (1 * 1 + 3 * 5)])


def test_features_are_asked_for_once_an_epoch_and_may_be_a_stream():
    features, asked = batches(4, 2), []

    def stream(epoch):
        asked.append(epoch)
        yield from features

    ours, theirs = drawn(), drawn()
    train_paraphraser(ours, stream, epochs=3)
    assert asked == [0, 1, 2]
    by_hand(theirs, features, 3)
    assert_same_bits(ours, theirs)


def test_it_is_frozen_afterwards():
    paraphraser = drawn().eval()
    modes = []
    paraphraser.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    train_paraphraser(paraphraser, lambda epoch: batches(2), epochs=2)
    assert modes == [True, True]
    assert not any(module.training for module in paraphraser.modules())
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in paraphraser.parameters())


def test_no_epochs_leave_it_as_it_was():
    ours = drawn()
    assert train_paraphraser(ours, lambda epoch: pytest.fail("nothing is asked for"), epochs=0) == []
    assert_same_bits(ours, drawn())
    assert not ours.training
    assert not ours.encoder[0].weight.requires_grad


def test_processes_average_gradients_and_errors():
    """Two that hold each a half of every batch end where one ends that holds all of it."""
    features, whole = batches(4, 4), drawn()
    expected = by_hand(whole, features, 2)
    barrier, told = threading.Barrier(2, timeout=30), {}

    def process(rank: int) -> tuple[Paraphraser, list[float]]:
        def reduce(value: torch.Tensor) -> torch.Tensor:
            told[rank] = value
            barrier.wait()
            mean = (told[0] + told[1]) / 2
            barrier.wait()
            return mean

        paraphraser = drawn_of_all[rank]
        half = [feature[2 * rank : 2 * rank + 2] for feature in features]
        return paraphraser, train_paraphraser(paraphraser, lambda epoch: half, epochs=2, reduce=reduce)

    drawn_of_all = [drawn(), drawn()]
    with ThreadPoolExecutor(2) as pool:
        (first, errors), (second, others) = pool.map(process, range(2))
    assert errors == others == pytest.approx(expected, rel=1e-5)
    assert_same_bits(first, second)
    for ours, theirs in zip(first.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("features", [[], [torch.zeros(2, 4, 3, 3)], [torch.zeros(0, 4, 3, 3)]])
def test_without_features_there_is_nothing_to_learn(features):
    with pytest.raises(ValueError, match="the paraphraser saw no features in epoch 0, or only zeros"):
        train_paraphraser(drawn(), lambda epoch: features, epochs=2)
    given = iter([batches(2), []])
    with pytest.raises(ValueError, match="no features in epoch 1"):
        train_paraphraser(drawn(), lambda epoch: next(given), epochs=2)


# From weights


def test_a_paraphraser_comes_back_from_its_weights():
    trained = drawn(channels=6, ratio=0.34)
    state = torch.get_rng_state()
    loaded = paraphraser_from(trained.state_dict(), 0.34, argument="paraphraser")
    assert_same_bits(loaded, trained)
    assert loaded.factor_channels == 2
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.encoder[0].weight.data_ptr() != trained.encoder[0].weight.data_ptr()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "state",
    [{}, {"weight": torch.ones(2)}, {"encoder.0.weight": torch.ones(2, 2)}, {"encoder.0.weight": 3}, None, [1]],
)
def test_what_holds_no_paraphraser_is_refused(state):
    message = r"the checkpoint holds no weights of a lightning_compress\.modules\.Paraphraser"
    with pytest.raises(ValueError, match=message):
        paraphraser_from(state, 0.5, argument="the checkpoint")


@pytest.mark.parametrize(
    ("make", "ratio"),
    [(lambda: drawn(), 1.0), (lambda: drawn(ratio=1.0), 0.5), (lambda: Translator(4, 2), 0.5)],
)
def test_weights_of_another_paraphraser_are_refused(make, ratio):
    message = rf"'p\.pt' holds weights of another shape than a paraphraser of 4 channels and factor_ratio={ratio}: "
    with pytest.raises(ValueError, match=message):
        paraphraser_from(make().state_dict(), ratio, argument="'p.pt'")
