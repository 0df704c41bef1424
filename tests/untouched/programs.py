"""Which projects, how they are started, and with which of the recipes that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STRANGERS = "tests/strangers/requirements.txt"


@dataclass(frozen=True)
class Program:
    """A project and the ways to start it.

    Attributes:
        title: What it is, for people.
        folder: Below ``projects``.
        command: As a user types it.
        recipes: Names of recipes.
        tested: So many of them, from the first on, are run by tests.
        before: What the user ran before, to have a trained network in ``trained``.
        trained: The checkpoint that it leaves; the teacher.
        metric: What the project logs.
        width: Of the trained network.
        fit: Number of the fit that is meant; None: there is one.
        needs: The requirements that hold what it imports; "": the test extra.
    """

    title: str
    folder: str
    command: str
    recipes: Sequence[str]
    tested: int = 1
    before: str = ""
    trained: str = "teacher.ckpt"
    metric: str = "val_acc"
    width: int = 32
    fit: int | None = None
    needs: str = ""

    def settings(self, recipe: str) -> list[str]:
        """What to change in a recipe, as behind ``--set``; "alone": the recipe that only exports."""
        found = [f"export.metric={self.metric}"]
        if recipe not in ("int8", "prune", "psgd-4bit", "alone"):
            teacher = "kd.teacher.init_args"
            found += [f"{teacher}.class_path=digits.ConvNet", f"{teacher}.init_args={{width: {self.width}}}"]
            found += [f"{teacher}.ckpt_path={self.trained}"]
        return found if self.fit is None else [*found, f"apply_to.fit={self.fit}"]


GOES_ON = "start_from=trained.ckpt lr=0.03"
PROGRAMS = {
    program.folder: program
    for program in (
        Program(
            "a script around torch-uncertainty's ClassificationRoutine",
            "packaged",
            "python train.py",
            ("distil", "dcil"),
            before="python train.py --width 32 --save teacher.ckpt",
            metric="val/cls/Acc",
            needs=STRANGERS,
        ),
        Program(
            "a project configured by Hydra, which goes on with a trained network",
            "hydra",
            f"python train.py {GOES_ON} trainer.max_epochs=5",
            ("psgd-4bit", "int8", "structured-distil-int8"),
            tested=2,
            before="python train.py hydra.run.dir=first && cp first/last.ckpt trained.ckpt",
            trained="trained.ckpt",
            width=16,
        ),
        Program(
            "a LightningCLI project",
            "cli",
            "python train.py fit --config config.yaml",
            ("dcil", "distil"),
            before="python train.py fit --config config.yaml --model.width 32 --trainer.enable_checkpointing true "
            "--trainer.default_root_dir first && cp first/checkpoints/*.ckpt teacher.ckpt",
        ),
        Program(
            "a package that imports pytorch_lightning, started as a module",
            "other_namespace",
            "python -m digits_project.train start=trained.ckpt",
            ("structured-distil-int8", "prune"),
            tested=2,
            before="python -m digits_project.train save=trained.ckpt",
            trained="trained.ckpt",
            width=16,
        ),
        Program(
            "two processes by torchrun",
            "torchrun",
            "torchrun --nproc_per_node 2 train.py 4",
            ("distil-prune-int8", "distil"),
            before="torchrun --nproc_per_node 2 train.py 32",
            trained="width-32.ckpt",
        ),
        Program(
            "a script that trains its teacher first",
            "teacher_first",
            "python train.py",
            ("distil", "distil-prune-int8"),
            trained="width-32.ckpt",
            fit=2,
        ),
    )
}
