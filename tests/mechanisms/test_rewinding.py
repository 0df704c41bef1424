"""Rewinding: parameters, optimizers and schedulers go back exactly, or the learning rates alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, lr_scheduler

from lightning_compress.mechanisms.rewinding import TrainingStart

LENGTH = 12


class Training:
    """A loop as Lightning runs it; stands in for a Trainer."""

    def __init__(self, optimizer, scheduler):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.module.register_buffer("count", torch.zeros((), dtype=torch.long), persistent=False)
        groups = [{"params": self.module[0].parameters()}, {"params": self.module[1:].parameters(), "lr": 0.01}]
        self.optimizer = optimizer(groups)
        self.scheduler = scheduler(self.optimizer)
        self.optimizers = [self.optimizer]
        self.lr_scheduler_configs = [SimpleNamespace(scheduler=self.scheduler)]

    def run(self, steps, seed):
        """Train, and give back the learning rates, momenta and losses on the way."""
        generator, seen = torch.Generator().manual_seed(seed), []
        for _ in range(steps):
            groups = [
                {key: group.get(key) for key in ("lr", "momentum", "betas")} for group in self.optimizer.param_groups
            ]
            loss = self.module(torch.randn(8, 3, generator=generator)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.module.count += 1
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(1.0)
            else:
                self.scheduler.step()
            seen.append((loss.item(), groups))
        return seen

    def everything(self):
        """A copy of all that training changes."""
        return copy.deepcopy(
            {
                "module": {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())},
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
            }
        )


def momentum(groups):
    return SGD(groups, lr=0.1, momentum=0.9)


def adam(groups):
    return Adam(groups, lr=0.1)


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=2 * LENGTH)


def sequence(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, T_max=LENGTH)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


class Noting(lr_scheduler.StepLR):
    """Keeps a list that it adds to, as schedulers of users do."""

    def __init__(self, optimizer):
        self.seen = []
        super().__init__(optimizer, 2)

    def step(self):
        self.seen.append(len(self.seen))
        super().step()


TRAININGS = [
    (momentum, Noting),
    (momentum, lambda optimizer: lr_scheduler.StepLR(optimizer, 2)),
    (momentum, one_cycle),  # which moves the momentum too
    (adam, one_cycle),  # and the betas
    (momentum, sequence),
    (adam, lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)),
    (momentum, lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 5])),
    (momentum, lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)),
    (adam, lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=3)),
]
IDS = ["noting", "steps", "one cycle", "one cycle of Adam", "sequence", "lambda", "milestones", "plateau", "restarts"]


def assert_equal(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def plain(state):
    """A scheduler's state without what cannot be compared."""
    return {key: value for key, value in state.items() if not callable(value)}


@pytest.mark.parametrize("trained", [0, 3])
@pytest.mark.parametrize(("optimizer", "scheduler"), TRAININGS, ids=IDS)
def test_with_weights_everything_goes_back_and_comes_out_the_same(optimizer, scheduler, trained):
    training = Training(optimizer, scheduler)
    training.run(trained, seed=1)  # so that there is momentum to go back to
    start = TrainingStart(training, training.module, weights=True)
    before = training.everything()
    first = training.run(6, seed=2)
    assert training.everything()["module"]["count"] == trained + 6
    start.restore(training, training.module)
    after = training.everything()
    for part in ("module", "optimizer"):
        assert_equal(after[part], before[part])
    assert plain(after["scheduler"]) == plain(before["scheduler"])
    assert training.run(6, seed=2) == first


@pytest.mark.parametrize(("optimizer", "scheduler"), TRAININGS, ids=IDS)
def test_without_weights_only_rates_and_schedulers_go_back(optimizer, scheduler):
    training = Training(optimizer, scheduler)
    start = TrainingStart(training, training.module, weights=False)
    assert set(start.state) == {"rates", "schedulers"}
    first = training.everything()
    rates = [groups for _, groups in training.run(6, seed=1)]
    assert rates[0] != rates[-1]
    before = training.everything()
    start.restore(training, training.module)
    after = training.everything()
    assert_equal(after["module"], before["module"])
    assert_equal(after["optimizer"]["state"], before["optimizer"]["state"])
    assert after["optimizer"]["param_groups"] == first["optimizer"]["param_groups"]
    assert plain(after["scheduler"]) == plain(first["scheduler"])
    assert [groups for _, groups in training.run(6, seed=1)] == rates


def test_one_cycle_moves_what_goes_back():
    """Else the tests above would show nothing of momentum and betas."""
    for optimizer, key, start in ((momentum, "momentum", 0.95), (adam, "betas", (0.95, 0.999))):
        training = Training(optimizer, one_cycle)
        beginning = TrainingStart(training, training.module, weights=False)
        training.run(6, seed=1)
        assert training.optimizer.param_groups[1][key] != start
        beginning.restore(training, training.module)
        assert [group[key] for group in training.optimizer.param_groups] == [start] * 2


def test_the_parameters_stay_the_same_objects():
    training = Training(momentum, one_cycle)
    parameters = list(training.module.parameters())
    start = TrainingStart(training, training.module, weights=True)
    training.run(2, seed=1)
    start.restore(training, training.module)
    assert all(now is before for now, before in zip(training.module.parameters(), parameters, strict=True))
    held = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
    assert all(any(own is parameter for parameter in parameters) for own in held)
    assert all(parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("scheduler", [one_cycle, Noting])
def test_going_back_again_and_again(scheduler, weights):
    """What is trained after going back does not reach what was kept."""
    training = Training(adam, scheduler)
    training.run(2, seed=1)
    start = TrainingStart(training, training.module, weights=weights)
    kept = copy.deepcopy(start.state)
    seen = []
    for _ in range(3):
        seen.append([groups if not weights else (loss, groups) for loss, groups in training.run(4, seed=2)])
        start.restore(training, training.module)
        once = training.everything()
        start.restore(training, training.module)
        assert_equal(training.everything()["module"], once["module"])
        assert_equal(training.everything()["optimizer"], once["optimizer"])
        assert plain(training.everything()["scheduler"]) == plain(once["scheduler"])
    assert seen[0] == seen[1] == seen[2]
    assert list(start.state) == list(kept)
    for part, value in kept.items():
        if part in ("module", "optimizers"):
            assert_equal(start.state[part], value)
        else:
            assert start.state[part] == value


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(("optimizer", "scheduler"), TRAININGS, ids=IDS)
def test_the_start_is_found_again_in_a_checkpoint(optimizer, scheduler, weights, tmp_path):
    first = Training(optimizer, scheduler)
    first.run(2, seed=1)
    start = TrainingStart(first, first.module, weights=weights)
    expected = first.everything()
    first.run(3, seed=2)
    torch.save(start.state, tmp_path / "start")

    second = Training(optimizer, scheduler)  # of another process
    second.run(5, seed=3)
    before = second.everything()
    again = TrainingStart(second, second.module, weights=weights)
    again.state = torch.load(tmp_path / "start", weights_only=True)
    again.restore(second, second.module)
    after = second.everything()
    assert_equal(after["module"], expected["module"] if weights else before["module"])
    assert_equal(after["optimizer"]["param_groups"], expected["optimizer"]["param_groups"])
    assert_equal(after["optimizer"]["state"], (expected if weights else before)["optimizer"]["state"])
    assert plain(after["scheduler"]) == plain(expected["scheduler"])


def test_several_optimizers_and_no_scheduler():
    training = Training(momentum, one_cycle)
    training.optimizers = [SGD(training.module[0].parameters(), lr=0.1), Adam(training.module[2].parameters(), lr=0.2)]
    training.lr_scheduler_configs = []
    start = TrainingStart(training, training.module, weights=False)
    for optimizer in training.optimizers:
        optimizer.param_groups[0]["lr"] = 9.0
    training.optimizers[1].param_groups[0]["weight_decay"] = 0.5
    start.restore(training, training.module)
    assert [optimizer.param_groups[0]["lr"] for optimizer in training.optimizers] == [0.1, 0.2]
    assert training.optimizers[1].param_groups[0]["weight_decay"] == 0.5  # no learning rate


@pytest.mark.parametrize("weights", [True, False])
def test_other_groups_of_parameters_are_an_error(weights):
    training = Training(lambda groups: SGD(groups, lr=0.1), lambda optimizer: lr_scheduler.StepLR(optimizer, 2))
    start = TrainingStart(training, training.module, weights=weights)
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    before = training.everything()
    with pytest.raises(RuntimeError, match="the optimizers have other groups of parameters than then"):
        start.restore(training, training.module)
    after = training.everything()
    assert all(torch.equal(value, before["module"][name]) for name, value in after["module"].items())
    assert after["scheduler"] == before["scheduler"]
