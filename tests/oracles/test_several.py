"""Several adapters in one merge: the sum of their changes of the one base, rounded once."""

from pathlib import Path

import numpy as np
import pytest

from lorakit.errors import MisfitError, UsageError
from tests.oracles.algebra import expected
from tests.oracles.conftest import Build
from tests.oracles.merging import merge
from tests.oracles.reading import read_dtypes, read_tensors
from tests.oracles.rounding import rounded
from tests.oracles.test_merge import assert_close

pytest.importorskip("peft", minversion="0.21")
TOGETHER = [
    (["linear", "linear-all"], [1.0, 1.0]),
    (["linear", "rslora"], [0.7, -0.4]),
    (["linear", "linear-all", "patterns"], [1.5, -2.0, 0.25]),
    (["linear", "dora"], [0.5, 1.0]),
    (["dora", "adapter-bfloat16-dora", "linear"], [1.0, -0.5, 2.0]),
    (["dora", "names-everything"], [1.0, -1.0]),
    (["embedding", "dora-embedding"], [1.0, 0.3]),
    (["embedding-saved", "dora-embedding"], [1.0, 0.5]),
    (["embedding-saved-and-moved", "linear-all"], [1.0, 0.5]),
    (["embedding-saved-and-moved", "embedding"], [0.5, 2.0]),
    (["norms-saved", "linear"], [0.25, 1.0]),
    (["vocabulary-resized", "linear", "dora"], [1.0, 0.5, -0.5]),
    (["tokens-list", "tokens-dict"], [1.0, 0.5]),
    (["tokens-list", "embedding"], [1.0, 0.5]),
    (["tokens-list", "dora-embedding"], [0.5, 1.0]),
    (["conv1d", "conv1d-dora", "bias-lora-only"], [1.0, 0.6, 0.5]),
    (["conv2d", "dora-conv2d", "lora-bias-conv2d"], [1.0, -0.6, 1.0]),
    (["lora-bias", "bias-all"], [0.3, 0.5]),
    (["attention", "attention-patterns"], [2.0, -1.0]),
    (["linear-float16", "adapter-bfloat16"], [0.9, -0.8]),
]


@pytest.mark.parametrize(
    ("names", "weights"), TOGETHER, ids=lambda value: "+".join(map(str, value))
)
def test_changes_add_up_and_are_rounded_once(
    built: Build, tmp_path: Path, names: list[str], weights: list[float]
) -> None:
    first, *others = map(built, names)
    merge(first, tmp_path / "out", *others, weights=weights)
    base = read_tensors(first.base)
    adapters = [first.plain, *(other.plain for other in others)]
    exact = expected(first.base, *adapters, weights=weights)
    bounds = dict.fromkeys(exact, np.zeros(1))
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, after in expected(first.base, adapter).items():
            change = abs(after).max() + abs(base[name]).max()
            bounds[name] = bounds[name] + abs(weight) * change
    assert_close(tmp_path / "out", exact, bounds)


def test_next_to_no_number_is_rounded_the_wrong_way(built: Build, tmp_path: Path) -> None:
    misses = numbers = 0
    for i, (names, weights) in enumerate(TOGETHER):
        first, *others = map(built, names)
        merge(first, tmp_path / str(i), *others, weights=weights)
        codes, ours = read_dtypes(tmp_path / str(i)), read_tensors(tmp_path / str(i))
        adapters = [first.plain, *(other.plain for other in others)]
        exact = expected(first.base, *adapters, weights=weights)
        right = {name: rounded(exact[name], codes[name]).astype(float) for name in exact}
        misses += sum(int((right[name] != ours[name]).sum()) for name in exact)
        numbers += sum(values.size for values in exact.values())
    assert misses <= 1e-4 * numbers


def test_an_adapter_and_its_negative_leave_the_base(built: Build, tmp_path: Path) -> None:
    case = built("conv1d-dora")
    merge(case, tmp_path / "out", case, weights=[0.75, -0.75])
    ours = read_tensors(tmp_path / "out")
    for name, before in read_tensors(case.base).items():
        np.testing.assert_array_equal(ours[name], before)


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["norms-saved", "norms-saved"], [0.5, 0.5], r"2 adapters replace '.*norm.weight'"),
        (["tokens-list", "tokens-list"], [1.0, 1.0], "3 rows of 'model.embed_tokens.weight'"),
        (["head-new", "head-new"], [1.0, 1.0], "no weight but 1 and one adapter"),
        (["head-new"], [0.5], "no weight but 1"),
        (["vocabulary-resized", "linear"], [0.5, 1.0], "another shape"),
        (["linear", "conv1d"], [1.0, 1.0], "are not in the base"),
    ],
)
def test_what_cannot_be_added_is_refused(
    built: Build, tmp_path: Path, names: list[str], weights: list[float], message: str
) -> None:
    first, *others = map(built, names)
    with pytest.raises(MisfitError, match=message):
        merge(first, tmp_path / "out", *others, weights=weights)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")]])
def test_there_is_one_finite_weight_for_each(
    built: Build, tmp_path: Path, weights: list[float]
) -> None:
    with pytest.raises(UsageError):
        merge(built("linear"), tmp_path / "out", built("dora"), weights=weights)
