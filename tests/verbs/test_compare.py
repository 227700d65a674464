"""compare: every figure is that of the dense deltas in float64."""

import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.errors import InputError, MisfitError, UsageError
from lorakit.verbs.compare import DifferentError
from tests.verbs.adapters import deltas, drawn, pair, save, tensors_of

WEIGHTS = {
    **pair("layers.0.q", 9, 7, 3),
    **pair("layers.1.q", 9, 7, 2),
    "conv.lora_A.weight": (2, 4, 3),
    "conv.lora_B.weight": (5, 2, 1),
    "embed.lora_embedding_A": (2, 10),
    "embed.lora_embedding_B": (6, 2),
    "mlp.experts.lora_A.weight": (6, 4),
    "mlp.experts.lora_B.weight": (6, 6),
}
CONFIG = {"target_parameters": ["experts.down_proj"], "peft_version": "0.21.2"}
SLOW = settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def two(tmp_path):
    return save(tmp_path / "a", WEIGHTS, **CONFIG), save(tmp_path / "b", WEIGHTS, **CONFIG)


def dense_overlap(x, y):
    """The mean squared cosines of the principal angles of columns and of rows, by dense SVDs."""
    found = []
    for one, other in ((x, y), (x.T, y.T)):
        spaces = []
        for z in (one, other):
            u, s, _ = np.linalg.svd(z, full_matrices=False)
            spaces.append(u[:, s > 1e-6 * s[0]])
        found.append(np.mean(np.linalg.svd(spaces[0].T @ spaces[1])[1] ** 2))
    return found


def dense_rank(x):
    share = np.linalg.svd(x)[1] ** 2
    share = share[share > 1e-20 * share[0]] / share.sum()
    return np.exp(-(share * np.log(share)).sum())


@SLOW
@given(alpha=st.sampled_from([-3, 0.1, 2, 7.5]), noise=st.sampled_from([0.0, 1e-6, 1e-3, 1.0]))
def test_every_figure_is_that_of_the_dense_deltas(tmp_path, alpha, noise):
    for name in ("a", "b"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    one = save(tmp_path / "a", WEIGHTS, **CONFIG)
    moved = {
        n: (t + np.float32(noise) * drawn(f"b{n}", *t.shape)).astype("float32")
        for n, t in tensors_of(one).items()
    }
    two = save(tmp_path / "b", moved, **CONFIG, lora_alpha=alpha)
    found, (x, y) = lorakit.compare(one, two), (deltas(one), deltas(two))
    assert [row.name for row in found.rows] == sorted(x)
    for row in found.rows:
        (both,), a, b = row.pairs, x[row.name], y[row.name]
        norms = [np.linalg.norm(a), np.linalg.norm(b)]
        np.testing.assert_allclose(row.norms, norms, rtol=1e-12)
        product = np.vdot(a, b)
        np.testing.assert_allclose(both.inner, product, rtol=1e-11, atol=1e-12 * np.prod(norms))
        np.testing.assert_allclose(both.cosine, product / np.prod(norms), rtol=1e-11, atol=1e-12)
        size = np.linalg.norm(a - b)
        np.testing.assert_allclose(both.difference, size, rtol=1e-9, atol=1e-14 * max(norms))
        np.testing.assert_allclose(both.relative, size / max(norms), rtol=1e-9, atol=1e-14)
        overlaps = np.mean([dense_overlap(p, q) for p, q in zip(a, b, strict=True)], axis=0)
        np.testing.assert_allclose([both.columns, both.rows], overlaps, rtol=1e-6)
        ranks = [np.mean([dense_rank(e) for e in d]) for d in (a, b)]
        np.testing.assert_allclose(row.effective, ranks, rtol=1e-9)
    everything = [np.concatenate([d.ravel() for d in z.values()]) for z in (x, y)]
    sizes = [np.linalg.norm(e) for e in everything]
    np.testing.assert_allclose(found.norms, sizes, rtol=1e-12)
    cosine = np.vdot(*everything) / np.prod(sizes)
    np.testing.assert_allclose(found.cosines[0][1], cosine, rtol=1e-10, atol=1e-12)
    size = np.linalg.norm(everything[0] - everything[1]) / max(sizes)
    np.testing.assert_allclose(found.differences[1][0], size, rtol=1e-9, atol=1e-14)


def test_an_adapter_is_itself(two):
    one, _ = two
    opened = lorakit.open_adapter(one)
    for found in (lorakit.compare(one, one), lorakit.compare(opened, opened)):
        assert found.cosines[0][1] == pytest.approx(1, abs=1e-15)
        assert (found.differences[0][1], found.largest[0]) == (0.0, 0.0)
        assert {p.cosine for row in found.rows for p in row.pairs} == {1.0}
        assert all(min(p.columns, p.rows) > 1 - 1e-12 for r in found.rows for p in r.pairs)
    lorakit.compare(one, one, tolerance=0)


def test_the_same_delta_in_other_factors_differs_by_rounding_of_float64(two, tmp_path):
    tensors = tensors_of(two[0])
    turned = {n: t[::-1] if "lora_A" in n else t[:, ::-1] for n, t in tensors.items()}
    plain = {n: t for n, t in turned.items() if n.startswith("layers")}
    one = save(tmp_path / "e", {n: tensors[n] for n in plain})
    found = lorakit.compare(one, save(tmp_path / "f", {n: t.copy() for n, t in plain.items()}))
    assert 0 < found.largest[0] < 3e-15


def test_a_close_difference_keeps_its_digits(tmp_path):
    one = save(tmp_path / "a", WEIGHTS, **CONFIG)
    tensors = tensors_of(one)
    tensors["layers.0.q.lora_B.weight"] = tensors["layers.0.q.lora_B.weight"] * (1 + 2.0**-20)
    two = save(tmp_path / "b", tensors, **CONFIG)
    found = lorakit.compare(one, two)
    assert found.largest == (pytest.approx(2.0**-20, rel=0.1), "layers.0.q.weight")


def test_modules_that_one_lacks_count_as_zero(two, tmp_path):
    one, _ = two
    short = save(tmp_path / "c", pair("layers.0.q", 9, 7, 4))
    found = lorakit.compare(one, short)
    assert found.common == 1
    assert [row.ranks for row in found.rows if None not in row.ranks] == [(3, 4)]
    lacking = [row for row in found.rows if None in row.ranks]
    assert {(row.ranks[1], row.norms[1], row.pairs) for row in lacking} == {(None, 0.0, ())}
    x, y = deltas(one), deltas(short)
    sizes = [np.sqrt(sum(np.vdot(d, d) for d in z.values())) for z in (x, y)]
    product = np.vdot(x["layers.0.q.weight"], y["layers.0.q.weight"])
    assert found.cosines[0][1] == pytest.approx(product / np.prod(sizes))
    square = sizes[0] ** 2 + sizes[1] ** 2 - 2 * product
    assert found.differences[0][1] == pytest.approx(np.sqrt(square) / max(sizes))
    assert found.largest[0] >= 1


def test_of_several_all_pairs_are_compared(two, tmp_path):
    three = save(tmp_path / "c", WEIGHTS, **CONFIG)
    found = lorakit.compare(*two, three)
    assert [(p.first, p.second) for p in found.rows[0].pairs] == [(1, 2), (1, 3), (2, 3)]
    for i, j, paths in ((0, 1, two), (0, 2, (two[0], three)), (1, 2, (two[1], three))):
        alone = lorakit.compare(*paths)
        assert found.cosines[i][j] == found.cosines[j][i] == alone.cosines[0][1]
        assert found.differences[i][j] == alone.differences[0][1]


def test_the_result_does_not_depend_on_the_number_of_workers(two):
    assert lorakit.compare(*two, jobs=1) == lorakit.compare(*two, jobs=3)


def test_modules_come_in_the_order_of_their_numbers(tmp_path):
    tensors = {}
    for n in (10, 9, 1):
        tensors |= pair(f"layers.{n}.q", 4, 4, 2)
    one = save(tmp_path / "a", tensors)
    names = [row.name for row in lorakit.compare(one, one).rows]
    assert names == [f"layers.{n}.q.weight" for n in (1, 9, 10)]


WHOLE = {
    **pair("q", 5, 5, 2),
    "q.lora_B.bias": (5,),
    "norm.weight": (6,),
    "lm_head.weight": (10, 6),
    "embed.token_adapter.trainable_tokens_delta": (2, 6),
}


def test_tensors_that_are_no_updates_are_compared_number_by_number(tmp_path):
    tokens = {"embed": [3, 5]}
    one = save(tmp_path / "a", WHOLE, trainable_token_indices=tokens, lora_bias=True)
    other = {n: s for n, s in WHOLE.items() if n != "norm.weight"} | {"lm_head.weight": (11, 6)}
    two = save(tmp_path / "b", other, trainable_token_indices={"embed": [5, 7]}, lora_bias=True)
    found = {w.name: w for w in lorakit.compare(one, two).whole}
    x, y = tensors_of(one), tensors_of(two)
    (pair_,) = found["q (bias of B)"].pairs
    size = 1.5 * np.linalg.norm(x["q.lora_B.bias"] - y["q.lora_B.bias"])
    assert pair_.difference == pytest.approx(size, rel=1e-6)
    assert found["norm.weight"].norms == (pytest.approx(np.linalg.norm(x["norm.weight"])), None)
    assert found["lm_head.weight"].pairs[0].difference is None
    rows = found["embed (token rows)"].pairs[0]
    name = "embed.token_adapter.trainable_tokens_delta"
    assert rows.difference == pytest.approx(np.linalg.norm(x[name][1] - y[name][0]), rel=1e-6)
    same = lorakit.compare(one, one)
    assert {p.difference for w in same.whole for p in w.pairs} == {0.0}


def test_a_tolerance_that_is_exceeded_is_an_error_with_the_findings(two):
    with pytest.raises(DifferentError, match=r"5 of 5 modules differ by more than 0\.1") as error:
        lorakit.compare(*two, tolerance=0.1)
    assert error.value.exit_code == 8
    assert error.value.compared == lorakit.compare(*two)
    assert error.value.to_dict()["compared"]["common"] == 5
    lorakit.compare(*two, tolerance=5)


def test_a_tolerance_holds_tensors_that_are_no_updates_too(tmp_path):
    one = save(tmp_path / "a", WHOLE, lora_bias=True)
    tensors = tensors_of(one)
    two = save(tmp_path / "b", tensors | {"norm.weight": 2 * tensors["norm.weight"]})
    with pytest.raises(DifferentError, match=r"1 of \d modules .* 'norm.weight' by 0.5"):
        lorakit.compare(one, two, tolerance=0.4)


DORA = {"q.lora_magnitude_vector": np.abs(drawn("m", 8)) + 1, **pair("q", 8, 6, 2)}


def merged_delta(base, adapter, folder):
    lorakit.merge(base, adapter, folder, dtype="float32", run=lorakit.RunOptions(sync=False))
    before, after = (load_file(f / "model.safetensors") for f in (base, folder))
    return after["q.weight"].astype("f8") - before["q.weight"]


def test_deltas_that_depend_on_the_base_are_those_of_a_merge(tmp_path):
    (tmp_path / "base").mkdir()
    save_file({"q.weight": drawn("w", 8, 6)}, tmp_path / "base/model.safetensors")
    one = save(tmp_path / "a", DORA, use_dora=True)
    two = save(tmp_path / "b", pair("q", 8, 6, 2))
    plain = lorakit.compare(one, two)
    assert any("has DoRA magnitudes" in note for note in plain.notes)
    assert [w.name for w in plain.whole] == ["q (magnitudes)"]
    found = lorakit.compare(one, two, base=tmp_path / "base")
    assert found.whole == ()
    x = merged_delta(tmp_path / "base", one, tmp_path / "merged-a")
    y = deltas(two)["q.weight"][0]
    ((row,), (both,)) = found.rows, found.rows[0].pairs
    np.testing.assert_allclose(row.norms, [np.linalg.norm(x), np.linalg.norm(y)], rtol=1e-5)
    cosine = np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y)
    np.testing.assert_allclose(both.cosine, cosine, rtol=1e-4)
    np.testing.assert_allclose(both.difference, np.linalg.norm(x - y), rtol=1e-5)
    assert row.norms[0] != pytest.approx(plain.rows[0].norms[0], rel=0.01)


def test_what_an_initialisation_took_out_of_the_base_is_told(tmp_path):
    one = save(tmp_path / "a", pair("q", 8, 6, 2), init_lora_weights="pissa")
    (note,) = lorakit.compare(one, save(tmp_path / "b", pair("q", 8, 6, 2))).notes
    assert "'pissa' changed its base" in note


def test_an_update_of_zeros_has_no_angle_and_no_cosine(tmp_path):
    one = save(tmp_path / "a", {**pair("q", 8, 6, 2), "q.lora_B.weight": np.zeros((8, 2), "f4")})
    two = save(tmp_path / "b", pair("q", 8, 6, 2))
    (row,) = lorakit.compare(one, two).rows
    assert (row.norms[0], row.effective[0], row.pairs[0].cosine) == (0.0, 0.0, 0.0)
    assert (row.pairs[0].columns, row.pairs[0].relative) == (0.0, pytest.approx(1.0))
    assert lorakit.compare(one, one).differences[0][1] == 0.0


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path):
    one = save(tmp_path / "a", pair("q", 8, 6, 2))
    with pytest.raises(UsageError, match="two adapters"):
        lorakit.compare(one)
    with pytest.raises(UsageError, match="no share of a norm"):
        lorakit.compare(one, one, tolerance=float("nan"))
    with pytest.raises(MisfitError, match="no other adapter has any of its 1 modules"):
        lorakit.compare(one, save(tmp_path / "b", pair("k", 8, 6, 2)))
    with pytest.raises(MisfitError, match="different models"):
        lorakit.compare(one, save(tmp_path / "c", pair("q", 8, 7, 2)))
    broken = {**pair("q", 8, 6, 2), "q.lora_B.weight": np.full((8, 2), np.nan, "f4")}
    with pytest.raises(InputError, match="NaN") as error:
        lorakit.compare(one, save(tmp_path / "d", broken))
    assert error.value.file == str(tmp_path / "d/adapter_model.safetensors")
