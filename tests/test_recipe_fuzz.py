"""Recipes that nobody would write: whatever stands in the file, or behind --set, the answer is a recipe or an error."""

from __future__ import annotations

import inspect
import re
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_compress.recipe import Recipe, RecipeError, load_recipe
from lightning_compress.recipe.classes import own_callbacks
from lightning_compress.recipe.file import KEYS

FEW, MANY = 6, 1000
WORDS = [
    *KEYS, *own_callbacks(), "class_path", "init_args", "dict_kwargs", "module", "fit", "path", "sparsity", "teacher",
    "teacher_transform", "layers", "schedule", "temperature", "name", "bits", "weight_bits", "ratio", "pairs", "output",
    "model.onnx", "type:Conv2d", "auto", "kd", "torch.nn.Identity", "lightning.pytorch.callbacks.EarlyStopping",
    "lightning_compress.teacher_from_checkpoint", "lightning_compress.functional.cubic_schedule",
]  # fmt: skip
scalars = st.one_of(
    st.sampled_from(WORDS), st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(),
    st.binary(max_size=4),
)  # fmt: skip
keys = st.one_of(st.sampled_from(WORDS), st.text(max_size=5))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=10
)
arguments = st.dictionaries(keys, values, max_size=4)


@st.composite
def own_entries(draw):
    """A callback of ours with arguments that it has; each argument that it needs is there."""
    name = draw(st.sampled_from(sorted(own_callbacks())))
    parameters = inspect.signature(own_callbacks()[name]).parameters.values()
    required = {entry.name: values for entry in parameters if entry.default is entry.empty}
    optional = {entry.name: values for entry in parameters if entry.default is not entry.empty}
    given_too = draw(st.lists(st.sampled_from(sorted(optional)), max_size=2, unique=True))
    chosen = {**required, **dict.fromkeys(given_too, values)}
    return {"class_path": name, "init_args": draw(st.fixed_dictionaries(chosen))}


def dumped(strategy):
    return strategy.map(lambda value: yaml.safe_dump(value))


others = st.fixed_dictionaries(
    {"class_path": st.sampled_from(WORDS)}, optional={"init_args": arguments, "other": values}
)
TEXTS = {
    "anything": st.one_of(
        st.text(max_size=60),
        st.text(alphabet="version: 1\n-[]{}&*!?|>%@`'\",#", max_size=60),
        st.binary(max_size=40),
    ),
    "the keys of a recipe": dumped(
        st.fixed_dictionaries(
            {"version": st.just(1)},
            optional={"callbacks": st.lists(others, max_size=2) | values, "export": arguments, "apply_to": values},
        )
    ),
    "callbacks of ours": dumped(
        st.fixed_dictionaries({"version": st.just(1), "callbacks": st.lists(own_entries(), min_size=1, max_size=2)})
    ),
}
changes = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.builds(
            "{}.{}={}".format,
            st.sampled_from(WORDS),
            st.sampled_from(WORDS),
            values.map(lambda value: yaml.safe_dump(value, default_flow_style=True)),
        ),
        st.builds("callbacks[{}].{}={}".format, st.integers(-1, 3), keys, st.text(max_size=5)),
    ),
    max_size=2,
)


def answer_to(path, settings_given):
    try:
        return load_recipe(path, settings=settings_given)
    except RecipeError as error:
        return str(error)


def check_answers(texts, count):
    """The property, on so many cases, the same each time, and without a database in the checkout."""

    @settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(text=texts, settings_given=changes)
    def property_of(text, settings_given):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
            for given_too in ([], settings_given):
                answer = answer_to(path, given_too)
                assert isinstance(answer, Recipe) or re.fullmatch(rf"{path}: \S.+", answer, flags=re.DOTALL)

    property_of()


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_whatever_is_in_the_file_is_answered(kind, count):
    check_answers(TEXTS[kind], count)
