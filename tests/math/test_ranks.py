"""The rank that a rule chooses is the least that meets its target; kohya's is one more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import UsageError
from lorakit.math.ranks import Rule, chosen

# The example of kohya's tool: what it keeps, and what would be enough.
S = [10, 5, 2, 1, 0.5, 0.1]
falling = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30).map(
    lambda x: sorted(x, reverse=True)
)
shares = st.floats(0.01, 1.0)


@pytest.mark.parametrize(
    ("rule", "ours", "theirs"),
    [
        (Rule("sv_ratio", 6), 3, 4),
        (Rule("sv_cumulative", 0.9), 3, 4),
        (Rule("sv_fro", 0.95), 2, 3),
        (Rule("rank", 2), 2, 2),
    ],
)
def test_the_example_of_kohyas_tool(rule, ours, theirs):
    assert chosen(S, rule) == ours
    assert chosen(S, rule, kohya=True) == theirs


@given(falling, shares)
def test_an_energy_is_met_and_not_with_one_less(s, share):
    rank = chosen(s, Rule("energy", share))
    total = sum(v**2 for v in s)
    assert sum(v**2 for v in s[:rank]) >= share * total * (1 - 1e-9)
    assert rank == 1 or sum(v**2 for v in s[: rank - 1]) < share * total


@given(falling, shares)
def test_a_share_of_the_norm_is_the_energy_of_its_square(s, share):
    assert chosen(s, Rule("sv_fro", share)) == chosen(s, Rule("energy", share**2))


@given(falling, st.floats(1.0, 1e3))
def test_a_ratio_keeps_what_is_above_it(s, ratio):
    rank = chosen(s, Rule("sv_ratio", ratio))
    assert all(v <= s[0] / ratio for v in s[rank:])
    assert all(v > s[0] / ratio for v in s[1:rank])


@given(falling, st.sampled_from(["energy", "sv_cumulative", "sv_fro"]), shares, st.integers(1, 9))
def test_a_limit_caps_every_rule(s, kind, share, limit):
    for kohya in (False, True):
        free = chosen(s, Rule(kind, share), kohya=kohya)
        assert chosen(s, Rule(kind, share), limit=limit, kohya=kohya) == min(free, limit)


@pytest.mark.parametrize("s", [[0.0, 0.0], []])
def test_of_nothing_one_is_kept(s):
    for kohya in (False, True):
        assert chosen(s, Rule("energy", 0.9), kohya=kohya) == 1


def test_kohya_cuts_what_is_next_to_nothing_to_one():
    assert chosen([1e-6, 1e-6], Rule("sv_fro", 0.99), kohya=True) == 1


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("energy", 0.0),
        ("energy", 1.1),
        ("sv_fro", float("nan")),
        ("sv_ratio", 0.5),
        ("rank", 0),
        ("rank", 1.5),
        ("sv_best", 1.0),
    ],
)
def test_a_target_out_of_range_is_refused(kind, value):
    with pytest.raises(UsageError, match=kind):
        Rule(kind, value)
