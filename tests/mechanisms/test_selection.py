"""Selection by name, pattern and type: what is taken, in which order, and each error."""

from __future__ import annotations

import fnmatch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress.mechanisms.selection import did_you_mean, find_module, plain_name, select_modules

WEIGHTED = (nn.Conv2d, nn.Linear)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3)


class WideConv(nn.Conv2d):
    pass


class Net(nn.Module):
    """A little network with a block per layer, a shared head and a convolution of a subclass."""

    def __init__(self):
        super().__init__()
        self.stem = WideConv(3, 4, 3)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer10 = nn.Sequential(Block())
        self.head = nn.Linear(4, 2)
        self.tied = self.head


class Task(nn.Module):
    """Stands in for a LightningModule that holds the network."""

    def __init__(self):
        super().__init__()
        self.net = Net()
        self.loss = nn.CrossEntropyLoss()


ALL = [
    "net.stem",
    "net.layer1.0.conv1",
    "net.layer1.0.conv2",
    "net.layer1.1.conv1",
    "net.layer1.1.conv2",
    "net.layer10.0.conv1",
    "net.layer10.0.conv2",
    "net.head",
]


def names(layers=None, exclude=None, types=WEIGHTED, root=None, **options):
    return list(select_modules(root or Task(), layers, exclude, types=types, **options))


# --- what is selected ---


def test_none_is_every_module_of_the_types_in_order_and_once():
    assert names() == ALL
    assert names(types=(nn.Linear,)) == ["net.head"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["net.layer1.0.conv1"], ["net.layer1.0.conv1"]),
        (["net.layer1"], ALL[1:5]),  # what lies below too, and not layer10
        (["net"], ALL),
        ([""], ALL),
        (["net.head", "net.stem"], ["net.stem", "net.head"]),  # order of named_modules, not of the list
        (["net.layer1", "net.layer1.0", "net.layer1"], ALL[1:5]),
        (["net.tied"], ["net.head"]),  # a shared module goes by its first name
        (["*.conv1"], [name for name in ALL if name.endswith("conv1")]),
        (["net.layer?.0.*"], ["net.layer1.0.conv1", "net.layer1.0.conv2"]),
        (["net.layer[1]"], ALL[1:5]),
        (["*"], ALL),
        ([r"re:net\.layer\d+\.0\.conv2"], ["net.layer1.0.conv2", "net.layer10.0.conv2"]),
        ([r"re:net\.layer1"], ALL[1:5]),  # the whole name, so not layer10
        (["type:Linear"], ["net.head"]),
        (["type:Conv2d"], ALL[:-1]),  # subclasses too
        (["type:WideConv"], ["net.stem"]),
        (["type:Sequential"], ALL[1:7]),
        (["type:Task"], ALL),
    ],
)
def test_selectors(layers, expected):
    assert names(layers) == expected


@pytest.mark.parametrize(
    ("layers", "exclude", "expected"),
    [
        (None, ["net.layer1", "net.layer10"], ["net.stem", "net.head"]),
        (None, ["type:Conv2d"], ["net.head"]),
        (None, ["*.conv?", "re:.*stem"], ["net.head"]),
        (["net.layer1"], ["*.conv2"], ["net.layer1.0.conv1", "net.layer1.1.conv1"]),
        (None, ["net.tied"], ALL[:-1]),  # under any of its names
        (None, ["net.relu"], ALL),  # is there, and would not have been taken
        (None, [], ALL),
    ],
)
def test_exclude(layers, exclude, expected):
    assert names(layers, exclude) == expected


def test_the_modules_themselves_come_back():
    task = Task()
    selected = select_modules(task, ["net.head", "net.stem"], None, types=WEIGHTED)
    assert [selected["net.stem"], selected["net.head"]] == [task.net.stem, task.net.head]


def test_a_root_that_is_itself_of_the_types():
    layer = nn.Linear(2, 2)
    assert select_modules(layer, None, None, types=WEIGHTED) == {"": layer}
    assert select_modules(layer, ["type:Linear"], None, types=WEIGHTED) == {"": layer}


def test_a_name_that_looks_like_a_pattern_is_a_name():
    root = nn.ModuleDict({"a[0]": nn.Linear(1, 1), "a0": nn.Linear(1, 1)})
    assert names(["a[0]"], root=root) == ["a[0]"]


@pytest.mark.sample
@settings(max_examples=50, deadline=None)
@given(pattern=st.text("*?cnv12.layerst0", min_size=1, max_size=8))
def test_patterns_select_what_fnmatch_selects_and_what_lies_below(pattern):
    task = Task()
    own = [name for name, _ in task.named_modules(remove_duplicate=False) if name]
    hits = [name for name in own if fnmatch.fnmatchcase(name, pattern)]
    below = [name for name in ALL if any(name == hit or name.startswith(f"{hit}.") for hit in hits)]
    if any(hit.endswith("tied") for hit in hits) and "net.head" not in below:
        below.append("net.head")
    if below:
        assert names([pattern], root=task) == below
    else:
        with pytest.raises(ValueError, match="layers"):
            names([pattern], root=task)


# --- compiled modules ---


def compiled_task():
    task = Task()
    task.net.layer1 = torch.compile(task.net.layer1)
    task.net.head = torch.compile(task.net.head)
    return task


def test_names_are_given_without_what_compile_adds():
    task = compiled_task()
    selected = select_modules(task, None, None, types=WEIGHTED)
    assert sorted(selected) == sorted(ALL)
    assert selected["net.head"] is task.net.head._orig_mod


@pytest.mark.parametrize(
    "layers",
    [
        ["net.layer1.0"],
        ["net.layer1._orig_mod.0"],
        ["net.layer1.0.*"],
        ["net.layer1._orig_mod.0.*"],
        [r"re:net\.layer1\.0\..*"],
        [r"re:net\.layer1\._orig_mod\.0\..*"],
    ],
)
def test_selectors_match_with_and_without_what_compile_adds(layers):
    assert names(layers, root=compiled_task()) == ["net.layer1.0.conv1", "net.layer1.0.conv2"]


def test_a_selector_written_for_the_compiled_network_fits_the_plain_one():
    assert names(["net.layer1._orig_mod.0"]) == ["net.layer1.0.conv1", "net.layer1.0.conv2"]


def test_a_compiled_wrapper_and_its_inside_count_once():
    root = torch.compile(nn.Sequential(nn.Linear(2, 2)))
    assert select_modules(root, None, None, types=(nn.Module,)) == {"": root, "0": root._orig_mod[0]}


def test_find_module_in_compiled_networks():
    task = compiled_task()
    assert find_module(task, "net.layer1", argument="student") is task.net.layer1
    assert find_module(task, "net.layer1._orig_mod", argument="student") is task.net.layer1._orig_mod
    inside = task.net.layer1._orig_mod[0].conv1
    assert find_module(task, "net.layer1.0.conv1", argument="student") is inside
    assert find_module(Task(), "net._orig_mod.stem", argument="student").kernel_size == (3, 3)


def test_what_is_suggested_can_be_taken():
    with pytest.raises(ValueError, match=r"matches no module; did you mean 'net\.layer10\.0\.conv1'"):
        select_modules(Task(), ["net.layer10.0.bn1x"], None, types=WEIGHTED, argument="layers")
    with pytest.raises(ValueError, match=r"exclude has 'type:ReLV', which matches no module; did you mean 'type:ReLU'"):
        select_modules(Task(), None, ["type:ReLV"], types=WEIGHTED, argument="layers")


def test_plain_name():
    assert [plain_name(name) for name in ("_orig_mod", "_orig_mod.net", "net._orig_mod.0", "net")] == [
        "",
        "net",
        "net.0",
        "net",
    ]


# --- one module by name ---


def test_find_module():
    task = Task()
    assert find_module(task, "", argument="student") is task
    assert find_module(task, "net.layer1.0", argument="student") is task.net.layer1[0]
    assert find_module(task, "net.tied", argument="student") is task.net.head


def test_find_module_names_argument_name_and_nearest_match():
    with pytest.raises(ValueError) as caught:
        find_module(Task(), "net.layr1", argument="pairs")
    assert str(caught.value) == "pairs names 'net.layr1', not a module of Task; did you mean 'net.layer1'?"


@pytest.mark.parametrize(
    ("name", "candidates", "expected"),
    [
        ("layr1", ["layer1", "layer2"], "; did you mean 'layer1'?"),
        ("head", ["model.backbone", "model.net.head"], "; did you mean 'model.net.head'?"),
        ("zzz", ["layer1", "layer2"], ""),
        ("layer1", [], ""),
        ("INT8", ["fp32", "int8"], "; did you mean 'int8'?"),
    ],
)
def test_did_you_mean(name, candidates, expected):
    assert did_you_mean(name, candidates) == expected
    assert did_you_mean(name, iter(candidates)) == expected


# --- errors ---


@pytest.mark.parametrize(
    ("selector", "nearest"),
    [
        ("net.layr1", "'net.layer1'"),
        ("head", "'net.head'"),
        ("net.layr1.*", "'net.layer1"),
        (r"re:net\.layr1.*", "'net.layer1"),
        ("type:Conv2", "'type:Conv2d'|'type:WideConv'"),
        ("type:Linaer", "'type:Linear'"),
    ],
)
@pytest.mark.parametrize("argument", ["layers", "exclude"])
def test_what_matches_nothing_is_an_error_with_the_nearest_match(selector, nearest, argument):
    layers, exclude = ([selector], None) if argument == "layers" else (None, [selector])
    with pytest.raises(ValueError, match=f"{argument} has .* matches no module; did you mean ({nearest})") as caught:
        names(layers, exclude)
    assert f"'{selector}'" in str(caught.value)


def test_one_miss_among_hits_is_an_error_too():
    with pytest.raises(ValueError, match=r"layers has 'net.layer2', which matches no module"):
        names(["net.layer1", "net.layer2"])


def test_the_argument_goes_by_the_users_name():
    with pytest.raises(ValueError, match=r"dense_layers has 'nothing'"):
        names(["nothing"], argument="dense_layers")


@pytest.mark.parametrize("selector", ["net.relu", "*relu", "type:ReLU"])
def test_a_module_of_another_type_is_an_error_that_names_its_type(selector):
    with pytest.raises(ValueError) as caught:
        names([selector])
    assert str(caught.value) == f"layers names '{selector}', of type ReLU and without any Conv2d or Linear in it"


def test_a_container_without_the_types_is_an_error():
    with pytest.raises(ValueError, match=r"'net.layer1', of type Sequential and without any Linear in it"):
        names(["net.layer1"], types=(nn.Linear,))


def test_a_regular_expression_that_may_be_empty_does_not_select_everything():
    assert names([r"re:(net\.head)?"]) == ["net.head"]
    with pytest.raises(ValueError, match="layers has 're:', which matches no module"):
        names(["re:"])


def test_a_bad_regular_expression_is_an_error():
    with pytest.raises(ValueError, match=r"layers has 're:layer\(', a malformed regular expression: missing \)"):
        names(["re:layer("])


@pytest.mark.parametrize("argument", ["layers", "exclude"])
def test_a_bare_string_is_an_error_that_shows_the_list(argument):
    for given_string in ("net.head", ""):
        layers, exclude = (given_string, None) if argument == "layers" else (None, given_string)
        with pytest.raises(TypeError) as caught:
            names(layers, exclude)
        assert str(caught.value) == (
            f"{argument} must be a list of names, got the string '{given_string}'; write ['{given_string}']"
        )


def test_what_is_not_a_string_is_an_error():
    with pytest.raises(TypeError, match=r"layers must hold strings .*, got 3"):
        names([3])


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError) as caught:
        names(["net.head"], ["type:Linear"])
    assert str(caught.value) == (
        "layers=['net.head'] without exclude=['type:Linear'] selects nothing: no Conv2d or Linear is left"
    )
    with pytest.raises(ValueError, match=r"layers must name at least one layer, got \[\]"):
        names([])


def test_a_network_without_the_types_is_an_error():
    with pytest.raises(ValueError, match="layers selects nothing: Task has no Conv1d"):
        names(types=(nn.Conv1d,))
