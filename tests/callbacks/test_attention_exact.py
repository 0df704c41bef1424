"""AttentionTransferCallback against loops written by hand: the weights after eight steps are equal, bit for bit."""

from __future__ import annotations

import functools

import pytest
import torch
from contract.features import (
    BLOCKS,
    STAGES,
    ConvChain,
    ConvClassifier,
    ConvItself,
    ConvMixin,
    ConvNormClassifier,
    TokenClassifier,
    conv_teacher,
    feature_fit,
    feature_loader,
    feature_teacher,
    in_a_row,
)
from contract.modules import BATCH, STEPS, difference, made, scaled
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_compress import AttentionTransferCallback, DistillationCallback
from lightning_compress import functional as C

LARGE, SMALL = 36, 9  # positions of the two stages
STRENGTH = 0.1
AUTO = {"stage1": STRENGTH * 1000 * LARGE / 16**2, "stage2": STRENGTH * 1000 * SMALL / 8**2}
KINDS = ("sum", "abs_sum", "power", "max", "edges")
SLOW = pytest.mark.slow  # all together they are not worth their time every day


def slow(*values):
    return pytest.param(*values, marks=SLOW)


def attention(kind=ConvClassifier, **settings):
    weight = {} if "weight" in settings else {"strength": STRENGTH}
    teacher = settings.pop("teacher", None) or feature_teacher(kind)
    return AttentionTransferCallback(teacher, **{"pairs": STAGES, **weight, **settings})


def maps(weights=AUTO, pairs=STAGES, cut=lambda feature: feature, **arguments):
    """The term by hand: for each pair its loss times its weight, from the first pair to the last."""

    def term(ours, theirs):
        losses = [
            C.attention_transfer_loss(cut(ours[student]), cut(theirs[teacher]), **arguments) * weights[student]
            for student, teacher in pairs.items()
        ]
        return functools.reduce(torch.add, losses)

    return term


def children_of(module):
    """The named parts of the network, in the order in which they run."""
    if isinstance(module, ConvChain):
        return [*((f"backbone.{name}", part) for name, part in module.backbone.named_children()), ("head", module.head)]
    return list(getattr(module, "model", module).named_children())


class ByHand:
    """A plain loop: forward, the features of both networks, the sum of the losses, backward, step."""

    def __init__(self, kind=ConvClassifier, term=None, *, teacher=None, transform=None, autocast=None):
        self.module, self.kind = made(kind), kind
        self.term = term or maps()
        self.teacher = (teacher or feature_teacher(kind)).eval()
        self.transform, self.autocast = transform or nn.Identity(), autocast
        settings = self.module.configure_optimizers()
        self.optimizer, self.scheduler = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
        self.task_losses, self.terms = [], []

    def loss(self, batch):
        x, y = batch
        with torch.autocast("cpu", dtype=self.autocast, enabled=self.autocast is not None):
            with torch.no_grad():
                theirs = in_a_row(self.teacher.named_children(), self.transform(x))
            ours = in_a_row(children_of(self.module), x)
            task, term = F.cross_entropy(ours["head"], y), self.term(ours, theirs)
            self.task_losses.append(task.item())
            self.terms.append(term.item())
            return task + term

    def run(self, *, windows=1, scaler=None, clip=None):
        self.scaler = scaler
        self.module.train()
        for index, batch in enumerate(feature_loader(self.kind)):
            loss = self.loss(batch) / windows
            (loss if scaler is None else scaler.scale(loss)).backward()
            if (index + 1) % windows:
                continue
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_(self.module.parameters(), clip)
            if scaler is None:
                self.optimizer.step()
            else:
                scaler.step(self.optimizer)
                scaler.update()
            self.optimizer.zero_grad()
            self.scheduler.step()
        return self.module


class GradientsByHand(ByHand):
    """With the gradient of both task losses by the input."""

    def __init__(self, kind=ConvClassifier, *, weight, **settings):
        super().__init__(kind, **settings)
        self.weight = weight
        self.teacher.requires_grad_(False)

    def loss(self, batch):
        x, y = batch[0].clone().requires_grad_(), batch[1]
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        with torch.autocast("cpu", dtype=self.autocast, enabled=self.autocast is not None):
            task = F.cross_entropy(in_a_row(children_of(self.module), x)["head"], y)
            (ours,) = torch.autograd.grad(task * scale, x, create_graph=True)
            (theirs,) = torch.autograd.grad(F.cross_entropy(self.teacher(self.transform(x)), y) * scale, x)
            term = C.gradient_transfer_loss(ours / scale, theirs / scale) * (self.weight / 2)
            self.task_losses.append(task.item())
            self.terms.append(term.item())
            return task + term


def fitted(kind=ConvClassifier, *callbacks, **settings):
    """The same with the callback; validation and its sanity check are on."""
    return feature_fit(made(kind), *(callbacks or [attention(kind)]), **settings)


def gradients(kind=ConvClassifier, **settings):
    return AttentionTransferCallback(
        settings.pop("teacher", None) or feature_teacher(kind), map_kind="gradient", **{"weight": 400.0, **settings}
    )


# Kinds, modes, weights


@pytest.mark.parametrize("map_kind", KINDS)
def test_every_kind_of_map(map_kind):
    by_hand, module = ByHand(term=maps(kind=map_kind)), fitted(ConvClassifier, attention(map_kind=map_kind))
    assert difference(by_hand.run(), module) == 0
    assert by_hand.terms[0] > 0.1
    assert difference(module, made(ConvClassifier)) > 0.01


@pytest.mark.parametrize("map_kind", ["power", "edges", *map(slow, ("sum", "abs_sum", "max"))])
def test_every_kind_of_map_in_the_papers_mode(map_kind):
    halved = dict.fromkeys(STAGES, 3.0 / 2)
    by_hand = ByHand(term=maps(halved, kind=map_kind, mode="paper")).run()
    assert difference(by_hand, fitted(ConvClassifier, attention(map_kind=map_kind, mode="paper", weight=3.0))) == 0


@pytest.mark.parametrize("kind", [ConvNormClassifier, slow(ConvClassifier)])
def test_gradients_of_the_input(kind):
    by_hand, module = GradientsByHand(kind, weight=400.0), fitted(kind, gradients(kind))
    assert difference(by_hand.run(), module) == 0
    assert by_hand.terms[0] > 0.05
    assert difference(module, fitted(kind, gradients(kind, weight=1e-6))) > 1e-3


@pytest.mark.parametrize(("map_kind", "power"), [("max", 3.0), slow("power", 1.0), slow("power", 3.0)])
def test_powers(map_kind, power):
    by_hand = ByHand(term=maps(kind=map_kind, power=power)).run()
    assert difference(by_hand, fitted(ConvClassifier, attention(map_kind=map_kind, power=power))) == 0


def test_a_weight_of_ones_own():
    by_hand = ByHand(term=maps(dict.fromkeys(STAGES, 40.0))).run()
    assert difference(by_hand, fitted(ConvClassifier, attention(weight=40.0))) == 0


@pytest.mark.parametrize("strength", [1.0, slow(0.5)])
def test_the_automatic_weight(strength):
    assert AUTO == {"stage1": 0.1 * 140.625, "stage2": 0.1 * 140.625}  # the authors' strength at a fixed resolution
    weights = {"stage1": strength * 140.625, "stage2": strength * 140.625}
    by_hand = ByHand(term=maps(weights)).run()
    assert difference(by_hand, fitted(ConvClassifier, attention(strength=strength))) == 0


@pytest.mark.parametrize(
    ("pairs", "weights"),
    [
        slow({"stage2": "stage2"}, {"stage2": 1000 * 9 / 8**2}),
        ({"stage1": "stage2"}, {"stage1": 1000 * 9 / 8**2}),  # the larger is pooled: 9 positions
        slow({"stage2": "stage1"}, {"stage2": 1000 * 9 / 8**2}),
        (
            {"stem": "stem", "stage1": "stage1", "stage2": "stage2"},
            {"stem": 1000 * 36 / 32**2, "stage1": 1000 * 36 / 16**2, "stage2": 1000 * 9 / 8**2},
        ),
        ({"stage2": "stage2", "stage1": "stage1"}, {"stage2": 1000 * 9 / 16**2, "stage1": 1000 * 36 / 8**2}),
        slow({"stem": "stage1", "stage1": "stage1"}, {"stem": 1000 * 36 / 16**2, "stage1": 1000 * 36 / 8**2}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_the_last_pair_is_the_deepest(pairs, weights):
    term = maps({name: weight * 0.1 for name, weight in weights.items()}, pairs)
    assert difference(ByHand(term=term).run(), fitted(ConvClassifier, attention(pairs=pairs, strength=0.1))) == 0


def test_the_term_is_learned_from():
    assert difference(fitted(), fitted(ConvClassifier, attention(strength=1e-9))) > 1e-3


def test_the_authors_own_lines():
    """As their code has it, without our functions: equal up to rounding."""

    def unit(feature):
        return F.normalize(feature.pow(2).mean(1).flatten(start_dim=1))

    def term(ours, theirs):
        return sum((unit(ours[name]) - unit(theirs[name])).pow(2).mean() * 20.0 for name in STAGES)

    by_hand = ByHand(term=term).run()
    assert difference(by_hand, fitted(ConvClassifier, attention(weight=20.0))) < 1e-5


@pytest.mark.sample
@pytest.mark.parametrize(("dropped", "positions"), [(0, 5), (1, 4)])
def test_tokens(dropped, positions):
    weights = {"block1": 0.1 * 1000 * positions / 16**2, "block2": 0.1 * 1000 * positions / 8**2}
    by_hand = ByHand(TokenClassifier, maps(weights, BLOCKS, lambda feature: feature[:, dropped:]))
    callback = attention(TokenClassifier, pairs=BLOCKS, drop_tokens=dropped, strength=0.1)
    assert difference(by_hand.run(), fitted(TokenClassifier, callback)) == 0


@SLOW
def test_gradients_of_tokens():
    with sdpa_kernel(SDPBackend.MATH):  # the fused one cannot be differentiated twice
        by_hand = GradientsByHand(TokenClassifier, weight=2.0).run()
        assert difference(by_hand, fitted(TokenClassifier, gradients(TokenClassifier, weight=2.0))) == 0


# Trainers


@pytest.mark.sample
@pytest.mark.parametrize("kind", [ConvNormClassifier, slow(ConvClassifier)])
def test_accumulation(kind):
    by_hand, module = ByHand(kind).run(windows=4), fitted(kind, accumulate_grad_batches=4)
    assert difference(by_hand, module) == 0
    assert difference(by_hand, ByHand(kind).run()) > 0


@pytest.mark.parametrize("windows", [1, slow(4)])
def test_bfloat16(windows):
    by_hand = ByHand(autocast=torch.bfloat16).run(windows=windows)
    assert difference(by_hand, fitted(precision="bf16-mixed", accumulate_grad_batches=windows)) == 0
    assert difference(by_hand, ByHand().run(windows=windows)) > 0


@pytest.mark.parametrize("windows", [1, slow(4)])
def test_float16_with_a_scaler(windows):
    scaler, plugin = torch.amp.GradScaler("cpu"), scaled()
    by_hand = ByHand(autocast=torch.float16).run(windows=windows, scaler=scaler)
    assert difference(by_hand, fitted(plugins=plugin, accumulate_grad_batches=windows)) == 0
    assert plugin.scaler.get_scale() == scaler.get_scale()
    assert plugin.scaler._growth_tracker.item() == scaler._growth_tracker.item() > 0


def test_clipped_gradients():
    by_hand = ByHand().run(clip=0.5)
    assert difference(by_hand, fitted(gradient_clip_val=0.5)) == 0
    assert difference(by_hand, ByHand().run()) > 1e-3


def test_gradients_of_the_input_with_accumulation_and_clipping():
    by_hand = GradientsByHand(weight=400.0).run(windows=4, clip=0.5)
    module = fitted(ConvClassifier, gradients(), accumulate_grad_batches=4, gradient_clip_val=0.5)
    assert difference(by_hand, module) == 0


@SLOW
def test_gradients_of_the_input_in_bfloat16():
    by_hand = GradientsByHand(weight=400.0, autocast=torch.bfloat16).run()
    assert difference(by_hand, fitted(ConvClassifier, gradients(), precision="bf16-mixed")) == 0


def test_gradients_of_the_input_with_a_scaler():
    scaler, plugin = torch.amp.GradScaler("cpu"), scaled()
    by_hand = GradientsByHand(weight=400.0, autocast=torch.float16).run(scaler=scaler)
    assert difference(by_hand, fitted(ConvClassifier, gradients(), plugins=plugin)) == 0
    assert plugin.scaler._growth_tracker.item() == scaler._growth_tracker.item() > 0


class LBFGS(ConvClassifier):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4, history_size=3)


def test_lbfgs():
    module, teacher, network = fitted(LBFGS), conv_teacher().eval(), made(LBFGS)
    optimizer, term, evaluations = network.configure_optimizers(), maps(), []
    for x, y in feature_loader():

        def closure(x=x, y=y):
            optimizer.zero_grad()
            with torch.no_grad():
                theirs = in_a_row(teacher.named_children(), x)
            ours = in_a_row(children_of(network), x)
            loss = F.cross_entropy(ours["head"], y) + term(ours, theirs)
            loss.backward()
            evaluations.append(loss.item())
            return loss

        optimizer.step(closure)
    assert difference(network, module) == 0
    assert len(evaluations) > 2 * STEPS


def test_the_mixin():
    module, network, teacher, term = fitted(ConvMixin), made(ConvMixin), conv_teacher().eval(), maps()
    optimizer = network.configure_optimizers()["optimizer"]
    for x, y in feature_loader():
        optimizer.zero_grad()
        ours = in_a_row(children_of(network), x)
        with torch.no_grad():
            theirs = in_a_row(teacher.named_children(), x)
        (F.cross_entropy(ours["head"], y) + term(ours, theirs)).backward()
        optimizer.step()
    assert difference(network, module) == 0


@SLOW
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("pairs", [STAGES, "auto"], ids=["given", "auto"])
@pytest.mark.parametrize("form", ["child", "in place"])
@pytest.mark.sample
def test_compiled(form, pairs):
    module = made(ConvClassifier)
    network = module.model
    if form == "child":
        module.model = torch.compile(network, backend="eager")
    else:
        network.compile(backend="eager")
    feature_fit(module, attention(pairs=pairs))
    assert difference(ByHand().run().model, network) == 0


# Students and teachers


class Two(ConvClassifier):
    """Calls a second network beside the student, so that the student must be named."""

    def build(self):
        super().build()
        self.other = nn.Linear(1, 1)

    def task_loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.model(x), y) + 0.0 * self.other(x[:, 0, 0, :1]).sum()


@pytest.mark.parametrize(
    ("kind", "student", "pairs"),
    [
        (ConvClassifier, None, STAGES),
        slow(ConvClassifier, None, "auto"),
        (ConvClassifier, "model", "auto"),
        (Two, "model", "auto"),
        (ConvItself, None, "auto"),
        (ConvItself, "", STAGES),
    ],
)
def test_students_that_are_named_or_found(kind, student, pairs):
    module = fitted(kind, attention(student=student, pairs=pairs))
    assert difference(ByHand(kind).run().state_dict(), module.state_dict()) == 0


@pytest.mark.parametrize("student", [None, slow("model"), slow("")])
def test_students_of_attention_by_gradients(student):
    kind = ConvItself if student == "" else ConvClassifier
    by_hand = GradientsByHand(kind, weight=400.0).run()
    assert difference(by_hand, fitted(kind, gradients(student=student))) == 0


@pytest.mark.parametrize("automatic", [slow(False), True])
def test_a_chain_of_two(automatic):
    pairs = {f"backbone.{name}": name for name in STAGES}
    by_hand = ByHand(ConvChain, maps({f"backbone.{name}": weight for name, weight in AUTO.items()}, pairs))
    callback = attention(student=["backbone", "head"], pairs="auto" if automatic else pairs)
    assert difference(by_hand.run(), fitted(ConvChain, callback)) == 0


@pytest.mark.parametrize("form", ["module", slow("description")])
def test_a_transform_before_the_teacher(form):
    """Its maps are twice as large then: they are pooled, and the weight is that of the student's size."""
    transform = nn.Upsample(scale_factor=2)
    given = {"class_path": "torch.nn.Upsample", "init_args": {"scale_factor": 2}}
    by_hand = ByHand(transform=transform)
    module = fitted(ConvClassifier, attention(teacher_transform=transform if form == "module" else given))
    assert difference(by_hand.run(), module) == 0
    assert difference(module, fitted()) > 1e-3


def test_a_transform_before_the_teacher_of_attention_by_gradients():
    """The gradient goes through the transform, back to the input that both received."""
    by_hand = GradientsByHand(weight=400.0, transform=nn.Upsample(scale_factor=2)).run()
    module = fitted(ConvClassifier, gradients(teacher_transform=nn.Upsample(scale_factor=2)))
    assert difference(by_hand, module) == 0


# With others


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("pairs", [pytest.param(STAGES, id="given", marks=SLOW), "auto"])
def test_together_with_distillation(order, pairs):
    teacher = conv_teacher()
    forwards = []
    teacher.register_forward_hook(lambda *_: forwards.append(1))
    callbacks = [
        attention(teacher=teacher, pairs=pairs),
        DistillationCallback(teacher, temperature=3.0, task_weight=0.3, kd_weight=0.7),
    ]
    module = fitted(ConvClassifier, *(callbacks[index] for index in order), limit_val_batches=0)
    assert len(forwards) == STEPS + (pairs == "auto")

    by_hand, term = ByHand(), maps()
    for x, y in feature_loader():
        ours = in_a_row(children_of(by_hand.module), x)
        with torch.no_grad():
            theirs = in_a_row(by_hand.teacher.named_children(), x)
        kd = C.distillation_loss(ours["head"], theirs["head"], 3.0)
        (F.cross_entropy(ours["head"], y) * 0.3 + term(ours, theirs) + kd * 0.7).backward()
        by_hand.optimizer.step()
        by_hand.optimizer.zero_grad()
        by_hand.scheduler.step()
    assert difference(by_hand.module, module) == 0


def test_maps_and_gradients_of_one_teacher_together():
    teacher = conv_teacher()
    forwards = []
    teacher.register_forward_hook(lambda *_: forwards.append(1))
    module = fitted(
        ConvClassifier, attention(teacher=teacher), gradients(teacher=teacher, name="j"), limit_val_batches=0
    )
    assert len(forwards) == 2 * STEPS  # attention by gradients has a forward of its own, and no other

    by_hand, term = GradientsByHand(weight=400.0), maps()
    for batch in feature_loader():
        x, y = batch[0].requires_grad_(), batch[1]
        ours = in_a_row(children_of(by_hand.module), x)
        with torch.no_grad():
            theirs = in_a_row(by_hand.teacher.named_children(), x)
        task = F.cross_entropy(ours["head"], y)
        (gradient,) = torch.autograd.grad(task, x, create_graph=True)
        (wanted,) = torch.autograd.grad(F.cross_entropy(by_hand.teacher(x), y), x)
        (task + term(ours, theirs) + C.gradient_transfer_loss(gradient, wanted) * 200.0).backward()
        by_hand.optimizer.step()
        by_hand.optimizer.zero_grad()
        by_hand.scheduler.step()
    assert difference(by_hand.module, module) == 0


def test_two_instances_add_up():
    """In the order of their names; each pair is the deepest of its instance."""
    teachers = [conv_teacher(), conv_teacher(seed=9)]
    callbacks = [
        attention(teacher=teachers[1], pairs={"stage2": "stage2"}, strength=0.1, name="b"),
        attention(teacher=teachers[0], pairs={"stage1": "stage1"}, strength=0.1, name="a"),
    ]
    module, by_hand = fitted(ConvClassifier, *callbacks), ByHand()
    teachers = [conv_teacher().eval(), conv_teacher(seed=9).eval()]
    for x, y in feature_loader():
        ours = in_a_row(children_of(by_hand.module), x)
        with torch.no_grad():
            one, two = (in_a_row(teacher.named_children(), x) for teacher in teachers)
        first = C.attention_transfer_loss(ours["stage1"], one["stage1"]) * (0.1 * 1000 * LARGE / 8**2)
        second = C.attention_transfer_loss(ours["stage2"], two["stage2"]) * (0.1 * 1000 * SMALL / 8**2)
        (F.cross_entropy(ours["head"], y) + first + second).backward()
        by_hand.optimizer.step()
        by_hand.optimizer.zero_grad()
        by_hand.scheduler.step()
    assert difference(by_hand.module, module) == 0
    metrics = module.trainer.callback_metrics
    assert metrics["compress/a/loss"].item() == first.item()
    assert metrics["compress/b/loss"].item() == second.item()


# What is logged


def test_what_is_logged():
    """The user's loss stays the task loss; ours is weighted. Validation is that of the final weights."""
    by_hand = ByHand(ConvNormClassifier)
    by_hand.run()
    module = fitted(ConvNormClassifier)
    metrics = module.trainer.callback_metrics
    assert metrics.keys() == {"train_loss", "val_loss", "compress/at/loss", "compress/at/val_loss"}
    assert metrics["train_loss"].item() == by_hand.task_losses[-1]
    assert metrics["compress/at/loss"].item() == by_hand.terms[-1]
    values = []
    with torch.no_grad():
        for x, _ in feature_loader(rows=2 * BATCH):
            ours = in_a_row(children_of(module.eval()), x)
            values.append(maps()(ours, in_a_row(conv_teacher().eval().named_children(), x)))
    assert metrics["compress/at/val_loss"].item() == pytest.approx(torch.stack(values).mean().item(), rel=1e-5)
