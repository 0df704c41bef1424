"""Stages of networks small enough to see where they end, of well-known ones, and how those of two networks pair."""

# ruff: noqa: PT012 -- the network is to fail inside of the context
from __future__ import annotations

import itertools
import random

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from lightning_compress.mechanisms.stages import LayerOutput, Stage, match_stages, record_outputs, stages


def recorded(network: nn.Module, *inputs: torch.Tensor) -> list[LayerOutput]:
    with torch.no_grad(), record_outputs(network) as outputs:
        network(*inputs)
    return outputs()


def ends(network: nn.Module, size: int = 16) -> list[tuple[str, tuple[int, ...]]]:
    """The stages of a network of images, by the layers that end them."""
    return [(stage.layer, stage.size) for stage in stages(recorded(network, torch.ones(2, 3, size, size)))]


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1)


class Bottleneck(nn.Module):
    """A residual block whose second convolution strides, so its first layers are of the resolution before."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, 2, 1), nn.BatchNorm2d(2)
        self.conv2, self.bn2 = convolution(2, 2, stride), nn.BatchNorm2d(2)
        self.conv3, self.bn3 = nn.Conv2d(2, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)  # one for all three
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class Flat(nn.Module):
    """Runs its children in a row, without being a sequence."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


class Wrapped(nn.Module):
    """Gives what a network returns another form."""

    def __init__(self, network: nn.Module, form) -> None:
        super().__init__()
        self.network, self.form = network, form

    def forward(self, x):
        return self.form(self.network(x))


def residual() -> Flat:
    return Flat(
        stem=convolution(3, 4, 2),
        layer1=nn.Sequential(Bottleneck(4, 4), Bottleneck(4, 4)),
        layer2=nn.Sequential(Bottleneck(4, 6, stride=2), Bottleneck(6, 6)),
        layer3=nn.Sequential(Bottleneck(6, 8, stride=2)),
    )


RESIDUAL_ENDS = [("layer1", (8, 8)), ("layer2", (4, 4)), ("layer3", (2, 2))]


# What each layer returned


def test_what_layers_return_is_described():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(convolution(3, 4), nn.ReLU(inplace=True))
            self.unused = nn.Linear(2, 2)
            self.split = nn.MaxPool2d(2, return_indices=True)
            self.again = nn.Identity()

        def forward(self, x):
            x, _ = self.split(self.body(x))
            return self.again(self.again(x))

    conv, relu, body, again = recorded(Net(), torch.ones(2, 3, 8, 8))
    assert conv == LayerOutput("body.0", (2, 4, 8, 8), weights=True, makes_maps=True)
    assert relu == LayerOutput("body.1", (2, 4, 8, 8), same_as="body.0")
    assert body == LayerOutput("body", (2, 4, 8, 8), same_as="body.1", sequence=True)
    assert (again.name, again.shape, again.calls) == ("again", (2, 4, 4, 4), 2)


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.LayerNorm(6), (2, 4, 4, 6), {"channels_last": True}),
        (nn.Linear(5, 6), (2, 4, 4, 5), {"channels_last": True, "weights": True}),
        (nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)), (2, 4, 4, 6), {"channels_last": True, "sequence": True}),
        (nn.LayerNorm(6), (2, 4, 6), {}),  # tokens, whose channels are always last
        (nn.LayerNorm([6, 4, 4]), (2, 6, 4, 4), {"weights": True}),
        (nn.GroupNorm(1, 6), (2, 6, 4, 4), {"makes_maps": True}),
        (nn.BatchNorm2d(6), (2, 6, 4, 4), {"makes_maps": True}),
        (nn.AdaptiveAvgPool2d(2), (2, 6, 4, 4), {"makes_maps": True}),
        (nn.ReLU(), (2, 6, 4, 4), {}),
    ],
)
def test_what_a_layer_says_of_its_channels(layer, shape, expected):
    output = recorded(nn.Sequential(layer), torch.ones(shape))[-1]
    said = ("channels_last", "makes_maps", "sequence", "weights")
    assert {name: getattr(output, name) for name in said if getattr(output, name)} == expected


@pytest.mark.parametrize(
    ("shape", "channels_last", "size"),
    [
        ((2, 3, 8, 6), False, (8, 6)),
        ((2, 3, 1, 6), False, (1, 6)),
        ((2, 3, 1, 1), False, None),
        ((2, 8, 6, 3), True, None),
        ((2, 17, 5), False, (17,)),
        ((2, 1, 5), False, None),
        ((2, 5), False, None),
        ((2,), False, None),
        ((2, 3, 4, 4, 4), False, None),
    ],
)
def test_sizes(shape, channels_last, size):
    assert LayerOutput("a", shape, channels_last=channels_last).size == size


def test_no_hook_stays():
    network = residual()
    with pytest.raises(RuntimeError, match="channels"), record_outputs(network) as outputs:
        network(torch.ones(2, 3, 16, 16))
        count = len(outputs())
        network(torch.ones(2, 7, 16, 16))
    assert count == len(list(network.named_modules())) - 1
    assert not any(module._forward_hooks for module in network.modules())
    network(torch.ones(2, 3, 16, 16))
    assert {output.calls for output in outputs()} == {1, 3}  # 3: the activation that a block shares


def test_a_scripted_layer_is_passed_over():
    network = nn.Sequential(convolution(3, 4), torch.jit.script(nn.ReLU()), convolution(4, 4))
    assert [output.name for output in recorded(network, torch.ones(2, 3, 8, 8))] == ["0", "2"]


@pytest.mark.sample
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("in_place", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiled_layers_that_ran_before_are_seen_once_each(in_place):
    body = nn.Sequential(convolution(3, 4), nn.ReLU(), convolution(4, 4))
    network, x = Flat(body=body, down=convolution(4, 4, 2), last=convolution(4, 4)), torch.ones(2, 3, 16, 16)
    plain = recorded(network, x)
    if in_place:
        network.body.compile(backend="eager")
    else:
        network.body = torch.compile(body, backend="eager")
    with torch.no_grad():
        network(x)
    with torch.no_grad(), record_outputs(network) as outputs:
        network(x)
    with torch.no_grad():
        network(x)  # not seen any more
    first, second = outputs(), recorded(network, x)
    assert first == second == plain
    assert [(stage.layer, stage.size) for stage in stages(first)] == [("body", (16, 16)), ("last", (8, 8))]
    assert not any(module._forward_hooks for module in network.modules())


# Where stages end


def test_a_residual_stage_ends_with_its_last_block():
    assert ends(residual()) == RESIDUAL_ENDS


def test_so_it_does_without_sequences():
    blocks = {"a": Bottleneck(3, 4), "b": Bottleneck(4, 4), "c": Bottleneck(4, 6, 2), "d": Bottleneck(6, 6, 2)}
    assert ends(Flat(**blocks)) == [("b", (16, 16)), ("c", (8, 8)), ("d", (4, 4))]
    # The last stage goes by the name of what hands it on.
    assert ends(Flat(body=Flat(**blocks))) == [("body.b", (16, 16)), ("body.c", (8, 8)), ("body", (4, 4))]


def test_a_block_that_strides_to_a_single_point_is_no_stage_and_ends_none():
    """The last layers of such a block are a point, its first of the resolution before."""
    network = Flat(layer1=Bottleneck(3, 4), layer2=Bottleneck(4, 4, 2), layer3=Bottleneck(4, 4, 2))
    assert ends(network, size=4) == [("layer1", (4, 4)), ("layer2", (2, 2))]
    body = Flat(layer1=Bottleneck(3, 4), layer2=Bottleneck(4, 4, 2), layer3=Bottleneck(4, 4, 2))
    assert ends(nn.Sequential(body), size=4) == [("0.layer1", (4, 4)), ("0.layer2", (2, 2))]


def test_a_stem_is_left_out_where_there_are_stages_of_more_layers():
    one = Flat(stem=convolution(3, 4), body=nn.Sequential(convolution(4, 4, 2), convolution(4, 4)))
    assert ends(one) == [("body", (8, 8))]
    two = Flat(stem=convolution(3, 4), body=convolution(4, 4, 2))
    assert ends(two) == [("stem", (16, 16)), ("body", (8, 8))]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_plain_sequence_of_convolutions_ends_before_its_poolings(inplace):
    widths = (4, 6, 8)
    layers, channels = [], 3
    for width in widths:
        layers += [convolution(channels, width), nn.ReLU(inplace), convolution(width, width), nn.ReLU(inplace)]
        layers.append(nn.MaxPool2d(2))
        channels = width
    network = Flat(features=nn.Sequential(*layers), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(8, 5))
    # The last pooling is of a fourth resolution, which has no layer with a weight.
    assert ends(network) == [("features.3", (16, 16)), ("features.8", (8, 8)), ("features.13", (4, 4))]


def test_a_sequence_of_two_resolutions_has_two_stages():
    body = nn.Sequential(convolution(3, 4), convolution(4, 4), nn.MaxPool2d(2), convolution(4, 4), convolution(4, 4))
    assert ends(Flat(body=body)) == [("body.1", (16, 16)), ("body", (8, 8))]


def test_tokens_are_one_stage():
    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)[:, 0])

    assert ends(Transformer().train()) == [("norm", (16,))]


class Merge(nn.Module):
    """Keeps every second token."""

    def forward(self, x):
        return x[:, ::2]


def test_tokens_that_are_merged_are_several_stages():
    def block():
        return nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 3))

    def found(network):
        return [(stage.layer, stage.size) for stage in stages(recorded(network, torch.ones(2, 16, 3)))]

    assert found(nn.Sequential(block(), Merge(), block())) == [("0", (16,)), ("2", (8,))]
    body = Flat(a=block(), b=Merge(), c=block(), d=Merge(), e=block())
    assert found(Flat(body=body)) == [("body.a", (16,)), ("body.c", (8,)), ("body", (4,))]


class Reduced(nn.Module):
    """Attention of all tokens to those of a smaller map, with a convolution of the larger one."""

    def __init__(self):
        super().__init__()
        self.reduce, self.norm = nn.Conv2d(4, 4, 2, 2), nn.LayerNorm(4)
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.scores = nn.Softmax(dim=-1)

    def forward(self, x):
        image = x.transpose(1, 2).unflatten(2, (8, 8))
        small = self.norm(self.reduce(image).flatten(2).transpose(1, 2))
        scores = self.scores(self.query(x) @ self.key(small).transpose(1, 2))
        return x + scores @ self.value(small) + self.depthwise(image).flatten(2).transpose(1, 2)


def test_attention_to_fewer_tokens_starts_no_stage():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.blocks = nn.Conv2d(3, 4, 2, 2), nn.ModuleList([Reduced(), Reduced()])

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = block(x)
            return x

    assert ends(Net()) == [("blocks.1", (64,))]


def test_windows_are_not_taken_for_samples():
    class Windowed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.last = convolution(3, 4), nn.Linear(4, 4), convolution(4, 4)

        def forward(self, x):
            x = self.first(x)
            n, c, h, w = x.shape
            windows = x.reshape(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
            windows = self.inner(windows).reshape(n, h // 4, w // 4, 4, 4, c)
            return {"out": self.last(windows.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w))}

    down = Wrapped(nn.Sequential(convolution(4, 4, 2), convolution(4, 4)), lambda x: x)
    network = nn.Sequential(Wrapped(Windowed(), lambda x: x["out"]), down)
    assert ends(nn.Sequential(Windowed())) == [("0.last", (16, 16))]  # of 16 tokens in windows, 32 a batch of 2
    assert ends(network) == [("0", (16, 16)), ("1", (8, 8))]


class Mixed(nn.Module):
    """A block of channels-last layers between two permutations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.wide, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x):
        inner = self.narrow(F.gelu(self.wide(self.norm(self.spatial(x).permute(0, 2, 3, 1)))))
        return x + inner.permute(0, 3, 1, 2)


class Windows(nn.Module):
    """A block that takes and gives channels last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, x):
        return x + self.linear(self.norm(x))


def test_blocks_with_channels_last_inside_are_maps_of_their_true_size():
    network = nn.Sequential(convolution(3, 4), Mixed(4), Mixed(4), convolution(4, 6, 2), Mixed(6))
    assert ends(network) == [("2", (16, 16)), ("4", (8, 8))]


def test_channels_last_is_never_taken_for_height_and_width():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.windows = convolution(3, 6, 2), nn.Sequential(Windows(6), Windows(6))
            self.last = nn.Sequential(convolution(6, 6, 2), convolution(6, 6))

        def forward(self, x):
            return self.last(self.windows(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    assert ends(Net()) == [("last", (4, 4))]
    # What such blocks return is (2, 8, 8, 6): were it read as a map of 8 channels, (8, 6) would be a stage.


def test_blocks_that_take_and_give_channels_last_are_not_looked_into():
    class Tokens(Windows):
        def __init__(self, channels):
            super().__init__(channels)
            self.all, self.few = (
                nn.Sequential(nn.Linear(channels, channels), nn.Linear(channels, channels)) for _ in range(2)
            )

        def forward(self, x):
            tokens = x.flatten(1, 2)
            few = self.few(tokens[:, ::2]).mean(dim=1, keepdim=True)
            return self.norm(x) + (self.all(tokens) + few).unflatten(1, x.shape[1:3])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.tokens = nn.Sequential(convolution(3, 6), convolution(6, 6)), Tokens(6)

        def forward(self, x):
            return self.tokens(self.first(x).permute(0, 2, 3, 1))

    assert ends(Net()) == [("first", (16, 16))]


class Double(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(inputs, outputs), nn.ReLU(True), convolution(outputs, outputs), nn.ReLU(True)
        )

    def forward(self, x):
        return self.body(x)


class Up(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up, self.body = nn.ConvTranspose2d(inputs, outputs, 2, 2), Double(2 * outputs, outputs)

    def forward(self, x, skipped):
        return self.body(torch.cat([skipped, self.up(x)], dim=1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inc = Double(3, 4)
        self.down1, self.down2 = (
            nn.Sequential(nn.MaxPool2d(2), Double(4, 6)),
            nn.Sequential(nn.MaxPool2d(2), Double(6, 8)),
        )
        self.up1, self.up2 = Up(8, 6), Up(6, 4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        first = self.inc(x)
        second = self.down1(first)
        return self.out(self.up2(self.up1(self.down2(second), second), first))


UNET_ENDS = [("inc", (16, 16)), ("down1", (8, 8)), ("down2", (4, 4)), ("up1", (8, 8)), ("out", (16, 16))]


def test_a_network_that_comes_back_to_its_resolutions_has_them_twice():
    assert ends(UNet()) == UNET_ENDS
    assert ends(nn.Sequential(UNet())) == [*((f"0.{name}", size) for name, size in UNET_ENDS[:-1]), ("0", (16, 16))]


def test_a_recursive_one_too():
    class Nested(nn.Module):
        def __init__(self, inside: nn.Module | None):
            super().__init__()
            self.before, self.inside, self.after = Bottleneck(4, 4, 2), inside, Bottleneck(4, 4)

        def forward(self, x):
            below = self.before(x)
            below = below if self.inside is None else self.inside(below)
            return self.after(F.interpolate(below, scale_factor=2.0))

    assert ends(Flat(stem=convolution(3, 4), nested=Nested(Nested(Nested(None))))) == [
        ("nested.before", (8, 8)),
        ("nested.inside.inside", (4, 4)),  # goes through two resolutions only, so it counts as a block
        ("nested.inside", (8, 8)),
        ("nested", (16, 16)),
    ]


class Squeeze(nn.Module):
    """Weighs channels by what is seen through a map of a single point."""

    def __init__(self, channels: int, *, gives_weights: bool = False) -> None:
        super().__init__()
        self.pool, self.gives_weights = nn.AdaptiveAvgPool2d(1), gives_weights
        self.weights = nn.Sequential(nn.Conv2d(channels, 2, 1), nn.ReLU(), nn.Conv2d(2, channels, 1), nn.Sigmoid())

    def forward(self, x):
        weights = self.weights(self.pool(x))
        return weights if self.gives_weights else x * weights


def test_squeeze_and_excitation_starts_no_stage():
    flat = nn.Sequential(convolution(3, 4), Squeeze(4), convolution(4, 4, 2), convolution(4, 4), Squeeze(4))
    assert ends(flat) == [("1", (16, 16)), ("4", (8, 8))]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.squeeze = convolution(3, 3), Squeeze(3, gives_weights=True)

        def forward(self, x):
            x = self.conv(x)
            return x * self.squeeze(x)

    assert ends(Flat(a=Block(), b=Block(), down=nn.MaxPool2d(2), c=Block())) == [("b", (16, 16)), ("c", (8, 8))]


@pytest.mark.parametrize(
    "form",
    [
        lambda x: {"out": x},
        lambda x: [x],
        lambda x: x.mean(dim=(2, 3)),
        lambda x: x.mean(dim=(2, 3), keepdim=True),
    ],
    ids=["dict", "list", "vector", "point"],
)
def test_a_backbone_is_looked_into_whatever_it_returns(form):
    network = Flat(backbone=Wrapped(residual(), form))
    last = ("backbone.network", (2, 2))  # which hands on what layer3 returned
    assert ends(network) == [*((f"backbone.network.{name}", size) for name, size in RESIDUAL_ENDS[:-1]), last]


def test_a_network_of_one_resolution_that_returns_a_vector_is_looked_into():
    one = Flat(first=convolution(3, 4), second=convolution(4, 4))
    assert ends(Flat(backbone=Wrapped(one, lambda x: x.mean(dim=(2, 3))))) == [("backbone.network", (16, 16))]


def test_what_one_dimensional_convolutions_make_is_not_taken_for_tokens():
    """Of ``(N, C, L)`` the second number is that of the channels, also where nothing says so any more."""
    network = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 8, 3), nn.ReLU())
    assert stages(recorded(network, torch.ones(2, 3, 16))) == []


def test_layers_that_ran_twice_end_no_stage():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.shared = nn.ReLU(), Bottleneck(4, 4)
            self.first, self.norm1 = convolution(3, 4), nn.BatchNorm2d(4)
            self.second, self.norm2 = convolution(4, 4), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.relu(self.norm1(self.first(x)))
            x = self.relu(self.norm2(self.second(x)))
            return self.shared(self.shared(x))

    assert ends(Twice()) == [("norm2", (16, 16))]


def test_a_layer_of_two_names_has_the_first():
    shared = convolution(3, 3)
    network = Flat(one=shared, two=convolution(3, 3))
    network.three = network.two
    network.forward = lambda x: network.three(network.one(x))
    assert ends(network) == [("two", (16, 16))]


def test_nothing_to_see_is_no_stage():
    assert stages([]) == []
    assert stages(recorded(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.ones(2, 3))) == []
    point = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    assert stages(recorded(point, torch.ones(2, 3, 1, 1))) == []


def test_shapes_come_with_the_stages():
    assert [stage.shape for stage in stages(recorded(residual(), torch.ones(2, 3, 16, 16)))] == [
        (2, 4, 8, 8),
        (2, 6, 4, 4),
        (2, 8, 2, 2),
    ]


RESNET = [("layer1", 16), ("layer2", 8), ("layer3", 4), ("layer4", 2)]
KNOWN = {
    "resnet18": (64, RESNET),
    "resnet50": (64, RESNET),
    "mobilenet_v2": (
        64,
        [("features.1", 32), ("features.3", 16), ("features.6", 8), ("features.13", 4), ("features", 2)],
    ),
    "vgg11": (32, [("features.9", 8), ("features.14", 4), ("features.19", 2)]),
}


@pytest.mark.parametrize("name", KNOWN)
def test_stages_of_well_known_networks(name):
    size, expected = KNOWN[name]
    with torch.device("meta"):  # only shapes count, and drawing the weights takes the most time
        network = getattr(torchvision.models, name)(weights=None).eval()
    assert ends(network.to_empty(device="cpu"), size) == [(layer, (side, side)) for layer, side in expected]


@pytest.mark.sample
def test_small_images_leave_out_what_became_a_point():
    network = torchvision.models.resnet50(weights=None).eval()
    assert ends(network, 32) == [(layer, (side // 2, side // 2)) for layer, side in RESNET[:3]]


def test_stages_of_a_vision_transformer():
    with torch.device("meta"):
        network = torchvision.models.vit_b_16(weights=None, image_size=32).eval()
    assert ends(network.to_empty(device="cpu"), 32) == [("encoder", (5,))]  # the patches are one layer alone


# Pairs


def of_sizes(prefix: str, *sizes: int) -> list[Stage]:
    return [Stage(f"{prefix}{index}", (1, 4, size, size), (size, size)) for index, size in enumerate(sizes)]


def paired(student, teacher) -> list[tuple[int, int]]:
    """Pairs by their places."""
    pairs = match_stages(of_sizes("s", *student), of_sizes("t", *teacher))
    return [(int(ours.layer[1:]), int(theirs.layer[1:])) for ours, theirs in pairs]


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ((8, 4, 2), (8, 4, 2), [(0, 0), (1, 1), (2, 2)]),
        ((8, 2), (8, 4, 2), [(0, 0), (1, 2)]),  # a gap
        ((8, 4), (16, 8, 4, 2), [(0, 1), (1, 2)]),
        ((16, 8), (8, 16), [(0, 1)]),  # of two that cross, one
        ((8, 4, 8), (8, 4, 8), [(0, 0), (1, 1), (2, 2)]),
        ((8,), (8, 4, 8), [(0, 2)]),  # ties go to the deepest
        ((8, 4, 8), (8,), [(2, 0)]),
        ((8, 8), (8,), [(1, 0)]),
        ((8, 8), (8, 8, 8), [(0, 1), (1, 2)]),
        ((8, 4, 8), (8, 2), [(2, 0)]),
        ((8, 2), (8, 4, 8), [(0, 2)]),
        ((9, 5), (8, 4, 2), [(0, 1), (1, 2)]),  # no common size: in order, from the deepest up
        ((9, 5, 3), (8,), [(2, 0)]),
        ((), (8, 4), []),
        ((8, 4), (), []),
        ((), (), []),
    ],
)
def test_pairs(student, teacher, pairs):
    assert paired(student, teacher) == pairs


def test_pairs_of_tokens():
    ours, theirs = Stage("a", (1, 17, 8), (17,)), Stage("b", (1, 17, 24), (17,))
    assert match_stages([ours], [theirs]) == [(ours, theirs)]
    image = Stage("c", (1, 4, 17, 17), (17, 17))
    assert match_stages([image, ours], [theirs, image]) in ([(ours, theirs)], [(image, image)])


def test_no_pairing_in_order_is_longer_or_deeper():
    generator = random.Random(0)
    for _ in range(200):
        student, teacher = ([generator.choice((8, 4, 2)) for _ in range(generator.randint(1, 5))] for _ in range(2))
        alike = [
            (i, j) for i, j in itertools.product(range(len(student)), range(len(teacher))) if student[i] == teacher[j]
        ]
        if not alike:
            continue
        ours = paired(student, teacher)
        assert set(ours) <= set(alike)
        for count in range(1, 6):
            for other in itertools.combinations(alike, count):
                in_order = all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(other))
                if in_order:
                    assert len(other) <= len(ours)
                    deeper = all(a[0] >= b[0] and a[1] >= b[1] for a, b in zip(other, ours, strict=False))
                    assert len(other) < len(ours) or list(other) == ours or not deeper
