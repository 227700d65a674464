"""Every task is given out once, to workers that keep to files of their own while they can."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.engine.feed import Feed


def feed_of(*counts: int) -> Feed:
    """The tasks of files with so many of them, as (file, task)."""
    return Feed(iter([(n, i) for i in range(count)]) for n, count in enumerate(counts))


@given(st.lists(st.integers(0, 5), max_size=6))
def test_one_worker_does_file_after_file(counts):
    expected = [(n, i) for n, count in enumerate(counts) for i in range(count)]
    assert list(feed_of(*counts).tasks()) == expected


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 5))
def test_every_task_is_given_to_one_worker(counts, workers):
    feed = feed_of(*counts)
    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(lambda _: list(feed.tasks()), range(workers)))
    assert sorted(t for mine in done for t in mine) == list(feed_of(*counts).tasks())


def test_workers_have_files_of_their_own_and_then_help_where_the_fewest_are():
    feed = feed_of(2, 3, 9)
    one, two = feed.tasks(), feed.tasks()
    assert [next(one), next(two), next(one), next(two)] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert next(one) == (2, 0)  # the first file has no more
    three, four = feed.tasks(), feed.tasks()
    assert next(three)[0] == 1
    assert next(four) == (2, 1)  # where two are now, as at the second, which has no more
    assert list(two) == [(2, i) for i in range(2, 9)]
    assert [list(rest) for rest in (one, three, four)] == [[], [], []]


def test_what_goes_wrong_with_a_file_is_raised_for_the_worker_that_asked():
    def broken():
        yield 0, 0
        raise OSError("no more")

    feed = Feed([broken(), iter([(1, 0)])])
    one, two = feed.tasks(), feed.tasks()
    assert (next(one), next(two)) == ((0, 0), (1, 0))
    with pytest.raises(OSError, match="no more"):
        next(one)
    assert list(two) == []
