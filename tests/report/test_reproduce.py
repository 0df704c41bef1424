from __future__ import annotations

import yaml

from lightning_compress.recipe import load_recipe
from lightning_compress.report import Report
from lightning_compress.report.reproduce import install_line, recipe_yaml, reproduction

from .samples import nasty_report


def test_the_recipe_comes_back_as_it_was(tmp_path):
    recipe = {
        "version": 1,
        "callbacks": [
            {"class_path": "DCILCallback", "init_args": {"sparsity": 1e-05, "layers": ["re:.*", "1e3", "no"]}}
        ],
        "export": {"path": "a: b.onnx", "precision": "fp32"},
        "apply_to": {"fit": 1},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_yaml(Report((), recipe={**recipe, "path": "there.yaml"})))
    loaded = load_recipe(file)
    assert list(loaded.callbacks) == recipe["callbacks"]
    assert (loaded.export, loaded.apply_to, loaded.version) == (recipe["export"], recipe["apply_to"], 1)
    assert list(yaml.safe_load(file.read_text())) == ["version", "callbacks", "export", "apply_to"]


def test_what_is_copied_into_a_shell_holds_no_surprise():
    assert install_line(nasty_report()) is None
    evil = {"torch": "2.1; rm -rf ~", "a b": "1", "python": "3.11 $(x)", "lightning": "2.6.6"}
    assert install_line(Report((), versions=evil)) == "pip install torch==2.1 lightning==2.6.6  # Python 3.11"
    assert install_line(Report((), versions={"python": "3.11"})) is None
    assert install_line(Report((), versions={"lightning_compress": "0.1.0"})) == (
        "pip install .  # in a checkout of lightning-compress 0.1.0"
    )


def test_only_what_is_known_is_shown():
    assert reproduction(Report(())) == []
    titles = [title for title, _ in reproduction(Report((), recipe={"version": 1, "path": "r.yaml"}, command="c"))]
    assert titles == ["Recipe, r.yaml", "Command"]
