"""The experiments: their statistics, what is chosen by which images, what is made again, and what the tables say."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import signal
import sys
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from experiments import __main__ as command
from experiments import (
    aware,
    bits,
    calibrated,
    cards,
    claims,
    curves,
    data,
    files,
    front,
    library,
    pipeline,
    plan,
    results,
    rounded,
    schedule,
    structured,
    tables,
    training,
    watch,
)
from experiments.claims import Claimed
from experiments.experiment import Experiment, Job, minutes
from experiments.files import Times
from experiments.plan import CLAIMS, FEW, FT, KD, LONGER, PLAIN, SHORT, SMOOTHED, Arm, Claim, Protocol, Run, Teacher
from experiments.published import publish, published
from experiments.store import Store, beside, candidates, series, write_atomically, write_with_record

CLAIM = Claim("kd", "page.md", "KD", ((SHORT, (PLAIN, KD, SMOOTHED)),))


def keep(store, run, held_out, test, batches=None, minutes=1.0):
    result = {
        "held_out_accuracy": held_out,
        "test_accuracy": test,
        "test_agreement": 0.9,
        "batches": batches or f"seed {run.seed}",
        "cpu_seconds": 60 * minutes,
    }
    store.write(run, result)


def keep_arm(store, arm, test_by_seed, held_out=0.8, protocol=SHORT):
    for run in candidates(protocol, arm):
        keep(store, run, held_out - abs(run.rate - 0.1), test_by_seed[0])  # 0.1 is chosen
    for seed in range(1, len(test_by_seed)):
        keep(store, Run(protocol, arm, 0.1, seed), held_out, test_by_seed[seed])


def test_the_interval_is_the_t_interval_worked_by_hand():
    # deviation 1, 3 seeds: 4.303 / sqrt(3) = 2.484
    assert tables.t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.0 - 2.484, 2.0 + 2.484), abs=1e-3)
    mean, low, high = tables.t_interval([0.5])
    assert mean == 0.5
    assert low != low
    assert high != high


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ((0.010, 0.011, 0.012), "+1.10 [+0.85, +1.35]"),
        ((0.0, 0.01, 0.02), "+1.00 [-1.48, +3.48], not shown"),
        ((-0.010, -0.011, -0.012), "-1.10 [-1.35, -0.85]"),
        ((0.02,), "+2.00 [+nan, +nan], not shown"),
    ],
)
def test_what_covers_zero_is_not_shown(tmp_path, gains, said):
    store = Store(tmp_path)
    plain = [0.8, 0.7, 0.6][: len(gains)]
    keep_arm(store, PLAIN, plain)
    keep_arm(store, KD, [base + gain for base, gain in zip(plain, gains, strict=True)])
    arms = [tables.measured(SHORT, arm, store, len(gains)) for arm in (KD, PLAIN)]
    assert tables.difference(*arms) == said


def test_arms_that_saw_different_batches_are_not_compared(tmp_path):
    store = Store(tmp_path)
    keep_arm(store, PLAIN, [0.8, 0.8])
    keep_arm(store, KD, [0.8, 0.8])
    keep(store, Run(SHORT, KD, 0.1, 1), 0.8, 0.8, batches="others")
    arms = [tables.measured(SHORT, arm, store, 2) for arm in (KD, PLAIN)]
    with pytest.raises(ValueError, match="kd and plain saw different batches with seed 1"):
        tables.difference(*arms)


def test_an_arm_with_as_much_time_trains_longer_and_sees_more_batches(tmp_path):
    assert Run(SHORT, LONGER, 0.1, 0).epochs == 13
    assert Run(SHORT, PLAIN, 0.1, 0).epochs == 6
    store = Store(tmp_path)
    keep_arm(store, KD, [0.82, 0.83])
    keep_arm(store, LONGER, [0.80, 0.81])
    keep(store, Run(SHORT, LONGER, 0.1, 1), 0.8, 0.81, batches="more")
    kd, longer = (tables.measured(SHORT, arm, store, 2) for arm in (KD, LONGER))
    assert tables.difference(kd, longer) == "+2.00 [+2.00, +2.00]"


def test_the_learning_rate_is_chosen_by_the_held_out_images_alone(tmp_path):
    store = Store(tmp_path)
    low, middle, high = candidates(SHORT, KD)
    keep(store, low, held_out=0.80, test=0.99)
    keep(store, middle, held_out=0.81, test=0.50)
    assert series(SHORT, KD).chosen(store) is None  # a run is missing
    keep(store, high, held_out=0.81, test=0.98)
    assert series(SHORT, KD).chosen(store).rate == 0.1  # of equals the lowest


def test_the_strength_is_chosen_by_the_held_out_images_alone(tmp_path):
    store = Store(tmp_path)
    weak, strong = (Arm(name, name, "at", {"strength": x}, candidate=True) for name, x in (("weak", 1), ("strong", 2)))
    keep_arm(store, PLAIN, [0.9, 0.9], held_out=0.99)
    keep_arm(store, weak, [0.7, 0.7], held_out=0.85)
    keep_arm(store, strong, [0.8, 0.8], held_out=0.84)
    arms = (PLAIN, weak, strong)
    rows = [tables.measured(SHORT, arm, store, 2) for arm in arms]
    assert tables.chosen_candidate(arms, rows).arm is weak
    assert tables.chosen_candidate(arms, [*rows[:2], None]) is None  # one strength is not measured yet


def test_a_run_is_named_by_its_whole_configuration():
    run = Run(SHORT, KD, 0.1, 0)
    others = [
        Run(plan.LONG, KD, 0.1, 0),
        Run(FEW, KD, 0.1, 0),
        Run(SHORT, SMOOTHED, 0.1, 0),
        Run(SHORT, dataclasses.replace(KD, arguments={"temperature": 2.0}), 0.1, 0),
        Run(SHORT, dataclasses.replace(KD, teacher="random"), 0.1, 0),
        Run(SHORT, KD, 0.3, 0),
        Run(SHORT, KD, 0.1, 1),
        Run(SHORT, KD, 0.1, 0, Teacher(width=16)),
        Run(dataclasses.replace(SHORT, epochs=7), KD, 0.1, 0),
        Run(SHORT, dataclasses.replace(KD, longer=2.0), 0.1, 0),
    ]
    assert len({run.key, *(other.key for other in others)}) == 1 + len(others)
    renamed = dataclasses.replace(KD, title="another title", candidate=False)
    assert Run(SHORT, renamed, 0.1, 0).key == run.key


def test_what_other_claims_need_leaves_the_names_of_runs_as_they_were():
    ninety = dataclasses.replace(PLAIN, title="not pruned")
    assert Run(plan.NINETY, ninety, 0.1, 0).key == "90%-plain-lr0.1-seed0-25188e2e43"
    assert Run(SHORT, KD, 0.1, 0).key == "short-kd-lr0.1-seed0-87f2de344a"


def test_a_run_that_is_there_is_not_made_again(tmp_path):
    store, experiment = Store(tmp_path), Claimed(Claim("kd", "page.md", "KD", ((SHORT, (PLAIN,)),)))
    runs = candidates(SHORT, PLAIN)
    keep(store, runs[1], 0.8, 0.7)
    teacher, *_, choosing, further, networks, quantised = experiment.batches(store, 3)
    assert [job.path for job in teacher] == [training.teacher_path(Teacher())]
    assert [job.arguments[1] for job in schedule.missing(choosing, store)] == [runs[0], runs[2]]
    assert further == networks == quantised == []  # the rate is not chosen yet
    keep_arm(store, PLAIN, [0.8])
    *_, choosing, further, _, _ = experiment.batches(store, 3)
    assert schedule.missing(choosing, store) == []
    left = [job.arguments[1] for job in schedule.missing(further, store)]
    assert left == [Run(SHORT, PLAIN, 0.1, seed) for seed in (1, 2)]


def test_an_interrupted_write_leaves_no_run(tmp_path):
    def interrupted(path):
        with open(path, "w") as file:
            file.write("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "run.json", interrupted)
    assert not (tmp_path / "run.json").exists()


def test_what_claims_share_is_made_and_counted_once(tmp_path):
    assert all(arms[0] is PLAIN for claim in CLAIMS.values() if claim.teacher for _, arms in claim.parts)
    keep_arm(Store(tmp_path), PLAIN, [0.8])
    jobs = [job for name in ("kd", "at", "ft") for job in Claimed(CLAIMS[name]).jobs(Store(tmp_path), 1)]
    assert sum(job.there(Store(tmp_path)) for job in jobs) == 9
    assert minutes(jobs, Store(tmp_path)) == 3.0


class InTurn(Experiment):
    """Two batches of two files each, some of which cannot be made."""

    page = "page.md"

    def __init__(self, *fails):
        self.fails = fails

    def batches(self, store, seeds):
        for name in ("first", "second"):
            yield [Job(Path(f"{name}-{part}.json"), self.make, (f"{name}-{part}",)) for part in "ab"]

    def make(self, name, folder):
        if name in self.fails:
            raise RuntimeError("no")
        (folder / f"{name}.json").write_text(name)
        return "made"

    def tables(self, store, seeds):
        return ""


@pytest.mark.parametrize(
    ("fails", "failures", "made"),
    [
        ((), 0, ["first-a", "first-b", "second-a", "second-b"]),
        (("first-a",), 1, ["first-b", "second-a", "second-b"]),
        (("first-a", "first-b"), 2, []),  # what follows would fail likewise
    ],
)
def test_all_is_made_in_turn_and_failures_are_said(tmp_path, monkeypatch, fails, failures, made):
    monkeypatch.setattr(schedule, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
    said = []
    assert schedule.make_all(InTurn(*fails), Store(tmp_path), seeds=1, jobs=1, say=said.append) == failures
    assert sorted(path.stem for path in tmp_path.iterdir()) == made
    assert sum(line.endswith("failed: RuntimeError: no") for line in said) == failures
    assert len(said) == failures + len(made)


class Deadly:
    """Kills the process that it is sent to."""

    def __reduce__(self):
        return signal.raise_signal, (signal.SIGKILL,)


class Killed(Experiment):
    """A batch whose second job kills its process, and one that works; files are copied, which needs no torch."""

    page = "page.md"

    def __init__(self, source):
        self.source = source

    def batches(self, store, seeds):
        yield [self.job("before"), self.job("killed", Deadly()), self.job("after")]
        yield [self.job("next")]

    def job(self, name, *arguments):
        return Job(Path(f"{name}.json"), shutil.copy, arguments or (self.source / f"{name}.json",))

    def tables(self, store, seeds):
        return ""


def test_a_process_that_is_killed_does_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "start_worker", int)  # it loads torch, for half a minute
    for folder in (source := tmp_path / "source", out := tmp_path / "out"):
        folder.mkdir()
    for name in ("before", "after", "next"):
        (source / f"{name}.json").touch()
    said = []
    failures = schedule.make_all(Killed(source), Store(out), seeds=1, jobs=1, say=said.append)
    made = sorted(path.stem for path in out.iterdir())
    assert made == ["before", "next"]
    assert failures == 2
    broken = [line for line in said if "failed: BrokenProcessPool" in line]
    assert sorted(line.split()[1] for line in broken) == ["after:", "killed:"]
    assert said[-1].startswith("[1/1] next: ")


def test_what_is_submitted_to_a_broken_pool_has_failed(tmp_path):
    class Broken(ThreadPoolExecutor):
        def submit(self, *arguments):
            raise BrokenExecutor("killed")

    said = []
    with Broken(1) as pool:
        assert schedule.make_batch([Job(Path(name), print) for name in "ab"], tmp_path, pool, said.append) == 2
    assert sorted(line.split("] ")[1] for line in said) == [f"{name}: failed: BrokenExecutor: killed" for name in "ab"]


class FromFiles(Experiment):
    """A file, a result of it, another file, and a result of that."""

    page = "page.md"

    def batches(self, store, seeds):
        for name in ("first.pt", "first.json", "second.pt", "second.json", "unused.pt"):
            yield [Job(Path(name), print)]

    def tables(self, store, seeds):
        return ""


@pytest.mark.parametrize(
    ("there", "made"),
    [
        ([], ["first.pt", "first.json", "second.pt", "second.json"]),
        (["first.json"], ["first.pt", "second.pt", "second.json"]),  # the second may need the first one's file
        (["second.json"], ["first.pt", "first.json"]),
        (["first.pt", "first.json"], ["second.pt", "second.json"]),
        (["first.json", "second.json"], []),
    ],
)
def test_files_are_only_made_for_results_that_are_missing(tmp_path, there, made):
    for name in there:
        (tmp_path / name).touch()
    left = schedule.needed(FromFiles(), Store(tmp_path), 1)
    assert [job.path.name for batch in left for job in batch] == made


def all_measured(store, experiment, seeds=2):
    """Made-up records of all runs."""
    while left := schedule.missing([job for job in experiment.jobs(store, seeds) if job.is_result], store):
        for job in left:
            store.save(job.path, {"held_out_accuracy": 0.8, "cpu_seconds": 1.0})


@pytest.mark.parametrize("name", command.EXPERIMENTS)
def test_with_all_results_nothing_is_made_and_without_one_what_it_begins_with(tmp_path, name):
    store, experiment = Store(tmp_path), command.EXPERIMENTS[name]
    all_measured(store, experiment)
    jobs = experiment.jobs(store, 2)
    assert pickle.loads(pickle.dumps(jobs)) == jobs
    assert not list(schedule.needed(experiment, store, 2))
    last = [job for job in jobs if job.is_result][-1]
    (tmp_path / last.path).unlink()
    left = [job for batch in schedule.needed(experiment, store, 2) for job in batch]
    assert left[-1] == last
    assert left == schedule.missing(jobs, store)
    assert {job.path.suffix for job in left[:-1]} <= {".pt", ".onnx"}


def test_files_are_made_again_without_another_record(tmp_path):
    def measure(run, folder):
        (folder / "one.onnx").write_text("file")
        return {"test_accuracy": 0.1}

    store, run = Store(tmp_path), candidates(SHORT, PLAIN)[0]
    store.write(run, {"test_accuracy": 0.9})
    job = Job.again(Path("one.onnx"), measure, run)
    assert schedule.missing([job], store) == [job]
    job.make(*job.arguments, tmp_path)
    assert schedule.missing([job], store) == []
    assert store.read(run) == {"test_accuracy": 0.9}


def test_tables_follow_from_the_records_alone(tmp_path):
    store, records = Store(tmp_path / "out"), tmp_path / "records"
    both = {name: Claimed(CLAIMS[name]) for name in ("kd", "at")}
    for name in both:
        keep_claim(store, CLAIMS[name])
    store.save(beside(training.teacher_path(Teacher())), {"test_accuracy": 0.905, "cpu_seconds": 240.0})
    store.save(Path("runs/of-an-older-version.json"), {})
    publish(both, store, 2, records)
    assert len((records / "kd.json").read_text().splitlines()) == 2 + 1 + 56  # braces, the teacher, the runs
    elsewhere = Store(tmp_path / "elsewhere", published(records))
    assert len(elsewhere.published) == 1 + 56 + 32  # the student alone and the teacher are in one file of the two
    for experiment in both.values():
        assert experiment.tables(elsewhere, 2) == experiment.tables(store, 2)
        assert not list(schedule.needed(experiment, elsewhere, 2))  # no teacher is trained either
    assert not elsewhere.folder.exists()
    first = next(schedule.needed(both["kd"], elsewhere, 3))
    assert [job.path for job in first] == [training.teacher_path(Teacher())]
    own = candidates(SHORT, PLAIN)[0]
    elsewhere.write(own, {"test_accuracy": 0.1})
    assert elsewhere.read(own) == {"test_accuracy": 0.1}  # what a folder has comes first
    (records / "twice.json").write_text((records / "at.json").read_text())
    with pytest.raises(ValueError, match=r"runs/.*json is in .*twice.json and in another file of its folder"):
        published(records)
    assert published(tmp_path / "nowhere") == {}


def test_a_file_is_never_there_without_its_record(tmp_path):
    def interrupted(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_with_record(tmp_path, Path("networks/one.pt"), interrupted, 0.0, test_accuracy=0.5)
    assert Store(tmp_path).of_file(Path("networks/one.pt"))["test_accuracy"] == 0.5
    assert not (tmp_path / "networks/one.pt").exists()


def test_a_paraphraser_is_trained_once_for_each_teacher():
    runs = [run for arm in (PLAIN, KD, *FT) for run in candidates(SHORT, arm)]
    assert sorted(run.arm.teacher for run in claims.one_a_teacher(runs)) == ["random", "trained"]


def test_the_table_of_a_claim(tmp_path):
    store = Store(tmp_path)
    keep_arm(store, PLAIN, [0.80, 0.81, 0.82])
    keep_arm(store, KD, [0.81, 0.821, 0.832])
    store.save(beside(training.teacher_path(Teacher())), {"test_accuracy": 0.905, "cpu_seconds": 240.0})
    assert Claimed(CLAIM).tables(store, 3) == (
        "Teacher: a residual network of width 24, 20 epochs, test accuracy 90.50, 4.0 minutes.\n\n"
        "### All 18,000 labels, 6 epochs\n\n"
        "| arm | learning rate | test accuracy | over student alone | KD over this arm | agreement with the teacher "
        "| minutes |\n|---|---|---|---|---|---|---|\n"
        "| student alone | 0.1 | 81.00 |  |  | 90.00 | 5.0 |\n"
        "| **KD** | 0.1 | 82.10 | +1.10 [+0.85, +1.35] |  | 90.00 | 5.0 |\n"
        "| label smoothing 0.1 | not measured yet | | | | | |\n\n"
        "KD over student alone, in points: +1.10 [+0.85, +1.35].\n\n"
        "3 seeds; 10 minutes of one thread, the choice of learning rates included.\n\n"
        "All of it: 14 minutes of one thread, with what arms begin with; what tables share is counted once.\n"
    )
    keep_arm(store, SMOOTHED, [0.81, 0.821, 0.832])
    assert "| label smoothing 0.1 | 0.1 | 82.10 | +1.10 [+0.85, +1.35] | +0.00" in tables.claim_tables(CLAIM, store, 3)


def test_a_control_is_compared_with_the_arm_that_it_controls(tmp_path):
    store, (weak, strong, _, random) = Store(tmp_path), plan.AT
    for arm, accuracy, held_out in ((PLAIN, 0.80, 0.8), (weak, 0.83, 0.9), (strong, 0.82, 0.8), (random, 0.70, 0.8)):
        keep_arm(store, arm, [accuracy, accuracy], held_out=held_out)
    text = tables.part_table(Claim("at", "page.md", "AT", ()), SHORT, (PLAIN, weak, strong, random), store, 2)
    assert "| **AT, strength 1/4** | 0.1 | 83.00 | +3.00 [+3.00, +3.00] |  |" in text
    assert (
        "| AT, randomly initialised teacher | 0.1 | 70.00 | -10.00 [-10.00, -10.00] | AT, strength 1: +12.00 [" in text
    )
    keep_arm(store, strong, [0.82, 0.82], held_out=0.95)  # now it is the chosen one
    text = tables.part_table(Claim("at", "page.md", "AT", ()), SHORT, (PLAIN, weak, strong, random), store, 2)
    assert "| 70.00 | -10.00 [-10.00, -10.00] | +12.00 [+12.00, +12.00] |" in text


def test_all_controls_name_an_arm_of_their_table():
    named = [
        (arm.control_of, {other.name for other in arms})
        for claim in CLAIMS.values()
        for _, arms in claim.parts
        for arm in arms
        if arm.control_of is not None
    ]
    assert len(named) == 1 + 2 + 4 + 3
    assert [name for name, names in named if name not in names] == []


@pytest.mark.parametrize(("rate", "said"), [(0.03, "0.03 (end)"), (0.1, "0.1"), (0.3, "0.3 (end)")])
def test_a_rate_at_the_end_of_those_that_were_tried_is_marked(rate, said):
    assert tables.rate_of(tables.Measured(Run(SHORT, KD, rate, 0), {}, 0.0, SHORT.rates)) == said
    large = Run(plan.FOUR, plan.LARGE_STEPS[0], 0.03, 0)  # it follows another, and tries none
    assert tables.rate_of(tables.Measured(large, {}, 0.0)) == "0.03"
    untrained = Run(plan.TRAINED_FOR[0], plan.CALIBRATED, 0.01, 0)
    assert tables.rate_of(tables.Measured(untrained, {}, 0.0, (0.01, 0.03))) == ""


def test_the_results_name_the_control_that_trains_longer(tmp_path):
    store = Store(tmp_path)
    claim = Claim("kd", "page.md", "KD", ((SHORT, (PLAIN, KD, LONGER, SMOOTHED)), (plan.LONG, (PLAIN, SMOOTHED))))
    lines = Claimed(claim).lines(store, 3)
    assert [line.compared for line in lines] == ["KD over student alone", "KD over student alone, as much time"]
    assert {line.difference for line in lines} == {tables.NOT_YET}
    keep_arm(store, PLAIN, [0.80, 0.81, 0.82])
    keep_arm(store, KD, [0.81, 0.82, 0.83])
    keep_arm(store, LONGER, [0.82, 0.83, 0.84])
    assert [line.difference for line in Claimed(claim).lines(store, 3)] == [
        "+1.00 [+1.00, +1.00]",
        "-1.00 [-1.00, -1.00]",
    ]
    losing = [line.compared for line in Claimed(CLAIMS["masks"]).lines(store, 3) if "epochs" in line.compared]
    assert losing == ["DCIL over gradual, twice the epochs"] * 2


def test_the_default_has_a_line_beside_the_chosen_strength_and_only_one(tmp_path):
    arms = (PLAIN, KD, plan.LIGHT_KD)
    store, claim = Store(tmp_path), Claim("kd", "page.md", "KD", ((SHORT, arms),), shown=(("kd", "plain"),))
    keep_arm(store, PLAIN, [0.80, 0.80])
    keep_arm(store, KD, [0.79, 0.79], held_out=0.8)
    keep_arm(store, plan.LIGHT_KD, [0.81, 0.81], held_out=0.9)
    lines = [(line.compared, line.difference) for line in Claimed(claim).lines(store, 2)]
    assert lines == [
        ("KD over student alone", "-1.00 [-1.00, -1.00]"),
        ("KD, weight 0.3 over student alone", "+1.00 [+1.00, +1.00]"),
    ]
    keep_arm(store, KD, [0.79, 0.79], held_out=0.95)
    assert [line.compared for line in Claimed(claim).lines(store, 2)] == ["KD over student alone"]


def test_a_line_costs_all_that_its_table_shows(tmp_path):
    store = Store(tmp_path)
    keep_arm(store, PLAIN, [0.8, 0.8])
    keep_arm(store, FT[0], [0.8, 0.8])
    store.save(beside(training.teacher_path(Teacher())), {"cpu_seconds": 600.0})
    store.save(beside(training.paraphraser_path(Run(SHORT, FT[0], 0.1, 0))), {"cpu_seconds": 6000.0})
    (line,) = Claimed(Claim("ft", "page.md", "FT", ((SHORT, (PLAIN, FT[0])),))).lines(store, 2)
    assert line.minutes == pytest.approx(4 + 4 + 10 + 100)
    few = Claim("psgd", "page.md", "PSGD", ((plan.FOUR, (plan.SGD, plan.PSGD[1])),))
    for arm in (plan.SGD, plan.PSGD[1]):
        for run in candidates(plan.FOUR, arm):
            keep(store, run, run.rate, 0.8)
    store.save(beside(rounded.network_path(rounded.start_of(run))), {"cpu_seconds": 600.0})
    (line,) = Claimed(few).lines(store, 1)
    assert line.minutes == 3 + 3 + 10


def test_tables_go_between_the_markers_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{tables.BEGIN}\nold\n{tables.END}\n\nAfter.\n")
    tables.splice(page, "new\n")
    tables.splice(page, "newer\n")
    assert page.read_text() == f"# Title\n\n{tables.BEGIN}\n\nnewer\n\n{tables.END}\n\nAfter.\n"
    page.write_text("# Title\n")
    with pytest.raises(ValueError, match=r"must hold the lines <!-- measured: begin -->"):
        tables.splice(page, "new")


def command_with(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["experiments", *map(str, arguments)])
    monkeypatch.setattr(command, "quiet", lambda: None)
    return command.main()


def test_the_command_lists_what_is_missing(tmp_path, monkeypatch, capsys):
    run = candidates(SHORT, PLAIN)[0]
    keep(Store(tmp_path), run, 0.8, 0.7)
    assert command_with(monkeypatch, "kd", "library", "--list", "--afresh", "--out", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("  missing")] == [
        "kd: 1 there, 41 missing of those that can be named by now",
        f"  there   {run.key}",
        "library: 0 there, 34 missing of those that can be named by now",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pipelin", "--list"], "got pipelin; did you mean pipeline?"),
        (["kd", "--list", "structual"], "got structual; did you mean structured?"),
        (["--tables-only", "distilation"], "got distilation; did you mean kd?"),
        (["nonsense", "--list"], "got nonsense"),
    ],
)
def test_a_name_that_is_unknown_is_refused_before_anything_else(tmp_path, monkeypatch, capsys, arguments, said):
    with pytest.raises(SystemExit) as error:
        command_with(monkeypatch, *arguments, "--out", tmp_path / "out")
    assert error.value.code == 2
    found = capsys.readouterr()
    expected = f"names must be of kd, at, ft, masks, psgd, qat, structured, pipeline, library, {said}"
    assert found.err.splitlines()[-1].endswith(expected)
    assert found.out == ""
    assert not (tmp_path / "out").exists()


def test_all_that_is_made_can_be_sent_to_another_process(tmp_path):
    for experiment in command.EXPERIMENTS.values():
        jobs = experiment.jobs(Store(tmp_path), 2)
        assert pickle.loads(pickle.dumps(jobs)) == jobs


def test_the_command_writes_all_pages_without_training(tmp_path, monkeypatch):
    keep(Store(tmp_path), candidates(SHORT, PLAIN)[0], 0.8, 0.7)
    (docs := tmp_path / "docs" / "experiments").mkdir(parents=True)
    pages = [docs / one.page for one in command.EXPERIMENTS.values()]
    for old in ("pruning.png", "quantisation.png", "library.png"):
        (docs / old).touch()
        (tmp_path / old).touch()
    (techniques := tmp_path / "docs" / "techniques").mkdir()
    technique = [techniques / f"{name}.md" for name in cards.CARDS]
    for page in (*pages, *technique, tmp_path / "docs" / "results.md"):
        page.write_text(f"# Title\n\n{tables.BEGIN}\n{tables.END}\n")
    monkeypatch.setattr(command, "DOCS", tmp_path / "docs")
    assert command_with(monkeypatch, "--tables-only", "--pages", "--out", tmp_path) == 0
    assert "| KD | not measured yet |" in (tmp_path / "distillation.md").read_text()
    assert all("ot measured yet" in page.read_text() for page in (*pages, *technique))
    found = (tmp_path / "docs" / "results.md").read_text()
    assert "| KD over student alone | All 18,000 labels, 6 epochs | not measured yet | 1 |" in found
    assert "| KD over student alone | All 18,000 labels, 16 epochs | not measured yet |  |" in found
    assert "| kd | 1 | 41 | 1 |" in found
    assert "8 seeds. All that is there took 1 minutes of one thread" in found
    assert not any("png" in page for page in (found, *(page.read_text() for page in pages)))
    assert not [*tmp_path.glob("**/*.png")]  # they were of other runs


def keep_claim(store, claim, seeds=2):
    """All arms of a claim, each a hundredth better than the one before it; other quantities count the arms."""
    for protocol, arms in claim.parts:
        for place, arm in enumerate(arms):
            more = {column.quantity: float(place) for column in (*claim.columns, *plan.GRIDS)}
            kept = {"test_accuracy": 0.6 + 0.01 * place, "batches": "", **more}
            keep_series(store, series(protocol, arm), seeds, lambda run, kept=kept: kept)


def test_a_card_has_a_row_an_arm_and_a_column_a_protocol(tmp_path):
    store = Store(tmp_path)
    keep_claim(store, CLAIMS["kd"])
    assert cards.CARDS["distillation"].table(store, 2).splitlines() == [
        "| | 200 labels, the steps of 5 epochs | All 18,000 labels, 6 epochs | All 18,000 labels, 16 epochs |",
        "|---|---|---|---|",
        "| student alone | 60.00 | 60.00 | 60.00 |",
        "| KD | 61.00, +1.00 [+1.00, +1.00] | 61.00, +1.00 [+1.00, +1.00] | 61.00, +1.00 [+1.00, +1.00] |",
        "| KD, weight 0.3 | 62.00, +2.00 [+2.00, +2.00] | 62.00, +2.00 [+2.00, +2.00] | 62.00, +2.00 [+2.00, +2.00] |",
        "| student alone, as much time | 63.00, +3.00 [+3.00, +3.00] | 63.00, +3.00 [+3.00, +3.00] |  |",
        "",
        "2 seeds.",
    ]
    assert "not measured yet" in cards.CARDS["distillation"].table(store, 3)


def test_the_cards_of_masks_say_how_steady_they_are(tmp_path):
    store = Store(tmp_path)
    keep_claim(store, CLAIMS["masks"])
    text = cards.CARDS["dcil"].table(store, 2)
    assert "| DCIL | 68.00 | 68.00 |" in text
    assert "| DCIL over gradual | +8.00 [+8.00, +8.00] | +8.00 [+8.00, +8.00] |" in text
    assert "| DCIL over gradual, twice the epochs | +4.00 [+4.00, +4.00] |" in text
    assert "| DCIL over DPF | +3.00 [+3.00, +3.00] |" in text
    assert "| swing, less that of DPF | +300.00 [+300.00, +300.00] |" in text
    text = cards.CARDS["dpf"].table(store, 2)
    assert "| DPF over gradual | +5.00 [+5.00, +5.00] |" in text
    assert "| swing, statistics re-estimated, in points | 500.00 | 500.00 |" in text


def test_the_cards_of_few_bits_say_what_the_grid_costs(tmp_path):
    store, claim = Store(tmp_path), CLAIMS["psgd"]
    keep_claim(store, claim)
    text = cards.CARDS["psgd"].table(store, 2)
    assert "| PSGD, mean factor 6 | 65.00, +5.00 [+5.00, +5.00] |" in text
    assert "| PSGD, mean factor 3: relative error of the rounded weights, less SGD's, in % | +400.0 [+400.0," in text
    assert "| PSGD, mean factor 3 over SGD, both with new batch-norm statistics | +400.00 [" in text
    assert "| PSGD, mean factor 3, less itself at full precision | -336.00 [" in text  # 64 less 4 of 1
    assert "| as PTQCallback chooses | not measured yet |" in (text := cards.CARDS["ptq"].table(store, 2))
    protocol, (arm, *_) = claim.parts[0]
    for place, option in enumerate(claim.options):
        for run in series(protocol, arm).runs(store, 2):
            for setting in plan.SETTINGS:
                store.write(plan.Calibrated(run, *setting, option), {"test_accuracy": 0.5 + 0.01 * place})
    text, last = cards.CARDS["ptq"].table(store, 2), len(claim.options) - 1
    assert "| largest weight, min-max | 50.00 | 50.00 | 50.00 | 50.00 |" in text
    assert f"| as PTQCallback chooses | {50 + last}.00, +{last}.00 [+{last}.00, +{last}.00] |" in text


def test_a_page_shows_the_picture_that_was_drawn(tmp_path, monkeypatch):
    store = Store(tmp_path)
    for run in candidates(plan.NINETY, plan.DPF):
        keep(store, run, 0.8, 0.7)
        curves = {"curve": [[1, 0.5, 0.5]], "churn_curve": [[1, 0.1]]}
        quantities = {column.quantity: 0.1 for column in plan.STEADINESS}
        store.write(run, store.read(run) | curves | quantities)
    assert command_with(monkeypatch, "masks", "--tables-only", "--afresh", "--seeds", 1, "--out", tmp_path) == 0
    text = (tmp_path / "pruning.md").read_text()
    assert text.startswith("![Accuracy on held-out images and churn over the training, for gradual pruning, DPF and ")
    assert (tmp_path / "pruning.png").read_bytes()[1:4] == b"PNG"


def test_pages_say_how_their_times_are_measured():
    folder = Path(__file__).parents[1] / "docs" / "experiments"
    assert files.SESSIONS == 5
    assert "each the median of five sessions" in (folder / "index.md").read_text()
    timed = [one.page for one in command.EXPERIMENTS.values() if hasattr(one, "times")]
    assert sorted(timed) == ["library.md", "pipeline.md", "structured-pruning.md"]
    for page in timed:
        said = " ".join((folder / page).read_text().split())
        assert "[Times](index.md#the-rules-of-every-table), each the median of five sessions, are those of the" in said


def images(count=80):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 6, 6, generator=generator), torch.arange(count) % 10


def test_batches_depend_on_the_seed_alone():
    def drawn(seed):
        batches = data.Batches(images(), seed=seed, batch=32)
        return torch.stack([picture for _ in range(2) for picture, _ in batches])  # two epochs

    assert drawn(0).shape == (4, 32, 1, 6, 6)
    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    assert not torch.equal(drawn(0)[:2], drawn(0)[2:])


def test_who_looks_at_one_batch_leaves_the_others_as_they_were():
    batches, untouched = (data.Batches(images(), seed=0, batch=32) for _ in range(2))
    next(iter(batches))
    for _ in range(2):
        assert [y.tolist() for _, y in batches] == [y.tolist() for _, y in untouched]


def test_few_labels_are_balanced_and_half_of_each_batch():
    batches = data.Batches(images(), seed=0, labels=20, batch=32)
    assert len(batches.labelled) == 20
    assert images()[1][batches.labelled].bincount().tolist() == [2] * 10
    labels = torch.stack([target for _, target in batches])
    assert (labels[:, :16] >= 0).all()
    assert (labels[:, 16:] == data.NO_LABEL).all()
    assert labels[labels >= 0].bincount().max() <= 2 * 2  # 32 draws go through the 20 in turn


def test_an_image_is_mirrored_and_shifted_by_at_most_a_pixel():
    picture = torch.arange(36.0).reshape(1, 1, 6, 6)
    drawn = data.augmented(picture.expand(400, 1, 6, 6), torch.Generator().manual_seed(0))
    inner = {tuple(image[0, 1:-1, 1:-1].flatten().tolist()) for image in drawn}
    padded = torch.nn.functional.pad(picture, (1, 1, 1, 1), value=data.BACKGROUND)
    expected = set()
    for source in (padded, padded.flip(-1)):
        for row in range(3):
            for column in range(3):
                expected.add(tuple(source[0, 0, row + 1 : row + 5, column + 1 : column + 5].flatten().tolist()))
    assert inner == expected


def test_the_shuffled_teacher_exchanges_targets_within_the_batch():
    teacher = training.ShuffledTeacher(torch.nn.Identity(), seed=0)
    logits = torch.arange(20.0).reshape(10, 2)
    first, second = teacher(logits), teacher(logits)
    assert sorted(first[:, 0].tolist()) == logits[:, 0].tolist()
    assert not torch.equal(first, second)


def test_a_run_measures_the_student_once_and_resumes(tmp_path, monkeypatch):
    tiny = data.Split(images(160), images(20), images(40))
    monkeypatch.setattr(training, "fashion_mnist", lambda: tiny)
    looked_at, measure = [], training.predictions

    def counted(network, part):
        looked_at.append(len(part[0]))
        return measure(network, part)

    monkeypatch.setattr(training, "predictions", counted)
    teacher, protocol = Teacher(width=8, epochs=1), Protocol("short", epochs=1)
    training.train_teacher(teacher, tmp_path)
    looked_at.clear()
    runs = [Run(protocol, arm, 0.1, 0, teacher) for arm in (PLAIN, KD, SMOOTHED)]
    results = [training.train(run, tmp_path) for run in runs]
    assert looked_at == [20, 40] * 3
    assert len({result["batches"] for result in results}) == 1
    assert [result["steps"] for result in results] == [1, 1, 1]
    assert 0 <= results[1]["test_agreement"] <= 1
    longer = training.train(Run(protocol, LONGER, 0.1, 0, teacher), tmp_path)
    assert longer["steps"] == 2 == longer["configuration"]["protocol"]["epochs"]
    Store(tmp_path).write(runs[0], results[0])
    assert Store(tmp_path).read(runs[0])["configuration"]["rate"] == 0.1
    jobs = [claims.job_of(run) for run in runs]
    assert schedule.missing(jobs, Store(tmp_path)) == jobs[1:]
    assert Claimed(CLAIM).jobs(Store(tmp_path), 1)[0].there(Store(tmp_path)) is False  # that of another teacher


def test_the_swing_is_the_deviation_of_the_steps_between_accuracies():
    assert watch.swing([0.5, 0.6, 0.6]) == pytest.approx(0.05)
    assert watch.swing([0.5, 0.6, 0.7]) == pytest.approx(0.0, abs=1e-12)
    assert watch.swing([0.5, 0.6, 0.5]) == pytest.approx(0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(held at their floor|masked completely)")
def test_masks_are_watched_while_they_change(tmp_path, monkeypatch):
    tiny = data.Split(images(256), images(20), images(40))
    monkeypatch.setattr(training, "fashion_mnist", lambda: tiny)
    monkeypatch.setattr(watch, "LOOKS", 1)
    teacher, protocol = Teacher(width=8, epochs=1), Protocol("90%", epochs=17, width=8, sparsity=0.9)
    training.train_teacher(teacher, tmp_path)
    gradual, dpf = (training.train(Run(protocol, arm, 0.1, 0, teacher), tmp_path) for arm in (plan.GRADUAL, plan.DPF))
    assert gradual["zeros"] == dpf["zeros"] == 17230  # of 19144 weights of convolutions
    assert [step for step, *_ in gradual["curve"]] == list(range(2, 35, 2))
    assert [step for step, _ in gradual["churn_curve"]] == [16, 32]
    assert 0 <= gradual["test_accuracy_reestimated"] <= 1
    assert gradual["dead_filters"] >= 0
    claim = Claim("masks", "page.md", "DPF", ((protocol, (plan.GRADUAL, plan.DPF)),), columns=plan.STEADINESS)
    store = Store(tmp_path)
    for arm, result in ((plan.GRADUAL, gradual), (plan.DPF, dpf)):
        for run in candidates(protocol, arm):
            store.write(run, result)
    assert "| DPF | 0.03 (end) |" in tables.claim_tables(claim, store, 1)
    assert curves.draw(claim, store, 1, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_what_two_arms_differ_in_is_paired_by_seed():
    column = plan.Column("swing", "swing")
    one, other = (
        tables.Measured(
            Run(plan.NINETY, plan.DPF, 0.1, 0), {seed: {"swing": value} for seed, value in enumerate(values)}, 1.0
        )
        for values in ([0.02, 0.03, 0.04], [0.01, 0.02, 0.03])
    )
    assert tables.paired(one, other, column) == "swing +1.00 [+1.00, +1.00]"
    assert tables.paired(one, one, column) == "swing +0.00 [+0.00, +0.00], not shown"


def test_to_sgd_it_is_all_one_how_its_weights_will_be_rounded():
    four, three = (Run(protocol, plan.SGD, 0.09, 0) for protocol in (plan.FOUR, plan.THREE))
    large = Run(plan.FOUR, plan.LARGE_STEPS[0], 0.09, 0)
    assert four.key != three.key != large.key
    assert four.training() == three.training() == large.training()
    one, other = (Run(protocol, plan.PSGD[1], 0.03, 0) for protocol in (plan.FOUR, plan.THREE))
    assert one.training() != other.training()
    start = rounded.start_of(one)
    assert (start.rate, start.epochs, start.protocol.start) == (0.1, 6, None)
    assert start.training() == rounded.start_of(four).training()


def test_steps_as_large_are_not_chosen_but_follow_those_of_sgd(tmp_path):
    store, large = Store(tmp_path), plan.LARGE_STEPS[0]
    assert candidates(plan.FOUR, large) == []
    assert series(plan.FOUR, large).chosen(store) is None
    for run in candidates(plan.FOUR, plan.SGD):
        keep(store, run, held_out=run.rate, test=0.7)
    assert [run.rate for run in candidates(plan.FOUR, plan.SGD)] == [0.01, 0.03, 0.1]
    assert series(plan.FOUR, large).chosen(store).rate == 0.3
    found = [run for arm in (plan.SGD, large) for run in series(plan.FOUR, arm).runs(store, 2)]
    assert [(run.arm.name, run.rate, run.seed) for run in found] == [
        ("plain", 0.1, 0),
        ("plain", 0.1, 1),
        ("plain-x3", 0.3, 0),
        ("plain-x3", 0.3, 1),
    ]


def test_each_seed_starts_once():
    runs = [run for arm in (plan.SGD, *plan.PSGD) for run in candidates(plan.FOUR, arm)]
    assert [run.seed for run in claims.one_a_start(runs, 3)] == [0, 1, 2]
    assert claims.one_a_start(candidates(SHORT, PLAIN), 3) == []


@pytest.mark.parametrize(("granularity", "steps"), [("tensor", [0.4, 0.4]), ("channel", [0.4, 0.2])])
def test_weights_are_rounded_and_the_first_and_last_layer_to_eight_bits(granularity, steps):
    network = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    for layer in network:
        layer.weight.data = torch.tensor([[1.2, 0.3], [-0.6, 0.29]])
    edges, inner = (network[i].weight.data.clone() for i in (0, 1))
    few = rounded.rounded(network, 3, granularity)
    step = torch.tensor(steps)[:, None]
    assert torch.allclose(few[1].weight, (inner / step).round().clamp(-3, 3) * step)
    assert (few[0].weight - edges).abs().max() < 1.2 / 127
    assert torch.equal(few[0].bias, network[0].bias)
    assert torch.equal(network[1].weight, inner)
    assert torch.allclose(rounded.rounded(network, 4)[0].weight[0, 1], torch.tensor(2 * 1.2 / 7))
    assert torch.equal(rounded.rounded(network, plan.FULL)[1].weight, inner)


def test_a_training_that_diverged_is_measured_as_it_is():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    network[0].weight.data[0, 0] = torch.nan
    assert rounded.rounded(network, 4)[0].weight[0, 0].isnan()


def test_permuted_factors_are_the_same_ones_elsewhere():
    weight = torch.nn.Parameter(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)))
    scaled = []
    for warped in (rounded.WarpedWeights({"w": weight}, {"w": 3}), rounded.PermutedWeights({"w": weight}, {"w": 3})):
        warped.generator = torch.Generator().manual_seed(0)
        weight.grad = torch.ones(20, 20)
        warped.scale_gradients(["w"], 7.0)
        scaled.append(weight.grad.flatten())
    assert torch.allclose(scaled[0].sort().values, scaled[1].sort().values)
    assert abs(torch.corrcoef(torch.stack(scaled))[0, 1]) < 0.2


@pytest.fixture
def few_bits(tmp_path, monkeypatch):
    """A claim on tiny data, with all of its runs made."""
    tiny = data.Split(images(160), images(20), images(40))
    for module in (training, rounded, calibrated):
        monkeypatch.setattr(module, "fashion_mnist", lambda: tiny)
    for module in (claims, tables):
        monkeypatch.setattr(module, "SETTINGS", ((4, 8),))
    start = plan.Start(epochs=1)
    full, four = (Protocol(name, epochs=1, bits=bits, start=start) for name, bits in (("full", 32), ("4-bits", 4)))
    options = (plan.OPTIONS[0], plan.OPTIONS[5])
    claim = Claim(
        "psgd",
        "page.md",
        "PSGD",
        ((full, (plan.SGD,)), (four, (plan.SGD, plan.PSGD[1], plan.PERMUTED[3]))),
        columns=plan.FEW_BITS,
        teacher=False,
        options=options,
    )
    store = Store(tmp_path)
    for protocol, arms in claim.parts:
        for arm in arms:
            result = rounded.measure(Run(protocol, arm, 0.01, 0), tmp_path)
            for run in candidates(protocol, arm):
                store.write(run, result)
    for one in claims.quantised(claim, store, 1):
        store.write(one, calibrated.measure(one, tmp_path))
    return claim, store


@pytest.mark.sample
def test_a_claim_on_few_bits_from_its_runs_to_its_tables(few_bits, monkeypatch):
    claim, store = few_bits
    (full, _), (four, arms) = claim.parts
    assert len(list((store.folder / "networks").glob("*.pt"))) == 4  # the start, SGD once, two of PSGD
    alone, psgd, permuted = (store.read(Run(four, arm, 0.01, 0)) for arm in arms)
    assert alone["batches"] == psgd["batches"] == permuted["batches"]
    assert alone["test_accuracy"] == alone["test_tensor_max_kept"]
    assert alone["test_accuracy_full"] == store.read(Run(full, plan.SGD, 0.01, 0))["test_accuracy"]
    assert psgd["lambda"] == permuted["lambda"] > 0
    assert psgd["mean_factor"] == pytest.approx(3.0, abs=1.0)  # after one step
    assert 0 < psgd["weight_error"] < 1
    again = rounded.measure(Run(four, arms[1], 0.01, 0), store.folder)
    assert again["network_seconds"] == psgd["network_seconds"]  # not trained again
    quantised = claims.quantised(claim, store, 1)
    assert [one.key.split("-seed")[0] for one in quantised] == ["ptq-4-8-plain", "ptq-4-8-clipped"]
    assert [store.read(one)["images"] for one in quantised] == [40, 40]
    text = Claimed(claim).tables(store, 1)
    assert "### 4 bits: 1 epochs of SGD, then 1 epochs" in text
    assert "| **PSGD, mean factor 3** | 0.01 (end) |" in text
    assert "PSGD, mean factor 3 less SGD: one, max +" in text or "PSGD, mean factor 3 less SGD: one, max -" in text
    assert f"| largest weight, min-max | {100 * store.read(quantised[0])['test_accuracy']:.2f} |" in text
    assert "The same networks at full precision: " in text
    assert bits.draw(claim, store, 1, store.folder / "picture.png")
    assert (store.folder / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_network_that_claims_share_is_counted_once_whoever_has_trained_it(few_bits, monkeypatch):
    claim, store = few_bits
    full, (sgd, *_) = claim.parts[0][0], claim.parts[1][1]
    monkeypatch.setattr(aware, "fashion_mnist", rounded.fashion_mnist)
    monkeypatch.setattr(aware, "VARIANTS", plan.VARIANTS[:2])
    trained_for = dataclasses.replace(full, name="qat-4-8", bits=4, activation_bits=8)
    run = Run(trained_for, plan.FINE_TUNED, 0.01, 0)
    (path := store.folder / rounded.network_path(run)).unlink()
    first, second = (aware.measure(run, store.folder) for _ in range(2))
    assert first["network"] == path.name == store.read(Run(full, sgd, 0.01, 0))["network"]
    kept = torch.load(path, weights_only=True)
    for found in (first, second):
        assert found["network_seconds"] == kept["cpu_seconds"] < found["cpu_seconds"]
        assert found["batches"] == kept["batches"]
    store.write(run, first)
    job = Job.of(aware.measure, run)
    assert job.seconds(store)[path.name] == kept["cpu_seconds"]
    start = aware.measure(dataclasses.replace(run, arm=plan.CALIBRATED), store.folder)
    assert start["batches"] == ""
    assert "network" not in start


def test_options_are_compared_by_seed(tmp_path):
    store, options = Store(tmp_path), plan.OPTIONS[:2]
    claim = Claim("psgd", "page.md", "PSGD", ((plan.UNROUNDED, (plan.SGD,)),), teacher=False, options=options)
    assert "SGD is not measured yet." in tables.options_table(claim, store, 3)
    keep_arm_at = [*candidates(plan.UNROUNDED, plan.SGD), *(Run(plan.UNROUNDED, plan.SGD, 0.01, s) for s in (1, 2))]
    for run in keep_arm_at:
        keep(store, run, 0.8, 0.9)
    for one in claims.quantised(claim, store, 3):
        if one.weight_bits == 8:
            more = 0.0 if one.option is options[0] else 0.01 + 0.001 * one.run.seed
            store.write(one, {"test_accuracy": 0.8 + more, "cpu_seconds": 1.0})
    text = tables.options_table(claim, store, 3)
    assert "| largest weight, min-max | 80.00 | not measured yet |" in text
    assert "| observer moving_average | 81.10, +1.10 [+0.85, +1.35] | not measured yet |" in text
    assert "The same networks at full precision: 90.00. 3 seeds." in text


def keep_series(store, own, seeds, result):
    """Results of all runs of a series; the second candidate is the best on the held-out images."""
    for index, run in enumerate(own.own):
        store.write(run, result(run) | {"held_out_accuracy": 0.9 if index == 1 else 0.8, "cpu_seconds": 60.0})
    for run in own.runs(store, seeds):
        if store.read(run) is None:
            store.write(run, result(run) | {"held_out_accuracy": 0.5, "cpu_seconds": 60.0})


def keep_times(store, times):
    found = {name: {"faster": 1.0 + i, "ms": 1.0 / (1 + i)} for i, (name, _) in enumerate(times.files)}
    store.write(times, {"files": found, "cpu_seconds": 60.0})


@pytest.fixture
def piped(tmp_path):
    """Made-up runs of the pipeline: each stage a point better than the one before, the last .4 below the teacher."""
    store = Store(tmp_path)
    assert pipeline.series(pipeline.STUDENTS[1], store).runs(store, 3) == []  # its teacher is not chosen yet
    whole = {"test_accuracy": 0.92, "bytes": 1_100_000, "deflated": 1_000_000}
    files = {"fp32": whole, "int8": {**whole, "test_accuracy": 0.919, "bytes": 300_000}}
    keep_series(store, pipeline.series(pipeline.TEACHER, store), 1, lambda run: {"files": files})
    for place, stage in zip(range(len(pipeline.STUDENTS))[::-1], pipeline.STUDENTS, strict=True):

        def result(run, place=place):
            sizes = {"bytes": 50_000, "deflated": 25_000}
            accuracy = {"fp32": 0.917, "int8": 0.916}
            files = {
                own: {"test_accuracy": accuracy[own] - 0.01 * place + 0.001 * run.seed, **sizes}
                for own in run.arm.files
            }
            return {"files": files, "parameters": 40_000 + 10_000 * place}

        keep_series(store, pipeline.series(stage, store), 3, result)
    return store


def test_the_pipeline_against_its_target(piped):
    experiment = pipeline.Pipeline()
    assert experiment.headline(piped, 3) == "Not measured yet."  # its times are not
    keep_times(piped, times := experiment.times(piped))
    names = [name for name, _ in times.files]
    assert names == [f"{stage.name}-{own}" for stage in pipeline.STAGES for own in stage.files]
    (run,) = pipeline.series(pipeline.STUDENTS[-1], piped).runs(piped, 1)
    # as the distilled one has chosen, and the teacher
    assert (run.arm.name, run.rate, run.kd_weight, run.teacher.rate) == ("quantised", 0.03, 0.9, 0.1)
    assert experiment.headline(piped, 3).splitlines()[2:] == [
        "| smaller, bytes | 20 times | 22.0 times, deflated 40.0 | yes |",
        "| faster, one image on one thread | 4 times | 9.00 times | yes |",
        "| points of test accuracy lost | at most 0.5 | 0.30 [0.05, 0.55] | by the mean; not shown |",
    ]
    text = experiment.tables(piped, 3)
    assert text.startswith("The teacher is one network; the students begin with width 16. All learn for 32 epochs:")
    assert "| teacher, ResNet-20 of width 16, fp32 | 0.1 |  | 92.00 |  |  | 1100 | 1.0x | 1.0x | 1.00 | 1.0 |" in text
    assert "| teacher, ResNet-20 of width 16, int8 (PTQ) | 0.1 |  | 91.90 | -0.10 |  | 300 | 3.7x | 1.0x |" in text
    assert (
        "| student alone, int8 (PTQ) | 0.1 |  | 88.70 | -3.30 [-3.55, -3.05] |  | 50 | 22.0x | 40.0x | 4.00 |" in text
    )
    assert (
        "| distilled, 50% pruned, trained on 8 bits, one fit, int8 | 0.03 | 0.9 | 91.70 | -0.30 [-0.55, -0.05] | +1.00 "
        "[+1.00, +1.00] | 50 | 22.0x | 40.0x | 9.00 | 1.0 |"
    ) in text
    # 3, 3 and 6 candidates, 2 further seeds of two stages that choose, 3 of two that do not, and the times
    assert "40,000 parameters are left of 70,000. 3 seeds; 23 minutes of one thread, teacher, choice of" in text
    (line,) = experiment.lines(piped, 3)
    assert (line.difference, line.minutes) == ("-0.30 [-0.55, -0.05]", 23.0)


def test_the_small_shape_from_the_start_is_what_pruned_filters_are_compared_with(tmp_path):
    store, experiment = Store(tmp_path), structured.Structured()
    assert experiment.tables(store, 3) == "Not measured yet.\n"
    for arm, ratio in structured.PARTS:
        gain = {"whole": 0.02, "l2": 0.01}.get(arm.name, 0.0)
        kept = {"parameters": 1000, "macs": 2000, "fp32_bytes": 4000, "int8_bytes": 1000, "int8_accuracy": 0.8}
        keep_series(
            store,
            structured.series(arm, ratio),
            3,
            lambda run, gain=gain, kept=kept: {**kept, "test_accuracy": 0.8 + gain * (1 + 0.01 * run.seed)},
        )
    lines = experiment.lines(store, 3)
    assert [line.protocol for line in lines] == [f"{ratio}% of the MACs removed, 16 epochs" for ratio in (30, 50, 70)]
    assert {line.difference for line in lines} == {"+1.01 [+0.99, +1.03]"}
    assert {line.minutes for line in lines} == {4 * 5.0}  # 3 rates and 2 further seeds of 3 arms, and of the whole
    for seed in range(3):
        store.save(beside(structured.base_path(seed)), {"test_accuracy": 0.8, "cpu_seconds": 60.0})
    assert {line.minutes for line in experiment.lines(store, 3)} == {23.0}
    store.write(structured.EXPORTED, {"bytes": 4000, "cpu_seconds": 1.0})
    keep_times(store, experiment.times(store))
    text = experiment.tables(store, 3)
    assert "16 channels, 8 epochs; 80.00% of the test images, 4 kB as an fp32 file." in text
    assert "| 30% | filters of the smallest norm | 0.03 | 81.01 | -1.01 [-1.03, -0.99] | +1.01 [+0.99, +1.03] |" in text
    pair = "; ".join(f"{ratio}%: +1.01 [+0.99, +1.03]" for ratio in (30, 50, 70))
    assert f"\nFilters of the smallest norm less random filters, test accuracy: {pair}.\n" in text
    assert "### Numbers of channels\n\nNot measured yet." in text
    shape = {"channels": "8/16/40", "macs": 2000, "bytes": 3000, "faster": 1.5}
    shapes = {f"{r:g}-{m}": None if m == 8 else shape for r in structured.RATIOS for m in structured.MULTIPLES}
    store.write(structured.SHAPES, {"shapes": shapes})
    text = experiment.tables(store, 3)
    assert "| 4, 4.00 | 80.00, 1, 5.00 |" in text  # the first after base and whole
    card = cards.CARDS["structured-pruning"].table(store, 3)
    assert "| filters of the smallest norm, over the whole network | 81.01, -1.01 [-1.03, -0.99] |" in card
    assert "| filters of the smallest norm, over the same shape from the start | 81.01, +1.01 [+0.99, +1.03] |" in card
    assert "| times as fast, `round_to=8` | cannot be met | cannot be met | cannot be met |" in card
    assert "| 70% | 4 | 8/16/40 | 2,000 | 3 | 1.50 |\n| 70% | 8 | cannot be met within 2 points | | | |" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rounds=3 are more than the . steps")
def test_the_stages_of_the_pipeline_see_the_same_batches(tmp_path, monkeypatch):
    tiny = data.Split(images(256), images(20), images(40))
    monkeypatch.setattr(pipeline, "EPOCHS", 2)
    monkeypatch.setattr(pipeline, "images", lambda: tiny)
    store = Store(tmp_path)
    for run in pipeline.series(pipeline.TEACHER, store).own:
        store.write(run, pipeline.measure(run, tmp_path))
    taught = pipeline.series(pipeline.TEACHER, store).chosen(store)
    runs = [dataclasses.replace(pipeline.series(stage, store).candidates[0], arm=stage) for stage in pipeline.STUDENTS]
    assert [run.teacher for run in runs] == [None, taught, taught, taught]
    results = [pipeline.measure(run, tmp_path) for run in runs]
    assert len({result["batches"] for result in [store.read(taught), *results]}) == 1
    assert [sorted(result["files"]) for result in results] == [["fp32", "int8"]] * 3 + [["int8"]]
    whole, _, pruned, quantised = (result["parameters"] for result in results)
    assert store.read(taught)["parameters"] > 3 * whole
    assert pruned == quantised == pytest.approx(whole / 2, rel=0.05)
    assert {run.epochs for run in runs} == {2}


@pytest.mark.slow
def test_shapes_that_are_trained_as_long_see_the_same_batches(tmp_path, monkeypatch):
    tiny = data.Split(images(256), images(20), images(40))
    for name in ("BASE_EPOCHS", "LATER_EPOCHS"):
        monkeypatch.setattr(structured, name, 1)
    monkeypatch.setattr(structured, "fashion_mnist", lambda: tiny)
    structured.make_base(0, tmp_path)
    assert structured.export_base(structured.EXPORTED, tmp_path)["bytes"] > 1000
    runs = [structured.series(*structured.PARTS[own]).candidates[0] for own in (0, 1, 3)]
    whole, pruned, scratch = (structured.measure(run, tmp_path)["batches"] for run in runs)
    assert whole == pruned != scratch
    assert [run.epochs for run in runs] == [1, 1, 2]


def test_stages_that_saw_different_batches_are_not_compared(piped, tmp_path):
    alone, distilled = (pipeline.series(pipeline.STUDENTS[own], piped).runs(piped, 3)[1] for own in (0, 1))
    piped.write(alone, piped.read(alone) | {"batches": "these"})
    assert "not measured yet" in pipeline.Pipeline().tables(piped, 3)  # its times; the other says nothing of batches
    piped.write(distilled, piped.read(distilled) | {"batches": "others"})
    with pytest.raises(ValueError, match="distilled and alone saw different batches with seed 1"):
        pipeline.Pipeline().tables(piped, 3)


def keep_library(store, seeds):
    for index, way in enumerate(library.WAYS):
        files = {
            own: {"test_accuracy": 0.8 + 0.01 * index, "bytes": 4000 * (9 - nth), "deflated": 1000 * (9 - nth)}
            for nth, own in enumerate(way.files)
        }
        keep_series(
            store,
            library.series(way),
            seeds,
            lambda run, files=files: {"files": files, "batches": str(run.seed), "training_seconds": 90.0},
        )
    kept = {"test_accuracy": 0.95, "bytes": 90_000, "deflated": 80_000, "training_seconds": 240.0}
    store.write(library.TEACHER, {**kept, "cpu_seconds": 60.0})


def test_each_file_of_the_library_is_compared_with_that_of_the_student_alone(tmp_path):
    store, experiment = Store(tmp_path), library.Library()
    assert "| KD, int8 (PTQ) | not measured yet |" in experiment.tables(store, 2)
    assert not experiment.draw(store, 2, tmp_path / "library.png")
    keep_library(store, 2)
    keep_times(store, experiment.times(store))
    rows = experiment.tables(store, 2).splitlines()
    assert len(rows) == 2 + 15 + 1 + 2
    assert rows[2] == "| student alone, fp32 | 0.1 | 80.00 |  | 36 | 9 | 1.00 | 1.5 |"
    assert (
        rows[3] == "| student alone, int8 (PTQ) | 0.1 | 80.00 | +0.00 [+0.00, +0.00], not shown | 32 | 8 | 2.00 | 1.5 |"
    )
    assert rows[5] == "| KD, fp32 | 0.1 | 81.00 | +1.00 [+1.00, +1.00] | 36 | 9 | 4.00 | 1.5 |"
    assert rows[-3] == "| teacher, fp32 | 0.1 | 95.00 | +15.00 [+15.00, +15.00] | 90 | 80 | 16.00 | 4.0 |"
    assert rows[-1] == (
        "2 seeds; 46 minutes of one thread, teacher, paraphraser, choice of learning rates and times included."
    )
    text = results.tables({"library": experiment}, store, 2)
    assert "](experiments/library.png)" in text
    assert "| library | 46 | 0 | 46 |" in text
    store.save(beside(training.paraphraser_path(library.TAUGHT)), {"cpu_seconds": 300.0})
    assert "| library | 46 | 0 | 51 |" in (text := results.tables({"library": experiment}, store, 2))


def test_files_that_learned_from_other_batches_are_not_compared(tmp_path):
    store = Store(tmp_path)
    keep_library(store, 2)
    run = library.series(library.WAYS[1]).runs(store, 2)[1]
    store.write(run, store.read(run) | {"batches": "others"})
    with pytest.raises(ValueError, match="kd and plain saw different batches with seed 1"):
        library.Library().tables(store, 2)


def test_on_the_front_is_what_nothing_else_beats():
    costs = {"cheap": (80, 1), "worse": (79, 1), "dear": (80, 2), "good": (82, 3), "best": (83, 9)}
    points = [front.Point(name, "fp32", (own,) * 3, cost, cost) for name, (own, cost) in costs.items()]
    assert [own.name for own in front.front(points, lambda own: own.kilobytes)] == ["cheap", "good", "best"]


@pytest.mark.slow
def test_the_picture_of_the_library_names_each_file_in_both_panels(tmp_path):
    store, experiment = Store(tmp_path), library.Library()
    keep_library(store, 2)
    keep_times(store, experiment.times(store))
    points = experiment.points(store, 2)
    names = sorted(own.name for own in points)
    assert len(names) == 16
    for panel in front.figure_of(points).axes:
        assert sorted(text.get_text() for text in panel.texts) == names
    assert experiment.draw(store, 2, tmp_path / "library.png")
    assert (tmp_path / "library.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*(held at their floor|masked completely|beyond the ends|a smaller weight is advised)"
)
def test_the_library_from_its_trainings_to_its_picture(tmp_path, monkeypatch):
    tiny = data.Split(images(256), images(20), images(40))
    for module in (training, library):
        monkeypatch.setattr(module, "fashion_mnist", lambda: tiny)
    taught = dataclasses.replace(library.TAUGHT, teacher=Teacher(epochs=1))
    monkeypatch.setattr(library, "TAUGHT", taught)
    monkeypatch.setattr(library, "LEARNING_RATES", (0.03,))
    monkeypatch.setattr(library, "Times", lambda *own, side: Times(*own, side=6))
    store, experiment = Store(tmp_path), library.Library()
    for batch in experiment.batches(store, 1):
        for job in schedule.missing(batch, store):
            job.make(*job.arguments, tmp_path)
    assert schedule.missing(experiment.jobs(store, 1), store) == []
    took = [(job, job.seconds(store)) for job in experiment.jobs(store, 1)]
    assert all(value > 0 for _, own in took for value in own.values())
    assert {job.path.suffix for job, own in took if not own} == {".onnx"}  # their runs have it
    rows = {way.name: store.read(library.series(way).own[0]) for way in library.WAYS}
    assert len({row["batches"] for row in rows.values()}) == 1
    small = {(name, own): kept["bytes"] for name, row in rows.items() for own, kept in row["files"].items()}
    assert small["plain", "int4"] < small["plain", "int8"] < small["plain", "fp32"] == small["at", "fp32"]
    assert small["structured", "fp32"] < 0.6 * small["plain", "fp32"]
    assert abs(small["psgd", "int4"] - small["plain", "int4"]) < 0.2 * small["plain", "int4"]
    sparse = {name: row["files"]["fp32"]["deflated"] for name, row in rows.items() if "fp32" in row["files"]}
    assert max(sparse[name] for name in ("pruning", "dpf", "dcil")) < 0.4 * sparse["plain"]
    assert "not measured yet" not in experiment.tables(store, 1)
    assert experiment.draw(store, 1, tmp_path / "library.png")
