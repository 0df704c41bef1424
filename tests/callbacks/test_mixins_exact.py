"""Each technique on the generator of two networks that optimise manually, against the training by hand."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES
from contract.gans import Accumulating, Clipped, Functions, Gan, Swapped, Untoggled, by_hand, teacher, techniques
from contract.modules import (
    Classifier,
    MixinClassifier,
    NormClassifier,
    difference,
    loader,
    made,
    scaled,
    teacher_for,
    trainer,
)
from contract.traces import traces
from torch.nn import functional as F

from lightning_compress import (
    AttentionTransferCallback,
    CompressionReport,
    DCILCallback,
    DistillationCallback,
    DPFCallback,
    ExportCallback,
    FactorTransferCallback,
    PruningCallback,
    PSGDCallback,
    PTQCallback,
    QATCallback,
)
from lightning_compress.modules import Paraphraser, Translator

pytestmark = pytest.mark.slow
STUDENT = {"student": "generator"}


def fitted(kind, *callbacks, validation=None, **settings):
    module = made(kind)
    trainer(*callbacks, **settings).fit(module, loader(), validation)
    return module


def unit(maps):
    return maps / maps.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(-1, *[1] * (maps.ndim - 1))


@pytest.mark.parametrize("kind", [Gan, Swapped, Functions], ids=lambda kind: kind.__name__)
def test_attention_transfer(kind):
    network = teacher()

    def total(module, loss, noise, fake):
        ours, theirs = (part[0](noise).square().mean(dim=1) for part in (module.generator, network))
        return loss + 2.0 * (unit(ours) - unit(theirs.detach())).square().mean()

    module = fitted(kind, AttentionTransferCallback(teacher(), pairs={"0": "0"}, weight=2.0, **STUDENT))
    assert difference(module, by_hand(kind, total)) <= 1e-7
    assert difference(module, by_hand(kind)) > 1e-3


@pytest.fixture
def paraphraser(tmp_path):
    torch.manual_seed(4)
    torch.save(Paraphraser(6).state_dict(), tmp_path / "paraphraser.pt")
    return tmp_path / "paraphraser.pt"


@pytest.mark.parametrize("kind", [Gan, Swapped, Accumulating], ids=lambda kind: kind.__name__)
def test_the_translator_steps_with_the_optimizer_of_its_student(kind, paraphraser):
    """While gradients are accumulated by hand the other optimizer steps in each batch."""
    helpers = Paraphraser(6)
    helpers.load_state_dict(torch.load(paraphraser, weights_only=True))
    network, translator = teacher(), []

    class Keeps(FactorTransferCallback):
        def term(self, passes):
            term = super().term(passes)
            if not translator:
                translator.append(Translator(4, 3))
                translator[0].load_state_dict(self._translator.module.state_dict())
                translator.append(torch.optim.SGD(translator[0].parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4))
            return term

    settings = {"pair": ("0", "0"), "weight": 5.0, "paraphraser": paraphraser}
    module = fitted(kind, Keeps(teacher(), **settings, **STUDENT))

    def total(module, loss, noise, fake):
        ours = translator[0](module.generator[0](noise))
        theirs = helpers.factor(network[0](noise)).detach()
        return loss + 5.0 * (unit(ours) - unit(theirs)).abs().mean()

    def stepped(module):
        translator[1].step()
        translator[1].zero_grad()

    assert difference(module, by_hand(kind, total, stepped=stepped)) <= 1e-7
    assert difference(module, by_hand(kind)) > 1e-3


@pytest.mark.parametrize("kind", [Gan, Swapped], ids=lambda kind: kind.__name__)
def test_scaled_gradients(kind):
    found = []

    def scale(module):
        names = ["0.weight", "2.weight"]
        weights = {name: own for name, own in module.generator.named_parameters() if name in names}
        distances = {}
        for name, weight in weights.items():
            step = weight.detach().abs().max() / 7
            distances[name] = (weight.detach() - step * (weight.detach() / step).round().clamp(-7, 7)).abs()
        found.append(1.5 / torch.cat([own.flatten() for own in distances.values()]).mean())
        for name, weight in weights.items():
            weight.grad *= found[0] * distances[name]

    module = fitted(kind, PSGDCallback(4, mean_factor=1.5, layers=["generator"]))
    assert difference(module, by_hand(kind, scaled=scale)) <= 1e-7
    assert difference(module, by_hand(kind)) > 1e-3


def masks_by_hand(module, share, layers=("0", "2")):
    """The entries of the largest magnitude of all weights."""
    weights = {f"{layer}.weight": module.generator[int(layer)].weight for layer in layers}
    flat = torch.cat([own.detach().abs().flatten() for own in weights.values()])
    zeros = math.floor(share * len(flat) + 0.5)
    limit = flat.sort().values[zeros - 1] if zeros else -1.0
    return {name: own.detach().abs() > limit for name, own in weights.items()}


@pytest.mark.parametrize(("callback", "through"), [(PruningCallback, False), (DPFCallback, True)])
@pytest.mark.parametrize("kind", [Gan, Swapped, Functions], ids=lambda kind: kind.__name__)
def test_masks(callback, through, kind):
    """One shot at the start; the masks of DPF move, and its gradients pass through."""
    masks = {}

    def shown(module, batch):
        if not masks or (callback is DPFCallback and seen.get("batch") != batch):
            masks.update(masks_by_hand(module, 0.5))
        seen["batch"] = batch
        weights = {name: module.generator.get_parameter(name) for name in masks}
        masked = {name: own * masks[name] for name, own in weights.items()}
        return {name: own + (masked[name] - own).detach() for name, own in weights.items()} if through else masked

    seen = {}
    settings = {"update_interval": 1, "dead_filters": "keep"} if through else {}
    module = fitted(kind, callback(0.5, schedule="one_shot", layers=["generator"], **settings))
    reference = by_hand(kind, shown=shown)
    with torch.no_grad():
        for name, mask in masks.items():
            reference.generator.get_parameter(name).mul_(mask)
    assert difference(module, reference) <= 1e-7
    assert sum(int((part.weight == 0).sum()) for part in module.generator[::2]) == 36


@pytest.mark.sample
@pytest.mark.parametrize("kind", [Gan, Swapped], ids=lambda kind: kind.__name__)
def test_rounded_weights(kind):
    def shown(module, batch):
        rounded = {}
        for layer in ("0", "2"):
            weight = module.generator.get_parameter(f"{layer}.weight")
            step = weight.detach().abs().amax(dim=(1, 2, 3), keepdim=True) / 7
            rounded[f"{layer}.weight"] = weight + (step * (weight / step).round().clamp(-7, 7) - weight).detach()
        return rounded

    settings = {"step_size": "observed", "freeze_observers_at": 1.0, "network": "generator"}
    module = fitted(kind, QATCallback(weight_bits=4, activation_bits=None, **settings))
    assert difference(module, by_hand(kind, shown=shown)) <= 1e-7
    assert difference(module, by_hand(kind)) > 1e-3


def test_what_works_after_the_fit_changes_nothing_in_it(tmp_path):
    ptq = PTQCallback(network="generator")
    export = ExportCallback(tmp_path / "model.onnx", precision="int8", network="generator")
    report = CompressionReport(path=tmp_path / "report", latency=False)
    module = fitted(Gan, ptq, export, report, validation=loader())
    assert difference(module, by_hand(Gan)) == 0
    assert set(ptq.quantization.weights) == {"0.weight", "2.weight"}
    assert (tmp_path / "model.onnx").is_file()
    assert "model.onnx" in [row.name for row in report.result.rows]


def test_everything_at_once(tmp_path):
    """All that goes together, on one of two networks, in two orders."""

    def callbacks(folder):
        export = ExportCallback(folder / "model.onnx", precision="int8", network="generator")
        return [*techniques(), export, CompressionReport(path=folder / "report", latency=False)]

    first = fitted(Gan, *callbacks(tmp_path / "1"), validation=loader())
    second = fitted(Gan, *callbacks(tmp_path / "2")[::-1], validation=loader())
    assert difference(first, second) == 0
    assert difference(first, by_hand(Gan)) > 1e-3
    assert traces(first) == traces(fitted(Gan, validation=loader()))


def test_gradients_that_the_user_clips_hold_the_terms():
    network = teacher()

    def total(module, loss, noise, fake):
        return 0.5 * loss + 0.9 * F.mse_loss(fake, network(noise).detach())

    module = fitted(Clipped, DistillationCallback(teacher(), loss_kind="mse", task_weight=0.5, **STUDENT))
    assert difference(module, by_hand(Clipped, total)) <= 1e-7


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("kind", [Gan, Swapped, Untoggled], ids=lambda kind: kind.__name__)
def test_compiled_networks(kind, in_place):
    """Compiled code does not tell what made its output; the output does."""

    class Compiled(kind):
        def build(self):
            super().build()
            if in_place:
                self.generator.compile(backend="eager")
            else:
                self.generator = torch.compile(self.generator, backend="eager")

    network = teacher()
    module = fitted(Compiled, DistillationCallback(teacher(), loss_kind="mse", task_weight=0.5, **STUDENT))
    reference = by_hand(
        kind, lambda module, loss, noise, fake: 0.5 * loss + 0.9 * F.mse_loss(fake, network(noise).detach())
    )
    found = [float((a - b).abs().max()) for a, b in zip(module.parameters(), reference.parameters(), strict=True)]
    assert max(found) <= 1e-7


# A function that computes the loss: as in the automatic loop


class Constant(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class ConstantNorm(Constant, NormClassifier):
    pass


class ByFunction(MixinClassifier):
    """What it logs, it logs within the function."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.compressed_loss(lambda: self.logged_loss(batch)))
        optimizer.step()

    def logged_loss(self, batch):
        loss = self.task_loss(batch)
        self.log("train_loss", loss)
        return loss


class Function(ByFunction, Constant):
    pass


class FunctionNorm(ByFunction, ConstantNorm):
    pass


@pytest.mark.parametrize(("kind", "manual"), [(Constant, Function), (ConstantNorm, FunctionNorm)])
@pytest.mark.parametrize("case", [case for case in CASES if not case.shrinks], ids=lambda case: case.name)
def test_a_function_gives_what_the_automatic_loop_gives(case, kind, manual, tmp_path):
    modules = [made(kind), made(manual)]
    for index, module in enumerate(modules):
        trainer(case.build(tmp_path / str(index), kind)).fit(module, loader(), loader())
    assert difference(*modules) == 0


@pytest.mark.sample
@pytest.mark.parametrize("path", ["own", "own_norm", "shared"])
def test_two_passes_give_what_the_automatic_loop_gives(path):
    modules = [made(ConstantNorm), made(FunctionNorm)]
    for module in modules:
        trainer(DCILCallback(0.4, update_interval=1, dense_path=path, kl_start=0.25)).fit(module, loader(), loader())
    assert difference(*modules) == 0
    assert traces(modules[1]) == traces(fitted(FunctionNorm, validation=loader()))


def test_attention_by_gradients_gives_what_the_automatic_loop_gives():
    settings = {"map_kind": "gradient", "weight": 0.5}
    automatic = fitted(Constant, AttentionTransferCallback(teacher_for(Classifier), **settings))
    manual = fitted(Function, AttentionTransferCallback(teacher_for(Classifier), **settings))
    assert difference(automatic, manual) == 0
    with pytest.raises(RuntimeError, match=r"map_kind='gradient' of 'at' runs the step once more, .*a function"):
        fitted(MixinClassifier, AttentionTransferCallback(teacher_for(Classifier), **settings))


@pytest.mark.sample
@pytest.mark.parametrize("kind", [Functions, type("SwappedFunctions", (Functions, Swapped), {})])
def test_collective_intelligence_on_one_of_two_networks(kind):
    """The generator's masked weights learn from its dense pass, the discriminator, and all else, from the masked."""
    settings = {"schedule": "one_shot", "dense_path": "shared", "kl_start": 1.0, "update_interval": 1}
    module = fitted(kind, DCILCallback(0.5, layers=["generator"], **settings))
    reference = made(kind)
    optimizers = dict(zip(("generator", "discriminator"), reference.configure_optimizers(), strict=True))
    for batch in loader():
        masks = masks_by_hand(reference, 0.5)
        for name in kind.order:
            weights = {key: reference.generator.get_parameter(key) for key in masks}
            dense = {key: weight.detach().clone() for key, weight in weights.items()}
            gradients = []
            for masked in (True, False):
                with torch.no_grad():
                    for key, weight in weights.items():
                        weight.copy_(dense[key] * masks[key] if masked else dense[key])
                own = list(getattr(reference, name).parameters())
                gradients.append(torch.autograd.grad(getattr(reference, f"{name}_loss")(batch), own))
            by_name = {id(weight): masks[key] for key, weight in weights.items()}
            for parameter, pruned, full in zip(own, *gradients, strict=True):
                mask = by_name.get(id(parameter))
                parameter.grad = pruned if mask is None else torch.where(mask, pruned, full)
            optimizers[name].step()
    with torch.no_grad():
        for key, mask in masks.items():
            reference.generator.get_parameter(key).mul_(mask)
    assert difference(module, reference) <= 1e-7


# Precision, processes, resuming


@pytest.mark.sample
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(precision):
    settings = {"plugins": scaled()} if precision == "16-mixed" else {"precision": precision}
    network, kind = teacher(), Gan
    callback = DistillationCallback(teacher(), loss_kind="mse", task_weight=0.5, **STUDENT)
    module = fitted(kind, callback, **settings)
    reference = made(kind)
    optimizers = dict(zip(("generator", "discriminator"), reference.configure_optimizers(), strict=True))
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
    for batch in loader():
        noise = reference.images(batch)[1]
        for name in kind.order:
            half = torch.bfloat16 if precision == "bf16-mixed" else torch.half
            with torch.autocast("cpu", half, cache_enabled=False):
                if name == "generator":
                    fake = reference.generator(noise)
                    loss = 0.5 * F.softplus(-reference.discriminator(fake)).mean()
                    loss = loss + 0.9 * F.mse_loss(fake, network(noise).detach())
                else:
                    loss = reference.discriminator_loss(batch)
            optimizers[name].zero_grad()
            scaler.scale(loss).backward(inputs=list(getattr(reference, name).parameters()))
            scaler.step(optimizers[name])
            scaler.update()
    assert difference(module, reference) <= 1e-7
    assert difference(module, by_hand(kind)) > 1e-3
