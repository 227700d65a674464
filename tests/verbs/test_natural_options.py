"""Options in Python take what one would naturally write, or say what to give."""

import json

import numpy as np
import pytest

import lorakit
from lorakit import RunOptions
from lorakit.errors import OutputError, UsageError
from tests.verbs.adapters import config_of, tensors_of
from tests.verbs.conftest import SCRATCH


@pytest.fixture
def state(made):
    """The base of the demo in memory."""
    source = lorakit.open_checkpoint(made / "base")
    return {n: np.zeros(i.shape, "float32") for n, i in source.infos.items()}


def test_a_number_is_the_weight_of_the_only_adapter(made, state):
    one = lorakit.merge(state, made / "style", weights=0.5)
    other = lorakit.merge(state, made / "style", weights=np.array([0.5]))
    whole = lorakit.merge(state, made / "style")
    name = "model.layers.0.self_attn.q_proj.weight"
    scalar = lorakit.merge(state, made / "style", weights=np.float32(0.5))
    np.testing.assert_array_equal(one[name], other[name])
    np.testing.assert_array_equal(one[name], scalar[name])
    np.testing.assert_array_equal(2 * one[name], whole[name])
    with pytest.raises(UsageError, match="1 weights are given for 2"):
        lorakit.merge(state, [made / "style", made / "detail"], weights=0.5)


@pytest.mark.parametrize("weights", ["10", {"style": 1}, [None], ["much", 1]])
def test_weights_that_are_no_numbers_are_refused(made, state, weights):
    with pytest.raises(UsageError, match="no number or list of numbers"):
        lorakit.merge(state, [made / "style", made / "detail"], weights=weights)


@pytest.mark.parametrize("adapters", [None, {}, {"style": "style"}])
def test_what_is_no_adapter_is_told_what_one_is(state, adapters):
    with pytest.raises(UsageError, match=r"where an adapter is\. Give a path"):
        lorakit.merge(state, adapters)


def test_sizes_may_be_texts(made, tmp_path):
    run = RunOptions(max_memory="2GB", sync=False)
    assert run.max_memory == 2_000_000_000
    lorakit.merge(made / "base", made / "style", tmp_path / "out", max_shard_size="100kB", run=run)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    with pytest.raises(UsageError, match="'much' is no size"):
        RunOptions(max_memory="much")


def test_targets_and_layers_may_be_lists_and_patterns_dicts(made, tmp_path):
    common = {"rank": 2, "run": SCRATCH}
    lorakit.init(
        made / "base",
        tmp_path / "natural",
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["layers.1.self_attn.v_proj"],
        layers=[0],
        rank_pattern={"q_proj": 3},
        **common,
    )
    lorakit.init(
        made / "base",
        tmp_path / "plain",
        target_modules="q_proj,v_proj",
        layers="0",
        rank_pattern=[("q_proj", 3)],
        **common,
    )
    assert config_of(tmp_path / "natural") == config_of(tmp_path / "plain")
    one, other = (tensors_of(tmp_path / name) for name in ("natural", "plain"))
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in other.items()}
    job = lorakit.plan_loftq(made / "base", rank=2, target_modules=["q_proj"], layers=range(2))
    assert job.plan.options["target_modules"] == "q_proj"
    assert job.plan.options["layers"] == "0,1"


def test_the_number_of_an_adapter_says_whose_whole_tensors_are_taken(made, tmp_path):
    both = [made / "style", made / "detail"]
    for name, whole in (("number", 1), ("text", "1")):
        lorakit.combine(both, tmp_path / name, method="cat", whole=whole, run=SCRATCH)
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("number", "text"))
    assert one.read_bytes() == other.read_bytes()


def test_one_pattern_is_a_list_of_one(made, state, tmp_path):
    kept = lorakit.edit(made / "style", tmp_path / "one", keep="q_proj", run=SCRATCH)
    assert kept.counts == {"kept": 2, "renamed": 0, "dropped": 2}
    for asked in ({"drop": "q_proj"}, {"rename": "q_proj=k_proj"}):
        lone = lorakit.plan_edit(made / "style", **asked)
        (listed,) = ({name: [value]} for name, value in asked.items())
        assert lone.changes == lorakit.plan_edit(made / "style", **listed).changes
    lorakit.merge(state, made / "style", key_map="q_proj=k_proj")
    planned = lorakit.plan_merge(made / "base", made / "style", key_map="q_proj=k_proj")
    assert planned.plan.options["key_map"] == ["q_proj=k_proj"]
    lorakit.convert(made / "style", tmp_path / "mlx", to="mlx", key_map="q=k", run=SCRATCH)
    with pytest.raises(UsageError, match="is not REGEX=REPLACEMENT"):
        lorakit.plan_edit(made / "style", rename="q_proj")


def test_an_open_base_does_where_a_path_does(made, tmp_path):
    base = lorakit.open_checkpoint(made / "base")
    lorakit.merge(base, made / "style", tmp_path / "merged", run=SCRATCH)
    lorakit.verify(lorakit.open_checkpoint(tmp_path / "merged"), full=True)
    lorakit.init(base, tmp_path / "fresh", rank=2, run=SCRATCH)
    lorakit.convert(made / "style", tmp_path / "mlx", to="mlx", base=base, run=SCRATCH)
    assert lorakit.inspect(base).kind == "base"
    with pytest.raises(OutputError, match="lies inside an input"):
        lorakit.merge(base, made / "style", made / "base" / "out")


def test_init_with_loftq_is_loftq(made, tmp_path):
    options = {"method": "loftq", "rank": 2, "exclude_modules": "v_proj", "run": SCRATCH}
    lorakit.init(made / "base", tmp_path / "one", **options)
    lorakit.loftq(made / "base", tmp_path / "other", rank=2, skip="v_proj", run=SCRATCH)
    for part in ("base/model-00001-of-00003.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "one" / part).read_bytes() == (tmp_path / "other" / part).read_bytes()
    with pytest.raises(UsageError, match="--dora does not go with loftq"):
        lorakit.init(made / "base", tmp_path / "x", method="loftq", rank=2, dora=True)


def test_what_makes_no_sense_is_said(made, state, tmp_path):
    for act, said in (
        (lambda: lorakit.merge(state, made / "style", mha_factor=3), "Give 1 or 2"),
        (lambda: RunOptions(jobs=0), "1 worker or more"),
        (lambda: lorakit.merge(state, made / "style", tmp_path / "out"), "Leave the output out"),
        (lambda: lorakit.init(made / "base", tmp_path / "x", rank=2, method="no"), "corda, loftq"),
    ):
        with pytest.raises(UsageError) as caught:
            act()
        assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_numbers_may_be_those_of_numpy(made, tmp_path):
    rank, share, run = np.int64(2), np.float32(0.5), SCRATCH
    style, base = made / "style", made / "base"
    lorakit.resize(style, tmp_path / "resize", rank=rank, energy=share, run=run)
    lorakit.combine(
        [style, style], tmp_path / "ties", method="ties", rank=rank, density=share, run=run
    )
    lorakit.init(base, tmp_path / "init", rank=rank, alpha=share, seed=rank, run=run)
    lorakit.loftq(base, tmp_path / "loftq", rank=rank, iters=rank, run=run)
    lorakit.extract(base, adapter=style, output=tmp_path / "extract", rank=rank, run=run)
    assert config_of(tmp_path / "init")["lora_alpha"] == 0.5
    assert config_of(tmp_path / "extract")["r"] == 2
