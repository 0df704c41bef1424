"""Structured pruning of torchvision's networks: which work, exactly, and which are refused."""

from __future__ import annotations

import copy
import warnings

import lightning.pytorch as L
import pytest
import torch
import torchvision
from structured_networks import fitted
from test_structured import equals_the_zeroed, snapshot
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import StructuredPruningCallback
from lightning_compress.mechanisms.channel_graph import StructureError

WORK = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "densenet121"),
    *("regnet_y_400mf", "googlenet", "mnasnet1_0", "vgg11_bn", "squeezenet1_1", "deeplabv3_resnet50"),
)
FAST = ("mobilenet_v3_small", "squeezenet1_1")
REFUSED = {
    "vit_b_16": r"13 of 25 selected layers reach attention.*exclude=\['type:MultiheadAttention'\]",
    "swin_t": "the structure of the network cannot be told.*at the operation 'Cat' after 'net.features",
    "shufflenet_v2_x0_5": "the structure of the network cannot be told.*at the operation 'View' after 'net.stage4",
}
NOT_EXACT = ("convnext_tiny",)
"""Its norms are over channels, so zeros in the whole network count; without them the two are compared."""


def made(name):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "deeplabv3_resnet50":
            net = torchvision.models.segmentation.deeplabv3_resnet50(
                weights=None, weights_backbone=None, num_classes=21
            )
        else:
            net = torchvision.models.get_model(name, num_classes=10)
    for part in net.modules():  # as after a training: without it many outputs are all but the same
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.uniform_(-0.1, 0.1), part.running_var.uniform_(0.5, 1.5)
            part.momentum = 0.0
    return net


class Lit(L.LightningModule):
    """Nothing learns, so that the network can be compared afterwards."""

    def __init__(self, net, size):
        super().__init__()
        self.net, self.size = net, size

    def training_step(self, batch, batch_idx):
        output = self.net(batch[0])
        output = output["out"].mean(dim=(2, 3)) if isinstance(output, dict) else getattr(output, "logits", output)
        return F.cross_entropy(output, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, 3, self.size, self.size, generator=generator)
        return DataLoader(TensorDataset(images, torch.tensor([0, 1])), batch_size=2)


@pytest.mark.parametrize("name", [pytest.param(own, marks=[] if own in FAST else [pytest.mark.slow]) for own in WORK])
@pytest.mark.parametrize(
    ("arguments", "ratio"),
    [
        ({"budget": "macs"}, 0.5),
        pytest.param({"budget": "params", "score": "taylor"}, 0.3, marks=pytest.mark.slow),
        pytest.param({"budget": "macs", "round_to": 8, "score": "l1"}, 0.7, marks=pytest.mark.slow),
    ],
)
@pytest.mark.sample
def test_these_work(name, arguments, ratio):
    module = Lit(made(name), 64)
    before = copy.deepcopy(module.net)
    callback = StructuredPruningCallback(
        ratio, **{"min_channels": 4, "time_limit": 600.0, **arguments}
    )  # other tests run beside
    fitted(module, callback)
    assert callback.reached == pytest.approx(ratio, abs=0.02)
    counts = [sum(own.numel() for own in net.parameters()) for net in (before, module.net)]
    assert callback.plan.parameters == tuple(counts)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        outputs = [net.eval()(x) for net in (before, module.net)]
    shapes = [{key: out.shape for key, out in own.items()} if isinstance(own, dict) else own.shape for own in outputs]
    assert shapes[0] == shapes[1]
    assert callback.plan.difference < 1e-10
    if name in NOT_EXACT:
        return
    if name == "deeplabv3_resnet50":
        module.net, before = OnlyOut(module.net), OnlyOut(before)
        callback = Renamed(callback)
    assert equals_the_zeroed(before, module.net, callback, x) < 1e-5


class OnlyOut(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)["out"]


class Renamed:
    """What went, by the names of a network that is wrapped now."""

    def __init__(self, callback):
        self.shrinkage = self
        self.inner = callback.shrinkage

    def zeroed(self, name, value):
        return self.inner.zeroed(name.replace("net.inner.", "net."), value)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_these_are_refused(name):
    module = Lit(made(name), 224 if name in ("vit_b_16", "swin_t") else 64)
    before = snapshot(module)
    with pytest.raises(StructureError, match=REFUSED[name]):
        fitted(module, StructuredPruningCallback(0.5))
    assert snapshot(module) == before


@pytest.mark.slow
def test_of_a_vision_transformer_the_rest_can_be_pruned():
    module = Lit(made("vit_b_16"), 224)
    torch.nn.init.normal_(module.net.heads.head.weight)  # which is zero at first
    before = copy.deepcopy(module.net)
    callback = StructuredPruningCallback(0.5, exclude=["type:MultiheadAttention"])
    fitted(module, callback)
    layers = module.net.encoder.layers
    assert {layer.mlp[0].out_features for layer in layers} == {1536}
    assert equals_the_zeroed(before, module.net, callback, torch.randn(1, 3, 224, 224)) < 1e-5


@pytest.mark.slow
def test_a_network_over_the_time_limit_is_refused():
    module = Lit(made("densenet121"), 64)
    before = snapshot(module)
    with pytest.raises(TimeoutError, match=r"stopped after time_limit=0\.3 s"):
        fitted(module, StructuredPruningCallback(0.5, time_limit=0.3))
    assert snapshot(module) == before
