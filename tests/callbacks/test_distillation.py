"""DistillationCallback in real fits: each loss, each shape of logits, each container, and everything it refuses."""

from __future__ import annotations

import copy
import math

import lightning.pytorch as L
import pytest
import torch
from contract.modules import CLASSES, FEATURES, Classifier, difference, fit, loader, made, small_network, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForTokenClassification

from lightning_compress import DistillationCallback
from lightning_compress import functional as LF
from lightning_compress.mechanisms.capture import CaptureError

IGNORED = -100


class Any(L.LightningModule):
    """A network, batches of anything, and a task loss that only pulls the logits to zero."""

    def __init__(self, network: nn.Module, pick=lambda output: output) -> None:
        super().__init__()
        self.model = network
        self.pick = pick

    def training_step(self, batch, batch_idx):
        loss = self.pick(self.model(batch[0])).square().mean()
        self.log("task", loss)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.model(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Wrapped(nn.Module):
    """Gives the logits of a network in a container."""

    def __init__(self, network: nn.Module, wrap) -> None:
        super().__init__()
        self.network, self.wrap = network, wrap

    def forward(self, x):
        return self.wrap(self.network(x))


class Tokens(nn.Module):
    """(N, L, F) to (N, L, K)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.layer(x)


def dense(inputs: int = 2) -> nn.Conv2d:
    return nn.Conv2d(inputs, CLASSES, 3, padding=1)


def bert(hidden: int) -> nn.Module:
    config = BertConfig(
        vocab_size=20, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForTokenClassification(config)


def batches(*tensors, size: int = 2) -> DataLoader:
    return DataLoader(torch.utils.data.TensorDataset(*tensors), batch_size=size)


def first_step(student: nn.Module, teacher: nn.Module, *tensors, pick=lambda output: output, **arguments):
    """One step on one batch: the logged quantities, and the logits of the two as they were before it."""
    x = tensors[0]
    before = copy.deepcopy(student)
    run = trainer(DistillationCallback(teacher, **arguments), max_steps=1)
    run.fit(Any(student, pick), batches(*tensors, size=len(x)))
    teacher.eval()
    with torch.no_grad():
        return run.callback_metrics, pick(before(x)), teacher(x)


def refused(message: str, student: nn.Module, teacher: nn.Module, *tensors, error=ValueError, **arguments) -> None:
    """The error comes in the first batch, and the module is as it was."""
    module = Any(student)
    state, keys = copy.deepcopy(module.state_dict()), set(vars(module))
    with pytest.raises(error, match=message):
        trainer(DistillationCallback(teacher, **arguments)).fit(module, batches(*tensors))
    assert difference(module, state) == 0
    assert untouched(module, keys)


def untouched(module: nn.Module, keys: set[str]) -> bool:
    new = {key for key in vars(module) if key not in keys}
    hooks = [hook for part in module.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]
    return not hooks and not {key for key in new if "compress" in key or key.endswith("step") or key == "forward"}


# The losses


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("auto", lambda s, t, y: LF.distillation_loss(s, t, 3.0)),
        ("softmax", lambda s, t, y: LF.distillation_loss(s, t, 3.0)),
        ("bernoulli", lambda s, t, y: LF.bernoulli_distillation_loss(s, t, 3.0)),
        ("mse", lambda s, t, y: F.mse_loss(s, t)),
        ("hard", lambda s, t, y: F.cross_entropy(s, t.argmax(dim=1))),
        ("dkd", lambda s, t, y: LF.decoupled_distillation_loss(s, t, y, 3.0)),
        ("dist", lambda s, t, y: LF.dist_loss(s, t, 3.0)),
    ],
)
def test_each_kind_logs_its_loss_and_adds_it_to_the_users(kind, expected):
    x, y = torch.randn(6, FEATURES), torch.randint(CLASSES, (6,))
    student, teacher = small_network(), small_network()
    before = copy.deepcopy(student)
    settings = {"task_weight": 0.25, "kd_weight": 0.5, **({} if kind in ("mse", "hard") else {"temperature": 3.0})}
    logged, s, t = first_step(student, teacher, x, y, loss_kind=kind, **settings)
    assert torch.equal(logged["compress/kd/loss"], expected(s, t, y))
    assert logged["task"] == s.square().mean()
    if kind == "mse":
        assert "compress/kd/agreement" not in logged
    else:
        same = (s > 0) == (t > 0) if kind == "bernoulli" else s.argmax(dim=1) == t.argmax(dim=1)
        assert logged["compress/kd/agreement"].item() == pytest.approx(same.float().mean().item())
    logits = before(x)
    (0.25 * logits.square().mean() + 0.5 * expected(logits, t, y)).backward()
    for after, start in zip(student.parameters(), before.parameters(), strict=True):
        assert torch.allclose(after, start - 0.01 * start.grad, atol=1e-7)


@pytest.mark.parametrize(
    ("student", "teacher", "x", "dimension"),
    [
        (nn.Linear(FEATURES, CLASSES), small_network(), torch.randn(4, FEATURES), 1),
        (dense(), dense(), torch.randn(4, 2, 5, 6), 1),
        (Tokens(), Tokens(), torch.randn(4, 7, FEATURES), 2),
    ],
)
def test_auto_takes_the_classes_where_the_shape_says(student, teacher, x, dimension):
    logged, s, t = first_step(student, teacher, x)
    assert torch.equal(logged["compress/kd/loss"], LF.distillation_loss(s, t, 4.0, class_dim=dimension))
    agreement = (s.argmax(dim=dimension) == t.argmax(dim=dimension)).float().mean().item()
    assert logged["compress/kd/agreement"].item() == pytest.approx(agreement)


def test_auto_says_what_it_chose(caplog):
    caplog.set_level("INFO", logger="lightning_compress")
    first_step(small_network(), small_network(), torch.randn(4, FEATURES))
    assert "kd: student 'model'" in caplog.text
    assert "loss_kind softmax, classes in dimension 1 of (4, 3)" in caplog.text


@pytest.mark.sample
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_auto_refuses_shapes_that_may_mean_anything(shape):
    network = Wrapped(nn.Linear(FEATURES, 1), lambda logits: logits.view(len(logits), *shape[1:]))
    refused("loss_kind", network, copy.deepcopy(network), torch.randn(4, FEATURES))
    logged, s, t = first_step(network, copy.deepcopy(network), torch.randn(4, FEATURES), loss_kind="bernoulli")
    assert logged["compress/kd/loss"] == 0
    assert torch.equal(s, t)


def test_class_dim_wins_over_the_shape():
    network, teacher = Wrapped(dense(), lambda x: x.flatten(2)), Wrapped(dense(), lambda x: x.flatten(2))
    x = torch.randn(4, 2, 5, 6)
    logged, s, t = first_step(network, teacher, x, class_dim=1)  # (N, K, L), which looks like (N, L, K)
    assert torch.equal(logged["compress/kd/loss"], LF.distillation_loss(s, t, 4.0, class_dim=1))
    refused(r"class_dim=3 is no dimension of logits of shape \(2, 3, 30\)", network, teacher, x, class_dim=3)


# Labels


def test_positions_that_are_ignored_carry_no_term():
    x, y = torch.randn(4, 2, 5, 6), torch.randint(CLASSES, (4, 5, 6))
    y[:, :3] = IGNORED
    logged, s, t = first_step(dense(), dense(), x, y, ignore_index=IGNORED)
    kept = (entry.movedim(1, -1)[y != IGNORED] for entry in (s, t))
    assert logged["compress/kd/loss"].item() == pytest.approx(LF.distillation_loss(*kept, 4.0).item())


def test_labels_may_be_told():
    x, y = torch.randn(4, 7, FEATURES), torch.randint(CLASSES, (4, 7))
    y[:, 4:] = IGNORED
    logged, s, t = first_step(Tokens(), Tokens(), x, torch.zeros_like(y), y, ignore_index=IGNORED, labels=2)
    assert logged["compress/kd/loss"].item() == pytest.approx(
        LF.distillation_loss(s[:, :4].reshape(-1, CLASSES), t[:, :4].reshape(-1, CLASSES), 4.0).item()
    )


@pytest.mark.parametrize(
    ("tensors", "arguments", "message"),
    [
        (0, {"ignore_index": IGNORED}, r"ignore_index=-100 needs the labels, .*0 integer tensors of shape \(2,\)"),
        (2, {"ignore_index": IGNORED}, r"ignore_index=-100 needs the labels, .*2 integer tensors .*labels="),
        (2, {"loss_kind": "dkd"}, r"loss_kind='dkd' needs the labels, .*2 integer tensors"),
        (1, {"loss_kind": "dkd", "labels": 5}, r"labels=5 is not in the batch"),
    ],
)
def test_labels_that_cannot_be_told_are_refused(tensors, arguments, message):
    labels = [torch.zeros(4, dtype=torch.long)] * tensors
    refused(message, small_network(), small_network(), torch.randn(4, FEATURES), *labels, **arguments)


# Containers


@pytest.mark.parametrize(
    ("wrap", "pick", "output"),
    [
        (lambda z: (z, z.argmax(dim=1)), lambda out: out[0], None),
        (lambda z: (z * 0, z), lambda out: out[1], 1),
        (lambda z: {"out": z, "aux": z * 0}, lambda out: out["out"], None),
        (lambda z: {"logits": z, "features": z * 0}, lambda out: out["logits"], None),
        (lambda z: {"main": z, "aux": z * 0}, lambda out: out["main"], "main"),
        (lambda z: torch.distributions.Categorical(logits=z), lambda out: out.logits, None),
    ],
)
@pytest.mark.parametrize("plain_teacher", [False, True])
def test_logits_in_containers(wrap, pick, output, plain_teacher):
    teacher = small_network()
    x = torch.randn(4, FEATURES)
    t = teacher(x).detach()
    given = teacher if plain_teacher else Wrapped(teacher, wrap)
    logged, s, _ = first_step(Wrapped(small_network(), wrap), given, x, pick=pick, output=output)
    assert logged["compress/kd/loss"].item() == pytest.approx(LF.distillation_loss(s, t, 4.0).item(), rel=1e-5)


def test_an_object_with_logits():
    student, teacher = bert(8), bert(16)
    x = torch.randint(20, (4, 6))
    logged, s, t = first_step(student, teacher, x, pick=lambda output: output.logits)
    assert s.shape == (4, 6, CLASSES)
    assert torch.equal(logged["compress/kd/loss"], LF.distillation_loss(s, t.logits, 4.0, class_dim=2))


def test_an_output_that_cannot_be_told_is_refused():
    network = Wrapped(small_network(), lambda z: (z, z))
    module = Any(network, lambda out: out[0])
    with pytest.raises(ValueError, match="the student returns tuple of Tensor, Tensor with 2 floating tensors; say"):
        trainer(DistillationCallback(small_network())).fit(module, batches(torch.randn(4, FEATURES)))
    with pytest.raises(ValueError, match="output='logit' is not in the student's output"):
        trainer(DistillationCallback(small_network(), output="logit")).fit(module, batches(torch.randn(4, FEATURES)))


# A teacher that wants another input


@pytest.mark.parametrize(
    ("transform", "by_hand"),
    [
        (nn.Upsample(scale_factor=2), lambda x: F.interpolate(x, scale_factor=2)),
        (nn.InstanceNorm2d(2), lambda x: F.instance_norm(x)),
        (
            {"class_path": "torch.nn.Upsample", "init_args": {"scale_factor": 2}},
            lambda x: F.interpolate(x, scale_factor=2),
        ),
    ],
)
def test_a_transform_stands_before_the_teacher(transform, by_hand):
    x = torch.randn(4, 2, 6, 6)
    student, teacher = (nn.Sequential(dense(), nn.AdaptiveAvgPool2d(1), nn.Flatten()) for _ in range(2))
    with torch.no_grad():
        expected = LF.distillation_loss(student(x), teacher(by_hand(x)), 4.0).item()
    logged, _, _ = first_step(student, teacher, x, teacher_transform=transform)
    assert logged["compress/kd/loss"].item() == pytest.approx(expected)


# Validation


def test_validation_is_the_mean_over_all_samples_of_uneven_batches():
    x = torch.randn(7, FEATURES)
    student, teacher = small_network(), small_network()
    run = trainer(DistillationCallback(teacher, temperature=2.0), num_sanity_val_steps=2)
    run.fit(Any(student), batches(x), batches(x, size=4))
    with torch.no_grad():
        s, t = student(x), teacher(x)
    logged = run.callback_metrics
    assert logged["compress/kd/val_loss"].item() == pytest.approx(LF.distillation_loss(s, t, 2.0).item(), rel=1e-5)
    assert logged["compress/kd/val_agreement"].item() == pytest.approx(
        (s.argmax(1) == t.argmax(1)).float().mean().item()
    )


def test_validation_weighs_by_the_positions_that_count():
    x, y = torch.randn(5, 2, 4, 4), torch.randint(CLASSES, (5, 4, 4))
    y[0] = y[4] = IGNORED
    y[1, 1:] = IGNORED
    student, teacher = dense(), dense()
    run = trainer(DistillationCallback(teacher, ignore_index=IGNORED))
    run.fit(Any(student), batches(x, y), batches(x, y))  # the last batch holds nothing that counts
    with torch.no_grad():
        s, t = (network(x).movedim(1, -1)[y != IGNORED] for network in (student, teacher))
    logged = run.callback_metrics
    assert logged["compress/kd/val_loss"].item() == pytest.approx(LF.distillation_loss(s, t, 4.0).item(), rel=1e-5)
    assert logged["compress/kd/val_agreement"].item() == pytest.approx(
        (s.argmax(1) == t.argmax(1)).float().mean().item()
    )


def test_each_of_several_validation_loaders_has_its_own_values():
    x = torch.randn(9, FEATURES)
    student, teacher = small_network(), small_network()
    run = trainer(DistillationCallback(teacher))
    run.fit(Any(student), batches(x), [batches(x[:4]), batches(x[4:])])
    with torch.no_grad():
        for index, part in enumerate((x[:4], x[4:])):
            same = (student(part).argmax(1) == teacher(part).argmax(1)).float().mean().item()
            assert run.callback_metrics[f"compress/kd/val_agreement/dataloader_idx_{index}"].item() == pytest.approx(
                same
            )


def test_validation_with_several_calls_is_not_measured_and_does_not_stop_the_training():
    class Twice(Any):
        def validation_step(self, batch, batch_idx):
            self.model(batch[0])
            self.model(-batch[0])

    x = torch.randn(4, FEATURES)
    module = Twice(small_network())
    run = trainer(DistillationCallback(small_network()))
    with pytest.warns(
        UserWarning, match="'kd': validation calls the student 2 times a step, not once, so it is not mea"
    ):
        run.fit(module, batches(x), batches(x))
    assert "compress/kd/val_loss" not in run.callback_metrics
    assert run.callback_metrics["compress/kd/loss"] > 0


def test_two_teachers_under_two_names():
    first, second = small_network(), small_network()
    x = torch.randn(4, FEATURES)
    student = small_network()
    s = student(x).detach()
    run = trainer(DistillationCallback(first), DistillationCallback(second, name="other", task_weight=1.0), max_steps=1)
    run.fit(Any(student), batches(x, size=4))
    for name, teacher in (("kd", first), ("other", second)):
        assert torch.equal(run.callback_metrics[f"compress/{name}/loss"], LF.distillation_loss(s, teacher(x), 4.0))


# What is refused when the callback is made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "temperature must be a positive number, got 0"),
        ({"temperature": -1.0}, "temperature must be a positive number, got -1.0"),
        ({"temperature": math.nan}, "temperature must be a positive number, got nan"),
        ({"temperature": "4"}, "temperature must be a positive number, got '4'"),
        ({"task_weight": 0, "kd_weight": 0}, "task_weight and kd_weight are both 0"),
        ({"task_weight": -0.1}, "task_weight must be a number of at least 0, got -0.1"),
        ({"kd_weight": -1}, "kd_weight must be a number of at least 0, got -1"),
        ({"kd_weight": math.inf}, "kd_weight must be a number of at least 0, got inf"),
        ({"loss_kind": "sofmax"}, "loss_kind must be one of auto, .*got 'sofmax'; did you mean 'softmax'"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationCallback(small_network(), **arguments)


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        (nn.Linear, TypeError, "teacher must be a module, got the class Linear; call it"),
        (None, TypeError, "teacher must be a torch.nn.Module, or a class_path with init_args, got NoneType"),
        ({"class_path": "torch.nn.Linaer"}, ValueError, "did you mean 'Linear'"),
        ({"class_path": "torch.nn.Linear", "init_args": {"in_feature": 2}}, ValueError, "did you mean 'in_features'"),
        ({"class_path": "torch.nn.Linear", "init_args": {"in_features": 2}}, ValueError, "teacher could not be built"),
    ],
)
def test_teachers_that_cannot_be_built_are_refused(teacher, error, message):
    with pytest.raises(error, match=message):
        DistillationCallback(teacher)


def test_a_transform_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"teacher_transform must be a torch.nn.Module, .*got function"):
        DistillationCallback(small_network(), teacher_transform=lambda x: x)


def test_a_weight_of_zero_is_warned_of():
    with pytest.warns(UserWarning, match="kd_weight is 0: the teacher is measured but not learned from"):
        DistillationCallback(small_network(), kd_weight=0.0)


# What is refused at the start of the fit or in the first batch


X = torch.randn(4, FEATURES)


def test_another_shape_of_the_teachers_logits_is_refused():
    refused(
        r"teacher's logits have shape \(2, 5\) and those of the student '.*' \(2, 3\)",
        small_network(),
        nn.Linear(FEATURES, 5),
        X,
    )


def test_a_teacher_that_wants_another_input_is_refused():
    refused(
        r"the teacher Linear failed on .*\[\(2, 8\)\]", small_network(), nn.Linear(5, CLASSES), X, error=RuntimeError
    )


@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_logits_that_are_not_finite_are_refused(owner):
    networks = {"student": small_network(), "teacher": small_network()}
    nn.init.constant_(networks[owner][0].bias, math.nan)
    module = Any(networks["student"])
    with pytest.raises(ValueError, match=f"the {owner}'s logits hold NaN or infinity in the first step"):
        trainer(DistillationCallback(networks["teacher"])).fit(module, batches(X))
    assert module.global_step == 0


def test_a_student_without_a_gradient_is_refused():
    class Head(Any):
        def __init__(self):
            super().__init__(small_network().requires_grad_(False))
            self.scale = nn.Parameter(torch.ones(()))

        def training_step(self, batch, batch_idx):
            return (self.model(batch[0]) * self.scale).sum()

    with pytest.raises(ValueError, match="the student's logits carry no gradient"):
        trainer(DistillationCallback(small_network())).fit(Head(), batches(X))


def test_an_unknown_student_is_refused():
    module = Any(small_network())
    keys = set(vars(module))
    with pytest.raises(ValueError, match=r"student names 'modle', not a module of Any; did you mean 'model'"):
        trainer(DistillationCallback(small_network(), student="modle")).fit(module, batches(X))
    assert untouched(module, keys)


def test_a_student_that_is_never_called_is_refused():
    class Spare(Any):
        def __init__(self):
            super().__init__(small_network())
            self.spare = small_network()

    with pytest.raises(CaptureError, match=r"without calling the student 'spare', .*name the network that it calls"):
        trainer(DistillationCallback(small_network(), student="spare")).fit(Spare(), batches(X))


class Two(Any):
    """Calls its two parts in a row."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, 4))
        self.head = nn.Linear(4, CLASSES)

    def training_step(self, batch, batch_idx):
        return self.head(self.model(batch[0])).square().mean()

    def validation_step(self, batch, batch_idx):
        self.head(self.model(batch[0]))


def test_two_candidates_are_refused_and_the_chain_works():
    module = Two()
    keys = set(vars(module))
    with pytest.raises(CaptureError, match=r"'model', 'head'; .*student=\[\"model\", \"head\"\]"):
        trainer(DistillationCallback(small_network())).fit(module, batches(X))
    assert untouched(module, keys)
    teacher = small_network()
    expected = LF.distillation_loss(module.head(module.model(X)), teacher(X), 4.0).item()
    run = trainer(DistillationCallback(teacher, student=["model", "head"]), max_steps=1)
    run.fit(module, batches(X, size=4), batches(X, size=4))
    assert run.callback_metrics["compress/kd/loss"].item() == pytest.approx(expected)
    assert run.callback_metrics["compress/kd/val_loss"] > 0


def test_two_calls_a_step_are_refused():
    class Pair(Any):
        def training_step(self, batch, batch_idx):
            return (self.model(batch[0]) - self.model(-batch[0])).square().mean()

    module = Pair(small_network())
    keys, state = set(vars(module)), copy.deepcopy(module.state_dict())
    with pytest.raises(CaptureError, match="the step calls the student 'model' 2 times"):
        trainer(DistillationCallback(small_network())).fit(module, batches(X))
    assert untouched(module, keys)
    assert difference(module, state) == 0


def test_a_teacher_that_is_the_student_is_refused():
    network = small_network()
    for teacher in (network, nn.Sequential(network)):
        refused("shares parameters with Any, the module being trained", network, teacher, X)
    assert all(parameter.requires_grad for parameter in network.parameters())
    fit(Classifier, DistillationCallback(copy.deepcopy(made(Classifier))))


def test_a_lightning_module_teaches_through_its_forward():
    teacher, student = made(Classifier), made(Classifier, seed=5)
    run = trainer(DistillationCallback(teacher), max_steps=1)
    x, _ = next(iter(loader()))
    expected = LF.distillation_loss(student.model(x), teacher.model(x), 4.0).item()
    run.fit(student, loader())
    assert run.callback_metrics["compress/kd/loss"].item() == pytest.approx(expected)
    assert teacher.training
    refused(r"teacher Any has no forward, .*\(model\)", small_network(), Any(small_network()), X)


def test_two_callbacks_of_one_name_are_refused():
    # Two of one class: Lightning itself refuses, when the Trainer is made. Two of different classes: see test_base.
    with pytest.raises(RuntimeError, match=r"more than one stateful callback of type `DistillationCallback`"):
        trainer(DistillationCallback(small_network()), DistillationCallback(small_network()))


def test_two_callbacks_that_weigh_the_task_are_refused():
    module = made(Classifier)
    with pytest.raises(ValueError, match=r"'kd' sets task_weight=0.1 and 'b' sets task_weight=0.1; only one"):
        trainer(DistillationCallback(small_network()), DistillationCallback(small_network(), name="b")).fit(
            module, loader()
        )
    assert not {key for key in vars(module) if "compress" in key or key.endswith("_step")}
