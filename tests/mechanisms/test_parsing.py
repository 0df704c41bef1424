"""What a parser says of a value, whichever version of jsonargparse says it, in whichever order it tries the types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Literal

import pytest
from jsonargparse import ArgumentParser

from lightning_compress.mechanisms.loading import build_module
from lightning_compress.mechanisms.parsing import chain, missing, of_the_user, ours, refusal, told, wrong_value

NO_LIST = ValueError("Expected a <class 'list'>. Got value: half")
NULL = ValueError("Expected a <class 'NoneType'>")
MEANT = ValueError("Not a valid class")
RAISE = """
def said(exceptions):
    text = "\\n".join(f"  - {one}" for one in exceptions).replace(". Got value: half", "")
    raise ValueError(f"Errors:\\n{text}\\nGiven value type: <class 'str'>\\nGiven value: half") from exceptions[0]
"""


def of_types(*exceptions, module="jsonargparse._typehints"):
    """What is raised where a value fits none of several types."""
    names = {"__name__": module}
    exec(RAISE, names)
    with pytest.raises(ValueError, match="Errors") as error:
        names["said"](list(exceptions))
    return error.value


@pytest.mark.parametrize("order", [(NULL, NO_LIST, MEANT), (MEANT, NULL, NO_LIST), (NO_LIST, MEANT, NULL)])
def test_the_chain_goes_on_with_the_type_that_was_meant(order):
    error = of_types(*order)
    assert list(chain(error)) == [error, MEANT]


def test_it_goes_on_with_the_first_where_all_are_other_types():
    error = of_types(NULL, NO_LIST)
    assert list(chain(error)) == [error, NULL]


def test_lists_of_exceptions_elsewhere_are_no_business_of_ours():
    error = of_types(NULL, MEANT, module="their.module")
    assert list(chain(error)) == [error, NULL]


def caught(source):
    with pytest.raises(ValueError, match="teacher") as found:
        build_module(source, argument="teacher")
    return found.value


def test_what_this_package_says_ends_the_chain():
    error = caught({"class_path": "torch.nn.Linear", "init_args": {"in_features": -2, "out_features": 1}})
    assert (ours(error), of_the_user(error.__cause__), list(chain(error))) == (True, False, [error])
    assert told(error) == " ".join(str(error).split())


def test_unless_code_of_the_user_s_led_to_it():
    error = caught(f"{__name__}.fails")
    *_, last = chain(error)
    assert (ours(error), ours(last), of_the_user(last)) == (True, False, True)
    assert (type(last), told(last)) == (ZeroDivisionError, "of the user's")


def fails():
    raise ZeroDivisionError("of the user's\nand more")


@pytest.mark.parametrize("order", [(NULL, NO_LIST), (NO_LIST, NULL)])
def test_null_is_named_last(order):
    error = of_types(*order)
    assert wrong_value(list(chain(error))) == "must be a list or null, got 'half'"
    assert wrong_value(list(chain(error)), ["half"]) == "must be a list of lists or null, got ['half']"


@pytest.mark.parametrize(
    "text",
    [
        "the following arguments are required: teacher",
        "Option 'teacher' is required but not provided or its value is None.",
    ],
)
def test_of_what_is_missing_the_cause_says_no_more(text):
    error = TypeError(text)
    error.__cause__ = KeyError("teacher")
    assert list(chain(error)) == [error]
    assert missing(text) == "teacher"


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (float, "half", "x must be a number, got 'half'"),
        (bool, 3, "x must be true or false, got 3"),
        (Sequence[str] | None, 3, "x must be a list or null, got 3"),
        (Sequence[str] | None, "a", "x must be a list or null, got 'a'"),
        (Sequence[int], ["a"], "x must be a list of whole numbers, got ['a']"),
        (Mapping[str, int], {"k": "v"}, "x must be a mapping of whole numbers, got {'k': 'v'}"),
        (list[list[int]], [3], "x must be a list of lists, got [3]"),
        (tuple[int, int], [1], "x must be a tuple with 2 elements, got [1]"),
        (timedelta | None, "x", 'x must be a string with form "h:m:s" or "d days, h:m:s" or null, got \'x\''),
        (Callable[[int], int] | None, "foo", "x must be the dotted path of a function or null, got 'foo'"),
        (int, "half " * 40, "x must be a whole number, got 'half half ha...lf half half '"),
        (Sequence[str] | None, [3], "x must be a list of texts or null, got [3]"),
        (Mapping[str, int] | None, {"a": "b"}, "x must be a mapping of whole numbers or null, got {'a': 'b'}"),
        (Literal["max", "mse"], "mx", "x must be max or mse, got 'mx'; did you mean 'max'?"),
        (Literal["max", "mse"] | None, "\n", r"x must be max, mse or null, got '\n'"),
        (Literal["max", "mse"] | None, "", "x must be max, mse or null, got ''"),
        (float | Literal["auto"], "atuo", "x must be a number or auto, got 'atuo'; did you mean 'auto'?"),
    ],
)
def test_what_a_type_accepts_is_said_in_words(kind, value, said):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=kind)
    with pytest.raises(Exception, match="x") as error:
        parser.parse_object({"x": value})
    told = refusal(error.value, {"x": value})
    assert told.replace("auto or a number", "a number or auto") == said  # versions differ in the order


def test_members_of_an_enum_are_told_as_they_are_written():
    said = wrong_value([ValueError("Expected a typing.Literal[<Kind.FAST: 1>, <Kind.SMALL: 2>]. Got value: x")])
    assert said == "must be <Kind.FAST: 1>, <Kind.SMALL: 2>, got 'x'"


class Inner:
    def __init__(self, size: int):
        self.size = size


class Outer:
    def __init__(self, inner: Inner | None = None, schedule: Callable[[int], int] | Literal["cosine"] = "cosine"):
        self.inner, self.schedule = inner, schedule


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"inner": {"init_args": {"size": "x"}}}, "inner.size must be a whole number, got 'x'"),
        ({"inner": {"init_args": {}}}, "the required key 'inner.size' is missing"),
        ({"inner": {"init_args": {"size": 1, "sise": 2}}}, "inner: Option 'sise' is not accepted"),
        ({"schedule": "os.pathx"}, "schedule: module 'os' has no attribute 'pathx'"),
    ],
)
def test_what_is_wrong_inside_an_argument_has_its_place(values, said):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Outer)
    if "inner" in values:
        values["inner"]["class_path"] = f"{__name__}.Inner"
    with pytest.raises(Exception, match=r"inner|schedule") as error:
        parser.parse_object(values)
    assert refusal(error.value, values) == said


def test_what_is_no_matter_of_types_is_told_as_it_is():
    assert refusal(ValueError("no such\n  thing"), {}) == "no such thing"
