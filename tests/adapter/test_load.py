"""What is read of an adapter is read once where it is needed again."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np

from lorakit.adapter.load import RECENT, LazyRows, Recent
from lorakit.store.memory import MemorySource


class Counting(MemorySource):
    """A source that counts what is read of it."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.read = Counter()

    def read_rows(self, name, start, stop, into, *, leading=1):
        self.read[name] += 1
        super().read_rows(name, start, stop, into, leading=leading)


def source_of(layers: int) -> Counting:
    return Counting({f"{n}.{s}": np.full((2, 3), n) for n in range(layers) for s in "abcd"})


def test_workers_at_different_layers_read_each_factor_once():
    source, recent, together = source_of(3), Recent(), Barrier(3)

    def worker(layer: int) -> None:
        for _ in range(5):  # experts
            together.wait()
            for stack in "abcd":
                found = recent.read([source], 0, f"{layer}.{stack}", "float32")
                assert found.dtype == np.float32
                assert (found == layer).all()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(worker, range(3)))
    assert set(source.read.values()) == {1}


def test_no_more_is_kept_than_of_one_layer():
    source, recent = source_of(2), Recent()
    for layer in (0, 1, 0):
        for stack in "abcd"[:RECENT]:
            recent.read([source], 0, f"{layer}.{stack}", "float32")
    assert source.read["0.a"] == 2
    assert source.read["1.a"] == 1


def test_rows_that_need_no_widening_are_read_where_they_stay():
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    rows = LazyRows(MemorySource({"w": values}), "w")[1:3]
    np.testing.assert_array_equal(rows, values[1:3])
    rows[:] = 0  # a copy: the tensor stays
    assert values[1:3].all()
