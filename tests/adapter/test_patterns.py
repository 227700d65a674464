"""Patterns mean what PEFT means by them, and a hostile one costs little time and memory."""

import re
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import InputError
from lorakit.formats.patterns import lookup, matches, search, substitute

names = st.lists(st.sampled_from(["a", "aa", "q", "q_proj", "7", "layers"]), min_size=1).map(
    ".".join
)
patterns = st.lists(
    st.sampled_from(["a", "q", ".", r"\.", ".*", r"\d+", "(a|q)", "_proj", "^", "[aq]+", "7", "|"]),
    min_size=1,
    max_size=5,
).map("".join)


def as_in_peft(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


@given(patterns, names)
def test_a_pattern_applies_where_it_does_for_peft(pattern, module):
    assert matches(pattern, module) == as_in_peft(pattern, module)


def test_a_pattern_that_is_stopped_is_named():
    with pytest.raises(InputError, match="takes too long"):
        matches("(a|aa)+$b", "a" * 100)


@given(names, names)
def test_a_plain_name_applies_where_it_does_for_peft(pattern, module):
    assert matches(pattern, module) == as_in_peft(pattern, module)


@pytest.mark.parametrize(
    ("pattern", "module", "applies"),
    [
        ("q", "q", True),
        ("q", "a.q", True),
        ("q", "a.aq", False),
        ("^q", "q", True),
        ("^q", "a.q", False),
        (".q", "xq", True),
        ("a|q", "x.q", True),
        ("a", "a.q", False),
        ("base_model.model.q", "q", False),
        ("layers.1.q", "layers.11.q", False),
        ("layers.1.q", "layers.1.q", True),
    ],
)
def test_patterns_are_anchored_at_segments_and_at_the_end(pattern, module, applies):
    assert matches(pattern, module) is applies


def test_lookup_gives_all_that_apply_in_the_order_of_the_file():
    assert lookup({"v": 1, ".*q": 2, "q": 3}, "a.q") == [(".*q", 2), ("q", 3)]


SLOW = [
    r"(.*.*)*x",
    r"(a|aa)+$b",
    r"(a|a?)+x",
    r"(\w+\s?)*:",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    r"(.*)*(.*)*(.*)*y",
    r"((a+)+)+((a+)+)+z",
    r"(?:.*a){25}z",
]


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize("module", ["a" * 100, "a." * 60 + "a!"])
def test_a_pattern_that_backtracks_for_ever_is_stopped(pattern, module):
    start = time.perf_counter()
    with suppress(InputError):
        matches(pattern, module)
    assert time.perf_counter() - start < 30  # it ends, is all


@pytest.mark.parametrize(
    "pattern", ["((a{1000}){1000}){1000}", "(a{60000}){60000}", "a{1,65535}" * 9, "(" * 2000]
)
def test_a_pattern_that_would_not_fit_in_memory_is_refused_at_once(pattern):
    start = time.perf_counter()
    with pytest.raises(InputError):
        matches(pattern, "a")
    assert time.perf_counter() - start < 30  # it ends, is all


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<x>", "a{2,1}", "\\"])
def test_what_is_no_regular_expression_is_refused(pattern):
    for use in (matches, search):
        with pytest.raises(InputError, match="no regular expression"):
            use(pattern, "a.q")


def test_a_pattern_for_every_module_of_a_large_model_is_looked_up_fast():
    leaves = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate")
    modules = [f"model.layers.{i}.{leaf}" for i in range(100) for leaf in leaves]
    table = {module: i for i, module in enumerate(modules)}
    start = time.perf_counter()
    assert [dict(lookup(table, m))[m] for m in modules[::5]] == list(range(0, 500, 5))
    assert time.perf_counter() - start < 30  # it ends, is all


def test_names_are_substituted_as_by_re():
    name = "vit.layers.11.attention.q_proj"
    assert substitute(r"layers\.(\d+)", r"encoder.layer.\1", name) == re.sub(
        r"layers\.(\d+)", r"encoder.layer.\1", name
    )


@pytest.mark.parametrize("replacement", [r"\9", r"\g<x>", "\\"])
def test_a_replacement_that_cannot_be_is_refused(replacement):
    with pytest.raises(InputError):
        substitute("a", replacement, "a")
