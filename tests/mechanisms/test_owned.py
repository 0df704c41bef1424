"""Owned parameters: against a hand-written optimizer in a plain loop, and inside of a Lightning fit."""

from __future__ import annotations

import copy
import random

import lightning.pytorch as L
import pytest
import torch
from contract.modules import CLASSES, FEATURES, Classifier, difference, loader, made, scaled, trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lightning_compress import CompressionCallback, CompressionMixin
from lightning_compress.mechanisms.owned import OwnedParameters, refuse_lbfgs
from lightning_compress.mechanisms.passes import Term


def owned(seed: int = 0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)) -> OwnedParameters:
    return OwnedParameters(lambda inputs, outputs: nn.Linear(inputs, outputs), optimizer, seed=seed)


# In a plain loop


def test_they_are_built_once_from_their_own_seed():
    torch.manual_seed(1)
    first = owned()
    assert first.module is None
    layer = first.get(3, 2)
    torch.manual_seed(99)
    second = owned().get(3, 2)
    assert first.get(3, 2) is layer
    assert torch.equal(layer.weight, second.weight)
    assert not torch.equal(layer.weight, owned(seed=1).get(3, 2).weight)
    assert layer.weight.requires_grad


def test_building_moves_no_random_state():
    states = (torch.get_rng_state(), random.getstate())
    owned().get(3, 2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_building_seeds_no_device(monkeypatch):
    def refuse(*_):
        raise AssertionError("the devices' random states are the user's")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    assert owned().get(3, 2).weight.shape == (2, 3)


def test_validation_may_come_first():
    helper = owned()
    with torch.inference_mode():
        layer = helper.get(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    helper.step()
    assert helper.steps == 1
    assert layer.weight.grad.sum() == 6


def test_dtype_and_device_are_followed():
    assert owned().get(3, 2, dtype=torch.float64, device=torch.device("cpu")).weight.dtype == torch.float64


def test_steps_equal_those_of_an_optimizer_by_hand():
    helper = owned()
    layer = helper.get(3, 2)
    reference = copy.deepcopy(layer)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        x = torch.full((2, 3), float(step))
        helper.zero_grad()
        layer(x).square().sum().backward()
        helper.step(lr=0.1 / (step + 1))
        optimizer.zero_grad()
        reference(x).square().sum().backward()
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.step()
    assert difference(layer, reference) == 0
    assert helper.steps == 4


def test_gradients_are_reduced_before_the_step():
    helper = owned(optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    layer = helper.get(1, 1)
    before = layer.weight.item()
    layer(torch.ones(1, 1)).sum().backward()
    helper.step(reduce=lambda gradient: gradient * 3)
    assert layer.weight.item() == pytest.approx(before - 3)


def test_the_scaler_unscales_and_skips_what_overflowed():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    helper = owned(optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    layer = helper.get(1, 1)
    before = layer.weight.item()
    scaler.scale(layer(torch.ones(1, 1)).sum()).backward()
    assert layer.weight.grad.item() == 8
    helper.step(scaler=scaler)
    scaler.update()
    assert layer.weight.item() == pytest.approx(before - 1)
    layer.weight.grad.fill_(float("inf"))
    before = layer.weight.item()
    helper.step(scaler=scaler)
    assert layer.weight.item() == before
    helper.zero_grad()
    helper.step(scaler=scaler)  # a scaler refuses an optimizer without any gradient
    assert layer.weight.item() == before


def test_state_goes_on_before_and_after_first_use():
    helper = owned()
    assert helper.state_dict() == {}
    layer = helper.get(3, 2)
    for _ in range(2):
        helper.zero_grad()
        layer(torch.ones(2, 3)).square().sum().backward()
        helper.step()
    state = copy.deepcopy(helper.state_dict())
    resumed, late = owned(seed=5), owned(seed=6)
    resumed.load_state_dict(state)
    assert resumed.state_dict() is state  # saved again before it was used
    late.get(3, 2)
    late.load_state_dict(state)
    for other in (resumed, late):
        assert difference(other.get(3, 2), layer) == 0
        assert other.steps == 2
    for each in (helper, resumed, late):
        each.zero_grad()
        each.get()(torch.ones(2, 3)).square().sum().backward()
        each.step()
    assert difference(resumed.get(), layer) == 0
    assert difference(late.get(), layer) == 0


def test_without_modules_a_step_does_nothing():
    helper = owned()
    helper.zero_grad()
    helper.step()
    helper.load_state_dict({})
    assert helper.steps == 0
    assert helper.state_dict() == {}


def test_a_step_without_any_gradient_is_none():
    """Momentum and weight decay would move weights that took part in nothing."""
    helper = owned(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1))
    layer = helper.get(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    helper.step()
    before = copy.deepcopy(layer.state_dict())
    reduced = []
    helper.zero_grad()
    helper.step(lr=5.0, reduce=reduced.append)
    assert difference(layer, before) == 0
    assert (helper.steps, reduced, helper.optimizer.param_groups[0]["lr"]) == (1, [], 0.1)


def test_a_parameter_without_a_gradient_is_left_out_of_the_step():
    helper = owned()
    layer = helper.get(3, 2)
    bias = layer.bias.detach().clone()
    F.linear(torch.ones(1, 3), layer.weight).sum().backward()
    reduced = []
    helper.step(reduce=lambda gradient: reduced.append(gradient.shape) or gradient)
    assert reduced == [(6,)]  # flat, so that several are reduced at once
    assert torch.equal(layer.bias, bias)
    assert helper.steps == 1


def test_lbfgs_is_refused():
    weight = [nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match="the translator has an optimizer of its own and cannot follow LBFGS"):
        refuse_lbfgs([torch.optim.SGD(weight, lr=0.1), torch.optim.LBFGS(weight)], "the translator")
    assert refuse_lbfgs([torch.optim.SGD(weight, lr=0.1)], "the translator") is None


# In a fit


class Translating(CompressionCallback):
    """Adds the loss of a translator of the logits, which trains beside the module."""

    changes_step = True

    def __init__(self, *, name=None):
        super().__init__(name=name)
        self.owned = owned()

    def attach(self, controller, stack, trainer, pl_module):
        capture = self.student_capture = controller.capture("model")
        self.own(self.owned)

        def term(passes):
            [call] = [entry.call(capture) for entry in passes.values()]
            return F.mse_loss(self.owned.get(CLASSES, FEATURES)(call.output), call.args[0])

        stack.enter_context(controller.term(Term(self.name, term)))

    def extra_state(self):
        return {"owned": self.owned.state_dict()}

    def load_extra_state(self, state):
        self.owned.load_state_dict(state["owned"])


def by_hand(
    module: Classifier, *, accumulate: int = 1, half: bool = False, schedule=None
) -> tuple[nn.Module, nn.Module]:
    """The same training with both networks in one loop."""
    helper = owned().get(CLASSES, FEATURES)
    optimizers = [
        torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
        torch.optim.SGD(helper.parameters(), lr=0.1, momentum=0.9),
    ]
    scheduler = None if schedule is None else schedule(optimizers[0])
    scaler = torch.amp.GradScaler("cpu", enabled=half)
    for index, (x, y) in enumerate(loader()):
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            logits = module.model(x)
            loss = F.cross_entropy(logits, y) + F.mse_loss(helper(logits), x)
        scaler.scale(loss / accumulate).backward()
        if (index + 1) % accumulate:
            continue
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return module, helper


class Scheduled(Classifier):
    schedule = None

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": type(self).schedule(optimizer), "interval": "step"}]


class Lambda(Scheduled):
    schedule = staticmethod(lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step))


class OneCycle(Scheduled):
    schedule = staticmethod(lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20))


@pytest.mark.parametrize(
    ("kind", "settings", "hand"),
    [
        (Scheduled, {}, {}),
        (Scheduled, {"accumulate_grad_batches": 4}, {"accumulate": 4}),
        (Scheduled, {"plugins": "scaled"}, {"half": True}),
        (Lambda, {}, {"schedule": Lambda.schedule}),
        (OneCycle, {}, {"schedule": OneCycle.schedule}),
    ],
)
def test_a_fit_equals_the_loop_by_hand(kind, settings, hand):
    plugin = scaled()
    settings = {key: plugin if value == "scaled" else value for key, value in settings.items()}
    module, callback = made(kind), Translating()
    reference, helper = by_hand(made(kind), **hand)
    trainer(callback, **settings).fit(module, loader())
    assert difference(module, reference) == 0
    assert difference(callback.owned.module, helper) == 0
    assert callback.owned.steps == 8 // settings.get("accumulate_grad_batches", 1)
    if "plugins" in settings:
        assert plugin.scaler.get_scale() == 65536.0
        assert plugin.scaler._growth_tracker == 8  # it did run


class Thaw(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.model[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model[0], optimizer)


class HeadFirst(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_finetuning_that_adds_groups_to_the_users_optimizer_is_not_disturbed():
    module, callback = made(HeadFirst), Translating()
    before = copy.deepcopy(module.state_dict())
    run = trainer(Thaw(), callback, max_epochs=2)
    run.fit(module, loader())
    assert len(run.optimizers[0].param_groups) == 2
    assert callback.owned.steps == 16
    assert not torch.equal(module.model[0].weight, before["model.0.weight"])
    assert {id(p) for group in run.optimizers[0].param_groups for p in group["params"]} == {
        id(p) for p in module.parameters()
    }


def test_a_resumed_run_equals_the_whole_one(tmp_path):
    whole, callback = made(Scheduled), Translating()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(callback, keep, max_epochs=2, enable_checkpointing=True).fit(whole, loader())
    module, resumed = made(Scheduled, seed=4), Translating()
    trainer(resumed, max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert difference(module, whole) == 0
    assert difference(resumed.owned.module, callback.owned.module) == 0
    assert resumed.owned.steps == 16
    plain = made(Scheduled)
    trainer(max_epochs=2).fit(plain, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert list(plain.state_dict()) == list(whole.state_dict())


class Alternating(Classifier):
    """Manual optimisation with two optimizers, of which the second steps without a backward pass of its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.manual_backward(self.compressed_loss(super().training_step(batch, batch_idx)))
        first.step()
        second.step()
        first.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.model.parameters(), lr=0.1), torch.optim.SGD(self.other.parameters(), lr=0.1)]


class MixedIn(CompressionMixin, Alternating):
    pass


def test_of_several_optimizers_only_the_one_after_the_backward_pass_counts():
    module, callback = made(MixedIn), Translating()
    reference, helper = made(MixedIn), owned().get(CLASSES, FEATURES)
    trainer(callback).fit(module, loader())
    optimizers = [
        torch.optim.SGD(reference.model.parameters(), lr=0.1),
        torch.optim.SGD(helper.parameters(), lr=0.1, momentum=0.9),
    ]
    for x, y in loader():
        logits = reference.model(x)
        (F.cross_entropy(logits, y) + F.mse_loss(helper(logits), x)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert callback.owned.steps == 8
    assert difference(callback.owned.module, helper) == 0
    assert difference(module, reference) == 0


def test_no_gradient_is_left_after_a_step():
    """Whenever the user's are zeroed, the helpers' are not added up over steps."""

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append([parameter.grad for parameter in callback.owned.module.parameters()])

    seen, callback = [], Translating()
    trainer(callback, Look()).fit(made(Scheduled), loader())
    assert seen == [[None, None]] * 8
