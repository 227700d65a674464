"""An adapter weight by weight: what is read is its delta, what is written has the same."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorakit.adapter.adapter import open_adapter
from lorakit.adapter.weights import adapted, roles_of, widest
from lorakit.errors import InputError
from lorakit.math.experts import unpacked
from lorakit.math.lowrank import LowRank, delta

PREFIX = "base_model.model."


def opened(folder, tensors, **config):
    rng = np.random.default_rng(0)
    made = {PREFIX + n: rng.standard_normal(s).astype("float32") for n, s in tensors.items()}
    save_file(made, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return open_adapter(str(folder)), {n.removeprefix(PREFIX): t for n, t in made.items()}


def test_a_linear_layer_is_its_scaled_product(tmp_path):
    adapter, made = opened(tmp_path, {"q.lora_A.weight": (2, 5), "q.lora_B.weight": (4, 2)})
    (one,) = adapted(adapter).values()
    assert (one.form.key, one.form.name, one.rank, one.dtype) == ("q.weight", "q", 2, "F32")
    expected = 1.5 * made["q.lora_B.weight"] @ made["q.lora_A.weight"]
    np.testing.assert_allclose(delta(one.lows()[0]), expected, rtol=1e-6)


def test_what_is_written_has_a_scaling_of_one_and_the_same_delta(tmp_path):
    adapter, _ = opened(tmp_path, {"q.lora_A.weight": (2, 5, 3), "q.lora_B.weight": (4, 2, 1)})
    (one,) = adapted(adapter).values()
    written = roles_of(one.form, one.lows(), "F32", rank=3)
    assert (written["a"].shape, written["b"].shape) == ((3, 5, 3), (4, 3, 1))
    found = LowRank(written["a"].reshape(3, -1), written["b"].reshape(4, -1))
    np.testing.assert_allclose(delta(found), delta(one.lows()[0]), rtol=1e-6)


def test_the_experts_of_a_stack_come_one_by_one_and_go_back_together(tmp_path):
    names = {"mlp.experts.lora_A.weight": (6, 5), "mlp.experts.lora_B.weight": (4, 6)}
    adapter, made = opened(tmp_path, names, target_parameters=["mlp.experts.down_proj"])
    (one,) = adapted(adapter).values()
    assert (one.form.key, one.form.experts, one.rank) == ("mlp.experts.down_proj", 3, 2)
    downs, ups = unpacked(*made.values(), 3)
    for low, a, b in zip(one.lows(), downs, ups, strict=True):
        np.testing.assert_allclose(delta(low), 1.5 * b @ a, rtol=1e-4, atol=1e-6)
    written = roles_of(one.form, one.lows(), "F32")
    np.testing.assert_array_equal(written["a"], made["mlp.experts.lora_A.weight"])
    np.testing.assert_allclose(written["b"], 1.5 * made["mlp.experts.lora_B.weight"], rtol=1e-6)


def test_experts_of_other_ranks_get_the_largest(tmp_path):
    names = {"mlp.experts.lora_A.weight": (4, 5), "mlp.experts.lora_B.weight": (4, 4)}
    adapter, _ = opened(tmp_path, names, target_parameters=["mlp.experts.down_proj"])
    (one,) = adapted(adapter).values()
    first, second = one.lows()
    shorter = LowRank(first.a[:1], first.b[:, :1], first.scaling)
    written = roles_of(one.form, [shorter, second], "F32")
    downs, ups = unpacked(written["a"], written["b"], 2)
    np.testing.assert_allclose(ups[0] @ downs[0], delta(shorter), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ups[1] @ downs[1], delta(second), rtol=1e-4, atol=1e-6)


def test_an_out_proj_that_peft_applies_twice_is_twice_its_factors(tmp_path):
    names = {"attn.base_layer.out_proj.lora_A.weight": (2, 4)}
    names["attn.base_layer.out_proj.lora_B.weight"] = (4, 2)
    adapter, made = opened(tmp_path, names)
    (one,) = adapted(adapter).values()
    assert (one.form.inner, one.form.name, one.form.key) == (True, "attn", "attn.out_proj.weight")
    a, b = made.values()
    np.testing.assert_allclose(delta(one.lows()[0]), 2 * 1.5 * b @ a, rtol=1e-4, atol=1e-6)
    written = roles_of(one.form, one.lows(), "F32")
    np.testing.assert_allclose(written["b"], 1.5 * b, rtol=1e-6)  # and is read twice again


def test_the_bias_of_a_layer_and_its_magnitude(tmp_path):
    names = {"q.lora_A.weight": (2, 5), "q.lora_B.weight": (4, 2), "q.lora_B.bias": (4,)}
    adapter, made = opened(tmp_path, {**names, "q.lora_magnitude_vector": (4,)}, use_dora=True)
    (one,) = adapted(adapter).values()
    assert one.dora
    np.testing.assert_allclose(one.bias(), 1.5 * made["q.lora_B.bias"])
    np.testing.assert_array_equal(one.magnitude(), made["q.lora_magnitude_vector"])


def test_factors_in_blocks_are_refused(tmp_path):
    names = {"q.lora_A.weight": (2, 5), "q.lora_B.weight": (4, 2)}
    adapter, _ = opened(tmp_path, names, use_bdlora={"nblocks": 1})
    with pytest.raises(InputError, match="BD-LoRA"):
        adapted(adapter)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["BF16", "BF16"], "BF16"),
        (["BF16", "F16"], "F32"),
        (["F16", "F32"], "F32"),
        (["F64", "BF16"], "F64"),
    ],
)
def test_the_widest_of_dtypes_holds_each_number_of_any(dtypes, expected):
    assert widest(dtypes) == expected
