"""The life of a network that is made smaller: resume, checkpoints, another fit, other callbacks, two ranks."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap

import lightning.pytorch as L
import pytest
import torch
from contract.modules import difference
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from structured_networks import Lit, Net, fitted, rows
from torch import nn

from lightning_compress import (
    CompressionReport,
    DistillationCallback,
    DPFCallback,
    ExportCallback,
    PruningCallback,
    PTQCallback,
    QATCallback,
    StructuredPruningCallback,
    teacher_from_checkpoint,
)
from lightning_compress.export import load_shrunk, plain_state_dict, to_onnx
from lightning_compress.export.runtime import OnnxNetwork

ROUNDS = {"schedule": "iterative", "start": 0.0, "end": 0.75, "rounds": 3}  # before steps 4, 8 and 12 of 16


def structured(ratio=0.5, **arguments):
    return StructuredPruningCallback(ratio, **{"start": 0.5, **arguments})


def sizes(module):
    return [module.net.conv1.out_channels, module.net.conv2.in_channels, module.net.conv2.out_channels]


def saving(folder):
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=2, save_weights_only=False)


@pytest.mark.sample
@pytest.mark.parametrize(
    "score", ["taylor", *(pytest.param(own, marks=pytest.mark.slow) for own in ("l1", "l2", "bn_scale", "random"))]
)
@pytest.mark.parametrize(
    ("arguments", "at"),
    [({"start": 0.5}, (4, 8, 12)), ({**ROUNDS}, (2, 4, 6, 10, 14))],
    ids=["one shot", "rounds"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(arguments, at, score, tmp_path):
    """From before, at, between and after the rounds; weights, optimizer, schedule and our own state."""
    whole = Lit("adamw")
    fitted(whole, structured(score=score, **arguments), saving(tmp_path), steps=16)
    expected = torch.load(tmp_path / "step=16.ckpt", weights_only=True)
    for step in at:
        folder = tmp_path / f"from {step}"
        resumed = Lit("adamw")
        fitted(
            resumed,
            structured(score=score, **arguments),
            saving(folder),
            steps=16,
            ckpt_path=tmp_path / f"step={step}.ckpt",
            weights_only=True,
        )
        assert difference(resumed, whole) == 0, step
        found = torch.load(folder / "step=16.ckpt", weights_only=True)
        for part in ("optimizer_states", "lr_schedulers"):
            pairs = zip(leaves(found[part]), leaves(expected[part]), strict=True)
            assert all(same(a, b) for a, b in pairs), (step, part)
        key = "StructuredPruningCallback[structured]"
        assert found["callbacks"][key] == expected["callbacks"][key]


def same(first, second):
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


@pytest.mark.sample
def test_rounds_come_when_they_are_due_and_add_up():
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(sizes(pl_module))

    callback, module = structured(**ROUNDS), Lit()
    first = module.net.conv1.weight.detach().clone()
    fitted(module, callback, Watch(), steps=16)
    remaining = [0.5 ** (done / 3) for done in range(4)]
    expected = [[16 - int((1 - own) * 16 + 0.5), 24 - int((1 - own) * 24 + 0.5)] for own in remaining]
    for step, (out1, in2, out2) in enumerate(seen):
        assert [out1, out2] == expected[step // 4], step
        assert in2 == out1
    assert callback.reached == 0.5
    kept = callback.shrinkage.kept["net.conv1.weight"][0]
    assert len(kept) == 8
    assert kept == sorted(set(kept))
    assert callback.shrinkage.take("net.conv1.weight", first).shape == module.net.conv1.weight.shape


@pytest.mark.slow
def test_with_averages_before_and_after_us(tmp_path):
    results = []
    for order in (0, 1):
        module = Lit()
        callbacks = [structured(), EMAWeightAveraging(decay=0.9)]
        fitted(module, *(callbacks if order else callbacks[::-1]), saving(tmp_path / str(order)), steps=16)
        results.append(module)
    assert difference(*results) == 0
    resumed = Lit()
    fitted(
        resumed,
        structured(),
        EMAWeightAveraging(decay=0.9),
        steps=16,
        ckpt_path=tmp_path / "1" / "step=12.ckpt",
    )
    assert difference(resumed, results[1]) == 0


@pytest.mark.sample
def test_stochastic_weight_averaging_goes_on():
    module = Lit()
    fitted(module, structured(start=0.3), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), steps=16)
    assert sizes(module) == [8, 8, 12]


@pytest.mark.slow
def test_a_smaller_network_is_loaded_without_a_trainer_and_without_the_library(tmp_path):
    module = Lit()
    fitted(module, structured(), ModelCheckpoint(tmp_path, filename="w", save_weights_only=True), steps=16)
    loaded = load_shrunk(Lit(), tmp_path / "w.ckpt")
    x = rows()[0][:4]
    module.eval(), loaded.eval()
    assert torch.equal(module.net(x), loaded.net(x))
    assert repr(loaded.net) == repr(module.net)
    program = """
        import sys
        sys.modules["torch_pruning"] = None  # importing it fails
        sys.path[:0] = sys.argv[2:]
        import torch
        from structured_networks import Lit, rows
        from lightning_compress.export import load_shrunk
        torch.save(load_shrunk(Lit(), sys.argv[1]).eval().net(rows()[0][:4]), sys.argv[1] + ".out")
    """
    here = [entry for entry in sys.path if entry.endswith(("callbacks", "tests"))]
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "w.ckpt"), *here], check=True, timeout=120
    )
    assert torch.equal(torch.load(tmp_path / "w.ckpt.out"), module.net(x))


def test_the_state_is_plain_python(tmp_path):
    fitted(Lit(), structured(), saving(tmp_path), steps=16)
    checkpoint = torch.load(tmp_path / "step=16.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["StructuredPruningCallback[structured]"]
    assert all(isinstance(leaf, (int, float, str, bool, type(None))) for leaf in leaves(state))
    assert checkpoint["lightning_compress"]["structured"]["structure"]["net.conv1"]["out_channels"] == 8


@pytest.mark.sample
def test_older_larger_and_newer_smaller_files_are_validated_in_turn(tmp_path):
    module, callback = Lit(), structured()
    trainer = fitted(module, callback, saving(tmp_path), steps=16)
    after = plain_state_dict(tmp_path / "step=16.ckpt")
    for step, first in ((4, 16), (12, 8), (4, 16), (16, 8)):
        trainer.validate(module, module.val_dataloader(), ckpt_path=tmp_path / f"step={step}.ckpt", verbose=False)
        assert module.net.conv1.out_channels == first
        assert len(module.net.conv1.weight) == first
    assert all(torch.equal(module.state_dict()[name], value) for name, value in after.items())


@pytest.mark.sample
@pytest.mark.parametrize("weights_only", [True, False])
def test_saved_after_the_fit_it_has_its_sizes(weights_only, tmp_path):
    module = Lit()
    trainer = fitted(module, structured(), steps=16)
    trainer.save_checkpoint(tmp_path / "later.ckpt", weights_only=weights_only)
    assert difference(load_shrunk(Lit(), tmp_path / "later.ckpt"), module) == 0


@pytest.mark.sample
def test_a_checkpoint_of_a_network_that_was_another_one_at_first_is_told(tmp_path):
    trainer = fitted(Lit(), structured(), steps=8)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = Lit(net=Net(32, 24))
    with pytest.warns(UserWarning, match=r"'net.conv1' had .*'out_channels': 16.*, and it had .*'out_channels': 32"):
        fitted(module, structured(), steps=16, ckpt_path=tmp_path / "a.ckpt")
    assert sizes(module) == [8, 8, 12]
    plain = fitted(Lit(), steps=8)
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(RuntimeError, match="size mismatch"):
        fitted(Lit(net=Net(32, 24)), structured(), steps=16, ckpt_path=tmp_path / "plain.ckpt")


@pytest.mark.sample
def test_made_smaller_twice_it_still_loads_into_the_class(tmp_path):
    module = Lit()
    fitted(module, structured(start=0.0), steps=8)
    trainer = fitted(module, structured(0.5, start=0.0, min_channels=2), steps=8)
    assert sizes(module) == [4, 4, 6]
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    for fresh in (Lit(), load_shrunk(Lit(), tmp_path / "again.ckpt")):
        assert difference(load_shrunk(fresh, tmp_path / "again.ckpt"), module) == 0


def test_under_another_name_it_is_not_gone_on_with(tmp_path):
    trainer = fitted(Lit(), structured(), steps=8)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"saved with StructuredPruningCallback 'structured'.*give this one name='struc"
    ):
        fitted(Lit(), structured(name="other"), steps=16, ckpt_path=tmp_path / "a.ckpt")


def test_with_other_arguments_a_file_can_be_validated(tmp_path):
    module = Lit()
    fitted(module, structured(), steps=8).save_checkpoint(tmp_path / "a.ckpt")
    fresh = Lit()
    tester = L.Trainer(callbacks=[structured(0.3)], logger=False, accelerator="cpu", enable_progress_bar=False)
    with pytest.warns(UserWarning, match="other arguments"):
        tester.validate(fresh, fresh.val_dataloader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert difference(fresh, module) == 0


@pytest.mark.slow
def test_export_and_teachers_take_checkpoints_of_smaller_networks(tmp_path):
    module = Lit()
    fitted(module, structured(), steps=8).save_checkpoint(tmp_path / "a.ckpt")
    result = to_onnx(Lit(), tmp_path / "m.onnx", rows()[0][:2], network="net", checkpoint=tmp_path / "a.ckpt")
    x = rows()[0][:4]
    with torch.no_grad():
        expected = module.eval().net(x)
    assert torch.allclose(OnnxNetwork(result.path).run([x])[0], expected, atol=1e-5)
    for arguments in ((Lit, "net"), ("structured_networks.Net", "net")):
        teacher = teacher_from_checkpoint(arguments[0], tmp_path / "a.ckpt", submodule=arguments[1])
        assert type(teacher) is Net
        assert torch.equal(teacher(x), expected)
    whole = teacher_from_checkpoint(Lit, tmp_path / "a.ckpt")
    assert type(whole) is Lit


@pytest.mark.sample
def test_a_second_fit_leaves_it_as_small_as_it_is(caplog):
    module, callback = Lit(), structured()
    fitted(module, callback, steps=16)
    with caplog.at_level("INFO", logger="lightning_compress"):
        fitted(module, callback, steps=16)
    assert "made smaller before" in caplog.text
    assert sizes(module) == [8, 8, 12]
    assert callback.failure is None


@pytest.mark.sample
def test_a_fit_of_another_module_begins_anew():
    callback = structured()
    fitted(Lit(), callback, steps=16)
    other = Lit()
    fitted(other, callback, steps=16)
    assert sizes(other) == [8, 8, 12]


@pytest.mark.sample
def test_nothing_stays_on_the_module():
    module, other = Lit(), Lit()
    fitted(other, steps=16)
    fitted(module, structured(), steps=16)
    for part, twin in zip(module.modules(), other.modules(), strict=True):
        assert vars(part).keys() == vars(twin).keys()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    module.trainer = None
    pickle.loads(pickle.dumps(module))


@pytest.mark.sample
def test_an_exception_leaves_a_checkpoint_to_go_on_from(tmp_path):
    whole = Lit()
    fitted(whole, structured(), steps=16)
    for at in (6, 11):

        class Broken(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, at=at):
                if trainer.global_step == at:
                    raise OSError("the disk is gone")

        module = Lit()
        with pytest.raises(OSError, match="the disk is gone"):
            fitted(module, Broken(), structured(), OnExceptionCheckpoint(tmp_path, filename=f"at{at}"), steps=16)
        assert "on_load_checkpoint" not in vars(module)
        assert "on_save_checkpoint" not in vars(module)
        resumed = Lit()
        fitted(resumed, structured(), steps=16, ckpt_path=tmp_path / f"at{at}.ckpt")
        assert sizes(resumed) == [8, 8, 12]


def test_it_waits_for_the_end_of_an_accumulation():
    callback, module = structured(start=0.4), Lit()
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((batch_idx, trainer.global_step, module.net.conv1.out_channels))

    fitted(module, callback, Watch(), steps=16, accumulate_grad_batches=4)  # 4 steps: due from step 1.6 on
    assert seen[7] == (7, 1, 16)
    assert seen[8] == (0, 2, 8)


@pytest.mark.sample
def test_after_a_skipped_batch_it_waits_for_the_end_of_an_accumulation_too():
    class Skipping(Lit):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(pl_module.net.conv1.out_channels)

    fitted(Skipping(), structured(start=0.4), Watch(), steps=16, accumulate_grad_batches=4)
    assert seen[8:13] == [16, 16, 16, 16, 8]


@pytest.mark.sample
def test_features_of_the_last_step_may_be_kept():
    """Whoever keeps a loss, and with it the graph of the last step, does not break the next one."""

    class Keeping(Lit):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.kept = [*getattr(self, "kept", []), loss]
            return loss

        def on_train_batch_start(self, batch, batch_idx):
            self.kept = self.kept[-1:] if hasattr(self, "kept") else []

    module = Keeping()
    fitted(module, structured(), steps=16)
    plain = Lit()
    fitted(plain, structured(), steps=16)
    assert difference(module, plain) == 0
    for parameter in module.parameters():
        node = torch.autograd.graph.get_gradient_edge(parameter).node
        assert tuple(node._input_metadata[0].shape) == tuple(parameter.shape)


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
def test_distillation_and_export_go_on(first, tmp_path):
    teacher = Net(32, 32)
    distillation = DistillationCallback(teacher, temperature=2.0)
    module, callback = Lit(), structured()
    export = ExportCallback(tmp_path / "m.onnx", metric="val_loss", tolerance=1e-4)
    report = CompressionReport(path=tmp_path / "report", latency=False)
    callbacks = [callback, distillation] if first else [distillation, callback]
    fitted(module, *callbacks, export, report, steps=16)
    assert export.failure is None
    assert sizes(module) == [8, 8, 12]
    rows = {row.name: row for row in report.result.rows}
    before, after = rows["before"], rows["after"]
    assert after.parameters == sum(own.numel() for own in module.net.parameters())
    assert after.parameters < before.parameters
    assert after.macs < before.macs
    assert {layer.name: layer.filters for layer in report.result.layers}["net.conv1"] == 8
    assert any("50.0% of the filters are gone" in note for note in report.result.notes)


@pytest.mark.sample
@pytest.mark.parametrize("order", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_masks_follow(order):
    """Masks that are there when filters go are cut with the weights, and the final sparsity is met."""
    results = []
    for kind in (lambda: PruningCallback(0.5, end=0.4), lambda: DPFCallback(0.5, end=0.4, update_interval=1)):
        masks, callback, module = kind(), structured(), Lit()
        fitted(module, *[masks, callback][::order], steps=16)
        weights = [module.net.conv1.weight, module.net.conv2.weight, module.net.fc.weight]
        zeros = sum(int((own == 0).sum()) for own in weights)
        total = sum(own.numel() for own in weights)
        assert zeros == masks._masks.zeros
        assert zeros / total == pytest.approx(masks.reached)
        assert masks.masks["net.conv1.weight"].shape == (8, 2, 3, 3)
        results.append(module)
    assert sizes(results[0]) == sizes(results[1]) == [8, 8, 12]


@pytest.mark.sample
def test_masks_follow_depthwise_transposed_convolutions():
    """They have fewer groups afterwards, by which their filters are told."""

    class Decoding(Net):
        def __init__(self):
            super().__init__()
            up = nn.ConvTranspose2d(16, 16, 2, stride=2, groups=16)
            self.conv1 = nn.Sequential(self.conv1, up, nn.MaxPool2d(2))

    module, masks = Lit(), DPFCallback(0.5, end=0.4, update_interval=1)
    module.net = Decoding()
    fitted(module, masks, structured(), steps=16)
    assert module.net.conv1[1].groups == module.net.conv1[1].out_channels == 8
    shown = masks._masks.views["net.conv1.1.weight"].filters
    assert shown.groups == 8
    assert masks.reached == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
def test_quantisation_after_the_filters_are_gone(tmp_path):
    module, callback = Lit(), structured(start=0.25)
    qat = QATCallback(start=0.5)
    export = ExportCallback(tmp_path / "m.onnx", precision="int8", metric="val_loss", tolerance=0.02)
    fitted(module, callback, qat, export, steps=16)
    assert export.failure is None
    assert sizes(module) == [8, 8, 12]


def test_quantisation_before_the_filters_go_is_refused():
    module = Lit()
    with pytest.raises(ValueError, match=r"'qat'.*start=.*after"):
        fitted(module, structured(), QATCallback(), steps=16)
    assert sizes(module) == [16, 16, 24]


@pytest.mark.slow
def test_calibration_after_the_fit(tmp_path):
    module = Lit()
    export = ExportCallback(tmp_path / "m.onnx", precision="int8", metric="val_loss", tolerance=0.02)
    fitted(module, structured(), PTQCallback(), export, steps=16)
    assert export.failure is None
    assert to_onnx(load_shrunk_like(module, tmp_path), tmp_path / "again.onnx", rows()[0][:2], network="net").bytes > 0


def load_shrunk_like(module, folder):
    trainer = module.trainer
    trainer.save_checkpoint(folder / "m.ckpt")
    return load_shrunk(Lit(), folder / "m.ckpt")


@pytest.mark.slow
def test_a_compiled_network_goes_on():
    plain, compiled = Lit(), Lit()
    compiled.net.compile(backend="eager")
    fitted(plain, structured(**ROUNDS), steps=16)
    fitted(compiled, structured(**ROUNDS), steps=16)
    assert difference(plain, compiled) == 0
    wrapped = Lit()
    wrapped.net = torch.compile(wrapped.net, backend="eager")
    fitted(wrapped, structured(**ROUNDS), steps=16)
    assert difference(plain.net, wrapped.net._orig_mod) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", ["", "static_graph=True", "find_unused_parameters=True", "gradient_as_bucket_view=True"]
)
@pytest.mark.parametrize("score", ["l2", "taylor"])
def test_two_ranks_are_identical_and_equal_one_process(settings, score, tmp_path):
    script = f"""
        import sys
        sys.path[:0] = {[entry for entry in sys.path if entry.endswith(("callbacks", "tests"))]!r}
        import torch
        import lightning.pytorch as L
        from lightning.pytorch.strategies import DDPStrategy
        from structured_networks import Lit, Half
        from lightning_compress import StructuredPruningCallback
        torch.set_num_threads(1)
        module = Lit(norm=False)
        callback = StructuredPruningCallback(0.5, score="{score}", schedule="iterative", rounds=2, end=0.5)
        strategy = DDPStrategy(process_group_backend="gloo", {settings})
        trainer = L.Trainer(max_epochs=2, accelerator="cpu", devices=2, callbacks=[callback], logger=False,
                            strategy=strategy, use_distributed_sampler=False,
                            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(module, datamodule=Half())
        torch.save((module.state_dict(), callback.shrinkage.kept), f"{{sys.argv[1]}}/rank{{trainer.global_rank}}.pt")
    """
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(script))
    subprocess.run([sys.executable, str(path), str(tmp_path)], check=True, timeout=180, capture_output=True)
    (first, kept), (second, other) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert kept == other
    assert difference(first, second) == 0
    if score == "l2":
        alone = Lit(norm=False)
        callback = StructuredPruningCallback(0.5, schedule="iterative", rounds=2, end=0.5)
        fitted(alone, callback, steps=16)
        assert callback.shrinkage.kept == kept
        assert difference(first, alone) < 1e-7


@pytest.mark.sample
def test_before_the_step_nothing_of_the_users_has_moved():
    """With a ratio that takes nothing away in the end, the run is the one without us."""

    class Never(StructuredPruningCallback):
        def _shrink(self, *args):
            pass

    with_us, without = Lit(dropout=0.5), Lit(dropout=0.5)
    torch.manual_seed(0)
    fitted(with_us, Never(0.5, start=0.5, score="taylor"), steps=16)
    torch.manual_seed(0)
    fitted(without, steps=16)
    assert difference(with_us, without) == 0


class Chain(Lit):
    """The step calls the parts of the network one after the other."""

    def build(self, net):
        self.encoder = nn.Sequential(net.conv1, net.bn1, nn.ReLU())
        self.decoder = nn.Sequential(net.conv2, net.bn2, nn.ReLU(), nn.Flatten(), net.fc)

    def logits(self, x):
        return self.decoder(self.encoder(x))


@pytest.mark.sample
def test_a_step_that_calls_parts_of_the_network():
    plain, chain = Lit(), Chain()
    fitted(plain, structured(), steps=16)
    fitted(chain, structured(), steps=16)
    ours, theirs = list(chain.state_dict().values()), list(plain.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.sample
def test_a_file_of_any_other_size_is_refused_after_a_fit_too(tmp_path):
    wider = Lit("sgd")
    wider.net.conv1, wider.net.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
    first, module = Lit("sgd"), Lit("sgd")
    pruning = structured()
    fitted(module, pruning)
    smaller = sizes(module)
    for name, other in (("wider", wider), ("first", first), ("small", module)):
        state = {"state_dict": other.state_dict(), "pytorch-lightning_version": L.__version__, "callbacks": {}}
        torch.save({**state, "epoch": 0, "global_step": 0}, tmp_path / f"{name}.ckpt")
    fitting = L.Trainer(callbacks=[pruning], accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fitting.validate(module, ckpt_path=tmp_path / "wider.ckpt", verbose=False)
    assert sizes(module) == smaller
    for name, those in (("first", sizes(first)), ("small", smaller), ("first", sizes(first))):
        fitting.validate(module, ckpt_path=tmp_path / f"{name}.ckpt", verbose=False)
        assert sizes(module) == those


@pytest.mark.sample
def test_a_resumed_fit_says_what_went_before(tmp_path):
    fitted(Lit("sgd"), structured(), saving(tmp_path), steps=16)
    pruning, module = structured(), Lit("sgd")
    fitted(module, pruning, steps=16, ckpt_path=tmp_path / "step=14.ckpt", weights_only=True)
    module.net = torch.compile(module.net)
    intent = pruning.intent(None, module)
    assert intent.takes == ("net.conv1", "net.conv2")
    assert intent.elements == sum(own.numel() for name, own in module.named_parameters() if ".conv" in name)
    assert "are gone" in intent.notes[0]


@pytest.mark.sample
def test_a_file_from_between_two_fits_is_loaded(tmp_path):
    module = Lit("sgd")
    fitted(module, structured(0.25)).save_checkpoint(tmp_path / "between.ckpt", weights_only=True)
    between, pruning = sizes(module), structured(0.45)
    fitted(module, pruning)
    assert sizes(module) != between
    fitting = L.Trainer(callbacks=[pruning], accelerator="cpu", logger=False, enable_progress_bar=False)
    fitting.validate(module, ckpt_path=tmp_path / "between.ckpt", verbose=False)
    assert sizes(module) == between
