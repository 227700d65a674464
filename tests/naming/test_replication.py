"""Layer replication by names, held against what PEFT does to a model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import InputError
from lorakit.naming.replication import config_facts, replicated

RANGES = [[0, 2], [1, 3]]
SOURCES = [0, 1, 1, 2]


def layers(stack, count=3, leaves=("mlp.weight", "norm.weight")):
    return [f"{stack}.{i}.{leaf}" for i in range(count) for leaf in leaves]


@pytest.mark.parametrize(
    "stack",
    [
        *("model.layers", "layers", "h", "transformer.h", "bert.encoder.layer"),
        *("encoder.layer", "roberta.encoder.layer", "model.model.layers"),
    ],
)
def test_every_new_layer_is_its_source_and_the_rest_stays(stack):
    names = ["wte.weight", *layers(stack), "norm.weight"]
    expected = [
        (f"{stack}.{new}.{leaf}", f"{stack}.{old}.{leaf}")
        for new, old in enumerate(SOURCES)
        for leaf in ("mlp.weight", "norm.weight")
    ]
    others = [("wte.weight", "wte.weight")], [("norm.weight", "norm.weight")]
    assert replicated(names, RANGES) == [*others[0], *expected, *others[1]]


@given(st.data(), st.integers(1, 12))
def test_new_names_are_distinct_and_every_source_is_on_disk(data, count):
    pairs = st.tuples(st.integers(0, count - 1), st.integers(1, count)).filter(
        lambda pair: pair[0] < pair[1]
    )
    ranges = data.draw(st.lists(pairs, min_size=1, max_size=4))
    names = data.draw(st.permutations([*layers("model.layers", count), "lm_head.weight"]))
    found = replicated(names, ranges)
    new = [name for name, _ in found]
    assert len(set(new)) == len(new) == 2 * sum(stop - start for start, stop in ranges) + 1
    assert {source for _, source in found} <= set(names)
    assert ("lm_head.weight", "lm_head.weight") in found


def test_ranges_that_cover_every_layer_once_change_nothing():
    names = ["a.weight", *layers("model.layers"), "b.weight"]
    assert replicated(names, [[0, 1], [1, 3]]) == [(n, n) for n in names]


def test_layers_of_experts_inside_a_layer_are_not_the_stack():
    names = ["h.0.experts.layers.0.weight", "h.1.experts.layers.0.weight"]
    assert replicated(names, [[1, 2]]) == [(names[0], names[1])]


@pytest.mark.parametrize(
    "ranges",
    [
        *([], "03", [[0, 4]], [[-1, 2]], [[1, 1]], [[2, 1]], [[0, 1, 2]], [3], [[0.0, 1]]),
        *([[True, 2]], [["0", "1"]], [None]),
    ],
)
def test_what_is_no_list_of_ranges_within_the_stack_is_refused(ranges):
    with pytest.raises(InputError, match="layer_replication"):
        replicated(layers("model.layers"), ranges)
    with pytest.raises(InputError, match="layer_replication"):
        config_facts({"num_hidden_layers": 3}, ranges)


@pytest.mark.parametrize("stacks", [[], ["model.layers", "h"], ["model.visual.blocks"]])
def test_a_base_without_exactly_one_stack_is_refused(stacks):
    names = ["embed.weight", *(n for s in stacks for n in layers(s))]
    with pytest.raises(InputError, match="one stack"):
        replicated(names, RANGES)


def test_a_layer_that_is_missing_is_refused():
    names = [n for n in layers("model.layers") if ".1." not in n]
    with pytest.raises(InputError, match=r"model\.layers\.1"):
        replicated(names, RANGES)


def test_counts_lists_by_layer_and_lists_of_layers_follow():
    config = {
        "architectures": ["A", "B", "C"],
        "eos_token_id": [1, 2, 3],
        "num_hidden_layers": 3,
        "layer_types": ["full", "sliding", "linear"],
        "intermediate_size": [10, 20, 30],
        "mlp_only_layers": [1],
        "moe_layer_freq": [0, 1, 1],
        "sliding_window_pattern": 3,
        "first_k_dense_replace": 1,
        "hidden_size": 8,
    }
    assert config_facts(config, RANGES) == {
        "num_hidden_layers": 4,
        "layer_types": ["full", "sliding", "sliding", "linear"],
        "intermediate_size": [10, 20, 20, 30],
        "mlp_only_layers": [1, 2],
        "moe_layer_freq": [0, 1, 1, 1],
        "first_k_dense_replace": 1,
    }


@pytest.mark.parametrize("name", ["n_layer", "num_layers", "n_layers"])
def test_the_count_is_changed_by_whatever_name_it_has(name):
    assert config_facts({"model_type": "gpt2", name: 3}, RANGES) == {name: 4}


def test_a_count_in_the_config_of_the_text_part_is_found():
    config = {"hidden_size": 3, "text_config": {"num_hidden_layers": 3}}
    assert config_facts(config, RANGES) == {"num_hidden_layers": 4}


@pytest.mark.parametrize(
    "rule",
    [
        *({"sliding_window_pattern": 2}, {"attn_layer_period": 2}, {"moe_layer_freq": "x"}),
        *({"model_type": "gemma2"}, {"num_kv_shared_layers": 1}, {"first_k_dense_replace": 2}),
    ],
)
def test_a_rule_that_would_make_another_kind_of_a_copy_is_refused(rule):
    with pytest.raises(InputError, match="layer"):
        config_facts({"num_hidden_layers": 3, **rule}, [[0, 3], [0, 2]])


def test_a_rule_that_every_copy_obeys_is_kept():
    config = {"num_hidden_layers": 4, "sliding_window_pattern": 2, "model_type": "gemma2"}
    assert config_facts(config, [[0, 4], [2, 4]]) == {"num_hidden_layers": 6}


def test_a_config_without_a_count_is_refused():
    with pytest.raises(InputError, match="how many layers"):
        config_facts({"hidden_size": 3}, RANGES)


def tiny(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 16}
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, intermediate_size=8)
        return transformers.LlamaForCausalLM(config)
    if kind == "bert":
        config = transformers.BertConfig(**sizes, intermediate_size=8)
        return transformers.BertForMaskedLM(config)
    return transformers.FalconModel(transformers.FalconConfig(**sizes))


@pytest.mark.parametrize("kind", ["llama", "bert", "falcon"])
def test_names_and_sources_are_those_of_peft(kind):
    utils = pytest.importorskip("peft.tuners.tuners_utils")
    torch = pytest.importorskip("torch")
    model = tiny(kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    utils.replicate_layers(model, RANGES)
    after = dict(model.named_parameters(remove_duplicate=False))
    mapped = dict(replicated(before, RANGES))
    assert mapped.keys() == after.keys()
    assert [n for n, old in mapped.items() if not torch.equal(after[n], before[old])] == []
    assert model.config.num_hidden_layers == len(SOURCES)
