"""What the rehearsal must see, and what it must leave alone: each was once wrong, or silent."""

from __future__ import annotations

import copy

import lightning.pytorch as L
import pytest
import torch
import torchmetrics
from contract.modules import difference
from lightning.pytorch.loggers import CSVLogger
from structured_networks import EPOCH, Lit, Net, fitted, rows
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import DPFCallback, PruningCallback, QATCallback, StructuredPruningCallback
from lightning_compress.mechanisms.channel_graph import StructureError

pytestmark = pytest.mark.sample  # fits of convolutions


def structured(ratio=0.5, **arguments):
    return StructuredPruningCallback(ratio, **arguments)


class Sizes(Lit):
    """Batches of images of growing or shrinking size."""

    def __init__(self, lengths, **settings):
        super().__init__(net=nn.Sequential(
            nn.Conv2d(2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3),
        ), **settings)  # fmt: skip
        self.lengths = lengths

    def train_dataloader(self):
        images, labels = rows()
        sizes = [self.lengths[index * len(self.lengths) // EPOCH] for index in range(EPOCH)]
        return DataLoader([(F.interpolate(images[:4], size=(own, own)), labels[:4]) for own in sizes], batch_size=None)


def test_rounds_on_batches_of_other_sizes_take_as_much():
    """The share of multiply-accumulates is of the network, not of the batch at hand."""
    results = []
    rounds = {"schedule": "iterative", "rounds": 2, "end": 0.75}
    for lengths, schedule in (((8, 8), {}), ((8, 8), rounds), ((8, 16), rounds), ((16, 8), rounds)):
        module, callback = Sizes(lengths), structured(0.75, budget="macs", min_channels=2, **schedule)
        fitted(module, callback)
        assert callback.reached == pytest.approx(0.75, abs=0.02)
        results.append([module.net[0].out_channels, module.net[2].out_channels])
    assert results[0] == results[1] == results[2] == results[3]


class Scrambled(nn.Module):
    """Channels change places between two convolutions; elsewhere a norm sees channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.norm, self.fc = nn.GroupNorm(4, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.b(F.relu(self.a(x)).flip(1))))
        return self.fc(x.mean(dim=(2, 3)))


def test_a_norm_elsewhere_hides_nothing():
    with pytest.raises(StructureError, match=r"computes something else .*exclude=\['net.a'\]"):
        fitted(Lit(net=Scrambled()), structured(min_channels=4))


class Head(nn.Module):
    def __init__(self, scrambled):
        super().__init__()
        self.a, self.b, self.scrambled = nn.Linear(16, 16), nn.Linear(16, 3), scrambled

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.b(x.flip(1) if self.scrambled else x)


class TwoHeads(Lit):
    def __init__(self, scrambled, optimizer="sgd"):
        self.scrambled = scrambled
        super().__init__(optimizer, net=nn.Identity())

    def build(self, net):
        self.body = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.first, self.second = Head(self.scrambled), Head(False)

    def logits(self, x):
        features = self.body(x)
        return self.first(features) + self.second(features)


def test_a_step_is_rehearsed_in_the_precision_of_the_fit():
    """But where copies are compared, in double."""

    class Noting(Lit):
        noted = []

        def training_step(self, batch, batch_idx):
            self.noted.append((torch.is_autocast_enabled("cpu"), self.net(batch[0]).dtype))
            return super().training_step(batch, batch_idx)

    fitted(Noting(), structured(), precision="bf16-mixed")
    assert set(Noting.noted) == {(True, torch.bfloat16), (False, torch.float64)}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_all_networks_of_a_step_are_compared(precision):
    with pytest.raises(StructureError, match=r"computes something else .*exclude=\['first.a'\]"):
        fitted(TwoHeads(scrambled=True), structured(min_channels=4), precision=precision)
    module, callback = TwoHeads(scrambled=False), structured(min_channels=4)
    fitted(module, callback, precision=precision)
    assert module.body[0].out_channels == module.first.a.out_features == 8
    assert callback.plan.difference < 1e-5


@pytest.mark.parametrize("kind", [PruningCallback, DPFCallback])
def test_masks_on_what_stays_have_the_sparsity_that_was_asked_for(kind, tmp_path):
    """Filters go by another score than weights, so what stays may be masked more, or less, than the whole was."""
    for score in ("bn_scale", "l2"):
        masks, module = kind(0.5, end=0.1, update_interval=1), Lit()
        with torch.no_grad():
            module.net.conv2.weight[:12] *= 1.5  # dense, and what goes by the scale of its norm
            module.net.bn2.weight[:12] *= 0.1
        trainer = fitted(module, masks, structured(score=score, start=0.5), steps=16)
        assert masks.reached == pytest.approx(0.5, abs=1e-3)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        resumed = Lit()
        fitted(
            resumed, kind(0.5, end=0.1, update_interval=1), structured(score=score, start=0.5), steps=24,
            ckpt_path=tmp_path / "a.ckpt",
        )  # fmt: skip


class PartAverage(L.Callback):
    """An average of a part of the module, as Lightning's own is not."""

    def on_fit_start(self, trainer, pl_module):
        self._average_model = AveragedModel(pl_module.net)


def test_an_average_that_cannot_follow_is_refused_before_anything_goes():
    module, callback = Lit(), structured()
    shapes = [tuple(leaf.shape) for leaf in module.parameters()]
    with pytest.raises(ValueError, match=r"the plan is of another module than Net: 'net\.conv1\.weight'"):
        fitted(module, PartAverage(), callback)
    assert [tuple(leaf.shape) for leaf in module.parameters()] == shapes
    assert callback.reached == 0


def test_an_error_in_another_callback_leaves_a_state_that_fits_the_module():
    class Broken(PruningCallback):
        def follow_shrinkage(self, shrinkage, pl_module):
            raise RuntimeError("broken")

    module, callback = Lit(), structured()
    with pytest.raises(RuntimeError, match="broken"):
        fitted(module, callback, Broken(0.5))
    assert module.net.conv1.out_channels == 8
    assert callback.reached == 0.5


class Writing(Lit):
    """A step that takes things out of its batch, and writes into it."""

    def train_dataloader(self):
        images, labels = rows()
        return DataLoader(
            [{"x": x, "y": y} for x, y in zip(images.split(8), labels.split(8), strict=True)], batch_size=None
        )

    def training_step(self, batch, batch_idx):
        y = batch.pop("y")
        batch["x"].mul_(0.5)
        return F.cross_entropy(self.net(batch["x"]), y)

    def validation_step(self, batch, batch_idx):
        pass


def test_a_step_may_write_into_its_batch():
    class Halved(Lit):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0] * 0.5), batch[1])

    writing, plain = Writing(), Halved()
    fitted(writing, structured(start=0.5))
    fitted(plain, structured(start=0.5))
    assert difference(writing, plain) == 0


@pytest.mark.parametrize("order", [1, -1])
def test_in_the_same_step_quantisation_cannot_begin(order):
    """Of 8 steps, .51 and .6 both are the sixth."""
    with pytest.raises(ValueError, match="'qat' begins in the same step, or before"):
        fitted(Lit(), *[structured(start=0.51), QATCallback(start=0.6)][::order])


def test_a_number_of_the_users_is_no_size(tmp_path):
    class Counting(Lit):
        def __init__(self):
            super().__init__()
            self.num_heads = 0

        def on_train_batch_end(self, *_):
            self.num_heads = self.num_heads + 1

    fitted(Counting(), structured(), steps=8).save_checkpoint(tmp_path / "a.ckpt")
    module = Counting()
    fitted(module, structured(), steps=16, ckpt_path=tmp_path / "a.ckpt")
    assert module.net.conv1.out_channels == 8
    assert module.num_heads == 8


class Skipping(Lit):
    def __init__(self, skipped, **settings):
        super().__init__(**settings)
        self.skipped = skipped

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.skipped else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("score", ["l2", "taylor"])
def test_a_batch_that_is_skipped_is_waited_out(score):
    module = Skipping((0, 1, 4))
    fitted(module, structured(start=0.5, score=score), steps=16)
    assert module.net.conv1.out_channels == 8


def test_a_step_that_never_does_anything_is_an_error():
    with pytest.raises(StructureError, match="calls no network, in 32 batches"):
        fitted(Skipping(range(100)), structured(), steps=40)


class Iterating(Lit):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return super().training_step(batch, 0)


def test_a_step_that_draws_its_batches_is_refused():
    with pytest.raises(ValueError, match="draws its batches itself, from dataloader_iter"):
        fitted(Iterating(), structured())


def test_memory_formats_stay():
    module = Lit("adamw")
    module.net.to(memory_format=torch.channels_last)
    trainer = fitted(module, structured(start=0.5))
    weight = module.net.conv2.weight
    assert weight.shape == (12, 8, 3, 3)
    for tensor in (weight, trainer.optimizers[0].state[weight]["exp_avg"]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_a_copy_that_stays_large_is_told():
    class Averaging(Lit):
        def build(self, net):
            self.net, self.average = net, copy.deepcopy(net).requires_grad_(False)

    with pytest.warns(UserWarning, match="'average' is as large as 'net', and stays so while 'net' gets smaller"):
        fitted(Averaging(), structured())


def test_parameters_are_those_of_what_the_step_calls():
    class Aside(Lit):
        def build(self, net):
            self.net, self.other = net, nn.Linear(200, 200)

    callback = structured(budget="params")
    fitted(Aside(), callback)
    assert callback.reached == pytest.approx(0.5, abs=0.02)
    assert callback.plan.parameters[0] == sum(leaf.numel() for leaf in Net().parameters())


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_recurrent_layers_count(ratio):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(8, 64, 3, padding=1), nn.Conv1d(64, 64, 3, padding=1)
            self.rnn, self.fc = nn.LSTM(64, 64, batch_first=True), nn.Linear(64, 3)

        def forward(self, x):
            x = F.relu(self.b(F.relu(self.a(x.flatten(1, 2)))))
            return self.fc(self.rnn(x.transpose(1, 2))[0][:, -1])

    module, callback = Lit(net=Recurrent()), structured(ratio, budget="macs")
    fitted(module, callback)
    assert callback.reached == pytest.approx(ratio, abs=0.02)
    assert module.net.rnn.input_size == module.net.b.out_channels


def test_a_round_is_logged_once_whatever_the_interval(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = structured(schedule="iterative", rounds=2, end=0.5)
    trainer = L.Trainer(max_epochs=2, callbacks=[callback], logger=logger, accelerator="cpu", log_every_n_steps=50,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Lit())
    logger.save()
    lines = [line.split(",") for line in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()]
    column = lines[0].index("compress/structured/share")
    logged = [(line[lines[0].index("step")], line[column]) for line in lines[1:] if line[column]]
    assert [step for step, _ in logged] == ["4", "8"]
    assert float(logged[1][1]) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 7}, "rounds=7 has no effect with schedule='one_shot'"),
        ({"end": 0.7}, "end=0.7 has no effect with schedule='one_shot'"),
        ({"seed": 3}, "seed=3 has no effect with score='l2'"),
    ],
)
def test_arguments_without_effect_are_told_of(arguments, message):
    with pytest.warns(UserWarning, match=message):
        structured(**arguments)


def test_more_rounds_than_steps_are_told():
    with pytest.warns(UserWarning, match="rounds=50 are more than the 4 steps between start and end"):
        fitted(Lit(), structured(schedule="iterative", rounds=50))


class Positions(nn.Module):
    """A bare parameter over channels and places."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Linear(16, 3)
        self.places = nn.Parameter(torch.randn(1, 16, 4, 4))

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.a(x) + self.places))).mean(dim=(2, 3)))


def test_position_maps_lose_channels_not_places():
    module = Lit(net=Positions())
    fitted(module, structured(min_channels=4))
    assert module.net.places.shape == (1, 8, 4, 4)


def test_a_network_that_returns_no_tensor_says_so():
    class Distribution(Net):
        def forward(self, x):
            return torch.distributions.Categorical(logits=super().forward(x))

    class Likely(Lit):
        def training_step(self, batch, batch_idx):
            return -self.net(batch[0]).log_prob(batch[1]).mean()

        def validation_step(self, batch, batch_idx):
            pass

    with pytest.raises(StructureError, match="returns no tensor that a gradient could come to"):
        fitted(Likely(net=Distribution()), structured())


class Teaching(Lit):
    """A frozen teacher in the module, called before the student or after it, with gradients or without."""

    def __init__(self, first, graph):
        self.first, self.graph = first, graph
        super().__init__()

    def build(self, net):
        self.net, self.teacher = net, nn.Sequential(nn.Conv2d(2, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
        self.teacher.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        def taught():
            with torch.set_grad_enabled(self.graph):
                return self.teacher(batch[0])

        target = taught() if self.first else None
        output = self.net(batch[0])
        return F.mse_loss(output, taught() if target is None else target)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("graph", [True, False])
def test_a_frozen_teacher_stays_as_it_is_and_counts_nowhere(first, graph):
    module, callback = Teaching(first, graph), structured(budget="macs")
    plain, alone = structured(budget="macs"), Lit()
    fitted(module, callback)
    fitted(alone, plain)
    assert module.teacher[0].out_channels == 64
    assert callback.plan.macs == plain.plan.macs
    assert callback.plan.parameters == plain.plan.parameters


class Masking(nn.Module):
    """Numbers that stand for infinity beside logits that are wrong."""

    def __init__(self, value, wrong):
        super().__init__()
        self.a, self.fc, self.value, self.wrong = nn.Conv2d(2, 16, 3), nn.Linear(16, 3), value, wrong

    def forward(self, x):
        x = F.relu(self.a(x)).mean(dim=(2, 3))
        return F.pad(self.fc(x.flip(1) if self.wrong else x), (0, 1), value=self.value)


@pytest.mark.parametrize("value", [-1e9, -torch.inf])
def test_numbers_that_stand_for_infinity_hide_nothing(value):
    with pytest.raises(StructureError, match="computes something else"):
        fitted(Lit(net=Masking(value, wrong=True)), structured())
    module = Lit(net=Masking(value, wrong=False))
    fitted(module, structured())
    assert module.net.a.out_channels == 8


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.embed, self.head = nn.Conv2d(2, 16, 3), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x, embed=False):
        x = self.embed(F.relu(self.body(x)).mean(dim=(2, 3)))
        return F.normalize(x, dim=1) if embed else self.head(F.relu(x))


@pytest.mark.parametrize("embedded_first", [True, False])
def test_all_calls_of_a_network_are_looked_at(embedded_first):
    """What any of them returns keeps its shape."""

    class Contrastive(Lit):
        def training_step(self, batch, batch_idx):
            outputs = {embed: self.net(batch[0], embed=embed) for embed in (embedded_first, not embedded_first)}
            return F.cross_entropy(outputs[False], batch[1]) + (outputs[True] @ outputs[True].T).square().mean()

    module = Contrastive(net=Embedding())
    fitted(module, structured(min_channels=4))
    assert module.net.body.out_channels == 8
    assert module.net(torch.ones(1, 2, 4, 4), embed=True).shape == (1, 16)


def test_what_only_training_computes_is_compared_too():
    class Training(Net):
        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            return self.fc(F.relu(self.bn2(self.conv2(x.flip(1) if self.training else x))).flatten(1))

    with pytest.raises(StructureError, match="computes something else"):
        fitted(Lit(net=Training()), structured())


def test_dropout_is_no_difference():
    for dropout in (0.5, 0.0):
        callback = structured()
        fitted(Lit(dropout=dropout), callback)
        assert callback.plan.difference < 1e-10


def test_the_step_runs_with_the_smaller_network_before_anything_goes():
    class Regular(Lit):
        def training_step(self, batch, batch_idx):
            rows = self.net.conv1.weight.flatten(1)
            return super().training_step(batch, batch_idx) + (rows @ rows.T - torch.eye(16)).square().mean()

    module = Regular()
    with pytest.raises(StructureError, match=r"the training step does not run with the smaller network: RuntimeError"):
        fitted(module, structured(start=0.5))
    assert module.net.conv1.out_channels == 16


def test_what_a_network_keeps_of_the_larger_one_is_noticed_with_the_first_batch():
    class Remembering(Net):
        last = None

        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            self.last = x.detach() if self.last is None else 0.9 * self.last + 0.1 * x.detach()
            return self.fc(F.relu(self.bn2(self.conv2(x + self.last))).flatten(1))

    steps = []

    class Count(L.Callback):
        def on_train_batch_end(self, *_):
            steps.append(1)

    with pytest.raises(StructureError, match="the smaller network does not run"):
        fitted(Lit(net=Remembering()), structured(start=0.5), Count())
    assert steps == []


class Anchored(Net):
    """With a parameter that holds nothing, as some keep to know the device."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.empty(0))

    def forward(self, x):
        return super().forward(x.to(self.anchor.device))


class Padded(nn.Module):
    """Channels are added as zeros, as in the shortcuts of the first residual networks."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1), nn.Linear(32, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(self.b(x) + F.pad(x, (0, 0, 0, 0, 8, 8)))
        return self.fc(x.mean(dim=(2, 3)))


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.a, self.norm, self.fc = nn.Conv2d(2, 16, 3, padding=1), norm, nn.Linear(16, 3)

    def forward(self, x):
        x = self.a(x)
        x = self.norm(x.movedim(1, -1)).movedim(-1, 1) if isinstance(self.norm, nn.RMSNorm) else self.norm(x)
        return self.fc(F.relu(x).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    "net",
    [
        Anchored,
        lambda: Normed(nn.RMSNorm(16)),
        lambda: Normed(nn.InstanceNorm2d(16, affine=True, track_running_stats=True)),
        lambda: Normed(nn.InstanceNorm2d(16)),
    ],
)
def test_these_work_too(net):
    module, callback = Lit(net=net()), structured(min_channels=4)
    fitted(module, callback)
    first = module.net.conv1 if isinstance(module.net, Net) else module.net.a
    assert first.out_channels == 8
    assert callback.plan.difference < 1e-5


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Padded, "no filters can go: .*'net.a'.* in a way that is not regular"),
        (
            lambda: nn.Sequential(
                nn.Conv2d(2, 16, 3, padding=1), nn.ConvTranspose2d(16, 16, 1, groups=4), nn.Flatten(), nn.Linear(256, 3)
            ),
            "reaches 'net.1', a transposed convolution with groups",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(2, 16, 3), nn.Flatten(), torch.jit.script(nn.Linear(64, 3))),
            "'net.2' is a scripted module, whose structure cannot be told",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_these_are_refused_by_name(net, message):
    with pytest.raises(StructureError, match=message):
        fitted(Lit(net=net()), structured(min_channels=4))


def test_metrics_are_no_layers():
    class Measured(Lit):
        def build(self, net):
            self.net, self.accuracy = (
                net,
                torchmetrics.MetricCollection([MulticlassAccuracy(3), torchmetrics.MeanMetric()]),
            )

    module = Measured()
    fitted(module, structured())
    assert module.net.conv1.out_channels == 8


def tower(width=16):
    """Two convolutions, of which the first can lose filters."""
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


class Twice(Lit):
    """Calls its network twice, and a frozen one beside it, before or after."""

    def __init__(self, first=False):
        super().__init__(net=tower())
        self.teacher, self.first = tower(24).requires_grad_(False), first

    def training_step(self, batch, batch_idx):
        x, labels = batch
        target = self.teacher(x) if self.first else None
        one, other = self.net(x), self.net(x.flip(-1))
        target = self.teacher(x) if target is None else target
        return F.mse_loss(one, other) + F.cross_entropy(one, labels) + F.mse_loss(one, target)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("budget", ["filters", "params", "macs"])
def test_a_frozen_network_beside_two_calls_stays_and_counts_nowhere(budget, first):
    module, callback = Twice(first), structured(budget=budget, min_channels=2)
    fitted(module, callback)
    assert module.net[0].out_channels == 8
    assert module.teacher[0].out_channels == 24
    assert callback.plan.parameters == (576, sum(leaf.numel() for leaf in module.net.parameters()))
    assert callback.plan.macs[0] == 2 * 8 * 16 * (16 * 2 * 9 + 16 * 16)  # two calls, 8 images of 4x4
    assert callback.plan.left == {
        "net.2": "is what the network returns", "teacher.0": "is of a frozen network",
        "teacher.2": "is of a frozen network",
    }  # fmt: skip


@pytest.mark.parametrize("budget", ["filters", "macs"])
def test_one_network_may_change_though_it_is_called_twice_beside_others(budget):
    class Gan(Lit):
        def __init__(self):
            super().__init__(net=nn.Linear(4, 3))
            self.g = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 48))
            self.d = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 1))

        def training_step(self, batch, batch_idx):
            return self.d(torch.ones(8, 48)).mean() - self.d(self.g(torch.ones(8, 16))).mean()

        def validation_step(self, batch, batch_idx):
            pass

    module, callback = Gan(), structured(budget=budget, network="d")
    fitted(module, callback)
    assert [module.g[0].out_features, module.d[0].out_features, module.d[2].out_features] == [64, 32, 1]
    assert callback.plan.left["g.0"] == "is of another network"


NOISY = {
    "dropout": lambda x, training: F.dropout(x, 0.3, training),
    "dropout that always drops": lambda x, training: F.dropout(x, 0.3, True),
    "channel dropout": lambda x, training: F.dropout2d(x, 0.3, training),
    "noise": lambda x, training: x + 0.1 * torch.randn_like(x),
    "noise that is drawn otherwise": lambda x, training: x + 0.1 * torch.randn(x.shape),
    "a random slope": lambda x, training: F.rrelu(x, training=training),
    "a norm, called directly": lambda x, training: torch.group_norm(x, 1),
    "a layer norm, called directly": lambda x, training: torch.layer_norm(x.movedim(1, -1), (x.shape[1],)).movedim(
        -1, 1
    ),
}


class Noisy(nn.Module):
    def __init__(self, kind, scrambled=False):
        super().__init__()
        self.kind, self.scrambled = kind, scrambled
        self.a, self.b, self.fc = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Linear(16, 3)

    def forward(self, x):
        x = NOISY[self.kind](self.a(x), self.training)
        return self.fc(self.b(x.flip(1) if self.scrambled else x).mean((2, 3)))


@pytest.mark.parametrize("kind", NOISY)
def test_random_numbers_are_no_difference(kind):
    module, callback = Lit(net=Noisy(kind)), structured()
    fitted(module, callback)
    assert module.net.a.out_channels == 8
    assert callback.plan.difference is None if "otherwise" in kind else callback.plan.difference < 1e-9


@pytest.mark.parametrize("kind", ["dropout", "dropout that always drops", "noise", "a random slope"])
def test_random_numbers_hide_no_difference(kind):
    with pytest.raises(StructureError, match=r"computes something else"):
        fitted(Lit(net=Noisy(kind, scrambled=True)), structured())


def test_a_step_that_differentiates_itself_is_tried_with_gradients():
    class Adversarial(Lit):
        def training_step(self, batch, batch_idx):
            x = batch[0].clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(self.net(x), batch[1]), x)
            return F.cross_entropy(self.net((x + 0.1 * slope.sign()).detach()), batch[1])

    module, callback = Adversarial(net=Noisy("dropout")), structured()
    fitted(module, callback)
    assert module.net.a.out_channels == 8
    assert callback.plan.difference < 1e-9


def test_what_is_differentiated_twice_says_so():
    class Penalised(Lit):
        def training_step(self, batch, batch_idx):
            x = batch[0].clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
            return F.cross_entropy(self.net(batch[0]), batch[1]) + slope.square().mean()

    with pytest.raises(StructureError, match=r"differentiated on the way .*create_graph=True"):
        fitted(Penalised(), structured())


def test_skipped_batches_are_counted_in_a_row():
    skipped = [index for index in range(80) if index % 7 != 6]
    module = Skipping(skipped)
    module.train_dataloader = lambda: DataLoader([tuple(own[:8] for own in rows())] * 80, batch_size=None)
    fitted(module, structured(schedule="iterative", end=0.9, rounds=40))
    assert module.net.conv1.out_channels == 8


def test_what_goes_with_a_single_channel_says_so():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gate, self.b = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1), nn.Linear(16, 16)
            self.fc = nn.Linear(16, 3)

        def forward(self, x):
            x = self.a(x).relu()
            x = x * self.gate(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)).sigmoid()
            return self.fc(self.b(x.mean((2, 3))).relu())

    callback = structured()
    fitted(Lit(net=Gated()), callback)
    assert callback.plan.left["net.gate"] == "has no more than min_channels=8"
    assert callback.plan.left["net.a"] == "goes together with 'net.gate', which has no more than min_channels=8"


def test_what_is_no_number_in_both_is_no_difference():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            x = self.net(x)
            return x, x[:, :1] * 0 + float("nan")

    class First(Lit):
        def logits(self, x):
            return self.net(x)[0]

    module, callback = First(net=Empty()), structured()
    fitted(module, callback)
    assert module.net.net.conv1.out_channels == 8
    assert callback.plan.difference < 1e-9
