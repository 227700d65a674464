"""Places: every row of a module exactly once, or none; never a guess."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import InputError, MisfitError
from lorakit.naming.places import Disk, Place, places
from lorakit.tensors import TensorInfo
from tests.naming.indexes import INDEXES

MOE = "model.layers.0.mlp.experts"
ATTN = "model.layers.0.self_attn"


def disk(shapes, model_type=""):
    return Disk({n: TensorInfo(n, "BF16", tuple(s)) for n, s in shapes.items()}, model_type)


def per_expert(experts=3, inner=6, hidden=4, front=MOE, leaves=("gate_proj", "up_proj")):
    rows = dict.fromkeys(leaves, (inner, hidden)) | {"down_proj": (hidden, inner)}
    return {f"{front}.{e}.{n}.weight": s for e in range(experts) for n, s in rows.items()}


def stacked(experts=3, inner=6, hidden=4, front=MOE):
    shapes = {"gate_up_proj": (experts, 2 * inner, hidden), "down_proj": (experts, hidden, inner)}
    return {f"{front}.{n}": s for n, s in shapes.items()}


def test_a_name_on_disk_counts_as_it_is_whatever_it_looks_like():
    both = disk({"model.layers.0.q.weight": (4, 4), "layers.0.q.weight": (4, 4)})
    assert places("layers.0.q", "weight", both, 4) == [Place("layers.0.q.weight")]


def test_a_parameter_of_the_root_module_has_no_dot_in_front():
    assert places("", "weight", disk({"weight": (4, 4)}), 4) == [Place("weight")]


def test_another_spelling_finds_the_tensor():
    there = disk({"language_model.model.layers.0.q.weight": (4, 4)}, "gemma3")
    found = places("model.language_model.layers.0.q", "weight", there, 4)
    assert found == [Place("language_model.model.layers.0.q.weight")]


def test_two_tensors_of_one_meaning_are_refused_by_name():
    both = disk({"model.layers.0.q.weight": (4, 4), "layers.0.q.weight": (4, 4)})
    with pytest.raises(MisfitError, match=r"model\.layers\.0\.q\.weight.*layers\.0\.q.*--key-map"):
        places("language_model.layers.0.q", "weight", both, 4)


def test_nothing_there_is_no_place():
    assert places("model.layers.9.q", "weight", disk({"model.layers.0.q.weight": (4, 4)}), 4) == []


def test_stacked_experts_lie_in_one_tensor_for_each_expert_and_half():
    found = places(MOE, "gate_up_proj", disk(per_expert(2)), 12)
    assert found == [
        Place(f"{MOE}.0.gate_proj.weight", expert=0, rows=(0, 6)),
        Place(f"{MOE}.0.up_proj.weight", expert=0, rows=(6, 12)),
        Place(f"{MOE}.1.gate_proj.weight", expert=1, rows=(0, 6)),
        Place(f"{MOE}.1.up_proj.weight", expert=1, rows=(6, 12)),
    ]


def test_the_down_projections_lie_whole_in_one_tensor_for_each_expert():
    found = places(MOE, "down_proj", disk(per_expert(2)), 4)
    assert found == [Place(f"{MOE}.{e}.down_proj.weight", expert=e) for e in range(2)]


def test_names_of_v5_find_the_experts_of_mixtral_in_their_old_names():
    names = {"w1": (6, 4), "w3": (6, 4), "w2": (4, 6)}
    front = "model.layers.0.block_sparse_moe.experts"
    there = disk({f"{front}.{e}.{n}.weight": s for e in range(12) for n, s in names.items()})
    found = places(MOE, "gate_up_proj", there, 12)
    assert [p.expert for p in found] == [e for e in range(12) for _ in "gu"]
    assert found[21] == Place(f"{front}.10.w3.weight", expert=10, rows=(6, 12))


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("leaf", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("expert", [0, 1, 2])
def test_experts_of_which_one_is_missing_are_no_place(parameter, leaf, expert):
    shapes = per_expert()
    del shapes[f"{MOE}.{expert}.{leaf}.weight"]
    concerned = (leaf == "down_proj") == (parameter == "down_proj")
    shortened = leaf == "down_proj" and expert == 2  # then there are two of them, says the disk
    found = places(MOE, parameter, disk(shapes), 12)
    assert bool(found) == (not concerned or shortened)
    assert len({p.expert for p in found}) in ((0, 2) if concerned else (3,))


def test_experts_without_a_gate_are_stacked_alone():
    front = "model.layers.0.mixer.experts"
    there = disk(per_expert(2, front=front, leaves=("up_proj",)), "nemotron_h")
    found = places(front, "up_proj", there, 6)
    assert found == [Place(f"{front}.{e}.up_proj.weight", expert=e) for e in range(2)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("leaf", ["w1", "gate_proj", "w3", "up_proj", "w2"])
def test_one_expert_is_a_slot_of_a_stacked_tensor(transposed, leaf):
    shapes = {n: (s[0], *reversed(s[1:])) if transposed else s for n, s in stacked().items()}
    module = f"model.layers.0.block_sparse_moe.experts.2.{leaf}"
    out = 4 if leaf == "w2" else 6
    name = f"{MOE}.down_proj" if leaf == "w2" else f"{MOE}.gate_up_proj"
    at = {"w2": None, "w3": 6, "up_proj": 6}.get(leaf, 0)
    assert places(module, "weight", disk(shapes), out) == [Place(name, slot=2, at=at)]


def test_an_expert_that_the_stack_does_not_have_is_no_place():
    assert places(f"{MOE}.3.gate_proj", "weight", disk(stacked()), 6) == []


def test_an_expert_of_which_the_stack_does_not_hold_two_halves_is_no_place():
    assert places(f"{MOE}.0.gate_proj", "weight", disk(stacked()), 5) == []


def test_gate_and_up_stacked_each_for_itself_are_the_rows_of_the_fused_weight():
    names = ("gate_proj", "up_proj", "down_proj")
    there = disk({f"model.layers.0.moe.{n}.weight": (3, 6, 4) for n in names}, "step3p7")
    gate, up = (f"model.layers.0.moe.{n}.weight" for n in names[:2])
    assert places(MOE, "gate_up_proj", there, 12) == [
        Place(gate, rows=(0, 6)),
        Place(up, rows=(6, 12)),
    ]
    assert places(f"{MOE}.1.up_proj", "weight", there, 6) == [Place(up, slot=1)]


def test_biases_of_stacked_experts_follow_their_weights():
    there = disk({f"{MOE}.{e}.{n}.bias": (6,) for e in range(2) for n in ("gate_proj", "up_proj")})
    found = places(MOE, "gate_up_proj_bias", there, 12)
    assert found[3] == Place(f"{MOE}.1.up_proj.bias", expert=1, rows=(6, 12))


@pytest.mark.parametrize("fused", ["qkv_proj.weight", "Wqkv.weight", "in_proj_weight"])
@pytest.mark.parametrize(("leaf", "out", "at"), [("q", 8, 0), ("k", 2, 8), ("v", 2, 10)])
def test_queries_keys_and_values_lie_in_this_order_in_a_fused_weight(fused, leaf, out, at):
    name = f"{ATTN}.{fused}"
    found = places(f"{ATTN}.{leaf}_proj", "weight", disk({name: (12, 4)}), out)
    assert found == [Place(name, at=at)]


@pytest.mark.parametrize(("leaf", "out"), [("q", 12), ("q", 9), ("k", 5), ("v", 6), ("k", 7)])
def test_a_part_too_large_for_a_fused_weight_is_no_place(leaf, out):
    there = disk({f"{ATTN}.qkv_proj.weight": (12, 4)})
    assert places(f"{ATTN}.{leaf}_proj", "weight", there, out) == []


@pytest.mark.parametrize(
    ("model_type", "fused", "gate", "up"),
    [("phi3", "gate_up_proj", 0, 6), ("gte", "up_gate_proj", 6, 0), ("molmo2", "ff_proj", 6, 0)],
)
def test_gate_and_up_lie_in_the_order_of_their_family(model_type, fused, gate, up):
    name = f"layers.0.mlp.{fused}.weight"
    there = disk({name: (12, 4)}, model_type)
    assert places("layers.0.mlp.gate_proj", "weight", there, 6) == [Place(name, at=gate)]
    assert places("layers.0.mlp.up_proj", "weight", there, 6) == [Place(name, at=up)]
    assert places("layers.0.mlp.gate_proj", "weight", there, 5) == []


def test_a_fused_module_lies_in_the_tensors_of_its_parts():
    shapes = {f"{ATTN}.{n}_proj.weight": (s, 4) for n, s in (("q", 8), ("k", 2), ("v", 2))}
    assert places(f"{ATTN}.qkv_proj", "weight", disk(shapes), 12) == [
        Place(f"{ATTN}.q_proj.weight", rows=(0, 8)),
        Place(f"{ATTN}.k_proj.weight", rows=(8, 10)),
        Place(f"{ATTN}.v_proj.weight", rows=(10, 12)),
    ]
    del shapes[f"{ATTN}.k_proj.weight"]
    assert places(f"{ATTN}.qkv_proj", "weight", disk(shapes), 12) == []


@pytest.mark.parametrize(
    ("model_type", "name", "module"),
    [
        ("gpt_oss", f"{MOE}.gate_up_proj", f"{MOE}.0.gate_proj"),
        ("codegen", "h.0.attn.qkv_proj.weight", "h.0.attn.q_proj"),
        (
            "kimi_k25",
            "vision_tower.blocks.0.wqkv.weight",
            "model.vision_tower.layers.0.attn.q_proj",
        ),
    ],
)
def test_families_with_another_order_of_rows_are_refused_by_name(model_type, name, module):
    there = disk({name: (3, 12, 4) if "experts" in name else (12, 4)}, model_type)
    with pytest.raises(InputError, match=f"{model_type} models"):
        places(module, "weight", there, 6 if "experts" in name else 4)
    whole, _, parameter = name.rpartition(".")
    assert places(whole, parameter, there, 12) == [Place(name)]


def test_a_refused_family_is_refused_for_nothing_but_that():
    there = disk({f"language_model.{MOE}.gate_up_proj": (3, 12, 4)}, "gpt_oss")
    assert len(places(MOE, "gate_up_proj", there, 12)) == 1
    assert places("model.layers.0.mlp.gone", "weight", there, 12) == []


@given(
    experts=st.integers(1, 12),
    inner=st.integers(1, 5),
    leaf=st.sampled_from(["gate_up_proj", "down_proj"]),
)
def test_every_row_of_every_expert_lies_in_exactly_one_place(experts, inner, leaf):
    shapes = per_expert(experts, inner, 3)
    out = 2 * inner if leaf == "gate_up_proj" else 3
    found = places(MOE, leaf, disk(shapes), out)
    rows = [(p.expert, r) for p in found for r in range(*(p.rows or (0, out)))]
    assert sorted(rows) == [(e, r) for e in range(experts) for r in range(out)]
    assert len({p.tensor for p in found}) == len(found)


@given(experts=st.integers(1, 12), inner=st.integers(1, 5))
def test_splitting_the_stack_is_the_inverse_of_stacking_the_experts(experts, inner):
    one, all_ = disk(per_expert(experts, inner, 3)), disk(stacked(experts, inner, 3))
    for place in places(MOE, "gate_up_proj", one, 2 * inner):
        module = place.tensor.removesuffix(".weight")
        (back,) = places(module, "weight", all_, inner)
        assert (back.slot, back.at) == (place.expert, place.rows[0])


def modules(index, targets):
    """The modules of an index whose last segment is a target, in the names on disk."""
    names = (n.removesuffix(".weight") for n in INDEXES[index] if n.endswith(".weight"))
    return [n for n in names if n.rpartition(".")[2] in targets]


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPELLINGS = {
    "as on disk": lambda name: name,
    "v5": lambda name: (
        name.replace("model.layers", "model.language_model.layers")
        .replace("block_sparse_moe", "mlp")
        .replace("visual.", "model.visual.")
    ),
    "v4 conditional": lambda name: name.replace("model.layers", "language_model.model.layers"),
    "bare": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("index", "targets", "count"),
    [
        ("llama", (*LLAMA, "embed_tokens", "lm_head"), 562),
        ("mixtral", (*LLAMA[:4], "w1", "w2", "w3", "gate"), 1624),
        ("qwen2_vl", (*LLAMA, "qkv", "proj", "fc1", "fc2", "0", "2"), 327),
    ],
)
def test_the_usual_targets_of_a_real_index_are_all_found(index, targets, count, spelling):
    there = disk(INDEXES[index], index)
    wanted = modules(index, targets)
    assert len(wanted) == count
    for module in wanted:
        name = f"{module}.weight"
        found = places(SPELLINGS[spelling](module), "weight", there, INDEXES[index][name][0])
        assert found == [Place(name)]


@pytest.mark.parametrize(
    ("parameter", "out", "each"), [("gate_up_proj", 32768, 2), ("down_proj", 6144, 1)]
)
def test_the_fused_experts_of_v5_are_found_in_the_index_of_mixtral(parameter, out, each):
    there = disk(INDEXES["mixtral"], "mixtral")
    for layer in range(56):
        found = places(f"model.layers.{layer}.mlp.experts", parameter, there, out)
        assert len({p.tensor for p in found}) == 8 * each
        assert all(f"layers.{layer}." in p.tensor for p in found)
