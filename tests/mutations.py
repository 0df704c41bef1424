"""Does each mechanism have a test that falls with it? Small edits, each with the test that must then fail.

``python tests/mutations.py`` copies the repository to a temporary folder, checks that all the named tests pass there,
then applies one edit at a time and runs its test, which must fail. Each processor has a copy of its own. It exits with
1 if an edit survives or no longer applies. ``python tests/mutations.py TEXT`` runs only the edits whose description
contains the text.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds for one test, beside others
WORKERS = len(os.sched_getaffinity(0))
TESTS_FAILED = 1  # pytest's exit code; others mean that nothing was tested

PACKAGE = "lightning_compress"
BASE = f"{PACKAGE}/callbacks/base.py"
DISTILLATION = f"{PACKAGE}/callbacks/distillation.py"
TEACHING = f"{PACKAGE}/callbacks/teaching.py"
FEATURES = f"{PACKAGE}/callbacks/features.py"
ATTENTION = f"{PACKAGE}/callbacks/attention.py"
FACTORS = f"{PACKAGE}/callbacks/factors.py"
REPORT = f"{PACKAGE}/callbacks/report.py"
REPLAY = f"{PACKAGE}/mechanisms/replay.py"
CAPTURE = f"{PACKAGE}/mechanisms/capture.py"
MASKS = f"{PACKAGE}/callbacks/masks.py"
MASKED = f"{PACKAGE}/callbacks/masked.py"
DCIL = f"{PACKAGE}/callbacks/dcil.py"
FURTHER = f"{PACKAGE}/mechanisms/further.py"
GATHERING = f"{PACKAGE}/mechanisms/gathering.py"
GATHERING_TEST = "tests/mechanisms/test_gathering.py"
STANDINS = f"{PACKAGE}/mechanisms/standins.py"
SELECTION = f"{PACKAGE}/functional/_selection.py"
VIEWS = f"{PACKAGE}/mechanisms/views.py"
MASKING = f"{PACKAGE}/mechanisms/masking.py"
SAVING = f"{PACKAGE}/mechanisms/checkpoints.py"
BATCH_NORM = f"{PACKAGE}/mechanisms/batchnorm.py"
CONTROLLER = f"{PACKAGE}/mechanisms/controller.py"
LOSSES = f"{PACKAGE}/mechanisms/losses.py"
MIXINS, MIXINS_EXACT = "tests/callbacks/test_mixins.py", "tests/callbacks/test_mixins_exact.py"
MISTAKES = "tests/callbacks/test_manual_mistakes.py"
LESSONS, LESSONS_TEST = f"{PACKAGE}/mechanisms/lessons.py", "tests/mechanisms/test_lessons.py"
STUDENT = f"{PACKAGE}/mechanisms/student.py"
TEACHER = f"{PACKAGE}/mechanisms/teacher.py"
WRAPPING = f"{PACKAGE}/mechanisms/wrapping.py"
PSGD = f"{PACKAGE}/callbacks/psgd.py"
VALIDATING = f"{PACKAGE}/callbacks/validating.py"
GRADIENTS = f"{PACKAGE}/functional/gradients.py"
SCALED_STEPS = f"{PACKAGE}/mechanisms/scaled_steps.py"
OPTIMIZERS = f"{PACKAGE}/mechanisms/optimizers.py"
QUANTIZATION = f"{PACKAGE}/mechanisms/quantization.py"
ROUNDING = f"{PACKAGE}/mechanisms/rounding.py"
CALIBRATION = f"{PACKAGE}/mechanisms/calibration.py"
OBSERVERS = f"{PACKAGE}/mechanisms/observers.py"
QUANTIZERS = f"{PACKAGE}/functional/quantizers.py"
EMISSION = f"{PACKAGE}/export/emission.py"
INTEGER = f"{PACKAGE}/export/integer.py"
SCALES = f"{PACKAGE}/export/scales.py"
CALIBRATING = f"{PACKAGE}/callbacks/calibrating.py"
QUANTISED = f"{PACKAGE}/callbacks/quantised.py"
QAT = f"{PACKAGE}/callbacks/qat.py"
MOVING = f"{PACKAGE}/mechanisms/moving_grids.py"
DIVERGENCE = f"{PACKAGE}/mechanisms/divergence.py"
SHRINKING = f"{PACKAGE}/mechanisms/shrinking.py"
BUDGETS = f"{PACKAGE}/mechanisms/budgets.py"
DEPENDENCIES = f"{PACKAGE}/mechanisms/dependencies.py"
GRAPH = f"{PACKAGE}/mechanisms/channel_graph.py"
COPIES = f"{PACKAGE}/callbacks/copies.py"
REHEARSAL = f"{PACKAGE}/callbacks/rehearsal.py"
STRUCTURED = f"{PACKAGE}/callbacks/structured.py"
TRACKER = f"{PACKAGE}/tracking/tracker.py"
HISTORY = f"{PACKAGE}/tracking/history.py"
SINKS = f"{PACKAGE}/tracking/sinks.py"
SWEEP_FIELDS = f"{PACKAGE}/commands/sweep_fields.py"
COMPAT = f"{PACKAGE}/_compat.py"
PARSING, PARSING_TEST = f"{PACKAGE}/mechanisms/parsing.py", "tests/mechanisms/test_parsing.py"

EXACT = "tests/callbacks/test_distillation_exact.py"
PRUNING_EXACT = "tests/callbacks/test_pruning_exact.py"
PRUNING_TEST = "tests/callbacks/test_pruning.py"
VIEWS_TEST = "tests/mechanisms/test_views.py"
DYNAMIC_EXACT = "tests/callbacks/test_dynamic_exact.py"
FURTHER_TEST = "tests/mechanisms/test_further.py"
STANDINS_TEST = "tests/mechanisms/test_standins.py"
PSGD_EXACT = "tests/callbacks/test_psgd_exact.py"
PSGD_TEST = "tests/callbacks/test_psgd.py"
QUANTIZATION_TEST = "tests/mechanisms/test_quantization.py"
ROUNDING_TEST = "tests/mechanisms/test_rounding.py"
CALIBRATION_TEST = "tests/mechanisms/test_calibration.py"
EMISSION_TEST = "tests/export/test_emission.py"
INTEGER_TEST = "tests/export/test_integer.py"
SCALES_TEST = "tests/export/test_scales.py"
PTQ_TEST = "tests/callbacks/test_ptq.py"
PTQ_LIFE = "tests/callbacks/test_ptq_life.py"
QAT_EXACT = "tests/callbacks/test_qat_exact.py"
QAT_TEST = "tests/callbacks/test_qat.py"
QAT_LIFE = "tests/callbacks/test_qat_life.py"
MOVING_TEST = "tests/mechanisms/test_moving_grids.py"
DIVERGENCE_TEST = "tests/mechanisms/test_divergence.py"
SHRINKING_TEST = "tests/mechanisms/test_shrinking.py"
STRUCTURED_EXACT = "tests/callbacks/test_structured_exact.py"
STRUCTURED_TEST = "tests/callbacks/test_structured.py"
STRUCTURED_LIFE = "tests/callbacks/test_structured_life.py"
STRUCTURED_TRIALS = "tests/callbacks/test_structured_trials.py"
TRACKING_TEST = "tests/tracking"
CONTRACT = "tests/contract"


class Mutation(NamedTuple):
    """One edit: in ``file``, ``old`` becomes ``new``; then ``test`` must fail, or hang where that is expected."""

    what: str
    file: str
    old: str
    new: str
    test: str
    hangs: bool = False


SAVED_EARLY = "tests/contract/test_resume.py::test_from_a_checkpoint_that_somebody_saved_before_our_turn"
DATA_COPIED = "tests/contract/test_cleanup.py::test_the_data_can_be_copied_in_the_midst_of_a_fit"

MUTATIONS = (
    Mutation(
        "the step of a base class counts as another",
        f"{PACKAGE}/mechanisms/optimizers.py",
        "        if outermost is None or not _lies_within(call, outermost):\n",
        "        if True:\n",
        "tests/mechanisms/test_scaled_steps.py::test_the_step_of_a_base_class_is_a_part_of_the_step",
    ),
    Mutation(
        "a step that raised hides the next",
        f"{PACKAGE}/mechanisms/optimizers.py",
        "        if outermost is None or not _lies_within(call, outermost):\n",
        "        if outermost is None:\n",
        "tests/mechanisms/test_scaled_steps.py::test_the_step_of_a_base_class_is_a_part_of_the_step",
    ),
    Mutation(
        "masks of the last step miss in what somebody saves before our turn",
        MASKS,
        "        self._follow_step()\n        early =",
        "        early =",
        f"{SAVED_EARLY}[DPFCallback-Classifier]",
    ),
    Mutation(
        "masks of the last step miss in a file of weights alone that somebody saves before our turn",
        MASKS,
        "        self._follow_step()\n        return super()._comp",
        "        return super()._comp",
        "tests/contract/test_resume.py::test_weights_alone_that_somebody_saved_before_our_turn_are_masked",
    ),
    Mutation(
        "grids of the last step miss in what somebody saves before our turn",
        f"{PACKAGE}/callbacks/qat.py",
        "            self._follow_step(self._fit.moving)\n",
        "            pass\n",
        f"{SAVED_EARLY}[QATCallback-Classifier]",
    ),
    Mutation(
        "a ModelCheckpoint is copied with our wrapper",
        MASKS,
        "            stack.enter_context(copied_plainly(callback))\n",
        "",
        f"{DATA_COPIED}[PruningCallback]",
    ),
    Mutation(
        "a teacher is copied with our hooks",
        f"{PACKAGE}/mechanisms/teacher.py",
        "                stack.enter_context(copied_plainly(module))\n",
        "",
        f"{DATA_COPIED}[AttentionTransferCallback]",
    ),
    Mutation(
        "complex weights are put on a grid",
        f"{PACKAGE}/mechanisms/calibration.py",
        " or not weight.is_floating_point():",
        ":",
        "tests/callbacks/test_ptq.py::test_complex_layers_are_left_in_float",
    ),
    Mutation(
        "scripted parts without parameters are refused too",
        VIEWS,
        "                    if learns or next(module.buffers(), None) is not None:\n",
        "                    if True:\n",
        "tests/callbacks/test_dcil.py::test_a_scripted_part_without_parameters_is_as_any_other",
    ),
    Mutation(
        "a batch is over when it begins",
        f"{PACKAGE}/mechanisms/progress.py",
        "self.steps - (not self._automatic and _compat.is_in_step(self._trainer))",
        "self.steps",
        "tests/mechanisms/test_progress.py::test_a_step_is_over_when_its_batch_is",
    ),
    Mutation(
        "a copy of a callback is at work",
        BASE,
        "self._snapshot() if self._stack is None or self._before_fit is None else self._before_fit",
        "self._snapshot()",
        f"{DATA_COPIED}[DistillationCallback]",
    ),
    Mutation(
        "what torch copies for a hook of the backward pass is another tensor",
        f"{PACKAGE}/mechanisms/quantization.py",
        '        if name == "view_as" and len(args) == 2 and args[0] is args[1]:\n',
        "        if False:\n",
        "tests/mechanisms/test_quantization.py::test_full_backward_hooks_change_nothing",
    ),
    Mutation(
        "what only distillation uses gets no gradient",
        DISTILLATION,
        "        return loss * self.kd_weight",
        "        return loss.detach() * self.kd_weight",
        f"{CONTRACT}/test_ranks.py::test_a_head_that_only_distillation_uses_is_trained",
    ),
    # Features, replay
    Mutation(
        "the shallowest pair has the weight of the deepest",
        ATTENTION,
        "enumerate(reversed(list(self.features(seen, call)))):",
        "enumerate(list(self.features(seen, call))):",
        "tests/callbacks/test_attention_exact.py::test_the_automatic_weight",
    ),
    Mutation(
        "the second pass draws other random numbers",
        CONTROLLER,
        "                random.restore()\n",
        "",
        "tests/callbacks/test_attention_transfer.py",
    ),
    Mutation(
        "the input gradient carries no gradient of its own",
        ATTENTION,
        'call, "student", create_graph=True, scale=scale)',
        'call, "student", create_graph=True, scale=scale).detach()',
        "tests/callbacks/test_attention_exact.py::test_gradients_of_the_input",
    ),
    Mutation(
        "proposed pairs are not kept",
        FEATURES,
        'return {"pairs": pairs, "student": None if self._found is None else list(self._found)}',
        "return {}",
        "tests/callbacks/test_factor_transfer.py::test_the_last_stages_are_proposed_once_and_kept_in_the_checkpoint",
    ),
    Mutation(
        "a replay moves the random state",
        REPLAY,
        "        stack.enter_context(random_state_kept(device_of(module)))\n",
        "",
        "tests/mechanisms/test_replay.py::test_a_run_after_a_replay_equals_one_without",
    ),
    Mutation(
        "a replay leaves its mark on the module",
        REPLAY,
        "        stack.enter_context(module_kept(module, parameters=parameters))\n",
        "",
        "tests/mechanisms/test_replay.py::test_nothing_can_be_told_afterwards",
    ),
    Mutation(
        "a replay logs",
        REPLAY,
        "        stack.enter_context(_compat.silenced_loggers(module))\n",
        "",
        "tests/mechanisms/test_replay.py::test_nothing_can_be_told_afterwards",
    ),
    Mutation(
        "a resumed run trains its paraphraser again",
        FACTORS,
        'if self._loaded.get("paraphraser"):',
        "if False:",
        "tests/callbacks/test_factors_exact.py::test_a_resumed_run_equals_the_whole_one_and_trains_no_paraphraser",
    ),
    Mutation(
        "the translator has a learning rate of nobody's",
        FACTORS,
        'return float(optimizer.param_groups[0]["lr"]) if self.translator_lr is None else self.translator_lr',
        "return self.translator_lr",
        "tests/callbacks/test_factors_exact.py::test_the_translator_follows_the_users_learning_rate",
    ),
    # Copies and ranks
    Mutation(
        "a wrapper that lies on another stays in copies",
        f"{PACKAGE}/mechanisms/wrapping.py",
        "    while is_own(entry):\n",
        "    if is_own(entry):\n",
        "tests/callbacks/test_export.py::test_a_network_made_of_parts_is_reported_and_exported_from_copies",
    ),
    Mutation(
        "functions in a copy refer to the original",
        f"{PACKAGE}/export/copying.py",
        "    _rebind_functions_(duplicate, copies)",
        "    pass",
        "tests/export/test_copying.py::test_a_hook_that_closes_over_the_module_belongs_to_the_copy",
    ),
    Mutation(
        "the other ranks do not hear of a failure",
        f"{PACKAGE}/callbacks/ranks.py",
        "    if problem is not None:\n        told",
        "    if False:\n        told",
        "tests/callbacks/test_base.py::test_work_that_fails_on_one_rank_fails_everywhere",
    ),
    Mutation(
        "the teacher runs after the student",
        CONTROLLER,
        "        if self._teachers_go_first and capture is one_of_many:",
        "        if False:",
        "tests/mechanisms/test_step.py::test_the_teacher_runs_before_the_student_once_that_is_known",
    ),
    # The total loss
    Mutation(
        "the terms are computed and not added",
        CONTROLLER,
        "output = _with_loss(deployed_output, self._sum_up(total))",
        "output = deployed_output",
        f"{EXACT}::test_every_way_to_write_a_step[Classifier]",
    ),
    Mutation(
        "the task loss is not weighed",
        CONTROLLER,
        "loss, terms = self._weighted(seen.task_loss, names)",
        "loss, terms = seen.task_loss",
        f"{EXACT}::test_accumulation[Classifier]",
    ),
    Mutation(
        "a dict becomes its loss",
        CONTROLLER,
        'return {**output, "loss": loss} if isinstance(output, Mapping) else loss',
        "return loss",
        f"{EXACT}::test_what_a_step_returns_beside_the_loss_is_kept",
    ),
    Mutation(
        "a skipped batch is taken for a loss",
        CONTROLLER,
        "                if output is None:\n                    return None\n",
        "",
        f"{EXACT}::test_skipped_batches",
    ),
    Mutation(
        "the logged loss is weighted",
        DISTILLATION,
        "self._log(loss, student, teacher, mask, validation=False)",
        "self._log(loss * self.kd_weight, student, teacher, mask, validation=False)",
        f"{EXACT}::test_what_is_logged",
    ),
    Mutation(
        "all instances log under one name",
        BASE,
        'key = f"compress/{self.name}/',
        'key = f"compress/{self.default_name}/',
        f"{EXACT}::test_two_instances_log_apart_and_add_up",
    ),
    # The step's signature
    Mutation(
        "the wrapper hides the signature",
        WRAPPING,
        'wrapper.__wrapped__ = getattr(original, "__wrapped__", original)',
        "wrapper.unwrapped = original",
        f"{EXACT}::test_every_way_to_write_a_step[LoaderIterator]",
    ),
    Mutation(
        "the wrapper shows the decorator and not the step",
        WRAPPING,
        'wrapper.__wrapped__ = getattr(original, "__wrapped__", original)',
        "wrapper.__wrapped__ = original",
        f"{EXACT}::test_every_way_to_write_a_step[WrappedOnlyBatch]",
    ),
    # Manual optimisation
    Mutation(
        "manual optimisation is not refused",
        BASE,
        'if not optimises_automatically(pl_module) and not getattr(pl_module, "_lightning_compress_mixin", False):',
        "if False:",
        f"{EXACT}::test_manual_optimisation_is_refused_by_name",
    ),
    Mutation(
        "a forgotten compressed_loss is not noticed",
        CONTROLLER,
        "if waiting and self._learned and not self._asked:",
        "if False:",
        f"{EXACT}::test_a_step_that_forgets_compressed_loss_is_refused",
    ),
    Mutation(
        "a loss that leads to no call takes all of the step, not those since the last",
        LOSSES,
        "or list(recent.get(key, ())) for key",
        "or list(own) for key",
        f"{MIXINS}::test_no_call_and_no_loss_counts_twice",
    ),
    Mutation(
        "the first loss of a manual step takes the calls of all",
        CONTROLLER,
        "        self._calls.add(*self._drained())\n",
        "        self._calls = StepCalls()\n        self._calls.add(*self._drained())\n",
        f"{MIXINS}::test_losses_may_all_be_computed_before_the_first_is_asked_for",
    ),
    Mutation(
        "a manual step that returns nothing is taken for a skipped one",
        CONTROLLER,
        "self._recorded(original, args, kwargs, none_skips=False)",
        "self._recorded(original, args, kwargs)",
        f"{CONTRACT}/test_matrix.py::test_cell[ExportCallback-manual]",
    ),
    # Nothing stays behind
    Mutation(
        "an exception leaves the mechanisms open",
        BASE,
        'no other hook follows an exception."""\n        if not self._is_elsewhere(trainer):\n',
        'no other hook follows an exception."""\n        if False:\n',
        f"{CONTRACT}/test_cleanup.py::test_after_an_exception_nothing_stays",
    ),
    Mutation(
        "a Trainer that is refused interrupts the fit in which a callback is at work",
        BASE,
        "        if not self._is_elsewhere(trainer):\n            self.interrupted(",
        "        if True:\n            self.interrupted(",
        f"{CONTRACT}/test_cleanup.py::test_a_callback_that_is_refused_to_another_trainer_goes_on[SharesIt-PruningCallback]",
    ),
    Mutation(
        "a file is compared with a network that rounds its products",
        f"{PACKAGE}/export/onnx.py",
        "random_state_kept(), full_float32()",
        "random_state_kept()",
        "tests/export/test_onnx.py::test_a_network_is_compared_in_full_float32",
    ),
    Mutation(
        "a network that rounds its products is validated beside a file",
        f"{PACKAGE}/export/evaluate.py",
        "        stack.enter_context(full_float32())",
        "        pass",
        "tests/export/test_evaluate.py::test_a_validation_computes_in_full_float32",
    ),
    Mutation(
        "a terminal that has gone ends the training",
        BASE,
        "    with suppress(AttributeError, OSError, ValueError):",
        "    with suppress(AttributeError):",
        f"{CONTRACT}/test_surroundings.py::test_where_output_goes[Gone-StructuredPruningCallback]",
    ),
    Mutation(
        "the hooks of a profiler are copied",
        f"{PACKAGE}/export/copying.py",
        "        elif is_own(value) or _compat.is_of_profiler(value):",
        "        elif is_own(value):",
        f"{CONTRACT}/test_surroundings.py::test_layers_that_a_profiler_names[ExportCallback]",
    ),
    Mutation(
        "parameters are renewed where a module is already",
        f"{PACKAGE}/mechanisms/isolation.py",
        "    if all(tensor.device == device for tensor",
        "    if False and all(tensor.device == device for tensor",
        f"{CONTRACT}/test_surroundings.py::test_parameters_that_are_replaced_where_a_module_is_moved",
    ),
    Mutation(
        "names in a file that are spelled alike are one",
        EMISSION,
        "next(name for name in names if not hasattr(self.held, name))",
        "spelled",
        f"{INTEGER_TEST}::test_names_that_are_spelled_alike_are_two",
    ),
    Mutation(
        "gradients that a fused optimizer is going to unscale are taken for unscaled ones",
        OPTIMIZERS,
        "if scaler is None or not (optimizer is None or _compat.unscales_itself(optimizer)):",
        "if scaler is None or optimizer is not None:",
        f"{PRUNING_TEST}::test_taylor_scores_of_gradients_that_a_fused_optimizer_is_going_to_unscale",
    ),
    Mutation(
        "calls of an evaluation that failed are counted in the next fit",
        QUANTISED,
        "        calls, self._calls = self._calls, None\n",
        "        calls = self._calls\n",
        f"{PTQ_LIFE}::test_after_an_evaluation_that_failed_a_fit_goes_on[validate-PTQCallback]",
    ),
    Mutation(
        "a file that does not fit takes the dense weights along",
        MASKED,
        "        self._put_back()\n",
        "",
        "tests/callbacks/test_pruning_life.py::test_a_file_that_does_not_fit_leaves_the_dense_weights[test]",
    ),
    Mutation(
        "what was before a file comes back though that was loaded",
        MASKED,
        '        """Validation in a fit sees the masked weights; outside of one, a file is loaded by now."""\n'
        "        self._forgotten = {}\n",
        '        """Validation in a fit sees the masked weights; outside of one, a file is loaded by now."""\n',
        "tests/callbacks/test_pruning_life.py::test_a_file_that_was_loaded_counts_where_the_validation_of_it_fails",
    ),
    Mutation(
        "dense weights are lost in another precision",
        MASKED,
        "torch.equal(left.to(own.dtype), own)",
        "torch.equal(left, own)",
        "tests/callbacks/test_pruning_life.py::test_a_fit_in_another_precision_goes_on_from_the_dense_weights[bf16-true]",
    ),
    Mutation(
        "a network of any size is taken after a fit",
        STRUCTURED,
        "        if not owners and not (self.has_fitted(pl_module) and self._knows(pl_module, checkpoint)):\n",
        "        if not owners and not self.has_fitted(pl_module):\n",
        f"{STRUCTURED_LIFE}::test_a_file_of_any_other_size_is_refused_after_a_fit_too",
    ),
    Mutation(
        "the step keeps its wrapper",
        WRAPPING,
        "        setattr(wrapper, _CLOSED, True)\n        _living_entry(owner, method)",
        "        setattr(wrapper, _CLOSED, True)",
        f"{CONTRACT}/test_cleanup.py::test_after_a_fit_nothing_stays[DistillationCallback-Classifier]",
    ),
    Mutation(
        "the user's own wrapper is lost",
        WRAPPING,
        "        if entry is not None:\n            vars(owner)[method] = entry",
        "        pass",
        f"{CONTRACT}/test_cleanup.py::test_a_module_with_its_own_hooks_and_wrapped_step_keeps_them",
    ),
    Mutation(
        "the capture keeps its hooks",
        CAPTURE,
        "self._forget()\n        self._stack.close()",
        "self._forget()",
        f"{CONTRACT}/test_cleanup.py::test_after_a_fit_nothing_stays[DistillationCallback-Classifier]",
    ),
    Mutation(
        "compiled code from before our hooks is used on",
        f"{PACKAGE}/_compat.py",
        "    if torch._dynamo.convert_frame.input_codes.seen:\n        torch._dynamo.reset()",
        "    pass",
        f"{CONTRACT}/test_compiled.py::test_a_network_that_ran_compiled_before_the_fit",
    ),
    # Several callbacks
    Mutation(
        "each callback runs the teacher for itself",
        TEACHER,
        "if call.key not in self._seen:",
        "if True:",
        f"{CONTRACT}/test_order.py::test_two_distillations_share_one_teacher[Classifier]",
    ),
    Mutation(
        "the terms are summed in the order of the list",
        CONTROLLER,
        "for name, term in sorted(self._terms.items()):",
        "for name, term in self._terms.items():",
        f"{CONTRACT}/test_order.py::test_three_distillations_add_up_in_one_order",
    ),
    Mutation(
        "plan: a checkpoint is saved",
        f"{PACKAGE}/_compat.py",
        "    trainer.save_checkpoint = do_nothing  # callbacks that save on an exception call it too\n",
        "",
        "tests/test_compat.py::test_a_quietened_fit_writes_nothing",
    ),
    Mutation(
        "plan: a learning rate is looked for",
        f"{PACKAGE}/_compat.py",
        '        for method in ("lr_find", "scale_batch_size"):',
        "        for method in ():",
        "tests/test_compat.py::test_a_quietened_fit_writes_nothing",
    ),
    Mutation(
        "plan: a teacher costs as much as the student",
        f"{PACKAGE}/commands/forecast.py",
        "times = step.passes + own / (3 * macs)",
        "times = step.passes + own / macs",
        "tests/test_forecast.py::test_shares_and_the_cost_of_a_teacher",
    ),
    Mutation(
        "plan: a further pass is not counted",
        CONTROLLER,
        "self._note(len(total.losses), total.losses[0], total.terms | between)",
        "self._note(1, total.losses[0], total.terms | between)",
        "tests/callbacks/test_intents.py::test_masks[dcil]",
    ),
    Mutation(
        "plan: an excluded layer is said to be not selected",
        f"{PACKAGE}/callbacks/intents.py",
        'return {layer: "excluded" if layer in excluded else "not selected" for layer in layers_of(weights)}',
        'return {layer: "not selected" for layer in layers_of(weights)}',
        "tests/callbacks/test_intents.py::test_masks[dpf]",
    ),
    Mutation(
        "the processes of a distributed fit count each other's fits",
        f"{PACKAGE}/commands/attachment.py",
        'event["event"] == "fit" and event["script"] == self._script]',
        'event["event"] == "fit"]',
        "tests/test_factory.py::test_each_process_counts_the_fits_of_its_own",
    ),
    Mutation(
        "two callbacks weigh the task loss",
        CONTROLLER,
        "        if len(found) > 1:\n            said",
        "        if False:\n            said",
        f"{CONTRACT}/test_order.py::test_only_one_callback_weighs_the_task_loss",
    ),
    # The teacher
    Mutation(
        "a teacher put into training mode stays in it",
        TEACHER,
        "if module is not None and any(part.training for part in module.modules()):",
        "if False:",
        f"{CONTRACT}/test_repeat.py::test_the_teacher_is_in_eval_though_the_user_calls_train",
    ),
    Mutation(
        "the teacher keeps the precision of the fit",
        TEACHER,
        "            parameter.data = data\n",
        "",
        f"{CONTRACT}/test_cleanup.py::test_the_teacher_gets_back_what_it_was",
    ),
    Mutation(
        "the teacher stays frozen",
        TEACHER,
        "            parameter.requires_grad_(requires_grad)\n",
        "",
        f"{CONTRACT}/test_cleanup.py::test_the_teacher_gets_back_what_it_was",
    ),
    Mutation(
        "the teacher does not follow the precision",
        TEACHER,
        "                if convert is not None:\n                    convert(module)\n",
        "",
        f"{CONTRACT}/test_cleanup.py::test_the_teacher_gets_back_what_it_was",
    ),
    Mutation(
        "the teacher is saved with our state",
        BASE,
        '"""Tensors and primitives to save beside the arguments."""\n        return {}',
        '"""Tensors and primitives to save beside the arguments."""\n'
        "        return {} if self.teacher_network is None else self.teacher_network.state_dict()",
        f"{CONTRACT}/test_checkpoints.py::test_the_teacher_is_in_no_checkpoint",
    ),
    Mutation(
        "the teacher becomes a child of the module",
        TEACHING,
        "capture(self.student)\n",
        "capture(self.student)\n        pl_module.add_module('t', self.teacher)\n",
        f"{CONTRACT}/test_rows.py::test_the_weights_change_only_if_the_row_says_so",
    ),
    Mutation(
        "the module refers to the callback when averages copy it",
        BASE,
        "        self.check(trainer, pl_module)",
        "        self.check(trainer, pl_module)\n        pl_module.compression = self",
        f"{CONTRACT}/test_averaging.py::test_the_teacher_is_not_copied",
    ),
    # Capture
    Mutation(
        "a direct call of forward is not captured",
        STUDENT,
        "Capture(module, direct=True)",
        "Capture(module)",
        f"{EXACT}::test_every_way_to_write_a_step[ItselfForward]",
    ),
    Mutation(
        "a call is recorded twice",
        CAPTURE,
        "self._records.append(",
        "self._records.extend([(given, _Snapshot(output, copy=True))] * 2) or (lambda pair: None)(",
        f"{CONTRACT}/test_ranks.py::test_each_rank_captures_its_half_of_the_batch_once_a_step",
    ),
    # YAML
    Mutation(
        "the callback is one of lightning.pytorch alone",
        BASE,
        'return (first, import_module("pytorch_lightning").Callback)',
        "return (first,)",
        f"{CONTRACT}/test_cli_yaml.py::test_the_teacher_in_yaml",
    ),
    Mutation(
        "the teacher is typed as a module, which fills the help",
        DISTILLATION,
        "        teacher: Any,\n",
        '        teacher: __import__("torch").nn.Module,\n',
        f"{CONTRACT}/test_cli_yaml.py::test_the_help_is_short_and_complete",
    ),
    Mutation(
        "the entry point is always on",
        "lightning_compress/_factory.py",
        "    if order is None:\n        return []\n",
        "",
        "tests/test_factory.py::test_without_the_variable_there_is_nothing",
    ),
    # Recipes
    Mutation(
        "recipes: values are left to the process that trains",
        f"{PACKAGE}/recipe/classes.py",
        "if cls not in own_callbacks().values():",
        "if True:",
        "tests/test_recipe.py::test_what_a_constructor_refuses_is_found_without_a_teacher",
    ),
    Mutation(
        "recipes: a teacher is built where the recipe is checked",
        f"{PACKAGE}/recipe/classes.py",
        "            found[name] = _StandIn()\n",
        "",
        "tests/test_recipe.py::test_loading_builds_no_teacher",
    ),
    Mutation(
        "recipes: what a teacher is made of is not looked at",
        f"{PACKAGE}/recipe/classes.py",
        "            check_source(source, argument=name)\n",
        "",
        "tests/test_recipe.py::test_what_a_constructor_refuses_is_found_without_a_teacher",
    ),
    Mutation(
        "recipes: aliases may unfold without end",
        f"{PACKAGE}/recipe/file.py",
        '    check_size(value, "the recipe")\n',
        "",
        "tests/test_recipe.py::test_a_value_that_unfolds_without_end_is_refused",
    ),
    Mutation(
        "recipes: a setting changes all that shares a value",
        f"{PACKAGE}/recipe/settings.py",
        "copy = list(node) if isinstance(step, int) else dict(node)",
        "copy = node",
        "tests/test_recipe_settings.py::test_an_alias_elsewhere_keeps_its_value",
    ),
    Mutation(
        "recipes: a changed recipe is not checked again",
        f"{PACKAGE}/recipe/__init__.py",
        "            content = changed(content, settings)\n            check_content(content)\n",
        "            content = changed(content, settings)\n",
        "tests/test_recipe_settings.py::test_the_changed_recipe_is_checked_like_any_other",
    ),
    Mutation(
        "recipes: settings do not reach the fit",
        f"{PACKAGE}/commands/attachment.py",
        "settings=self.order.settings",
        "settings=()",
        "tests/test_factory.py::test_settings_change_what_is_attached_and_what_the_report_says",
    ),
    Mutation(
        "a parser's error: the first type is taken for the one that was meant",
        PARSING,
        "if not _OTHER_TYPE.match(str(cause)))",
        "if cause)",
        f"{PARSING_TEST}::test_the_chain_goes_on_with_the_type_that_was_meant",
    ),
    Mutation(
        "a parser's error: an entry's type is that of the list",
        PARSING,
        "if isinstance(value, (list, Mapping)) and _value(match)",
        "if False and _value(match)",
        f"{PARSING_TEST}::test_what_a_type_accepts_is_said_in_words",
    ),
    Mutation(
        "a parser's error: types of the outer argument are those of the inner one",
        PARSING,
        "reversed(links[key + 1 :])",
        "reversed(links)",
        f"{PARSING_TEST}::test_what_is_wrong_inside_an_argument_has_its_place",
    ),
    Mutation(
        "plan: a script goes on after an error",
        f"{PACKAGE}/commands/foresight.py",
        "            _end_process(_shown(error))\n",
        "            raise\n",
        "tests/test_plan.py::test_an_error_is_told_and_shown_and_the_process_ends",
    ),
    Mutation(
        "plan: relative paths start where the script has gone",
        f"{PACKAGE}/commands/attachment.py",
        "settings=self.order.settings, cwd=self.order.cwd",
        "settings=self.order.settings",
        "tests/test_plan.py::test_relative_paths_of_the_recipe_start_where_the_command_was_called",
    ),
    Mutation(
        "run: a signal that comes early is lost",
        f"{PACKAGE}/commands/run.py",
        "            early.append(number)\n",
        "            pass\n",
        "tests/test_run.py::test_a_signal_while_the_child_is_started_ends_it_too",
    ),
    Mutation(
        "run: netrc is not looked at before a run is kept offline",
        COMPAT,
        "_wandb_settings_say() or _wandb_key_in_netrc()",
        "_wandb_settings_say()",
        "tests/test_compat.py::test_wandb_finds_a_key_where_it_is_looked_for",
    ),
    Mutation(
        "recipes: the folder of a report is not looked at before",
        f"{PACKAGE}/recipe/__init__.py",
        'checked_folder(init_args["path"])',
        "pass",
        "tests/test_run.py::test_a_place_that_cannot_be_written",
    ),
    # Ranks
    Mutation(
        "each rank logs its own part of the validation",
        BASE,
        "sync_dist=many",
        "sync_dist=False",
        f"{CONTRACT}/test_ranks.py::test_ranks_are_identical_and_equal_one_process",
    ),
    Mutation(
        "one rank alone asks for the log directory",
        REPORT,
        "        directory = self._directory(trainer)  # on every rank: reading the log directory is a broadcast\n"
        "        if not trainer.is_global_zero:\n            return\n",
        "        if not trainer.is_global_zero:\n            return\n        directory = self._directory(trainer)\n",
        f"{CONTRACT}/test_ranks.py::test_the_end_of_fit_hangs_no_rank",
        hangs=True,
    ),
    Mutation(
        "the gradient of a masked weight is not masked",
        MASKING,
        "        return gradient * self._factors(gradient)",
        "        return gradient",
        f"{VIEWS_TEST}::test_training_equals_a_loop_by_hand",
    ),
    Mutation(
        "a recurrent layer keeps the views in its list of weights",
        VIEWS,
        " = below\n            _compat.refresh_flat_weights(site.module)",
        " = below",
        f"{VIEWS_TEST}::test_recurrent_layers",
    ),
    Mutation(
        "the memory of a view is used again while a graph holds it",
        VIEWS,
        "self.buffer is None or not _compat.is_unshared(self.buffer)",
        "self.buffer is None",
        f"{VIEWS_TEST}::test_a_graph_that_is_kept_over_two_steps_is_not_corrupted",
    ),
    Mutation(
        "writes past autograd are not noticed",
        VIEWS,
        "same = original is None or torch.allclose",
        "same = True or torch.allclose",
        f"{VIEWS_TEST}::test_a_change_in_the_step_is_an_error",
    ),
    Mutation(
        "code compiled without the views is not forgotten",
        VIEWS,
        "            self._traced.append(_compat.being_traced(event))",
        "            pass",
        f"{VIEWS_TEST}::test_compiled_code_sees_what_is_presented_in_any_order",
    ),
    Mutation(
        "a reset of torch.compile ends the watch, so that each step resets",
        VIEWS,
        "            _compat.watch_compilations(self._tracing)  # which a reset ends",
        "            pass",
        f"{VIEWS_TEST}::test_a_pass_without_the_views_is_followed_by_one_compilation",
    ),
    Mutation(
        "views that nobody owns watch torch.compile for ever",
        VIEWS,
        "        if not self._weights:\n            return\n",
        "",
        f"{VIEWS_TEST}::test_without_an_owner_nothing_is_watched_or_compiled_again",
    ),
    Mutation(
        "a tensor may lose more than its floor leaves",
        SELECTION,
        "        beyond = [index for index, own in zip(free, lost, strict=True) if own > limits[index]]",
        "        beyond: list[int] = []",
        "tests/functional/test_masks.py::test_limits_hand_worked",
    ),
    Mutation(
        "of equal weights all are pruned",
        SELECTION,
        "    return (key + 1, 0) if rank == ties else (key, rank)",
        "    return key + 1, 0",
        "tests/functional/test_masks.py::test_of_equal_magnitudes_the_earlier_is_pruned_first",
    ),
    Mutation(
        "each process prunes as many of equal weights as all together",
        SELECTION,
        "    return (ties - before[:, parts.rank])",
        "    return (ties - 0 * before[:, parts.rank])",
        "tests/functional/test_parts.py::test_masks_equal_those_of_a_stable_sort[zeros-2]",
    ),
    Mutation(
        "a sharded weight gets the gradient of what was presented",
        GATHERING,
        "            return rows if self.view.plain else self.view.gradient(rows)",
        "            return rows",
        f"{GATHERING_TEST}::test_a_layer_is_given_the_view_and_the_weight_its_gradient",
    ),
    Mutation(
        "what was gathered through a view stays when that is dropped",
        GATHERING,
        "        self.shown = False\n        self._reshard()",
        "        self.shown = False",
        f"{GATHERING_TEST}::test_a_layer_is_given_the_view_and_the_weight_its_gradient",
    ),
    Mutation(
        "what a pass with a backward pass of its own has learned is lost",
        GATHERING,
        "for rows in (earlier, through, self._owed) if",
        "for rows in (earlier, through) if",
        f"{GATHERING_TEST}::test_a_pass_with_a_backward_pass_of_its_own",
    ),
    Mutation(
        "a gradient past the view of a sharded weight is taken for its own",
        GATHERING,
        "        if rows.any():",
        "        if False:",
        f"{GATHERING_TEST}::test_a_gradient_that_did_not_come_through_the_view_is_an_error",
    ),
    Mutation(
        "a backward pass of others counts as one's own",
        GATHERING,
        "weight.owner == owner and not weight.learnt",
        "weight.owner == owner and not any(own.learnt for own in self.weights.values())",
        f"{GATHERING_TEST}::test_a_backward_pass_of_another_before_counts_for_none_who_begins_later",
    ),
    Mutation(
        "QAT does not look where its first backward pass went",
        QAT,
        "        self._require_controller().weights.sharded.check_learnt(self.name)\n",
        "",
        "tests/sharded/test_quantised.py::test_a_backward_pass_past_the_module_is_told_though_that_of_others_was_not",
    ),
    Mutation(
        "one shot waits for an end",
        MASKS,
        "fraction >= self.reached_at[1] and",
        "fraction >= self.end and",
        "tests/callbacks/test_dynamic_exact.py::test_the_steps_after_which_masks_change",
    ),
    Mutation(
        "the final sparsity is that of the schedule",
        MASKS,
        "        self._take(self.new_masks(self.sparsity), more=more)",
        "        self._take(self.new_masks(self._scheduled(self.end)), more=more)",
        f"{PRUNING_TEST}::test_the_end_is_exact_whatever_the_schedule",
    ),
    Mutation(
        "the best checkpoint may be denser than the target",
        MASKS,
        "            if self._has_target() and not is_one_metric(",
        "            if not is_one_metric(",
        f"{PRUNING_TEST}::test_the_best_checkpoint_has_the_final_sparsity",
    ),
    Mutation(
        "what was measured before the final sparsity makes a checkpoint the best",
        MASKS,
        " and not is_one_metric(measured, self._denser.get(callback.monitor)):",
        ":",
        f"{PRUNING_TEST}::test_what_was_measured_before_the_final_sparsity_makes_no_checkpoint_the_best",
    ),
    Mutation(
        "a step that moves its weights between two passes sees them as they were",
        VIEWS,
        "            if any(weight.is_stale for part in (module, *parts) for weight in readers.get(id(part), ())):",
        "            if False:",
        "tests/callbacks/test_pruning_life.py::test_a_step_that_moves_its_weights_between_two_passes_sees_them_masked",
    ),
    Mutation(
        "a forked process lets go of the sessions that it inherits",
        f"{PACKAGE}/export/runtime.py",
        "        before=lambda: _until_forked.extend(_sessions),",
        "        before=lambda: None,",
        "tests/export/test_runtime.py::test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have[forgotten]",
    ),
    Mutation(
        "a clip that the grid does not make itself leaves a layer in float",
        f"{PACKAGE}/export/integer.py",
        "                clip.input[0] = read",
        "                pass",
        "tests/export/test_integer.py::test_a_clip_that_the_grid_does_not_make_itself_leaves_the_layer_in_integers",
    ),
    Mutation(
        "a model that is tested gets its dense weights back",
        SAVING,
        '            if resumes and "state_dict" in checkpoint:',
        "            if True:",
        f"{PRUNING_TEST}::test_everything_is_kept_through_fit_test_save_and_load",
    ),
    Mutation(
        "what is resumed goes on from the compressed weights",
        SAVING,
        '            if resumes and "state_dict" in checkpoint:',
        "            if False:",
        f"{CONTRACT}/test_resume.py::test_from_the_middle_of_an_epoch_with_a_stateful_loader",
    ),
    Mutation(
        "validation sees the dense weights",
        MASKED,
        "            self._controller.weights.show()\n",
        "            pass\n",
        f"{PRUNING_EXACT}::test_validation_sees_what_is_saved",
    ),
    Mutation(
        "Taylor scores add up over all steps",
        f"{PACKAGE}/mechanisms/importance.py",
        "            if name not in self._sums or name in self._taken:",
        "            if name not in self._sums:",
        f"{PRUNING_TEST}::test_taylor_scores_are_those_of_the_steps_since_the_last_update",
    ),
    Mutation(
        "batch-norm statistics begin with what they were",
        BATCH_NORM,
        "            layer.momentum = None  # a cumulative mean",
        "            pass",
        "tests/mechanisms/test_batchnorm.py",
    ),
    Mutation(
        "pruned weights get no feedback",
        MASKING,
        "        return gradient if self._alive is None else gradient * self._alive.to(gradient.device)",
        "        return super().gradient(gradient)",
        f"{DYNAMIC_EXACT}::test_dpf",
    ),
    Mutation(
        "dead filters learn from an amplified gradient",
        MASKING,
        "            self._alive = None if bool(alive.all()) else alive",
        "            self._alive = None",
        f"{DYNAMIC_EXACT}::test_dpf",
    ),
    Mutation(
        "kept weights learn from the dense network",
        MASKING,
        "torch.zeros_like(gradient) if self._masked.mask is None else self._masked.lost(gradient)",
        "gradient",
        f"{DYNAMIC_EXACT}::test_dcil",
    ),
    Mutation(
        "what is not masked learns from both passes",
        DCIL,
        "**unlearning(rest), ",
        "",
        f"{DYNAMIC_EXACT}::test_dcil",
    ),
    Mutation(
        "the dense pass counts in the statistics",
        DCIL,
        "**scratch(buffers), ",
        "",
        f"{DYNAMIC_EXACT}::test_dcil",
    ),
    Mutation(
        "own layers keep the settings of the first step",
        DCIL,
        "            self._own.follow(optimizer)",
        "            pass",
        f"{DYNAMIC_EXACT}::test_dcil",
    ),
    Mutation(
        "own layers start anew on resume",
        DCIL,
        "OwnLayers(saved if same else None)",
        "OwnLayers(None)",
        f"{CONTRACT}/test_resume.py::test_from_the_middle_of_an_epoch_with_a_stateful_loader",
    ),
    Mutation(
        "the two learn from each other from the start",
        DCIL,
        "begun = self._require_progress().fraction_before >= self.kl_start",
        "begun = True",
        f"{DYNAMIC_EXACT}::test_dcil",
    ),
    Mutation(
        "the second pass draws other random numbers",
        FURTHER,
        "            for restore in self._start:\n                restore()",
        "            pass",
        FURTHER_TEST,
    ),
    Mutation(
        "the second pass logs",
        FURTHER,
        "            for method in MUTED:",
        "            for method in ():",
        FURTHER_TEST,
    ),
    Mutation(
        "the second pass counts in metrics",
        FURTHER,
        "                if is_metric(part):\n                    stack",
        "                if False:\n                    stack",
        FURTHER_TEST,
    ),
    Mutation(
        "changes of the second pass go unnoticed",
        FURTHER,
        "        if changed:",
        "        if False:",
        FURTHER_TEST,
    ),
    Mutation(
        "activation checkpointing goes on with one of two passes",
        VIEWS,
        "        if _compat.runs_again() and self._module() is module:",
        "        if False:",
        VIEWS_TEST,
    ),
    Mutation(
        "masks of DPF stay from the end",
        MASKS,
        "        elif due and not self.masks_stay(fraction):",
        "        elif due and not self._finished:",
        f"{DYNAMIC_EXACT}::test_masks_that_stay",
    ),
    Mutation(
        "recurrent layers go on with their own weights",
        STANDINS,
        "            _compat.refresh_flat_weights(module)\n        yield",
        "        yield",
        STANDINS_TEST,
    ),
    Mutation(
        "gradients are scaled before clipping",
        PSGD,
        """                steps.prepare(optimizer)
            return original(optimizer)
""",
        """                pass
            result = original(optimizer)
            steps.prepare(optimizer)
            return result
""",
        f"{PSGD_EXACT}::test_what_others_see",
    ),
    Mutation(
        "the scale is kept in checkpoints",
        PSGD,
        '            "lambda": self.lambda_s,\n',
        '            "lambda": None,\n',
        f"{PSGD_EXACT}::test_a_resumed_run_equals_the_whole",
    ),
    Mutation(
        "decoupled weight decay is not scaled",
        OPTIMIZERS,
        """        kept: float | Tensor = 1 - group["lr"] * group["weight_decay"]
""",
        """        kept: float | Tensor = 1 - 0.0 * group["lr"]
""",
        f"{PSGD_EXACT}::test_what_adaptive_optimizers_add_is_scaled",
    ),
    Mutation(
        "an update that a fused optimizer skipped is not scaled",
        SCALED_STEPS,
        "if not names or not before or found_infinite(optimizer):",
        "if not names or not before:",
        f"{PSGD_EXACT}::test_adam_with_a_real_scaler",
    ),
    Mutation(
        "the grid of an update is that before the step",
        GRADIENTS,
        "steps = _steps(before, bits, axes, steps)",
        "steps = _steps(weights, bits, axes, steps)",
        f"{PSGD_EXACT}::test_what_adaptive_optimizers_add_is_scaled",
    ),
    Mutation(
        "a step past Lightning's hooks is refused",
        SCALED_STEPS,
        "if names and id(optimizer) not in self._prepared:",
        "if False:",
        f"{PSGD_TEST}::test_steps_past_lightning_are_refused",
    ),
    Mutation(
        "a skipped batch is no first step",
        PSGD,
        "if steps.has_work(optimizer):",
        "if True:",
        f"{PSGD_TEST}::test_a_skipped_batch_skips_everything",
    ),
    Mutation(
        "what is validated is masked before it is rounded",
        VALIDATING,
        "vars(site.module).get(site.attribute, weight)",
        "weight",
        f"{PSGD_TEST}::test_masked_weights_are_validated_masked",
    ),
    Mutation(
        "biases that were left out stay out in a resumed run",
        PSGD,
        'return dict(state["bits"])',
        "return dict.fromkeys(weights, self.bits)",
        f"{PSGD_TEST}::test_a_resume_keeps_left_out_biases_out",
    ),
    # Quantisation: names of activations, and what they carry
    Mutation(
        "the calls of a module share a name",
        QUANTIZATION,
        'below}" + (f"#{earlier}" if earlier else "")',
        'below}" + (f"#{earlier}" if earlier < 0 else "")',
        f"{QUANTIZATION_TEST}::test_a_module_that_is_called_twice_has_a_name_for_each_call",
    ),
    Mutation(
        "a call past the owner has the name of the owner's",
        QUANTIZATION,
        "        if owner is not None and owner != outer_name:",
        "        if False:",
        f"{QUANTIZATION_TEST}::test_different_calls_have_different_paths",
    ),
    Mutation(
        "a list of modules counts as the owner of what is in it",
        QUANTIZATION,
        "    while above and isinstance(named[above], (nn.ModuleList, nn.ModuleDict)):",
        "    while False:",
        f"{QUANTIZATION_TEST}::test_the_owner_of_what_is_in_a_list_is_who_has_the_list",
    ),
    Mutation(
        "marks stay on the inputs of a network",
        QUANTIZATION,
        "                mode.finish()\n                for tensor in tensors:\n                    unmark(tensor)\n",
        "",
        f"{QUANTIZATION_TEST}::test_inputs_by_name_within_structures_and_those_given_back",
    ),
    Mutation(
        "marks stay on the outputs of a network",
        QUANTIZATION,
        "  # only now: one may be there twice\n            unmark(tensor)",
        "  # only now: one may be there twice\n            pass",
        f"{QUANTIZATION_TEST}::test_what_compiled_code_returns_bears_no_mark",
    ),
    Mutation(
        "a parameter that a network takes as input keeps its marks",
        QUANTIZATION,
        "            while own is not None and not isinstance(own, nn.Parameter):",
        "            while own is not None:",
        f"{CALIBRATION_TEST}::test_a_parameter_as_input_is_observed_with_the_data",
    ),
    Mutation(
        "each consumer rounds a tensor anew",
        QUANTIZATION,
        "        if rounded is not None:\n            known = getattr",
        "        if False:\n            known = getattr",
        f"{QUANTIZATION_TEST}::test_where_maps_are_rounded",
    ),
    Mutation(
        "what is fused behind a grid counts as on that grid",
        QUANTIZATION,
        "PENDING if state == GRID else product)",
        "product)",
        f"{QUANTIZATION_TEST}::test_where_maps_are_rounded",
    ),
    Mutation(
        "what was cut out counts as on the grid for the kernel behind it",
        QUANTIZATION,
        "        state = PENDING if kind is Kind.CUT and state == GRID else state\n",
        "",
        f"{QUANTIZATION_TEST}::test_where_maps_are_rounded",
    ),
    Mutation(
        "what was moved needs a quantiser again",
        QUANTIZATION,
        "        state = PENDING if kind is Kind.CUT and state == GRID else state\n",
        "        state = PENDING if state == GRID else state\n",
        f"{QUANTIZATION_TEST}::test_where_maps_are_rounded",
    ),
    Mutation(
        "who works in place goes on with what was there before",
        QUANTIZATION,
        "    return x.copy_(result) if in_place and not torch.compiler.is_exporting() else result",
        "    return result",
        f"{QUANTIZATION_TEST}::test_where_maps_are_rounded",
    ),
    Mutation(
        "a float operation in place writes into a copy",
        QUANTIZATION,
        "target = args[0] if rounded is args[0] else args[0].copy_(rounded)",
        "target = rounded",
        f"{QUANTIZATION_TEST}::test_where_maps_are_rounded",
    ),
    Mutation(
        "numbers that are moved in place are moved in a copy",
        QUANTIZATION,
        "            rounded = x.copy_(rounded)\n",
        "            pass\n",
        f"{QUANTIZATION_TEST}::test_where_maps_are_rounded",
    ),
    Mutation(
        "what was written through a view is not noticed",
        QUANTIZATION,
        "            if known is not None and known != _version(x):",
        "            if False:",
        f"{ROUNDING_TEST}::test_a_tensor_that_is_written_to_through_a_view_after_its_use",
    ),
    Mutation(
        "a view of what was rounded is used after a write to the tensor",
        QUANTIZATION,
        "        if getattr(x, ORIGIN, None):",
        "        if False:",
        f"{ROUNDING_TEST}::test_a_tensor_that_is_written_to_after_a_view_of_it_was_taken",
    ),
    Mutation(
        "a linear layer and the ReLU behind it have no quantiser before a float operation",
        QUANTIZATION,
        "        product = PRODUCT if state == FREE and x.ndim == 2 else state",
        "        product = state",
        f"{EMISSION_TEST}::test_a_linear_layer_with_relu_before_a_float_operation_runs_in_integers",
    ),
    Mutation(
        "a network that calls itself begins anew",
        QUANTIZATION,
        "            if calls.depth or not when():\n",
        "            if not when():\n",
        f"{QUANTIZATION_TEST}::test_a_network_that_calls_itself_is_one_call",
    ),
    Mutation(
        "maps need a quantiser though activations have none",
        QUANTIZATION,
        "        if not self.quantizers.active or getattr(x, STATE, None) == GRID:",
        "        if getattr(x, STATE, None) == GRID:",
        f"{QUANTIZATION_TEST}::test_weights_only",
    ),
    Mutation(
        "activation checkpointing within the network is not refused",
        QUANTIZATION,
        "        if calls.depth and torch.is_grad_enabled():",
        "        if False:",
        f"{QUANTIZATION_TEST}::test_activation_checkpointing_is_refused",
    ),
    Mutation(
        "views of what a kernel made are taken before it has a quantiser",
        QUANTIZATION,
        "            pending = isinstance(result, Tensor) and getattr(args[0], STATE, None) == PENDING",
        "            pending = False",
        f"{QUANTIZATION_TEST}::test_where_maps_are_rounded",
    ),
    # Quantisation: grids
    Mutation(
        "weights have one more integer below zero than above",
        QUANTIZERS,
        "    return (-highest if signed else 0), highest",
        "    return (-highest - 1 if signed else 0), highest",
        "tests/mechanisms/test_grids.py::test_limits",
    ),
    Mutation(
        "the range that was seen need not contain zero",
        OBSERVERS,
        "    return min(extremes[0], 0.0), max(extremes[1], 0.0)",
        "    return extremes",
        "tests/mechanisms/test_observers.py::test_extremes_by_hand",
    ),
    Mutation(
        "a grid need not contain zero",
        QUANTIZERS,
        "    low, high = limits[:, 0].clamp(max=0.0), limits[:, 1].clamp(min=0.0)",
        "    low, high = limits[:, 0], limits[:, 1]",
        "tests/functional/test_quantizers.py::test_range_grid_equals_the_formula",
    ),
    Mutation(
        "each part of the projections of attention has the first rows",
        ROUNDING,
        "        start = int(weight.storage_offset() - whole[1].storage_offset()) // row",
        "        start = 0",
        f"{ROUNDING_TEST}::test_cross_attention",
    ),
    Mutation(
        "statistics that were estimated are not used",
        ROUNDING,
        '        if module in self.grids.statistics and not arguments.get("training"):',
        "        if False:",
        f"{ROUNDING_TEST}::test_statistics_that_were_estimated_stand_in_in_evaluation_only",
    ),
    Mutation(
        "statistics that were estimated are those of training too",
        ROUNDING,
        '        if module in self.grids.statistics and not arguments.get("training"):',
        "        if module in self.grids.statistics:",
        f"{ROUNDING_TEST}::test_statistics_that_were_estimated_stand_in_in_evaluation_only",
    ),
    Mutation(
        "a correction takes the place of the bias",
        ROUNDING,
        "            bias = correction if bias is None else bias + correction",
        "            bias = correction",
        f"{ROUNDING_TEST}::test_a_correction_is_added_to_the_bias_or_in_its_place",
    ),
    Mutation(
        "the gate of hardswish has no grid",
        ROUNDING,
        '        return fake_quantize(x + 3.0, self._number("gate", GATE_STEP, x.device), 0, 0, 255) / 6.0',
        "        return torch.clamp((x + 3.0) / 6.0, 0.0, 1.0)",
        f"{ROUNDING_TEST}::test_curves",
    ),
    Mutation(
        "a gate of its own grid is rounded to another",
        QUANTIZATION,
        'GRID if name == "hardsigmoid" else PENDING',
        "PENDING",
        f"{QUANTIZATION_TEST}::test_where_maps_are_rounded",
    ),
    # Calibration
    Mutation(
        "a batch norm is folded though others take what the layer has made",
        CALIBRATION,
        "    return len(consumers) == 1 and module_of(next(iter(consumers))) == norm",
        "    return any(module_of(consumer) == norm for consumer in consumers)",
        f"{CALIBRATION_TEST}::test_a_batch_norm_is_a_part_of_the_layer_whose_output_nobody_else_takes",
    ),
    Mutation(
        "a batch norm over other channels than those of the linear layer is folded",
        CALIBRATION,
        '        if x.ndim != 2 and ":linear:" in layer:',
        "        if False:",
        f"{CALIBRATION_TEST}::test_a_batch_norm_over_tokens_is_no_part_of_the_linear_layer",
    ),
    Mutation(
        "a shift that new statistics have taken back is taken back twice",
        CALIBRATION,
        "        if grid is not None and self.grids.folds.get(site) not in self.grids.statistics:",
        "        if grid is not None:",
        f"{CALIBRATION_TEST}::test_a_batch_norm_with_new_statistics_has_taken_the_shift_back_already",
    ),
    Mutation(
        "channels are scaled that others take too",
        CALIBRATION,
        "        alone = len(watch.consumers.get(layer, ())) == 1 and len(takers) == 1",
        "        alone = len(watch.consumers.get(layer, ())) == 1",
        f"{CALIBRATION_TEST}::test_channels_are_scaled_only_where_nobody_else_takes_them",
    ),
    Mutation(
        "channels of a weight that is used twice are scaled",
        CALIBRATION,
        "            if alike and uses[place.name] == uses[grids.sites[after].name] == 1:",
        "            if alike:",
        f"{CALIBRATION_TEST}::test_channels_are_scaled_only_where_nobody_else_takes_them",
    ),
    Mutation(
        "channels are scaled between a convolution and a linear layer over positions",
        CALIBRATION,
        '            alike = (":linear:" in layer) == (":linear:" in after)',
        "            alike = True",
        f"{CALIBRATION_TEST}::test_a_linear_layer_over_the_positions_of_maps_takes_other_channels",
    ),
    Mutation(
        "the input of a network has the bits of all activations",
        CALIBRATION,
        '        edge = self.settings.edge_bits if key.startswith("in:") else None',
        "        edge = None",
        f"{CALIBRATION_TEST}::test_edges_have_bits_of_their_own",
    ),
    Mutation(
        "the last weight is no edge",
        CALIBRATION,
        "        ends = {sites[0].name, sites[-1].name}",
        "        ends = {sites[0].name}",
        f"{CALIBRATION_TEST}::test_edges_have_bits_of_their_own",
    ),
    Mutation(
        "statistics of batch norm leave no fingerprint",
        CALIBRATION,
        "    for name, value in [*network.named_parameters(), *network.named_buffers()]:",
        "    for name, value in network.named_parameters():",
        f"{CALIBRATION_TEST}::test_any_change_is_noticed",
    ),
    Mutation(
        "the same numbers elsewhere leave the same fingerprint",
        CALIBRATION,
        "wide.contiguous().view(-1).view(torch.uint8)",
        "wide.contiguous().view(-1).sort().values.view(torch.uint8)",
        f"{CALIBRATION_TEST}::test_any_change_is_noticed",
    ),
    Mutation(
        "a scripted part is not refused",
        CALIBRATION,
        "    if scripted:",
        "    if False:",
        f"{CALIBRATION_TEST}::test_scripted_parts_are_refused_by_name",
    ),
    Mutation(
        "calibration watches compiled code",
        CALIBRATION,
        'torch.compiler.set_stance("force_eager")',
        'torch.compiler.set_stance("default")',
        f"{CALIBRATION_TEST}::test_of_a_compiled_network_the_same_is_found",
    ),
    # Files of integers
    Mutation(
        "grids are taken though the weights have changed",
        SCALES,
        '                raise ValueError(\n                    "the weights have changed since',
        '                _ = (\n                    "the weights have changed since',
        f"{SCALES_TEST}::test_a_checkpoint_whose_weights_are_not_those_that_were_calibrated",
    ),
    Mutation(
        "the steps of a checkpoint are those of whole weights",
        SCALES,
        "axis=0 if channel else None",
        "axis=None",
        f"{SCALES_TEST}::test_a_checkpoint_of_psgd[channel]",
    ),
    Mutation(
        "a scale in the file may be nearly the given one",
        INTEGER,
        "not torch.equal(given, value)",
        "not torch.allclose(given, value)",
        f"{INTEGER_TEST}::test_a_scale_or_an_integer_that_the_exporter_changes_is_found",
    ),
    Mutation(
        "a network in float64 is not refused",
        INTEGER,
        "        _refuse_float64(network, call)\n",
        "",
        f"{INTEGER_TEST}::test_a_network_in_float64_is_refused_by_name",
    ),
    Mutation(
        "a computed weight that is changed once more is rounded as what it was",
        CALIBRATION,
        "        if site not in self.grids.sites and not self.names.is_whole(place, weight):",
        "        if False:",
        f"{CALIBRATION_TEST}::test_a_computed_weight_that_is_changed_once_more_stays_in_float",
    ),
    Mutation(
        "one integer kernel is enough",
        INTEGER,
        "        if len(kernels) < self._layers:",
        "        if len(kernels) < 1:",
        f"{INTEGER_TEST}::test_a_layer_that_does_not_run_in_integers_is_named",
    ),
    Mutation(
        "a file may be as far off as half of its output",
        INTEGER,
        "lambda noise, size: noise.clamp(LEAST_NOISE * size, most * size)",
        "lambda noise, size: most * size",
        f"{INTEGER_TEST}::test_how_far_off_a_file_may_be",
    ),
    Mutation(
        "a file may be no further off where quantisation itself is",
        INTEGER,
        "lambda noise, size: noise.clamp(LEAST_NOISE * size, most * size)",
        "lambda noise, size: LEAST_NOISE * size",
        f"{INTEGER_TEST}::test_how_far_off_a_file_may_be",
    ),
    Mutation(
        "a file may be anything where quantisation leaves nothing",
        INTEGER,
        "lambda noise, size: noise.clamp(LEAST_NOISE * size, most * size)",
        "lambda noise, size: torch.maximum(noise, LEAST_NOISE * size)",
        f"{INTEGER_TEST}::test_how_far_off_a_file_may_be",
    ),
    Mutation(
        "the upper half of a byte of a product comes first",
        EMISSION,
        "    packed = (halves[..., 0] | (halves[..., 1] << 4)).to(torch.uint8)",
        "    packed = (halves[..., 1] | (halves[..., 0] << 4)).to(torch.uint8)",
        f"{EMISSION_TEST}::test_products_of_four_bits_hold_two_integers_in_a_byte",
    ),
    Mutation(
        "the upper half of a byte of a convolution comes first",
        INTEGER,
        "(halves[:, 0] | (halves[:, 1] << 4))",
        "(halves[:, 1] | (halves[:, 0] << 4))",
        f"{INTEGER_TEST}::test_int4_packs_convolutions_and_multiplies_linear_layers_in_blocks",
    ),
    Mutation(
        "a channel that batch norm multiplies by a negative number keeps its sign",
        EMISSION,
        "integers * along(kernel.gain.sign().int(), integers, 0)",
        "integers * along(kernel.gain.sign().abs().int(), integers, 0)",
        f"{EMISSION_TEST}::test_folding_keeps_the_integers_up_to_their_sign",
    ),
    Mutation(
        "batch norm is folded with its own statistics",
        EMISSION,
        "    mean, variance = grids.statistics.get(grids.folds[site], (norm.running_mean, norm.running_var))",
        "    mean, variance = norm.running_mean, norm.running_var",
        f"{EMISSION_TEST}::test_folding_without_affine_and_with_other_statistics",
    ),
    Mutation(
        "the gate in the file ends below 1",
        EMISSION,
        "        raised = x + self._read(three, half, zero_point)",
        "        raised = x + self._read(three, half, zero_point) - 0.1",
        f"{EMISSION_TEST}::test_one_operation_between_two_layers[hardswish]",
    ),
    # The callback
    Mutation(
        "scales of other weights are shown",
        QUANTISED,
        "        return network is not None and fingerprints(network) == grids.fingerprints",
        "        return network is not None",
        f"{PTQ_LIFE}::test_changed_weights_are_noticed_and_calibrated_anew",
    ),
    Mutation(
        "two quantise one network",
        QUANTISED,
        "            if None in (self.network, other.network):",
        "            if False:",
        f"{PTQ_TEST}::test_two_parts_are_quantised_by_a_callback_each",
    ),
    Mutation(
        "what is measured may be the plain network",
        QUANTISED,
        "        if calls is not None and calls.count == 0:",
        "        if False:",
        f"{PTQ_TEST}::test_a_network_that_is_never_called_in_a_test_is_no_silent_float",
    ),
    Mutation(
        "without a validation step there is nothing to replay",
        CALIBRATING,
        '        self._method = "training_step"\n        if not defines',
        '        self._method = "validation_step"\n        if not defines',
        f"{PTQ_LIFE}::test_without_a_validation_step_the_training_step_is_replayed_in_evaluation_mode",
    ),
    Mutation(
        "batches that the validation step does not take end the calibration",
        CALIBRATING,
        'is replayed, because %s", self.name, error)\n            self._method = "training_step"',
        'is replayed, because %s", self.name, error)',
        f"{PTQ_LIFE}::test_training_batches_that_the_validation_step_does_not_take",
    ),
    Mutation(
        "a validation that goes around the network is not noticed",
        CALIBRATING,
        '        if self._method == "training_step":\n            raise',
        '        if self._method == "validation_step":\n            return\n        if True:\n            raise',
        f"{PTQ_LIFE}::test_a_validation_that_goes_around_the_network_is_told_after_the_first_step",
    ),
    # Quantisation-aware training
    Mutation(
        "a step of an activation learns as fast as its elements are many",
        MOVING,
        "        step = gradient_scaled(step, 1 / math.sqrt(max(1, x.numel()) * highest))",
        "        step = gradient_scaled(step, 1.0)",
        f"{MOVING_TEST}::test_the_gradient_of_learned_steps",
    ),
    Mutation(
        "ranges follow at once",
        MOVING,
        "MOMENTUM = 0.1",
        "MOMENTUM = 1.0",
        f"{QAT_EXACT}::test_the_plain_loop",
    ),
    Mutation(
        "a range that was lost moves",
        MOVING,
        "                lost.append(key)\n                continue",
        "                lost.append(key)",
        f"{MOVING_TEST}::test_an_activation_without_a_range",
    ),
    Mutation(
        "a step that is replayed is quantised",
        QAT,
        "when=lambda: controller.deployed and not controller.replaying",
        "when=lambda: controller.deployed",
        f"{QAT_TEST}::test_where_the_step_is_replayed_nothing_is_quantised",
    ),
    Mutation(
        "a weight of grids that follow keeps its first step",
        MOVING,
        "        if known is None or self.frozen:\n            return known",
        "        if True:\n            return known",
        f"{MOVING_TEST}::test_weights_have_the_grid_of_what_they_are_now",
    ),
    Mutation(
        "frozen grids are not remembered by a checkpoint",
        MOVING,
        '        self.frozen = state["frozen"]',
        "        self.frozen = False",
        f"{QAT_LIFE}::test_a_resume_equals_the_whole",
    ),
    Mutation(
        "learned steps go on from where they once began",
        QAT,
        '        begun = kept.get("begun") or state["quantization"]',
        '        begun = state["start_grids"] or state["quantization"]',
        f"{QAT_LIFE}::test_a_resume_after_a_resume_with_another_step_size",
    ),
    Mutation(
        "batch norm is frozen at any rate",
        QAT,
        "fit.lr <= SMALL_RATE * fit.highest_lr",
        "fit.lr <= 2 * fit.highest_lr",
        f"{QAT_EXACT}::test_everything_as_it_is_by_default",
    ),
    Mutation(
        "statistics that somebody estimates anew stay frozen",
        BATCH_NORM,
        "            if averages and layer.momentum is None:",
        "            if False:",
        f"{QAT_LIFE}::test_the_statistics_that_swa_estimates_are_kept",
    ),
    Mutation(
        "batch norm stays frozen after the fit",
        BATCH_NORM,
        "            layer.training = self._module.training",
        "            pass",
        f"{QAT_LIFE}::test_batch_norm_that_the_user_froze_stays_so",
    ),
    Mutation(
        "grids that follow are those of the weights that were trained",
        MOVING,
        "    return FollowingGrids(network, grids, watching=bool).current() if grids.following else grids",
        "    return grids",
        f"{QAT_LIFE}::test_a_checkpoint_of_averages_is_tested_as_it_was_validated",
    ),
    Mutation(
        "a loss counts as small as accumulation makes it",
        QAT,
        "device=pl_module.device, times=parts)",
        "device=pl_module.device)",
        f"{QAT_TEST}::test_batches_that_are_accumulated_do_not_make_the_loss_smaller",
    ),
    Mutation(
        "a window with one loss that is no number ends the training",
        DIVERGENCE,
        "        finite = losses.isfinite()",
        "        finite = losses == losses",
        f"{DIVERGENCE_TEST}::test_single_losses_that_are_no_numbers_are_left_out_and_a_window_of_them_is_not",
    ),
    Mutation(
        "the loss before freezing does not count",
        DIVERGENCE,
        "        self._first, self._batches, self._seen = self._last if finite else None, 0, []",
        "        pass",
        f"{DIVERGENCE_TEST}::test_beginning_again_compares_with_what_was_last",
    ),
    Mutation(
        "checkpoints are compared with those in full precision",
        BASE,
        "        for kind in wait_anew(trainer):",
        "        for kind in ():",
        f"{QAT_TEST}::test_a_scheduler_that_waits_for_a_plateau_waits_anew",
    ),
    Mutation(
        "early stopping goes on with scores of the denser network",
        MASKS,
        "                if more:\n                    self._wait_anew",
        "                if False:\n                    self._wait_anew",
        f"{PRUNING_TEST}::test_what_waits_for_a_better_score_waits_anew_at_the_final_sparsity",
    ),
    Mutation(
        "a view of the whole weight is one without gradients in a validation",
        f"{PACKAGE}/mechanisms/views.py",
        "self.weight.view_as(self.weight) if torch.is_grad_enabled() else self.weight.detach()",
        "self.weight.view_as(self.weight)",
        "tests/callbacks/test_psgd.py::test_weights_whose_mask_comes_later_are_validated_whole",
    ),
    Mutation(
        "networks of metrics are masked",
        f"{PACKAGE}/mechanisms/weights.py",
        "if module in outside} or chosen",
        "} or chosen",
        f"{PRUNING_TEST}::test_networks_that_only_measure",
    ),
    Mutation(
        "filters are where they were in the larger network",
        f"{PACKAGE}/callbacks/dynamic.py",
        "                view.filters = self._filters.get(name)",
        "                pass",
        "tests/callbacks/test_structured_life.py::test_masks_follow_depthwise_transposed_convolutions",
    ),
    Mutation(
        "averages keep the statistics of before",
        f"{PACKAGE}/mechanisms/batchnorm.py",
        "                copied.copy_(own)",
        "                pass",
        f"{PRUNING_TEST}::test_an_average_gets_the_statistics_that_are_estimated_at_the_end",
    ),
    Mutation(
        "a metric that steps log too has one name",
        f"{PACKAGE}/mechanisms/metrics.py",
        'f"{metric}_epoch{of}{loader}"',
        "name",
        "tests/callbacks/test_export.py::test_a_metric_that_steps_log_too_has_both_its_names",
    ),
    Mutation(
        "lists among hyperparameters are not compared",
        f"{PACKAGE}/mechanisms/loading.py",
        "        return all(_is_plain(entry) for entry in value)",
        "        return False",
        "tests/test_exporting_projects.py::test_lists_among_the_hyperparameters_count_too",
    ),
    Mutation(
        "configure_model makes a copy's network anew",
        f"{PACKAGE}/export/evaluate.py",
        '            vars(duplicate)["configure_model"] = _compat.do_nothing',
        "            pass",
        "tests/callbacks/test_odd_projects.py::test_a_network_that_would_be_made_anew_is_the_one_that_was_trained",
    ),
    Mutation(
        "a checkpoint of other layers is resumed",
        QAT,
        "        for argument in changed:\n            raise",
        "        for argument in ():\n            raise",
        f"{QAT_LIFE}::test_a_resume_with_other_layers",
    ),
    Mutation(
        "a module that comes later runs in float",
        QAT,
        "        if new:\n            raise",
        "        if False:\n            raise",
        f"{QAT_TEST}::test_modules_that_come_later_are_refused",
    ),
    Mutation(
        "a parameter that is replaced runs in float",
        ROUNDING,
        "            self.names.renew()",
        "            return None",
        f"{QAT_TEST}::test_parameters_that_are_replaced_are_rounded_all_the_same",
    ),
    Mutation(
        "layers of later batches are not looked for",
        CALIBRATION,
        "LOOKS = 8",
        "LOOKS = 1",
        f"{QAT_TEST}::test_norms_behind_layers_that_the_first_batches_do_not_run_are_folded",
    ),
    Mutation(
        "what a network keeps bears marks",
        QUANTIZATION,
        "            if (kept := made()) is not None:",
        "            if (kept := None) is not None:",
        f"{QAT_TEST}::test_what_a_network_keeps_between_calls_is_what_it_was_given",
    ),
    Mutation(
        "a step that differentiates is replayed without gradients",
        REPLAY,
        "                self._differentiates = True\n",
        "                return\n",
        "tests/mechanisms/test_replay.py::test_a_step_that_differentiates_is_run_to_its_end",
    ),
    Mutation(
        "a ReLU takes what others take on their grid as it is",
        ROUNDING,
        "        return key in self.grids.shared",
        "        return False",
        f"{EMISSION_TEST}::test_a_relu_is_not_a_part_of_a_kernel_whose_output_others_take",
    ),
    Mutation(
        "biases are added as they are in validation",
        ROUNDING,
        "        if not self.evaluating or place is None",
        "        if True or place is None",
        "tests/mechanisms/test_kernels.py::test_a_module_gives_what_its_file_gives",
    ),
    Mutation(
        "a branch of a later batch is an end of the network",
        CALIBRATION,
        "                self._first = self._first or list(grids.sites)",
        "                self._first = list(grids.sites)",
        f"{CALIBRATION_TEST}::test_the_first_and_the_last_layer_are_those_of_the_first_batch",
    ),
    Mutation(
        "a failure on another rank is not told",
        f"{PACKAGE}/_compat.py",
        "        torch.distributed.all_gather_object(said, message, group=group)",
        "        pass",
        f"{QAT_LIFE}::test_a_calibration_that_fails_on_one_rank_ends_all",
    ),
    # Filters that go
    Mutation(
        "filters: optimizers keep what they had",
        SHRINKING,
        "                    optimizer.state[parameter].update(values)",
        "                    pass",
        STRUCTURED_EXACT,
    ),
    Mutation(
        "filters: a graph of before is remembered",
        SHRINKING,
        "        leaf.data = value.to(torch.float32 if value.dtype == torch.float16 else torch.float16)\n",
        "        pass\n",
        SHRINKING_TEST,
    ),
    Mutation(
        "filters: gradients keep their shape",
        SHRINKING,
        "                leaf.grad = gradient\n",
        "                leaf.grad = None\n",
        SHRINKING_TEST,
    ),
    Mutation(
        "filters: sizes of layers stay",
        SHRINKING,
        "        _set_attributes(module, shrinkage.attributes)\n",
        "        pass\n",
        SHRINKING_TEST,
    ),
    Mutation(
        "filters: two rounds do not add up",
        SHRINKING,
        "[own[dim][index] for index in indices] if dim in own else list(indices)",
        "list(indices)",
        SHRINKING_TEST,
    ),
    Mutation(
        "filters: a user's number is a size",
        SHRINKING,
        "        if values and isinstance(part, LAYERS_OF_TORCH):",
        "        if values:",
        f"{STRUCTURED_TRIALS}::test_a_number_of_the_users_is_no_size",
    ),
    Mutation(
        "filters: memory formats are lost",
        SHRINKING,
        "            return taken.contiguous(memory_format=layout)",
        "            return taken.contiguous()",
        f"{STRUCTURED_TRIALS}::test_memory_formats_stay",
    ),
    Mutation(
        "filters: groups step at one share together",
        BUDGETS,
        "    return min(candidates, key=lambda kept: abs(gone(kept) - ratio))",
        "    return above",
        "tests/mechanisms/test_budgets.py",
    ),
    Mutation(
        "filters: the share is of what is left",
        BUDGETS,
        "(1.0 - share) * group.originally / step",
        "(1.0 - share) * group.channels / step",
        "tests/mechanisms/test_budgets.py",
    ),
    Mutation(
        "filters: rounds count on the batch at hand",
        BUDGETS,
        "        shapes = {**self._sizes.shapes, **self._sizes.originally}",
        "        shapes = {**self._sizes.shapes}",
        f"{STRUCTURED_TRIALS}::test_rounds_on_batches_of_other_sizes_take_as_much",
    ),
    Mutation(
        "filters: the output loses its channels",
        DEPENDENCIES,
        "        if any(item.returned for item in items):",
        "        if False:",
        f"{STRUCTURED_TEST}::test_the_head_that_is_a_convolution_keeps_its_classes",
    ),
    Mutation(
        "filters: attention is dealt out to other heads",
        DEPENDENCIES,
        "        if any(item.attention for item in items):",
        "        if False:",
        f"{STRUCTURED_TEST}::test_what_reaches_attention_is_left_alone",
    ),
    Mutation(
        "filters: frozen layers are not followed",
        GRAPH,
        "                parameter.requires_grad_(True)  # else what is frozen would not be seen",
        "                pass",
        "tests/mechanisms/test_dependencies.py",
    ),
    Mutation(
        "filters: channels that come twice count once",
        DEPENDENCIES,
        "sorted(set(item.indices[gone].tolist()))",
        "sorted(set(item.indices[gone].tolist()))[:1]",
        "tests/mechanisms/test_dependencies.py",
    ),
    Mutation(
        "filters: a step writes into the batch that is trained on",
        COPIES,
        "        batch = _copied(self._batch)\n",
        "        batch = self._batch\n",
        f"{STRUCTURED_TRIALS}::test_a_step_may_write_into_its_batch",
    ),
    Mutation(
        "filters: only evaluation is compared",
        COPIES,
        "        found = []\n        for training in (False, True):",
        "        found = []\n        for training in (False,):",
        f"{STRUCTURED_TRIALS}::test_what_only_training_computes_is_compared_too",
    ),
    Mutation(
        "filters: the step is not tried",
        COPIES,
        "                            self._step(copied)",
        "                            pass",
        f"{STRUCTURED_TRIALS}::test_the_step_runs_with_the_smaller_network_before_anything_goes",
    ),
    Mutation(
        "filters: behind zeros nothing is seen",
        COPIES,
        "            _fill_zeros_(copied)\n",
        "",
        f"{STRUCTURED_TEST}::test_behind_zeros_it_is_compared_too",
    ),
    Mutation(
        "filters: infinity hides differences",
        COPIES,
        "LARGE * (usual",
        "math.inf * (usual",
        f"{STRUCTURED_TRIALS}::test_numbers_that_stand_for_infinity_hide_nothing",
    ),
    Mutation(
        "filters: a frozen teacher is made smaller",
        COPIES,
        "        self.names = tuple(trained or calls)",
        "        self.names = tuple(calls)",
        f"{STRUCTURED_TRIALS}::test_a_frozen_teacher_stays_as_it_is_and_counts_nowhere",
    ),
    Mutation(
        "filters: one call of a network stands for all",
        COPIES,
        "        if len(self.names) == 1 and len(calls[self.names[0]]) == 1:\n            [call]",
        "        if len(self.names) == 1:\n            [call, *_]",
        f"{STRUCTURED_TRIALS}::test_all_calls_of_a_network_are_looked_at",
    ),
    Mutation(
        "filters: nothing is compared",
        REHEARSAL,
        "        if difference is not None and not difference <= TOLERANCE:\n            name",
        "        if False:\n            name",
        f"{STRUCTURED_TEST}::test_refusals_leave_the_module_as_it_was",
    ),
    Mutation(
        "filters: random scores are those of every round",
        REHEARSAL,
        "(seed * 1_000_003 + sum(map(ord, group.name)) * 8191 + group.channels) % (1 << 63)",
        "0",
        f"{STRUCTURED_TEST}::test_random_scores_follow_the_seed",
    ),
    Mutation(
        "filters: averages stay large",
        STRUCTURED,
        "            shrinking += [prepared_shrinkage(average, shrinkage) for average in averages]\n",
        "",
        STRUCTURED_EXACT,
    ),
    Mutation(
        "filters: networks beside are cut",
        COPIES,
        "        return lies_within(name, self.names)",
        "        return True",
        f"{STRUCTURED_TRIALS}::test_one_network_may_change_though_it_is_called_twice_beside_others",
    ),
    Mutation(
        "filters: networks beside count",
        COPIES,
        "lambda: self.run(copied), within=self.names)",
        "lambda: self.run(copied))",
        f"{STRUCTURED_TRIALS}::test_a_frozen_network_beside_two_calls_stays_and_counts_nowhere",
    ),
    Mutation(
        "filters: dropout is a difference",
        COPIES,
        "        if func in DROPOUTS:",
        "        if False:",
        f"{STRUCTURED_TRIALS}::test_random_numbers_are_no_difference",
    ),
    Mutation(
        "filters: random numbers are a difference",
        COPIES,
        " or not _distance(whole, self._values(None, dtype, training, seed=1)):",
        " or True:",
        f"{STRUCTURED_TRIALS}::test_random_numbers_are_no_difference",
    ),
    Mutation(
        "filters: skipped batches are never forgotten",
        STRUCTURED,
        "wanted).plan, message))\n                self._skipped = 0",
        "wanted).plan, message))",
        f"{STRUCTURED_TRIALS}::test_skipped_batches_are_counted_in_a_row",
    ),
    Mutation(
        "filters: a graph of gradients is taken for the network's",
        GRAPH,
        "        if func is torch.autograd.grad and (",
        "        if False and (",
        f"{STRUCTURED_TRIALS}::test_what_is_differentiated_twice_says_so",
    ),
    Mutation(
        "filters: in the middle of an accumulation",
        STRUCTURED,
        " or batch_idx % trainer.accumulate_grad_batches:",
        ":",
        f"{STRUCTURED_LIFE}::test_after_a_skipped_batch_it_waits_for_the_end_of_an_accumulation_too",
    ),
    Mutation(
        "filters: a checkpoint's sizes are not taken",
        STRUCTURED,
        "            told = resize_(module, checkpoint)",
        "            told = None",
        f"{STRUCTURED_LIFE}::test_older_larger_and_newer_smaller_files_are_validated_in_turn",
    ),
    Mutation(
        "filters: masks keep their shapes",
        MASKED,
        "        self._require_masks().follow(shrinkage)\n",
        "",
        f"{STRUCTURED_LIFE}::test_masks_follow",
    ),
    Mutation(
        "filters: masks of what stays may be sparser",
        MASKS,
        "        if masks.zeros > self.zeros_at(self.sparsity):  # what",
        "        if False:  # what",
        f"{STRUCTURED_TRIALS}::test_masks_on_what_stays_have_the_sparsity_that_was_asked_for",
    ),
    Mutation(
        "filters: quantisation may begin in the same step",
        QAT,
        "progress.step_at(until) < progress.step_at(self.start)",
        "True",
        f"{STRUCTURED_TRIALS}::test_in_the_same_step_quantisation_cannot_begin",
    ),
    # Tracking
    Mutation(
        "tracking: other ranks write too",
        TRACKER,
        "        if not self.trainer.is_global_zero:\n            return []\n",
        "",
        f"{TRACKING_TEST}/test_tracker.py::test_nothing_is_written_on_other_ranks_and_without_loggers",
    ),
    Mutation(
        "tracking: a failure is told each time",
        TRACKER,
        "        self._failed.add(id(logger))\n",
        "",
        f"{TRACKING_TEST}/test_tracker.py::test_a_logger_that_fails_is_told_of_once_and_others_go_on",
    ),
    Mutation(
        "tracking: a column keeps the first sparsity of its updates",
        HISTORY,
        "self._sparsity[-1], self._churn[-1] = zeros, self._churn[-1] + changed",
        "self._churn[-1] = self._churn[-1] + changed",
        f"{TRACKING_TEST}/test_history.py",
    ),
    Mutation(
        "tracking: the churn of a column is a sum",
        HISTORY,
        "np.stack(self._churn, axis=1) / np.asarray(self._updates, np.float32)",
        "np.stack(self._churn, axis=1)",
        f"{TRACKING_TEST}/test_history.py",
    ),
    Mutation(
        "tracking: the checkpoint is an output of the run",
        COMPAT,
        "is_user_created=True, use_after_commit=True",
        "is_user_created=False, use_after_commit=False",
        f"{TRACKING_TEST}/test_read_back.py::test_the_artifact_comes_from_the_checkpoint",
    ),
    Mutation(
        "tracking: the best of a metric is the worst",
        TRACKER,
        '(max if way == "max" else min)',
        '(min if way == "max" else max)',
        f"{TRACKING_TEST}/test_tracker.py::test_the_best_of_each_metric_that_counts",
    ),
    Mutation(
        "tracking: a sweep of bits that have to agree",
        SWEEP_FIELDS,
        "argument not in bits and ",
        "",
        "tests/test_sweep.py::test_bits_that_have_to_agree_are_left_alone",
    ),
    # Manual optimisation: which terms belong to which loss
    Mutation(
        "a loss has the terms of everybody",
        LOSSES,
        "if term.student is None or term.student in of_student]",
        "]",
        f"{MIXINS}::test_of_two_networks_only_the_student_s_loss_changes[Gan]",
    ),
    Mutation(
        "of two students one is guessed",
        LOSSES,
        "if not _related(one, other):",
        "if False:",
        f"{MIXINS}::test_what_is_not_said_is_an_error_and_no_guess",
    ),
    Mutation(
        "names of nobody are taken",
        LOSSES,
        "        if name in terms:\n            continue",
        "        continue",
        f"{MIXINS}::test_names_are_checked",
    ),
    Mutation(
        "calls of other losses count",
        LOSSES,
        "[call for call in own if call in found] or list(recent.get(key, ()))",
        "list(own)",
        f"{MIXINS}::test_of_two_networks_only_the_student_s_loss_changes[Silent]",
    ),
    Mutation(
        "an unnamed student is whatever the first loss shows",
        STUDENT,
        "self._is_one(list(dict.fromkeys((*(self.names or ()), *learning))))",
        "pass",
        f"{MIXINS}::test_a_student_that_was_not_named_is_not_guessed_from_the_first_loss[Swapped]",
    ),
    Mutation(
        "a batch that is skipped has to ask",
        CONTROLLER,
        "if waiting and self._learned and not self._asked:",
        "if waiting and not self._asked:",
        f"{MIXINS}::test_a_step_that_skips_its_batch_need_not_ask",
    ),
    Mutation(
        "a term that no loss had is not noticed",
        BASE,
        "self._everywhere(trainer, ready)",
        "False",
        f"{MIXINS}::test_names_are_checked",
    ),
    Mutation(
        "helpers step with any optimizer",
        BASE,
        "return not leaders or any(own is optimizer for own in leaders)",
        "return True",
        f"{MIXINS_EXACT}::test_the_translator_steps_with_the_optimizer_of_its_student[Accumulating]",
    ),
    Mutation(
        "a loss is weighed whose it is not",
        CONTROLLER,
        "for owner, weight in every if names is None or owner in names}",
        "for owner, weight in every}",
        f"{MIXINS}::test_of_two_networks_only_the_student_s_loss_changes[Gan]",
    ),
    Mutation(
        "cleared gradients are not noticed",
        LESSONS,
        "gone = [id(own) for own, _ in watched if _is_cleared(own)]",
        "gone = []",
        f"{LESSONS_TEST}::test_gradients_that_are_not",
    ),
    Mutation(
        "whoever writes to a parameter has taken its gradient",
        LESSONS,
        "if not self._told and any(",
        "if any(",
        f"{LESSONS_TEST}::test_gradients_that_are_not",
    ),
    Mutation(
        "an optimizer that clears gradients has taken none",
        LESSONS,
        "register_optimizer_step_pre_hook(self._stepping),",
        "",
        f"{LESSONS_TEST}::test_gradients_that_are_taken",
    ),
    Mutation(
        "who asks autograd for gradients has lost them",
        LESSONS,
        "if self._given_out:",
        "if False:",
        f"{LESSONS_TEST}::test_gradients_that_are_taken",
    ),
    Mutation(
        "who puts other gradients in their place has lost them",
        LESSONS,
        "if replaced or any(",
        "if any(",
        f"{LESSONS_TEST}::test_gradients_that_are_taken",
    ),
    Mutation(
        "two losses of one node are one",
        LOSSES,
        "if (loss.grad_fn, loss.output_nr) in self._asked:",
        "if loss.grad_fn in {node for node, _ in self._asked}:",
        f"{MIXINS}::test_two_losses_of_one_node_are_two",
    ),
    Mutation(
        "gradients of all losses count",
        LESSONS,
        "if self.taken or not self._running or",
        "if self.taken or",
        f"{LESSONS_TEST}::test_gradients_that_are_not",
    ),
    Mutation(
        "a step that a scaler skips loses gradients",
        LESSONS,
        "if not bool(_entries(gradient).isfinite().all()):",
        "if False:",
        f"{LESSONS_TEST}::test_gradients_that_are_not",
    ),
    Mutation(
        "a term of another network's loss teaches nothing, in silence",
        BASE,
        "self._tell_of_lost_lessons(pl_module, over=True)",
        "pass",
        f"{MISTAKES}::test_a_term_whose_gradients_are_cleared_is_warned_of",
    ),
    Mutation(
        "what teaches nothing is told of at the end of the epoch only",
        LESSONS,
        "PATIENCE = 8",
        "PATIENCE = 10**9",
        f"{MISTAKES}::test_it_is_said_in_the_midst_of_an_epoch",
    ),
    Mutation(
        "a student whose turn has not come is told of",
        BASE,
        "not (lesson.passed_over or self._taught_moved(pl_module))",
        "False",
        f"{MISTAKES}::test_who_does_not_step_at_all_has_his_reasons",
    ),
    Mutation(
        "a student whose turn has not come is blamed",
        BASE,
        "return not self._taught_moved(pl_module)",
        "return False",
        f"{MISTAKES}::test_a_student_whose_turn_never_came_is_told_of_at_the_end",
    ),
    Mutation(
        "parameters that nobody trains are followed",
        LESSONS,
        "return theirs or every",
        "return every",
        f"{MISTAKES}::test_a_gradient_that_nobody_would_take_does_not_hide_that_all_others_are_cleared",
    ),
    Mutation(
        "what both passes teach is looked for in the first step only",
        DCIL,
        "(LOOKS if manual else 1)",
        "1",
        f"{MISTAKES}::test_what_is_computed_before_a_function_is_found_in_later_steps_too",
    ),
    Mutation(
        "a function of a loss that nobody runs twice computes all of it",
        CONTROLLER,
        "if compute is not None and (self._views_of(names) or not self._repeated.isdisjoint(names)):",
        "if compute is not None:",
        f"{MISTAKES}::test_nor_need_one_of_a_loss_that_nobody_runs_twice",
    ),
    Mutation(
        "a function may use what was computed before",
        LOSSES,
        "if any(call in found for call in calls):\n            raise",
        "if False:\n            raise",
        f"{MISTAKES}::test_a_function_that_is_run_twice_computes_all_of_its_loss",
    ),
    Mutation(
        "a function may learn",
        LOSSES,
        "if gradients() != before:",
        "if False:",
        f"{MISTAKES}::test_a_function_that_learns_is_refused",
    ),
    Mutation(
        "both networks of a GAN are pruned unasked",
        MASKED,
        "        if self.layers is None:\n            self._refuse_separate",
        "        if False:\n            self._refuse_separate",
        f"{MISTAKES}::test_of_networks_that_are_trained_apart_none_is_taken_unasked",
    ),
    Mutation(
        "a view that was written into is no source",
        CAPTURE,
        "for tensor in (*tensors, *bases) if",
        "for tensor in tensors if",
        "tests/mechanisms/test_capture.py::test_what_a_loss_was_computed_from_is_known",
    ),
    Mutation(
        "what compiled code returns is no source",
        CAPTURE,
        "if self._nodes is None else self._nodes",
        "if False else self._nodes or frozenset()",
        f"{MIXINS_EXACT}::test_compiled_networks",
    ),
    Mutation(
        "a copy shares memory with the shard of a single rank",
        "lightning_compress/export/copying.py",
        'gathered.to("cpu", copy=True)',
        'gathered.to("cpu")',
        "tests/mechanisms/test_sharding.py::test_a_whole_copy_is_as_if_nothing_had_been_sharded",
    ),
    Mutation(
        "whole parameters of a forward pass are taken for the shards",
        "lightning_compress/mechanisms/sharding.py",
        "        unit.reshard()",
        "        unit.children()",
        "tests/mechanisms/test_sharding.py::test_a_module_that_holds_whole_parameters_gives_its_shards",
    ),
    Mutation(
        "a copy keeps the hooks of FSDP2",
        "lightning_compress/_compat.py",
        "if not _is_of_sharding(hook)}",
        "if hook}",
        "tests/test_compat.py::test_what_fsdp2_puts_on_a_module_is_found_and_put_back",
    ),
)


def copied(folder: Path) -> Path:
    """A copy of the repository without what is not tracked."""
    target = folder / "repository"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "dist", "build")
    return Path(shutil.copytree(ROOT, target, ignore=ignored))


def run(copy: Path, *tests: str, workers: int = 0, limit: float | None = LIMIT) -> int | None:
    """Exit code of pytest in the copy; None if it took too long. Its output goes to ``pytest.log`` beside the copy."""
    options = ["-q", "-x", "-m", "slow or not slow", "-p", "no:cacheprovider", "-n", str(workers)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        stdout=(copy.parent / "pytest.log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the ranks that it started
            process.wait()


def verdict(copy: Path, mutation: Mutation) -> str:
    """Whether the test falls with the edit; the copy is whole again afterwards."""
    path = copy / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        return f"NO LONGER APPLIES ({text.count(mutation.old)} places in {mutation.file})"
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        code = run(copy, mutation.test)
    finally:
        path.write_text(text)
    if code is None:
        return "caught (hangs)" if mutation.hangs else f"SURVIVES (not done in {LIMIT} s)"
    return "caught" if code == TESTS_FAILED else f"SURVIVES (pytest ended with {code})"


def main(wanted: str = "") -> int:
    """Run the edits whose description contains a text; all without one."""
    chosen = [mutation for mutation in MUTATIONS if wanted in mutation.what]
    with tempfile.TemporaryDirectory() as folder:
        copies = [copied(Path(folder) / str(worker)) for worker in range(WORKERS)]
        code = run(copies[0], *dict.fromkeys(mutation.test for mutation in chosen), workers=WORKERS, limit=None)
        if code != 0:
            print("\n".join((copies[0].parent / "pytest.log").read_text().splitlines()[-30:]))
            print(f"the tests do not pass without any edit: pytest ended with {code}")
            return 1
        free: SimpleQueue[Path] = SimpleQueue()
        for copy in copies:
            free.put(copy)

        def tried(mutation: Mutation) -> bool:
            start, copy = time.monotonic(), free.get()
            try:
                result = verdict(copy, mutation)
            finally:
                free.put(copy)
            print(f"{result:<16} {time.monotonic() - start:5.1f} s  {mutation.what}  [{mutation.test}]", flush=True)
            return result.startswith("caught")

        with ThreadPoolExecutor(WORKERS) as pool:
            caught = sum(pool.map(tried, chosen))
    print(f"{caught} of {len(chosen)} caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:2]))
