"""All claims in a line each, the headline of the pipeline, the picture of the library, and what all of it took."""

from __future__ import annotations

from collections.abc import Mapping

from .experiment import Experiment, minutes
from .library import Library
from .pipeline import Pipeline
from .store import Store

PAGE = "results.md"


def tables(experiments: Mapping[str, Experiment], store: Store, seeds: int) -> str:
    """The page, from what has been made."""
    lines = [
        "## Claims",
        "",
        "| what over what | protocol | points of test accuracy | minutes | all of it |",
        f"|{'---|' * 5}",
    ]
    for name, experiment in experiments.items():
        for line in experiment.lines(store, seeds):
            took, page = f"{line.minutes:.0f}" if line.minutes else "", f"[{name}](experiments/{experiment.page})"
            lines.append(f"| {line.compared} | {line.protocol} | {line.difference} | {took} | {page} |")
    for experiment in experiments.values():
        if isinstance(experiment, Pipeline):
            lines += ["", "## The pipeline against its target", "", experiment.headline(store, seeds)]
        if isinstance(experiment, Library):
            lines += ["", "## The whole library", "", experiment.image(store, seeds, "experiments/")]
    return "\n".join([*lines, "", "## What it took", "", cost(experiments, store, seeds)]) + "\n"


def cost(experiments: Mapping[str, Experiment], store: Store, seeds: int) -> str:
    jobs = {name: experiment.jobs(store, seeds) for name, experiment in experiments.items()}
    lines = ["| | runs | missing | minutes |", "|---|---|---|---|"]
    for name, own in jobs.items():
        measured = [job for job in own if job.is_result]
        there = sum(job.there(store) for job in measured)
        lines.append(f"| {name} | {there} | {len(measured) - there} | {minutes(own, store):.0f} |")
    whole = minutes([job for own in jobs.values() for job in own], store)
    return "\n".join(
        [
            *lines,
            "",
            f"{seeds} seeds. All that is there took {whole:.0f} minutes of one thread, {whole / 120:.1f} hours with "
            "two processes; what several tables share is counted once in the sum. Missing are the runs that can be "
            "named by now: those of the other seeds can only once a learning rate is chosen.",
        ]
    )
