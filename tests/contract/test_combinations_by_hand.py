"""Combinations against loops that are written out: nothing of the package but what builds its networks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from records import record
from torch.func import functional_call
from torch.nn import functional as F

from lightning_compress import (
    AttentionTransferCallback,
    DCILCallback,
    DistillationCallback,
    DPFCallback,
    FactorTransferCallback,
    PruningCallback,
    PSGDCallback,
    QATCallback,
)
from lightning_compress.modules import Paraphraser, Translator

from .modules import STEPS, Classifier, difference, loader, made, teacher_for, trainer

pytestmark = pytest.mark.sample
SMALL = 1e-8
"""In 64 bits; PSGD sums up its distances in 32."""
CONVOLUTION, LINEAR = "model.0.weight", "model.3.weight"


def fitted(*callbacks):
    module = made(Classifier)
    trainer(*callbacks, precision="64-true").fit(module, loader())
    return module


def equal_in_both_orders(build, reference, classes):
    """The largest difference of the fits in both orders to a reference, which must be small."""
    found = [difference(fitted(*build()[::order]), reference) for order in (1, -1)]
    assert max(found) <= SMALL
    assert difference(fitted(), reference) > 1e-3
    row = " + ".join(f"{own}Callback" for own in classes.split())
    record("combinations", row, "by hand", "exact", f"{max(found):.1e} in 64 bits")


class Loop:
    """What all loops have: the module, its optimizer and schedule, and the masks of a sparsity that grows."""

    def __init__(self):
        self.module = made(Classifier).double()
        settings = self.module.configure_optimizers()
        self.optimizer, self.schedule = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
        self.teacher = teacher_for(Classifier).double().eval()

    def batches(self):
        for index, (x, y) in enumerate(loader()):
            self.optimizer.zero_grad()
            yield index / STEPS, x.double(), y
            self.optimizer.step()
            self.schedule.step()

    def soft(self, logits, x, temperature=2.0):
        """Temperature squared times the divergence from the teacher's soft targets."""
        return divergence(logits, self.teacher(x), temperature)

    def masks(self, names, done, final, end=0.75):
        """The entries of the largest magnitude of several weights, when a share of the training is behind."""
        share = final * (1 - (1 - min(done / end, 1.0)) ** 3)
        weights = {name: self.module.get_parameter(name).detach() for name in names}
        flat = torch.cat([own.abs().flatten() for own in weights.values()])
        zeros = math.floor(share * len(flat) + 0.5)
        limit = flat.sort().values[zeros - 1] if zeros else -1.0
        return {name: (own.abs() > limit).double() for name, own in weights.items()}

    def compress(self, masks):
        with torch.no_grad():
            for name, mask in masks.items():
                self.module.get_parameter(name).mul_(mask)
        return self.module


def divergence(ours, theirs, temperature):
    p = F.softmax(theirs.detach() / temperature, dim=1)
    return temperature**2 * (p * (p.log() - F.log_softmax(ours / temperature, dim=1))).sum(dim=1).mean()


def attention(feature):
    maps = feature.square().mean(dim=1).flatten(1)
    return maps / maps.norm(dim=1, keepdim=True)


def test_distillation_with_collective_intelligence():
    """Kept weights learn from the masked network and its teacher, masked ones from the dense network."""
    loop = Loop()
    for done, x, y in loop.batches():
        masks = loop.masks([CONVOLUTION], done, 0.4)
        weight, mask = loop.module.get_parameter(CONVOLUTION), masks[CONVOLUTION]
        kept = (weight * mask).detach().requires_grad_()
        dense = weight.detach().clone().requires_grad_()
        still = {name: own.detach() for name, own in loop.module.named_parameters()}
        pruned = functional_call(loop.module, {CONVOLUTION: kept}, (x,))
        full = functional_call(loop.module, {**still, CONVOLUTION: dense}, (x,))
        loss = 0.5 * F.cross_entropy(pruned, y) + 0.5 * loop.soft(pruned, x) + 0.5 * F.cross_entropy(full, y)
        loss = loss + divergence(pruned, full, 2.0) + divergence(full, pruned, 2.0)
        loss.backward()
        weight.grad = mask * kept.grad + (1 - mask) * dense.grad

    def build():
        distillation = DistillationCallback(teacher_for(Classifier), temperature=2.0, task_weight=0.5, kd_weight=0.5)
        return [distillation, DCILCallback(0.4, update_interval=1, dense_path="shared", kl_start=0.0)]

    equal_in_both_orders(build, loop.compress(masks), "Distillation DCIL")


def test_attention_transfer_with_pruning():
    """The student's attention is that of the masked network; masked entries get no gradient."""
    loop = Loop()
    names = [CONVOLUTION, LINEAR]
    for done, x, y in loop.batches():
        if done <= 0.75:  # from the end on they stay
            masks = loop.masks(names, done, 0.6)
        weights = {name: loop.module.get_parameter(name) * masks[name] for name in names}
        feature = F.conv2d(x.reshape(-1, 1, 2, 4), weights[CONVOLUTION], loop.module.model[0].bias, padding=1)
        logits = F.linear(feature.relu().flatten(1), weights[LINEAR], loop.module.model[3].bias)
        apart = (attention(feature) - attention(loop.teacher[0](x).detach())).square().mean()
        (F.cross_entropy(logits, y) + 7.0 * apart).backward()

    def build():
        transfer = AttentionTransferCallback(teacher_for(Classifier), pairs={"0": "0"}, weight=7.0, student="model")
        return [transfer, PruningCallback(0.6, regrow=True)]

    equal_in_both_orders(build, loop.compress(masks), "AttentionTransfer Pruning")


def test_distillation_with_feedback_on_a_grid():
    """Masked weights are rounded, and the gradient of the result arrives at all dense weights."""
    loop = Loop()
    names = [CONVOLUTION, LINEAR]
    for done, x, y in loop.batches():
        masks, shown = loop.masks(names, done, 0.6), {}
        for name in names:
            weight = loop.module.get_parameter(name)
            masked = weight.detach() * masks[name]
            step = masked.abs().amax(dim=tuple(range(1, masked.ndim)), keepdim=True) / 7
            rounded = torch.where(step > 0, step * (masked / step).round().clamp(-7, 7), masked)
            shown[name] = weight + (rounded - weight).detach()
        logits = functional_call(loop.module, shown, (x,))
        (0.5 * F.cross_entropy(logits, y) + 0.5 * loop.soft(logits, x)).backward()

    def build():
        distillation = DistillationCallback(teacher_for(Classifier), temperature=2.0, task_weight=0.5, kd_weight=0.5)
        feedback = DPFCallback(0.6, update_interval=1, dead_filters="keep")
        settings = {"step_size": "observed", "freeze_observers_at": 1.0}
        return [distillation, feedback, QATCallback(weight_bits=4, activation_bits=None, **settings)]

    equal_in_both_orders(build, loop.compress(masks), "Distillation DPF QAT")


def test_factor_transfer_with_scaled_gradients(tmp_path):
    """The translator's gradients are its own; those of the network are scaled, with the factors' among them."""
    torch.manual_seed(4)
    paraphraser, started = Paraphraser(6), []
    torch.save(paraphraser.state_dict(), tmp_path / "paraphraser.pt")

    class Keeps(FactorTransferCallback):
        """Shows from where its translator begins."""

        def term(self, passes):
            term = super().term(passes)
            started.append(copy.deepcopy(self._translator.module.state_dict()))
            return term

    def build():
        settings = {"pair": ("0", "0"), "weight": 4.0, "paraphraser": tmp_path / "paraphraser.pt", "student": "model"}
        return [Keeps(teacher_for(Classifier), **settings), PSGDCallback(4, mean_factor=1.5)]

    torch.manual_seed(0)
    fitted(*build())
    loop, translator, paraphraser = Loop(), Translator(4, 3).double(), paraphraser.double()
    translator.load_state_dict(started[0])
    helper = torch.optim.SGD(translator.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scaled, lambda_s = [CONVOLUTION, LINEAR, "model.3.bias"], None
    for _, x, y in loop.batches():
        feature = loop.module.model[0](x)
        ours, theirs = translator(feature), paraphraser.factor(loop.teacher[0](x)).detach()
        ours, theirs = (own / own.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for own in (ours, theirs))
        loss = F.cross_entropy(loop.module.model[1:](feature), y) + 4.0 * (ours - theirs).abs().mean()
        helper.zero_grad()
        loss.backward()
        distances = {}
        for name in scaled:
            weight = loop.module.get_parameter(name).detach()
            step = weight.abs().max() / 7
            distances[name] = (weight - step * (weight / step).round().clamp(-7, 7)).abs()
        lambda_s = lambda_s or 1.5 / torch.cat([own.flatten() for own in distances.values()]).mean()
        for name in scaled:
            loop.module.get_parameter(name).grad *= lambda_s * distances[name]
        helper.param_groups[0]["lr"] = loop.optimizer.param_groups[0]["lr"]
        helper.step()

    equal_in_both_orders(build, loop.module, "FactorTransfer PSGD")


@pytest.fixture(autouse=True)
def always_the_same_numbers():
    torch.manual_seed(0)
