"""Small convolutional and token networks, for callbacks that compare the layers of a student and a teacher."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .modules import BATCH, CLASSES, STEPS, Classifier, ManualClassifier, MixinClassifier, StatefulLoader, trainer

SIDE = 6
TOKENS, WIDTH = 4, 8
STAGES = {"stage1": "stage1", "stage2": "stage2"}
BLOCKS = {"block1": "block1", "block2": "block2"}


class Images(Dataset):
    """Noise of shape (1, 6, 6), one third of which is brighter: its class says which."""

    def __init__(self, rows: int = BATCH * STEPS) -> None:
        generator = torch.Generator().manual_seed(11)
        self.targets = torch.randint(CLASSES, (rows,), generator=generator)
        self.inputs = torch.randn(rows, 1, SIDE, SIDE, generator=generator)
        thirds = torch.arange(SIDE) // (SIDE // CLASSES)
        self.inputs += 1.5 * (thirds[None, :] == self.targets[:, None]).float()[:, None, :, None]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index], self.targets[index]


class Sequences(Images):
    """The same noise as four tokens of nine numbers."""

    def __init__(self, rows: int = BATCH * STEPS) -> None:
        super().__init__(rows)
        self.inputs = self.inputs.reshape(rows, TOKENS, -1)


def conv_network(*widths: int, norm: bool = False, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """A stem, one stage of two convolutions for each width, each stage half as large as the one before, and a head.

    Its children are "stem", "stage1", "stage2" and so on, and "head"; they run in a row.
    """

    def layers(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=not norm)
        return [convolution, *([nn.BatchNorm2d(outputs)] if norm else []), activation()]

    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(*layers(1, widths[0])))
    for index, (inputs, outputs) in enumerate(zip(widths[:1] + widths, widths, strict=False)):
        stride = 1 if index == 0 else 2
        parts[f"stage{index + 1}"] = nn.Sequential(*layers(inputs, outputs, stride), *layers(outputs, outputs))
    parts["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES))
    return nn.Sequential(parts)


class Block(nn.Module):
    """One block of a transformer, without dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norms[0](tokens)
        tokens = tokens + self.attention(x, x, x, need_weights=False)[0]
        return tokens + self.mlp(self.norms[1](tokens))


class Embedding(nn.Module):
    """Tokens (N, 4, 9) to (N, 5, D): a class token comes first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(SIDE * SIDE // TOKENS, width)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.class_token.expand(len(tokens), 1, -1), self.linear(tokens)], dim=1)


class ClassTokenHead(nn.Module):
    """Classes from the class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens[:, 0])


def token_network(width: int = WIDTH) -> nn.Sequential:
    """Children "embedding", "block1", "block2" and "head", which run in a row; features are (N, 5, width)."""
    return nn.Sequential(
        OrderedDict(embedding=Embedding(width), block1=Block(width), block2=Block(width), head=ClassTokenHead(width))
    )


class ConvClassifier(Classifier):
    """The network is a child, ``model``, and the step calls the LightningModule."""

    def build(self) -> None:
        self.model = conv_network(4, 6, norm=self.norm)


class ConvNormClassifier(ConvClassifier):
    """With batch norm."""

    norm = True


class ConvItself(Classifier):
    """The LightningModule is the network."""

    def build(self) -> None:
        for name, child in conv_network(4, 6).named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage2(self.stage1(self.stem(x))))


class ConvChain(Classifier):
    """The step calls the two parts of the network in a row."""

    def build(self) -> None:
        network = conv_network(4, 6)
        self.backbone, self.head = network[:3], network[3]

    def task_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.backbone(x)), y)


class TokenClassifier(Classifier):
    """A small transformer with a class token, for :class:`Sequences`."""

    def build(self) -> None:
        self.model = token_network()


class ConvManual(ManualClassifier):
    """Optimises manually, without our mixin."""

    def build(self) -> None:
        self.model = conv_network(4, 6)


class ConvMixin(MixinClassifier):
    """Optimises manually, with our mixin."""

    def build(self) -> None:
        self.model = conv_network(4, 6)


def seeded(make: Callable[[], nn.Module], seed: int = 3) -> nn.Module:
    """A network from fixed random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def conv_teacher(seed: int = 3, *widths: int) -> nn.Module:
    """A wider network with batch norm, whose stages have the student's sizes and names."""
    return seeded(lambda: conv_network(*(widths or (7, 10)), norm=True, activation=nn.Tanh), seed)


def token_teacher(seed: int = 3) -> nn.Module:
    """A wider transformer, whose blocks have the student's names."""
    return seeded(lambda: token_network(12), seed)


def feature_teacher(kind: type[Classifier], seed: int = 3) -> nn.Module:
    """A teacher for the batches of a kind."""
    return token_teacher(seed) if kind is TokenClassifier else conv_teacher(seed)


def feature_loader(kind: type[Classifier] = ConvClassifier, **settings: Any) -> DataLoader:
    """The same batches in the same order each time."""
    data = {key: settings.pop(key) for key in ("rows",) if key in settings}
    stateful = settings.pop("stateful", False)
    dataset = Sequences(**data) if kind is TokenClassifier else Images(**data)
    return (StatefulLoader if stateful else DataLoader)(dataset, **{"batch_size": BATCH, **settings})


def in_a_row(children: Iterable[tuple[str, nn.Module]], x: Tensor) -> dict[str, Tensor]:
    """What each of several named children returns, one after the other; the last is the network's output."""
    outputs = {}
    for name, child in children:
        outputs[name] = x = child(x)
    return outputs


def feature_fit(module: Classifier, *callbacks: Any, **settings: Any) -> Classifier:
    """Train a module on the batches of its kind, with validation, and give it back."""
    loader = feature_loader(type(module))
    trainer(*callbacks, **settings).fit(module, loader, feature_loader(type(module), rows=2 * BATCH))
    return module
