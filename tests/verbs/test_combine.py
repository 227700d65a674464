"""combine: what goes into an adapter made of several, what is asked, and what is refused."""

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorakit
from lorakit.errors import InputError, MisfitError, OutputError, ResourceError, UsageError
from lorakit.math.combining.methods import METHODS
from tests.verbs.adapters import (
    bytes_of,
    config_of,
    deltas,
    drawn,
    pair,
    save,
    tensors_of,
)
from tests.verbs.conftest import SCRATCH

EXPERTS = {"mlp.experts.lora_A.weight": (6, 5), "mlp.experts.lora_B.weight": (4, 6)}


@pytest.fixture
def two(tmp_path):
    """Two adapters: one weight in both, of other ranks and scalings, and one in each alone."""
    one = {**pair("q", 6, 5, 2), **pair("k", 6, 5, 2)}
    other = {**pair("q", 6, 5, 3), **pair("v", 4, 5, 3)}
    return (
        save(tmp_path / "one", one, target_modules=["q", "k"]),
        save(tmp_path / "other", other, r=3, use_rslora=True, target_modules=["q", "v"]),
    )


def combined(adapters, out, **options):
    return lorakit.combine(adapters, out, run=SCRATCH, **options)


def test_the_sum_has_the_weighted_delta_of_every_weight(two, tmp_path):
    combined(two, tmp_path / "out", weights=[0.7, -0.4])
    one, other, out = map(deltas, (*two, tmp_path / "out"))
    assert out.keys() == {"q.weight", "k.weight", "v.weight"}
    for key, found in out.items():
        expected = 0.7 * one.get(key, 0.0) - 0.4 * other.get(key, 0.0)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_config_has_the_true_ranks_and_a_scaling_of_one(two, tmp_path):
    combined(two, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["target_modules"] == ["k", "q", "v"]
    assert not config["use_rslora"]
    ranks = {"k": 2, "q": 5, "v": 3}
    for module, rank in ranks.items():
        assert config["rank_pattern"].get(module, config["r"]) == rank
        assert config["alpha_pattern"].get(module, config["lora_alpha"]) == rank


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_lone_adapter_back(two, tmp_path, method):
    density = {"density": 1.0} if "density" in METHODS[method].uses else {}
    if method == "breadcrumbs":
        density["gamma"] = 0.0
    combined(two[1], tmp_path / "out", method=method, **density)
    expected, found = deltas(two[1]), deltas(tmp_path / "out")
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, atol=1e-5)


def test_the_number_of_workers_changes_no_byte(two, tmp_path):
    for jobs in (1, 4):
        run = lorakit.RunOptions(jobs=jobs, sync=False)
        options = {"method": "dare_ties", "density": 0.5, "rank": 2}
        lorakit.combine(two, tmp_path / f"{jobs}", run=run, **options)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "4")


def test_another_seed_gives_another_mask(two, tmp_path):
    for seed in (0, 1):
        options = {"method": "dare_linear", "density": 0.5, "seed": seed}
        combined(two, tmp_path / f"{seed}", **options)
    one, other = deltas(tmp_path / "0"), deltas(tmp_path / "1")
    assert not np.allclose(one["q.weight"], other["q.weight"])


def test_what_a_rank_leaves_out_is_told(two, tmp_path):
    report = combined(two, tmp_path / "out", rank=2)
    rows = {r.name: r for r in report.rows}
    assert (rows["q.weight"].rank, rows["q.weight"].ranks) == (2, (2, 3))
    exact = deltas(two[0])["q.weight"] + deltas(two[1])["q.weight"]
    left = np.linalg.norm(exact - deltas(tmp_path / "out")["q.weight"]) ** 2
    lost = 1 - rows["q.weight"].retained
    assert lost == pytest.approx(left / np.linalg.norm(exact) ** 2, rel=1e-3)
    assert report.retained == min(r.retained for r in report.rows) < 1


def test_a_preview_has_the_rows_of_the_run_and_writes_nothing(two, tmp_path):
    job = lorakit.plan_combine(two, rank=2)
    before = sorted(p.name for p in tmp_path.iterdir())
    rows = list(job.preview().rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert rows == list(job.run(tmp_path / "out", SCRATCH).rows)


def test_stacked_experts_are_combined_one_by_one(tmp_path):
    options = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": None}
    one = save(tmp_path / "one", EXPERTS, **options)
    other = save(tmp_path / "other", EXPERTS, lora_alpha=4, **options)
    combined([one, other], tmp_path / "out", weights=[1, -2])
    expected = deltas(one)["mlp.experts.down_proj"] - 2 * deltas(other)["mlp.experts.down_proj"]
    found = deltas(tmp_path / "out")["mlp.experts.down_proj"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    config = config_of(tmp_path / "out")
    assert config["target_parameters"] == ["mlp.experts.down_proj"]
    assert config["r"] == 4


def test_biases_of_layers_are_summed(tmp_path):
    tensors = {**pair("q", 6, 5, 2), "q.lora_B.bias": (6,)}
    one = save(tmp_path / "one", tensors, lora_bias=True)
    other = save(tmp_path / "other", pair("q", 6, 5, 2))
    combined([one, other], tmp_path / "out", weights=[2, 1])
    expected = 2 * 1.5 * tensors_of(one)["q.lora_B.bias"]
    np.testing.assert_allclose(tensors_of(tmp_path / "out")["q.lora_B.bias"], expected, rtol=1e-6)
    assert config_of(tmp_path / "out")["lora_bias"]


def test_what_one_adapter_alone_holds_whole_is_taken_and_told(two, tmp_path):
    head = save(
        tmp_path / "head", {**pair("q", 6, 5, 2), "score.weight": (2, 5)}, modules_to_save=["score"]
    )
    report = combined([two[0], head], tmp_path / "out")
    found = tensors_of(tmp_path / "out")["score.weight"]
    np.testing.assert_array_equal(found, tensors_of(head)["score.weight"])
    assert config_of(tmp_path / "out")["modules_to_save"] == ["score"]
    assert any("adapter 2 alone" in note for note in report.notes)


@pytest.fixture
def heads(tmp_path):
    """Two adapters that hold a head whole, and differ in it."""
    tensors = {**pair("q", 6, 5, 2), "score.weight": (2, 5)}
    return [save(tmp_path / n, tensors, modules_to_save=["score"]) for n in ("one", "other")]


def test_tensors_held_whole_that_differ_are_a_question(heads, tmp_path):
    with pytest.raises(MisfitError, match=r"adapters 1 and 2 hold 'score\.weight' whole"):
        combined(heads, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["1", "2", "average", "drop"])
def test_the_answer_to_that_question(heads, tmp_path, way):
    combined(heads, tmp_path / "out", whole=way, weights=[3, 1])
    one, other = (tensors_of(h)["score.weight"] for h in heads)
    expected = {"1": one, "2": other, "average": 0.75 * one + 0.25 * other, "drop": None}[way]
    found = tensors_of(tmp_path / "out").get("score.weight")
    if expected is None:
        assert found is None
        assert config_of(tmp_path / "out")["modules_to_save"] is None
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_module_that_one_saves_and_another_adapts_is_not_listed_as_saved(tmp_path):
    shapes = {**pair("q", 6, 5, 2), "m.head.weight": (6, 5), "m.norm.weight": (5,)}
    one = save(tmp_path / "one", shapes, modules_to_save=["m"])
    other = save(tmp_path / "other", {**pair("q", 6, 5, 2), **pair("m.head", 6, 5, 2)})
    combined([one, other], tmp_path / "out")
    config, names = config_of(tmp_path / "out"), tensors_of(tmp_path / "out")
    assert config["modules_to_save"] == ["m.norm"]
    assert config["target_modules"] == ["m.head", "q"]
    assert {"m.head.base_layer.weight", "m.norm.weight"} < names.keys()


def test_token_rows_beside_an_update_of_their_table_are_told(tmp_path):
    rows = {"embed.token_adapter.trainable_tokens_delta": (1, 5), **pair("q", 6, 5, 2)}
    one = save(tmp_path / "one", rows, trainable_token_indices={"embed": [3]})
    table = {"embed.lora_embedding_A": (2, 9), "embed.lora_embedding_B": (5, 2)}
    other = save(tmp_path / "other", {**pair("q", 6, 5, 2), **table})
    assert any("PEFT does not load" in n for n in combined([one, other], tmp_path / "out").notes)
    assert not any("PEFT" in n for n in combined([one, one], tmp_path / "one-alone").notes)


def test_biases_beside_experts_are_told(tmp_path):
    one = save(tmp_path / "one", {**pair("q", 6, 5, 2), "q.lora_B.bias": (6,)}, lora_bias=True)
    parameters = {"target_parameters": ["mlp.experts.down_proj"]}
    other = save(tmp_path / "other", {**pair("q", 6, 5, 2), **EXPERTS}, **parameters)
    (note,) = combined([one, other], tmp_path / "out").notes
    assert "(lora_bias) and 'mlp.experts.down_proj' are in one adapter" in note


def test_token_rows_are_joined_row_by_row(tmp_path):
    def tokens(name, indices):
        rows = {"embed.token_adapter.trainable_tokens_delta": (len(indices), 5)}
        config = {"trainable_token_indices": {"embed": indices}}
        return save(tmp_path / name, {**pair("q", 6, 5, 2), **rows}, **config)

    one, other = tokens("one", [3, 7]), tokens("other", [7, 9])
    with pytest.raises(MisfitError, match=r"embed\[7\]"):
        combined([one, other], tmp_path / "out")
    combined([one, other], tmp_path / "out", whole="2")
    name = "embed.token_adapter.trainable_tokens_delta"
    mine, theirs, found = (tensors_of(f)[name] for f in (one, other, tmp_path / "out"))
    np.testing.assert_array_equal(found, [mine[0], theirs[0], theirs[1]])
    assert config_of(tmp_path / "out")["trainable_token_indices"] == {"embed": [3, 7, 9]}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"weights": [1.0]}, UsageError, "1 weights are given for 2"),
        ({"weights": [1.0, float("nan")]}, UsageError, "not finite"),
        ({"method": "tise"}, UsageError, "'ties'"),
        ({"method": "ties"}, UsageError, "--density"),
        ({"method": "ties", "density": 0.0}, UsageError, "above 0"),
        ({"method": "ties", "density": 1.5}, UsageError, "at most 1"),
        ({"density": 0.5}, UsageError, "linear has no density"),
        ({"rank": 0}, UsageError, "at least 1"),
        ({"compat": "mergekit"}, UsageError, "peft"),
        ({"whole": "3"}, UsageError, "1 to 2"),
        ({"dtype": "int8"}, UsageError, "int8"),
        ({"expert_packing": "mine"}, UsageError, "mine"),
    ],
)
def test_an_option_that_makes_no_sense(two, tmp_path, options, error, said):
    with pytest.raises(error, match=said):
        combined(two, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_adapters_without_a_module_in_common_are_refused(two, tmp_path):
    other = save(tmp_path / "far", pair("model.q", 6, 5, 2))
    with pytest.raises(
        MisfitError, match=r"no other adapter has any of its 2 modules; the first is 'k\.weight'"
    ):
        combined([two[0], other], tmp_path / "out")


def test_adapters_of_other_modules_of_the_same_layers_are_joined(tmp_path):
    two = [
        save(tmp_path / leaf, pair(f"model.layers.{n}.{leaf}", 6, 5, 2), target_modules=[leaf])
        for n, leaf in ((1, "self_attn.q_proj"), (1, "mlp.up_proj"))
    ]
    combined(two, tmp_path / "out", weights=[0.5, -2.0])
    for adapter, weight in zip(two, (0.5, -2.0), strict=True):
        for key, values in deltas(adapter).items():
            np.testing.assert_allclose(deltas(tmp_path / "out")[key], weight * values, atol=1e-6)


def test_weights_of_other_shapes_are_refused(two, tmp_path):
    other = save(tmp_path / "wide", pair("q", 6, 7, 2))
    with pytest.raises(MisfitError, match=r"\[6, 5\] in the first adapter, \[6, 7\]"):
        combined([two[0], other], tmp_path / "out")


def test_nan_is_refused_by_name(two, tmp_path):
    bad = drawn("x", 6, 2)
    bad[1, 1] = np.nan
    tensors = {**pair("q", 6, 5, 2), "q.lora_B.weight": bad}
    other = save(tmp_path / "bad", tensors)
    with pytest.raises(MisfitError, match=r"q\.lora_B\.weight' has 1 NaN"):
        combined([two[0], other], tmp_path / "out")


def test_dora_and_changed_bases_need_the_base(two, tmp_path):
    dora = save(
        tmp_path / "dora",
        {**pair("q", 6, 5, 2), "q.lora_magnitude_vector": (6,)},
        use_dora=True,
    )
    pissa = save(tmp_path / "pissa", pair("q", 6, 5, 2), init_lora_weights="pissa")
    with pytest.raises(InputError, match="DoRA"):
        combined([two[0], dora], tmp_path / "out")
    with pytest.raises(InputError, match="pissa"):
        combined([two[0], pissa], tmp_path / "out")
    combined([two[0], pissa], tmp_path / "out", base_is_residual=True)


@pytest.fixture
def base(tmp_path):
    """What the weights of `two` are of."""
    shapes = {"q.weight": (6, 5), "k.weight": (6, 5), "v.weight": (4, 5)}
    (tmp_path / "base").mkdir()
    save_file({n: drawn(n, *s) for n, s in shapes.items()}, tmp_path / "base/model.safetensors")
    return tmp_path / "base"


def test_a_change_that_is_of_low_rank_is_not_said_to_have_lost_some(two, base, tmp_path):
    pissa = save(tmp_path / "pissa", pair("q", 6, 5, 2), init_lora_weights="pissa")
    assert not combined([two[0], pissa], tmp_path / "out", base=base).notes


def test_an_initialisation_that_only_the_first_adapter_tells_names_the_way_out(two, base, tmp_path):
    niter = save(tmp_path / "niter", pair("q", 6, 5, 2), init_lora_weights="pissa_niter_4")
    said = "combine TRAINED INITIAL --weight 1 --weight -1 --base-is-residual -o OUT"
    with pytest.raises(InputError, match=said):
        combined([two[0], niter], tmp_path / "out", base=base)
    with pytest.raises(InputError, match=said):
        lorakit.extract(base, output=tmp_path / "out", adapter=niter, rank=4)
    combined([niter, niter], tmp_path / "out", weights=[1, -1], base_is_residual=True)
    assert config_of(tmp_path / "out")["init_lora_weights"] is True


def test_other_stacks_of_layers_are_refused(two, tmp_path):
    other = save(tmp_path / "stack", pair("q", 6, 5, 2), layer_replication=[[0, 2], [1, 3]])
    with pytest.raises(MisfitError, match="layer_replication"):
        combined([two[0], other], tmp_path / "out")


def half(folder, size, **config):
    """An adapter in float16 whose A has numbers around 1, and B around a size."""
    tensors = {n: drawn(folder.name + n, *s) for n, s in pair("q", 6, 5, 2).items()}
    tensors["q.lora_B.weight"] *= np.float32(size)
    return save(folder, {n: t.astype("float16") for n, t in tensors.items()}, **config)


@pytest.mark.parametrize(("size", "weight", "alpha"), [(1e-3, 0.1, 0.25), (2e4, 1.0, 64)])
def test_float16_keeps_its_digits_whatever_scaling_goes_into_it(tmp_path, size, weight, alpha):
    two = [half(tmp_path / n, size, lora_alpha=alpha) for n in ("one", "other")]
    combined(two, tmp_path / "out", weights=[weight, weight])
    assert tensors_of(tmp_path / "out")["q.lora_B.weight"].dtype == "float16"
    expected = weight * sum(deltas(f)["q.weight"] for f in two)
    error = np.linalg.norm(deltas(tmp_path / "out")["q.weight"] - expected)
    assert error < 5e-4 * np.linalg.norm(expected)


def test_numbers_that_no_float16_has_are_refused(tmp_path):
    wide = {n: drawn(n, *s) * np.float32(1e6) for n, s in pair("q", 6, 5, 2).items()}
    one = save(tmp_path / "one", wide)
    said = r"'base_model.model.q.lora_[AB].weight' does not fit float16: .*--dtype float32"
    with pytest.raises(MisfitError, match=said):
        combined([one, one], tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    combined([one, one], tmp_path / "out", dtype="float32")


def test_outputs_that_exist_or_are_files_are_refused(two, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError):
        combined(two, tmp_path / "out")
    with pytest.raises(UsageError, match="a folder"):
        combined(two, tmp_path / "out.safetensors")


def test_too_little_memory_is_told_before_anything_is_written(two, tmp_path):
    with pytest.raises(ResourceError, match="memory"):
        lorakit.combine(two, tmp_path / "out", run=lorakit.RunOptions(max_memory=1000))
    assert not (tmp_path / "out").exists()


def test_the_names_of_the_result_are_pefts(two, tmp_path):
    combined(two, tmp_path / "out")
    names = {f"{m}.lora_{x}.weight" for m in "kqv" for x in "AB"}
    assert tensors_of(tmp_path / "out").keys() == names
