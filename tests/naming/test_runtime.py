"""The rules for names of transformers v5 and transformers itself say the same."""

import pytest

from lorakit.errors import InputError
from lorakit.naming.from_transformers import places_of
from lorakit.naming.places import Disk, Place
from lorakit.naming.runtime import RULES, by_rules, runtime_of
from lorakit.tensors import TensorInfo
from tests.naming.tiny_models import tiny_model

TYPES = [t for types in RULES for t in types.split()]


def infos(*names):
    return {n: TensorInfo(n, "BF16", (4, 4)) for n in names}


@pytest.mark.parametrize("model_type", TYPES)
def test_a_rule_and_transformers_agree_on_every_parameter(model_type):
    pytest.importorskip("transformers", minversion="5.20")
    from transformers.core_model_loading import revert_weight_conversion

    model = tiny_model(model_type)
    state = revert_weight_conversion(model, dict(model.state_dict()))
    disk = {n: TensorInfo(n, "F32", tuple(t.shape)) for n, t in state.items()}
    ours, theirs = by_rules(Disk(disk, model_type)).places, places_of(model, disk)
    assert {n: list(p) for n, p in ours.items()} == {n: list(p) for n, p in theirs.items()}


def test_a_model_that_nobody_knows_is_refused_with_the_way_out():
    with pytest.raises(InputError, match="--names disk"):
        runtime_of({"model_type": "nobody"}, Disk(infos("a.weight"), "nobody"))


def test_a_rule_is_used_where_transformers_cannot_build_the_model():
    disk = Disk(infos("language_model.model.layers.0.q_proj.weight"), "llava")
    found = runtime_of({}, disk)
    assert found.by == "lorakit's own table"
    assert found.places == {
        "model.language_model.layers.0.q_proj.weight": [
            Place("language_model.model.layers.0.q_proj.weight")
        ]
    }
    assert found.of("language_model.model.layers.0.q_proj.weight") == [*found.places]


def test_routers_beside_experts_are_no_layers():
    names = [f"model.layers.0.block_sparse_moe.experts.0.w{n}.weight" for n in (1, 2, 3)]
    gates = ("model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.other.gate.weight")
    found = by_rules(Disk(infos(*names, *gates), "mixtral"))
    stem = "model.layers.0.mlp"
    assert found.others == {
        f"{stem}.gate.weight",
        f"{stem}.experts.gate_up_proj",
        f"{stem}.experts.down_proj",
    }
    assert found.stacks
