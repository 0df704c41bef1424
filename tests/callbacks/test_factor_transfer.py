"""FactorTransferCallback in real fits: what it keeps, shows, logs and leaves alone, and everything it refuses."""

from __future__ import annotations

import copy
import math
import signal
from contextlib import contextmanager

import lightning.pytorch as L
import onnx
import pytest
import torch
from contract.features import (
    ConvChain,
    ConvClassifier,
    ConvItself,
    ConvMixin,
    ConvNormClassifier,
    Images,
    TokenClassifier,
    conv_network,
    conv_teacher,
    feature_loader,
    seeded,
    token_teacher,
)
from contract.modules import BATCH, STEPS, difference, made, rows_logged, trainer
from contract.traces import condition, is_portable, traces
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_compress import ExportCallback, FactorTransferCallback
from lightning_compress import functional as C
from lightning_compress.callbacks import factors
from lightning_compress.mechanisms.capture import CaptureError
from lightning_compress.modules import Paraphraser, Translator

PAIR = ("stage2", "stage2")
STATE = {"schema", "arguments", "pairs", "student", "layer", "paraphraser", "reconstruction_errors", "translator"}


def teacher() -> nn.Module:
    """Its last feature lies about 0.7, which a paraphraser learns in a few steps."""
    network = conv_teacher()
    nn.init.ones_(network.stage2[4].bias)
    return network


def transfer(**settings) -> FactorTransferCallback:
    epochs = {} if "paraphraser" in settings else {"pretrain_epochs": 2}
    arguments = {"pair": PAIR, "weight": 10.0, **epochs, **settings}
    return FactorTransferCallback(arguments.pop("teacher", None) or teacher(), **arguments)


def fitted(callback, kind=ConvClassifier, *others, **settings):
    module = made(kind)
    trainer(*others, callback, **settings).fit(module, feature_loader())
    return module


@pytest.fixture(scope="module")
def paraphraser_file(tmp_path_factory):
    """Of the teacher's features, which one epoch is enough for."""
    callback, path = transfer(pretrain_epochs=1), tmp_path_factory.mktemp("saved") / "paraphraser.pt"
    trainer(callback, max_steps=1).fit(made(ConvClassifier), feature_loader())
    callback.save_paraphraser(path)
    return path


def factor_loss(callback, student, taught):
    """From the states in the callback's checkpoint."""
    state = callback.state_dict()
    paraphraser, translator = Paraphraser(taught.shape[1]), Translator(student.shape[1], taught.shape[1] // 2)
    paraphraser.load_state_dict(state["paraphraser"])
    translator.load_state_dict(state["translator"]["module"])
    return C.factor_transfer_loss(translator(student), paraphraser.factor(taught))


# What is kept, and where


def test_checkpoints_have_plain_keys_and_a_state_of_tensors_without_the_teacher(tmp_path):
    callback, module = transfer(), made(ConvClassifier)
    fitting = trainer(callback)
    fitting.fit(module, feature_loader())
    fitting.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    plain = made(ConvClassifier, seed=5)
    assert list(saved["state_dict"]) == list(plain.state_dict())
    plain.load_state_dict(saved["state_dict"], strict=True)
    assert difference(plain, module) == 0

    state = saved["callbacks"]["FactorTransferCallback[ft]"]
    assert set(state) == STATE
    assert state["arguments"]["teacher"] == "Sequential"
    assert state["arguments"]["pair"] == list(PAIR)
    assert difference(state["paraphraser"], Paraphraser(10)) > 0
    assert difference(state["translator"]["module"], Translator(6, 5)) > 0
    assert state["translator"]["steps"] == STEPS
    assert [tuple(entry) for entry in state["translator"]["optimizer"]["state"].values()] == [("momentum_buffer",)] * 6
    group = state["translator"]["optimizer"]["param_groups"][0]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
    assert state["reconstruction_errors"] == callback.reconstruction_errors
    paraphraser, translator = callback.factor_networks
    assert difference(paraphraser.state_dict(), state["paraphraser"]) == 0
    assert difference(translator.state_dict(), state["translator"]["module"]) == 0


def test_there_are_no_networks_before_a_training():
    with pytest.raises(RuntimeError, match="no trained networks yet: they are made when a training starts"):
        _ = transfer().factor_networks


@pytest.mark.slow
def test_the_exported_file_holds_the_network_alone(tmp_path):
    fitted(transfer(), ConvClassifier, ExportCallback(tmp_path / "m.onnx"))
    graph = onnx.load(tmp_path / "m.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("Conv") == 5  # one in the stem, two in each stage
    assert not {"ConvTranspose", "LeakyRelu", "Tanh"} & set(kinds)
    weights = sum(math.prod(entry.dims) for entry in graph.initializer if entry.data_type == onnx.TensorProto.FLOAT)
    assert weights == sum(parameter.numel() for parameter in made(ConvClassifier).parameters())


class Watching(L.Callback):
    """The helpers before the first step, and their modes in each."""

    def __init__(self, callback) -> None:
        self.callback, self.modes, self.before = callback, set(), {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.before:
            self.before = copy.deepcopy(
                {"paraphraser": self.callback._paraphraser.state_dict(), "teacher": self.callback.teacher.state_dict()}
            )

    def on_train_batch_end(self, *_):
        frozen = (self.callback._paraphraser, self.callback.teacher)
        self.modes.add(tuple((part.training, any(p.requires_grad for p in part.parameters())) for part in frozen))


def test_steps_change_the_translator_and_neither_paraphraser_nor_teacher():
    callback = transfer()
    was = condition(callback.teacher)
    watching = Watching(callback)
    module = made(ConvNormClassifier)
    trainer(callback, watching).fit(module, feature_loader(), feature_loader())
    state = callback.state_dict()
    assert difference(state["paraphraser"], watching.before["paraphraser"]) == 0
    assert difference(callback.teacher, watching.before["teacher"]) == 0
    assert watching.modes == {((False, False), (False, False))}
    assert condition(callback.teacher) == was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        start = Translator(6, 5)
    assert difference(state["translator"]["module"], start) > 0.001
    plain = made(ConvNormClassifier)
    trainer().fit(plain, feature_loader(), feature_loader())
    assert traces(module) == traces(plain)
    assert is_portable(module)


def test_a_paraphraser_saved_and_read_again_is_the_same(paraphraser_file, tmp_path):
    callback = transfer(paraphraser=paraphraser_file)
    seen = Watching(callback)
    trainer(callback, seen, max_steps=1).fit(made(ConvClassifier), feature_loader())
    callback.save_paraphraser(tmp_path / "again.pt")
    first, second = (torch.load(path, weights_only=True) for path in (paraphraser_file, tmp_path / "again.pt"))
    assert first["schema"] == second["schema"] == 1
    assert first["factor_ratio"] == second["factor_ratio"] == 0.5
    assert difference(first["weights"], second["weights"]) == 0
    assert seen.modes == {((False, False), (False, False))}


def test_reading_a_paraphraser_draws_no_random_numbers(paraphraser_file):
    state = torch.get_rng_state()
    callback = transfer(paraphraser=paraphraser_file)
    assert torch.equal(torch.get_rng_state(), state)
    trainer(callback, max_steps=1).fit(made(ConvClassifier), feature_loader())
    ours = torch.get_rng_state()
    torch.set_rng_state(state)
    trainer(max_steps=1).fit(made(ConvClassifier), feature_loader())
    assert torch.equal(torch.get_rng_state(), ours)


def test_there_is_nothing_to_save_before_a_training(tmp_path):
    with pytest.raises(RuntimeError, match="there is no trained paraphraser yet"):
        transfer().save_paraphraser(tmp_path / "paraphraser.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.sample
@pytest.mark.parametrize("resumed", [True, pytest.param(False, marks=pytest.mark.slow)])  # test_repeat.py has one more
def test_a_second_fit_with_the_same_callback_equals_one_with_a_fresh_callback(resumed, tmp_path):
    callback, fresh, path = transfer(), transfer(), None
    if resumed:
        saving = trainer(transfer(weight=5.0, pretrain_epochs=3), max_steps=4)
        saving.fit(made(ConvNormClassifier), feature_loader())
        saving.save_checkpoint(path := tmp_path / "c.ckpt")
        with pytest.warns(
            UserWarning, match="'ft' resumes with other arguments.*weight was 5.0 and is 10.0; pretrain_epo"
        ):
            trainer(callback).fit(made(ConvNormClassifier), feature_loader(), ckpt_path=path, weights_only=True)
    else:
        fitted(callback, ConvNormClassifier)
    first = callback.state_dict()
    assert len(first["reconstruction_errors"]) == (3 if resumed else 2)
    again, other = fitted(callback), fitted(fresh)
    assert difference(again, other) == 0
    ours, theirs = callback.state_dict(), fresh.state_dict()
    assert difference(ours["translator"]["module"], theirs["translator"]["module"]) == 0
    assert difference(ours["paraphraser"], theirs["paraphraser"]) == 0
    assert difference(ours["translator"]["module"], first["translator"]["module"]) > 0
    assert ours["translator"]["steps"] == STEPS
    assert callback.reconstruction_errors == fresh.reconstruction_errors


@pytest.mark.sample
def test_another_fit_of_the_same_trainer_goes_on():
    callback, module = transfer(), made(ConvNormClassifier)
    fitting = trainer(callback)
    fitting.fit(module, feature_loader())
    first, errors = copy.deepcopy(callback.state_dict()), list(callback.reconstruction_errors)
    fitting.fit_loop.max_epochs = 2
    fitting.fit(module, feature_loader())
    last = callback.state_dict()
    assert difference(last["paraphraser"], first["paraphraser"]) == 0
    assert callback.reconstruction_errors == errors
    assert (first["translator"]["steps"], last["translator"]["steps"]) == (STEPS, 2 * STEPS)


# Which layers


@pytest.fixture(scope="module")
def named():
    """A run in which all is named, and one without the callback."""
    torch.manual_seed(0)
    return fitted(transfer(student="model")), fitted(L.Callback())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ConvClassifier, {"pair": "auto"}),
        (ConvClassifier, {"pair": list(PAIR)}),
        (ConvItself, {}),
        (ConvItself, {"pair": "auto"}),
        (ConvChain, {"pair": ("backbone.stage2", "stage2"), "student": ["backbone", "head"]}),
    ],
)
def test_every_way_to_hold_the_network_trains_alike(kind, settings, named):
    module, (reference, plain) = fitted(transfer(**settings), kind), named
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert difference(reference, plain) > 1e-5


def test_the_last_stages_are_proposed_once_and_kept_in_the_checkpoint(tmp_path, capsys):
    callback, keep = transfer(pair="auto"), ModelCheckpoint(tmp_path, filename="end")
    trainer(callback, keep, enable_checkpointing=True).fit(made(ConvClassifier), feature_loader())
    shown = capsys.readouterr().out
    assert "ft: proposed pairs" in shown
    assert "stage2   6 x 3 x 3  stage2   10 x 3 x 3" in shown
    assert "stage1" not in shown
    assert callback.state_dict()["pairs"] == [list(PAIR)]
    resumed = transfer(pair="auto")
    trainer(resumed, max_epochs=2).fit(
        made(ConvClassifier), feature_loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True
    )
    assert "proposed" not in capsys.readouterr().out
    assert [(pair.student, pair.teacher) for pair in resumed.settled] == [PAIR]


def test_a_teacher_with_another_resolution_is_averaged_down():
    x, _ = next(iter(feature_loader()))
    callback, module = transfer(teacher_transform=nn.Upsample(scale_factor=2)), made(ConvClassifier)
    fitting = trainer(callback, Frozen(), max_steps=1)
    fitting.fit(module, feature_loader())
    with torch.no_grad():
        student, taught = module.model[:3](x), callback.teacher.eval()[:3](nn.functional.interpolate(x, scale_factor=2))
        assert (student.shape[2:], taught.shape[2:]) == ((3, 3), (6, 6))
        expected = factor_loss(callback, student, taught).item()
    assert fitting.callback_metrics["compress/ft/loss"].item() == pytest.approx(expected, rel=1e-6)


class Frozen(L.Callback):
    """No step changes anything: the optimizer of a test that looks at the first loss."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        optimizer.param_groups[0]["lr"] = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.on_before_optimizer_step(trainer, pl_module, trainer.optimizers[0])


# What is shown and logged


@pytest.mark.sample
def test_what_is_logged_is_the_loss_without_its_weight():
    module, callback = made(ConvClassifier), transfer()
    fitting = trainer(callback)
    fitting.fit(module, feature_loader(), feature_loader(batch_size=16))
    assert fitting.callback_metrics.keys() == {"train_loss", "val_loss", "compress/ft/loss", "compress/ft/val_loss"}
    x = Images().inputs
    with torch.no_grad():
        expected = factor_loss(callback, module.model[:3](x), callback.teacher.eval()[:3](x)).item()
    assert fitting.callback_metrics["compress/ft/val_loss"].item() == pytest.approx(expected, rel=1e-5)


class Chatty(ConvClassifier):
    """Writes to its logger past Lightning."""

    def training_step(self, batch, batch_idx):
        self.logger.log_metrics({"rows": len(batch[0])}, step=100 + batch_idx)
        return super().training_step(batch, batch_idx)


@pytest.mark.sample
def test_reconstruction_errors_are_logged_for_each_epoch_and_nothing_else_of_the_replay(tmp_path):
    callback, logger = transfer(pretrain_epochs=3), CSVLogger(tmp_path)
    trainer(callback, logger=logger, log_every_n_steps=1).fit(made(Chatty), feature_loader())
    rows, key = rows_logged(logger), "compress/ft/reconstruction"
    errors = {int(row["step"]): float(row[key]) for row in rows if row[key]}
    assert errors == pytest.approx(dict(enumerate(callback.reconstruction_errors)))
    assert list(errors) == [0, 1, 2]
    assert sum(bool(row["train_loss"]) for row in rows) == STEPS
    assert sum(bool(row["rows"]) for row in rows) == STEPS
    assert set(rows[0]) == {"epoch", "step", "train_loss", "rows", "compress/ft/loss", key}


@pytest.mark.sample
def test_reconstruction_errors_are_relative_to_the_feature():
    callback = transfer(pretrain_epochs=1)
    fitted(callback)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        paraphraser = Paraphraser(10)
    optimizer = torch.optim.SGD(paraphraser.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    errors = sizes = 0.0
    for x, _ in feature_loader():
        feature = callback.teacher.eval()[:3](x).detach()
        loss = (paraphraser(feature) - feature).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors, sizes = errors + loss.item(), sizes + feature.abs().mean().item()
    assert callback.reconstruction_errors == pytest.approx([errors / sizes])
    assert 0.5 < callback.reconstruction_errors[0] < 1.1


def test_a_sign_of_life_counts_all_batches_of_the_pre_training(monkeypatch):
    signs = []

    @contextmanager
    def recorded(trainer, what, total=0):
        signs.append([what, total, 0])
        yield lambda: signs[-1].__setitem__(2, signs[-1][2] + 1)

    monkeypatch.setattr(factors, "sign", recorded)
    fitted(transfer())
    assert signs == [["Pre-training the paraphraser", 16, 16]]


def test_the_first_batch_shows_the_term_beside_the_task_loss(capsys):
    fitted(transfer())
    shown = capsys.readouterr().out
    assert "ft: the losses of the first batch, with their weights" in shown
    assert "task loss              1.099" in shown
    assert shown.count("'stage2' and 'stage2'") == 1


@pytest.mark.sample
def test_a_term_that_dominates_is_warned_of():
    with pytest.warns(UserWarning, match=r"the term of 'stage2' and 'stage2' is \d+.*a smaller weight is advised"):
        fitted(transfer(weight=500.0))


@pytest.mark.sample
def test_a_paraphraser_that_learned_nothing_is_warned_of():
    callback = transfer(teacher=conv_teacher())  # features about zero: a median that no bias can reach
    with pytest.warns(UserWarning, match="'ft': the paraphraser's error is still 1.0. .* learned next to nothing"):
        fitted(callback)
    assert callback.reconstruction_errors[-1] == pytest.approx(1.02, abs=0.01)


def test_without_pretraining_the_paraphraser_is_random_and_this_is_warned_of():
    callback = transfer(pretrain_epochs=0)
    with pytest.warns(UserWarning, match="pretrain_epochs=0 leaves the paraphraser random"):
        fitted(callback)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        assert difference(callback.state_dict()["paraphraser"], Paraphraser(10)) == 0
    assert callback.reconstruction_errors == []
    assert not any(parameter.requires_grad for parameter in callback._paraphraser.parameters())


# Ctrl-C


@pytest.mark.sample
def test_ctrl_c_in_the_middle_of_pretraining_leaves_everything_as_it_was(tmp_path):
    read = []

    class Interrupting(Images):
        def __getitem__(self, index):
            read.append(index)
            if (
                len(read) == 3 * BATCH + BATCH * STEPS + 20
            ):  # the fit's, one that is looked at twice, an epoch, the second
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(index)

    callback, module = transfer(pretrain_epochs=3, student="model"), made(ConvNormClassifier)
    was, before = condition(callback.teacher), copy.deepcopy(module.state_dict())
    fitting = trainer(callback)
    with pytest.raises(SystemExit):
        fitting.fit(module, DataLoader(Interrupting(), batch_size=BATCH))
    assert read == [*range(BATCH), *range(BATCH), *range(BATCH), *range(BATCH * STEPS), *range(20)]
    assert fitting.global_step == 0
    assert difference(module, before) == 0
    assert condition(callback.teacher) == was
    assert {"training_step", "validation_step", "forward", "log"}.isdisjoint(vars(module))
    assert is_portable(module)
    assert set(callback.state_dict()) == STATE - {"layer", "paraphraser", "reconstruction_errors", "translator"}
    assert callback.reconstruction_errors == []
    with pytest.raises(RuntimeError, match="there is no trained paraphraser yet"):
        callback.save_paraphraser(tmp_path / "paraphraser.pt")
    fresh = fitted(transfer(pretrain_epochs=3), ConvNormClassifier)
    trainer(callback).fit(module, feature_loader())
    assert difference(module, fresh) == 0


# What is refused when the callback is made


NUMBERS = [0, -1.0, math.nan, math.inf, "2", True]


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize("argument", ["factor_ratio", "weight", "translator_lr"])
def test_numbers_that_are_not_positive_are_refused(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be a positive number, got {value!r}"):
        transfer(**{argument: value})


@pytest.mark.parametrize("value", [-1, 1.5, "6", True, None])
def test_epochs_that_are_no_whole_number_are_refused(value):
    with pytest.raises(ValueError, match=f"pretrain_epochs must be a whole number of at least 0, got {value!r}"):
        transfer(pretrain_epochs=value)


@pytest.mark.parametrize("value", ["stage2", ("stage2",), ("a", "b", "c"), (1, 2), {"stage2": "stage2"}, None])
def test_a_pair_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="pair must be 'auto', or the name of a layer inside the student and of one"):
        transfer(pair=value)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"teacher": nn.Conv2d}, TypeError, "teacher must be a module, got the class Conv2d; call it"),
        ({"teacher_transform": abs}, TypeError, "teacher_transform must be a torch.nn.Module"),
        ({"name": "a/b"}, ValueError, "name must be a non-empty string without '/', got 'a/b'"),
        ({"paraphraser": 5}, TypeError, "paraphraser must be a string or a path, got 5"),
    ],
)
def test_other_arguments_that_cannot_be_used_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        transfer(**settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"paraphraser names '.*p\.pt', which is no file; FactorTransferCallback.save_paraphraser writes one"),
        (b"garbage", r"paraphraser '.*p\.pt' is not a file that torch\.load can read"),
        (b"", r"paraphraser '.*p\.pt' is damaged, or was not written to its end"),
        (Paraphraser(10), r"paraphraser '.*p\.pt' holds objects other than tensors"),
        ([torch.ones(2)], r"paraphraser: '.*p\.pt' holds no weights of a lightning_compress.modules.Paraphraser"),
        (nn.Conv2d(1, 1, 1).state_dict(), r"'.*p\.pt' holds no weights of a lightning_compress.modules.Paraphraser"),
        (Translator(10, 5).state_dict(), r"(?s)another shape than a paraphraser of 10 channels.*Missing key.*decoder"),
        (
            Paraphraser(10, 0.3).state_dict(),
            r"(?s)another shape than a paraphraser of 10 channels and factor_ratio=0.5: .*"
            r"torch.Size\(\[3, 10, 3, 3\]\).*torch.Size\(\[5, 10, 3, 3\]\)",
        ),
    ],
)
def test_files_that_hold_no_paraphraser_of_this_ratio_are_refused(content, message, tmp_path):
    path = tmp_path / "p.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        transfer(paraphraser=path)


# What is refused at the start of the fit or in the first batch


def refused(message, callback, module=None, error=ValueError, data=None):
    """The error comes before any step, and the module is as it was."""
    module = made(ConvClassifier) if module is None else module
    state, keys = copy.deepcopy(module.state_dict()), set(vars(module))
    fitting = trainer(callback)
    with pytest.raises(error, match=message):
        fitting.fit(module, feature_loader(type(module), rows=16) if data is None else data)
    assert fitting.global_step == 0
    assert difference(module, state) == 0
    assert not {key for key in vars(module) if key not in keys and (key.endswith("step") or key == "forward")}
    assert not [hook for part in module.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]


@pytest.mark.parametrize(
    ("pair", "student", "message"),
    [
        (
            ("stage2", "stge2"),
            None,
            r"pair \(teacher's side\) names 'stge2', not a module of Seq.*did you mean 'stage2'",
        ),
        (("stge2", "stage2"), "model", r"pair \(student's side\) names 'stge2', .*did you mean 'stage2'"),
        (("stge2", "stage2"), None, r"pair \(student's side\) names 'model.stge2', .*did you mean 'model.stage2'"),
        (PAIR, "modle", "student names 'modle', not a module of ConvClassifier; did you mean 'model'"),
    ],
)
def test_names_of_no_layer_are_refused(pair, student, message):
    refused(message, transfer(pair=pair, student=student))


class Twofold(nn.Module):
    def forward(self, x):
        return x, x


class Odd(nn.Module):
    """A network with layers that return no image, run twice, or do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_network(4, 6)
        self.twofold, self.tokens, self.twice, self.idle = Twofold(), nn.Flatten(2), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        x, _ = self.twofold(self.body[:3](x))
        self.tokens(x)
        return self.body.head(self.twice(self.twice(x)))


class OddClassifier(ConvClassifier):
    def build(self):
        self.model = Odd()


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (
            "twofold",
            TypeError,
            "pair: the layer 'twofold' of the {owner} returns tuple of Tensor, Tensor.*, not a tensor",
        ),
        (
            "tokens",
            ValueError,
            r"pair: the layer 'tokens' of the {owner} returns shape \(8, 6, 9\).*need.*\(N, C, H, W\)",
        ),
        ("twice", CaptureError, "pair.*layer '.*twice' ran 2 times in .*choose a layer that runs once"),
        ("idle", CaptureError, "pair: the layer 'idle' of the {owner} did not run in the step"),
    ],
)
@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_layers_that_give_no_image_once_are_refused(owner, layer, error, message):
    message = message.format(owner=owner)
    if owner == "student":
        callback, forwards = transfer(pair=(layer, "stage2")), []
        callback.teacher.register_forward_hook(lambda *_: forwards.append(1))
        refused(message, callback, made(OddClassifier), error)
        assert len(forwards) == 1  # of the first batch: no paraphraser was trained in vain
    else:
        refused(message, transfer(teacher=seeded(Odd), pair=("stage2", layer)), error=error)


def test_a_frozen_layer_of_the_student_is_refused():
    module = made(ConvClassifier)
    module.model[:3].requires_grad_(False)
    refused("pair: what the student's layer 'stage2' returns carries no gradient.*is it frozen", transfer(), module)


@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_features_that_are_not_finite_are_refused(owner):
    module, callback = made(ConvClassifier), transfer(pretrain_epochs=0)
    broken = {"student": module.model, "teacher": callback.teacher}[owner]
    broken.stage2[0].weight.data.fill_(math.nan)
    message = f"the layer 'stage2' of the {owner} returns in the first step .*NaN"
    with pytest.warns(UserWarning, match="pretrain_epochs=0"), pytest.raises(ValueError, match=message):
        trainer(callback).fit(module, feature_loader(rows=16))


def test_where_no_image_stage_is_found_both_are_listed():
    message = r"pair='auto' finds no layers .*The student offers '.*block2' .*The teacher offers '.*block2' .*pair="
    refused(message, transfer(teacher=token_teacher(), pair="auto"), made(TokenClassifier))


def test_a_student_that_is_not_called_is_refused():
    class Spare(ConvClassifier):
        def build(self):
            super().build()
            self.spare = conv_network(4, 6)

    message = r"never calls the student 'spare', .*name the network that it calls with student=, or give paraphraser="
    refused(message, transfer(student="spare"), made(Spare), CaptureError)


def test_a_paraphraser_of_other_channels_is_refused(tmp_path):
    torch.save(Paraphraser(7).state_dict(), tmp_path / "p.pt")
    message = "paraphraser: it was trained on features of 7 channels, and the layer 'stage2' of the teacher returns 10"
    refused(message, transfer(paraphraser=tmp_path / "p.pt"))


def test_lbfgs_is_refused_before_the_paraphraser_is_trained():
    class Quasi(ConvClassifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    callback, forwards = transfer(), []
    callback.teacher.register_forward_hook(lambda *_: forwards.append(1))
    refused(
        "'ft' trains a translator, which has an optimizer of its own and cannot follow LBFGS", callback, made(Quasi)
    )
    assert forwards == []


def test_the_same_network_as_teacher_and_student_is_refused():
    module = made(ConvClassifier)
    refused("teacher Sequential shares parameters with ConvClassifier", transfer(teacher=module.model), module)


# Data that can be read only once


def test_data_that_can_be_read_once_is_refused_where_it_would_be_read_twice(paraphraser_file):
    message = "the training data is a generator, which can be read only once"
    for settings in ({}, {"student": "model"}, {"paraphraser": paraphraser_file}):
        refused(message, transfer(**settings), data=(batch for batch in feature_loader()))
    settings = {"paraphraser": paraphraser_file, "pair": "auto", "student": "model"}
    refused(message, transfer(**settings), data=(batch for batch in feature_loader()))


@pytest.mark.sample
def test_data_that_can_be_read_once_will_do_for_a_named_student_and_pair_and_a_paraphraser(paraphraser_file):
    module, reference = made(ConvClassifier), made(ConvClassifier)
    settings = {"student": "model", "paraphraser": paraphraser_file}
    trainer(transfer(**settings), max_steps=STEPS).fit(module, (batch for batch in feature_loader()))
    trainer(transfer(**settings)).fit(reference, feature_loader())
    assert difference(module, reference) == 0
    assert difference(module, made(ConvClassifier)) > 0.01


# A translator that is never trained


class Raw(ConvMixin):
    """Steps the optimizer past Lightning."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.compressed_loss(self.task_loss(batch)))
        optimizer.step()


class RawStep(ConvClassifier):
    """The same with automatic optimisation."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer_closure()
        optimizer.optimizer.step()


class EveryFourth(ConvMixin):
    """Accumulates by hand."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.compressed_loss(self.task_loss(batch)) / 4)
        if batch_idx % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.sample
@pytest.mark.parametrize("kind", [Raw, RawStep])
def test_a_translator_that_is_never_stepped_is_an_error_at_the_end_of_the_epoch(kind):
    callback, module = transfer(), made(kind)
    message = f"'ft' trains helpers .*in a whole epoch none .* stepped through Lightning: let {kind.__name__} step what"
    with pytest.raises(RuntimeError, match=message):
        trainer(callback, max_epochs=3).fit(module, feature_loader())
    assert module.current_epoch == 0
    assert "training_step" not in vars(module)


@pytest.mark.sample
def test_accumulation_by_hand_is_no_such_error():
    callback = transfer()
    manual, automatic = fitted(callback, EveryFourth), transfer()
    assert callback._translator.steps == STEPS // 4
    module = made(ConvClassifier)
    trainer(automatic, NoSchedule(), accumulate_grad_batches=4).fit(module, feature_loader())
    assert difference(module, manual) < 1e-7
    ours, theirs = (each.state_dict()["translator"]["module"] for each in (callback, automatic))
    assert difference(ours, theirs) < 1e-7


class NoSchedule(L.Callback):
    def on_fit_start(self, trainer, pl_module):
        trainer.lr_scheduler_configs.clear()
