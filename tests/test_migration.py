"""What the page on migration says of Lightning's ModelPruning and of ours; it fails where Lightning changes."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from experiments import migration
from experiments.migration import Arm, cubic, dense, equal_shares, fit, lightnings, ours, prunable
from lightning.pytorch.callbacks import ModelPruning
from pages import ROOT, blocks
from torch.nn.utils import parametrizations, prune

from lightning_compress import PruningCallback

PAGE = ROOT / "docs/migration.md"
IMAGES = tuple(part[:64] for part in migration.digits().train)  # one step an epoch
TINY = tuple(part[:128] for part in migration.digits().train)  # two


def test_amount_is_a_share_of_what_is_left():
    measured = migration.sparsity_by_epoch(lightnings(0.5), IMAGES, 4)
    assert measured == pytest.approx([1 - 0.5**epoch for epoch in range(1, 5)], abs=1e-4)


def test_an_integer_amount_is_a_number_of_weights_more_each_epoch():
    total = sum(layer.weight.numel() for layer, _ in prunable(migration.Classifier(8, 0.1)))
    assert total == 19_464
    assert migration.sparsity_by_epoch(lightnings(1000), IMAGES, 2) == [1000 / total, 2000 / total]
    assert migration.sparsity_by_epoch(lightnings(1), IMAGES, 1) == [1 / total]
    assert migration.sparsity_by_epoch(lightnings(1.0), IMAGES, 1) == [1.0]


def test_more_weights_than_are_left_cannot_be_taken():
    with pytest.raises(ValueError, match="should be smaller than the number of parameters to prune"):
        fit(lightnings(10_000), IMAGES, 2)


@pytest.mark.parametrize("schedule", migration.SCHEDULES)
def test_our_sparsity_is_the_end_of_every_schedule(schedule):
    assert migration.sparsity_by_epoch(ours(0.5, schedule=schedule), TINY, 4)[-2:] == [0.5, 0.5]


@pytest.mark.parametrize("make", [equal_shares(0.8, 8), cubic(0.8, 8), ours(0.8)], ids=["shares", "cubic", "ours"])
def test_the_arms_are_equally_sparse(make):
    measured = migration.sparsity_by_epoch(make, IMAGES, 8)
    assert measured[4] < 0.8
    assert measured[-3:] == pytest.approx([0.8] * 3, abs=1e-4)


def test_weights_whose_channels_are_last(monkeypatch):
    monkeypatch.setattr(migration, "classifier", lambda rate: migration.Classifier(migration.WIDTH, rate))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        fit(lightnings(0.5), IMAGES, 1)
    assert migration.sparsity_by_epoch(ours(0.5), TINY, 4)[-1] == 0.5


def test_lightnings_masks_are_lost_on_resume():
    middle, late = migration.resumed(cubic(0.8, 8), TINY, 8, (4, 7))
    assert (middle.in_file, late.in_file) == pytest.approx((0.8 * (1 - (1 / 3) ** 3), 0.8), abs=1e-4)
    for result in (middle, late):
        assert result.first_steps[0] == result.in_file
        assert result.first_steps[1] < 0.01
        assert result.largest_difference > 0
        assert result.uninterrupted_end == pytest.approx(0.8, abs=1e-4)
    # the last two calls take their shares of weights that are all there again
    assert middle.end == pytest.approx(1 - (1 - 0.8) / (1 - middle.in_file), abs=1e-3)
    assert late.end < 0.01


@pytest.mark.parametrize("make", [ours(0.8), dense], ids=["ours", "no callback"])
def test_ours_goes_on_like_the_uninterrupted_training(make):
    end = 0.0 if make is dense else 0.8
    for result in migration.resumed(make, TINY, 8, (4, 7)):
        assert result.largest_difference == 0
        assert result.first_steps[0] == result.in_file <= result.first_steps[1]
        assert result.end == result.uninterrupted_end == pytest.approx(end, abs=1e-4)


def test_names_during_the_fit_and_in_checkpoints():
    pruned = [name for name, value in migration.Classifier(8, 0.1).state_dict().items() if value.ndim > 1]
    added = sorted(f"{name}_{part}" for name in pruned for part in ("mask", "orig"))
    permanent = migration.names(lightnings(0.5), IMAGES)
    kept = migration.names(lightnings(0.5, make_pruning_permanent=False), IMAGES)
    assert permanent == migration.Names(added, [], loads=True, resumes=True)
    assert kept == migration.Names(added, added, loads=False, resumes=False)
    assert migration.names(ours(0.5), IMAGES) == migration.Names([], [], loads=True, resumes=True)


def test_lightnings_defaults_prune_biases_and_norms_and_go_back():
    def make(module):
        return [ModelPruning("l1_unstructured")]

    masked = {name.removesuffix("_mask") for name in migration.names(make, IMAGES).in_module if name.endswith("_mask")}
    torch.manual_seed(0)
    first = {name: value.detach() for name, value in migration.Classifier(8, 0.1).named_parameters()}
    assert masked == set(first)  # biases and norms too
    trained = dict(fit(make, IMAGES, 1)[0].named_parameters())
    assert all(torch.equal(value[value != 0], first[name][value != 0]) for name, value in trained.items())
    assert migration.sparsity_of(trained) > 0.4


def test_a_checkpoint_of_lightnings_gives_its_masks_to_one_shot():
    source = fit(lightnings(0.7), IMAGES, 1)[0]

    def make(module):
        module.load_state_dict(source.state_dict())
        return ours(migration.sparsity_of(source.state_dict()), schedule="one_shot")(module)

    target = fit(make, IMAGES, 2)[0]
    pairs = [
        (one.weight, other.weight) for (one, _), (other, _) in zip(prunable(source), prunable(target), strict=True)
    ]
    assert all(torch.equal(one == 0, other == 0) for one, other in pairs)
    assert not any(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    "computed",
    [lambda layer: prune.l1_unstructured(layer, "weight", 0.5), parametrizations.weight_norm],
    ids=["prune", "weight_norm"],
)
def test_layers_that_compute_their_weight_are_refused(computed):
    def make(module):
        computed(module.network.head)
        return ours(0.5)(module)

    with pytest.raises(ValueError, match=r"the layer 'network\.head' computes its weight from other parameters"):
        fit(make, IMAGES, 1)


def test_removing_the_reparametrisation_is_enough():
    def make(module):
        prune.l1_unstructured(module.network.head, "weight", 0.5)
        prune.remove(module.network.head, "weight")
        return ours(0.5)(module)

    assert migration.sparsity_of(fit(make, IMAGES, 2)[0].state_dict()) == 0.5


def test_the_table_of_arguments_is_that_of_the_signatures():
    section = PAGE.read_text().partition("## Arguments")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|", section, flags=re.MULTILINE)[1:]
    theirs = [name for name, _ in rows]
    named = {name for _, cell in rows for name in re.findall(r"`(\w+)`", cell)}
    signature = inspect.signature(ModelPruning).parameters
    assert theirs == list(signature)
    assert named == {
        "score", "pattern", "layers", "exclude", "scope", "sparsity", "start", "end", "update_interval", "rewind",
    }  # fmt: skip
    assert named <= set(inspect.signature(PruningCallback).parameters)
    defaults = {name: signature[name].default for name in ("amount", "make_pruning_permanent", "parameter_names")}
    assert defaults == {"amount": 0.5, "make_pruning_permanent": True, "parameter_names": None}
    assert signature["use_lottery_ticket_hypothesis"].default is True
    assert ModelPruning.PARAMETER_NAMES == ("weight", "bias")


@pytest.mark.sample
def test_before_and_after_run_and_are_equally_sparse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, reached = {}, []
    for code in blocks(PAGE, "py"):
        exec(compile(code, PAGE.name, "exec"), namespace)
        reached.append(migration.zeros(layer.weight for layer, _ in prunable(namespace["module"])))
    assert reached == pytest.approx([0.9, 0.9], abs=1e-4)


def test_a_difference_whose_interval_covers_nothing_is_said_so():
    def arm(test, batches=(1, 2)):
        return Arm("", dense, 0.1, test, [0.9, 0.9], list(batches), [1.0, 1.0])

    # deviation sqrt(2) / 2 points, 2 seeds: 12.706 * 0.5
    assert migration.over(arm([0.92, 0.93]), arm([0.91, 0.91])) == "+1.50 [-4.85, +7.85], not shown"
    assert migration.over(arm([0.92, 0.93]), arm([0.81, 0.82])) == "+11.00 [+11.00, +11.00]"
    with pytest.raises(ValueError, match="different batches"):
        migration.over(arm([0.9, 0.9]), arm([0.9, 0.9], batches=(1, 3)))


def test_the_test_images_do_not_choose_the_rate(monkeypatch):
    looked_at, measure = [], migration.predictions

    def counted(network, images):
        looked_at.append(len(images[0]))
        return measure(network, images)

    monkeypatch.setattr(migration, "predictions", counted)
    data = migration.Split(IMAGES, tuple(part[:20] for part in TINY), tuple(part[:40] for part in TINY))
    table = migration.accuracy_table(data, 2, seeds=2, sparsities=(0.5,)).splitlines()
    assert looked_at == [20, 20, 20, 40, 40] * 5
    sparsities = [float(row.split(" | ")[1].rstrip("%")) for row in table[2:]]
    assert sparsities == pytest.approx([0, 50, 50, 50, 50], abs=0.02)
