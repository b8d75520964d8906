from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from pyro_scm.cli import parsing
from pyro_scm.cli.counterfactual import action
from pyro_scm.cli.parsing import UsageError
from pyro_scm.cli.simulate import graph


@pytest.mark.parametrize(
    ("text", "expected"), [("3", (0, 1, 2)), ("1", (0,)), ("0,5,7", (0, 5, 7)), ("5,", (5,)), (" 2 , 1 ", (2, 1))]
)
def test_seeds_are_a_number_of_them_or_themselves(text: str, expected: tuple[int, ...]) -> None:
    assert parsing.seeds(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1", ("a", 1)),
        ("a=0.5", ("a", 0.5)),
        ("a=1e-3", ("a", 0.001)),
        ("a=true", ("a", True)),
        ("a=False", ("a", False)),
        ("a=none", ("a", None)),
        ("a=top-k", ("a", "top-k")),
        ("a=64,32", ("a", (64, 32))),
        ("a=1,0.1", ("a", (1, 0.1))),
        ("a=x,e", ("a", ("x", "e"))),
        ("a=", ("a", "")),
        ("a=b=c", ("a", "b=c")),
        ('a={"b": 1}', ("a", '{"b": 1}')),
    ],
)
def test_assignment(text: str, expected: tuple[str, object]) -> None:
    found = parsing.assignment(text)
    assert found == expected
    assert type(found[1]) is type(expected[1])


def test_widths_of_zero_are_no_layers() -> None:
    assert [parsing.widths(text) for text in ("0", "64", "128,64")] == [(), (64,), (128, 64)]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (parsing.whole, "0", "'0' is not a whole number of 1 or more"),
        (parsing.whole, "1.5", "'1.5' is not a whole number"),
        (parsing.natural, "-1", "of 0 or more"),
        (parsing.positive, "0", "'0' is not a number above 0"),
        (parsing.positive, "inf", "'inf' is not a number above 0"),
        (parsing.positive, "nan", "'nan' is not a number above 0"),
        (parsing.probability, "1.1", "'1.1' is not a number from 0 to 1"),
        (parsing.share, "1", "'1' is not a number between 0 and 1"),
        (parsing.share, "0", "'0' is not a number between 0 and 1"),
        (parsing.names, " , ", "names nothing"),
        (parsing.widths, "64,x", "'x' is not a whole number"),
        (parsing.seeds, "0", "'0' is not a whole number of 1 or more"),
        (parsing.seeds, "1,1", "'1,1' names a seed twice"),
        (parsing.assignment, "a", "'a' is not of the form NAME=VALUE"),
        (parsing.assignment, "=1", "'=1' is not of the form"),
        (action, "c_3", "'c_3' is neither"),
        (action, "=1", "'=1' is neither"),
        (action, "c_3=high", "'c_3=high' is neither"),
        (action, "c_3=inf", "'c_3=inf' is neither"),
        (graph, "tree", "'tree' is neither one of empty"),
        (graph, "0-1-2", "'0-1-2' is neither"),
    ],
)
def test_words_that_are_no_values(kind, text: str, message: str) -> None:
    with pytest.raises(ArgumentTypeError, match=message.replace("(", r"\(")):
        kind(text)


def test_actions_set_or_move() -> None:
    assert action("c_3=2.0") == ("c_3", 2.0)
    name, step = action("c_3+=-1.5")
    assert name == "c_3"
    assert callable(step)
    assert step(4.0) == 2.5


def test_graphs_by_kind_or_edges() -> None:
    assert graph("growing") == "growing"
    assert graph("0-1,1-2") == ((0, 1), (1, 2))


def test_options_take_the_kind_of_their_default() -> None:
    defaults = {"hidden": (128,), "depth": 4, "scale": True, "temperature": 1.0, "likelihood": None}
    given = {"hidden": 64, "depth": 3, "scale": False, "temperature": 2, "likelihood": "normal"}
    assert parsing.matching(given, defaults, "it") == {**given, "hidden": (64,)}
    assert parsing.matching({"hidden": ""}, defaults, "it") == {"hidden": ()}
    assert parsing.matching({"hidden": (8, 4)}, defaults, "it") == {"hidden": (8, 4)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"deep": 1}, "vae has no option 'deep': it has hidden, depth, scale"),
        ({"depth": "three"}, "vae: depth='three' is of another kind than its default 4"),
        ({"depth": 2.5}, "depth=2.5 is of another kind"),
        ({"depth": True}, "depth=True is of another kind"),
        ({"scale": 1}, "scale=1 is of another kind"),
        ({"depth": None}, "depth=None is of another kind"),
        ({"hidden": "wide"}, r"hidden=\('wide',\) is of another kind"),
        ({"hidden": (8, 2.5)}, r"hidden=\(8, 2.5\) is of another kind"),
    ],
)
def test_options_of_another_kind(given: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parsing.matching(given, {"hidden": (128,), "depth": 4, "scale": True}, "vae")


def test_paths_know_the_home_folder() -> None:
    assert parsing.path("~/x") == Path.home() / "x"
