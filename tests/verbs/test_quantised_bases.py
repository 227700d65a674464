"""Weights that are codes on a grid are refused where an adapter touches them, whatever the scales
or the packed tensors are called; beside them everything else merges.
"""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import lorakit
from lorakit.adapter.load import read_stored
from lorakit.errors import InputError
from lorakit.store.checkpoint import open_checkpoint
from tests.verbs.adapters import pair, save
from tests.verbs.conftest import SCRATCH

Q, OUT, EXPERTS = ("model.layers.0." + n for n in ("attn.q_proj", "attn.o_proj", "mlp.experts"))
F8 = np.zeros((16, 16), ml_dtypes.float8_e4m3fn)
STACK = np.zeros((4, 32, 16), ml_dtypes.float8_e4m3fn)
ONE, CODES = np.ones(1, "f4"), np.zeros((16, 2), "i4")
SCALED = [{f"{Q}.weight": F8, f"{Q}.{s}": ONE} for s in ("scale", "scale_weight", "weight_scale")]
PACKED = [{f"{Q}.{n}": CODES} for n in ("qweight", "weight_packed", "W_q", "_weight_qdata")]
EVERY = [f"{EXPERTS}.{e}.{n}_proj.weight_packed" for e in range(4) for n in ("gate", "up")]
FUSED = f"{EXPERTS}.gate_up_proj"
STACKS = [
    {FUSED: STACK, f"{FUSED}_scale_inv": ONE},
    {FUSED: STACK, f"{FUSED}_weight_scale": ONE},
    {f"{FUSED}_blocks": np.zeros((4, 32, 1, 8), "u1")},
    dict.fromkeys(EVERY, CODES),
]


@pytest.fixture
def base(tmp_path):
    def make(tensors, **config):
        folder = tmp_path / "base"
        folder.mkdir()
        plain = np.ones((16, 16), ml_dtypes.bfloat16)
        save_file({f"{OUT}.weight": plain, **tensors}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        return folder

    return make


def test_float8_without_scales_is_written_in_the_dtype_that_is_asked_for(base, tmp_path):
    w = np.random.default_rng(0).standard_normal((16, 16)).astype(F8.dtype)
    beside = {"model.layers.0.attn.k_proj.weight": w, "model.layers.0.attn.k_proj.bias": w[0]}
    folder = base({f"{Q}.weight": w, **beside}, torch_dtype="float8_e4m3fn")
    adapter = save(tmp_path / "adapter", pair(Q, 16, 16, 2))
    lorakit.merge(folder, adapter, tmp_path / "out", dtype="bfloat16", run=SCRATCH)
    merged = open_checkpoint(str(tmp_path / "out"))
    assert {i.dtype for i in merged.infos.values()} == {"BF16"}
    assert merged.config["torch_dtype"] == "bfloat16"
    for name, values in beside.items():
        found = read_stored(merged, merged.infos[name])
        np.testing.assert_array_equal(found.astype("f4"), values.astype("f4"))
    assert lorakit.verify(tmp_path / "out", full=True).differences == ()


@pytest.mark.parametrize("tensors", SCALED, ids=lambda t: list(t)[-1])
def test_float8_with_scales_keeps_its_codes_in_any_dtype(base, tmp_path, tensors):
    tensors = {**tensors, "scaled_fp8": F8[0]}
    other = save(tmp_path / "other", pair(OUT, 16, 16, 2))
    lorakit.merge(base(tensors), other, tmp_path / "out", dtype="float32", run=SCRATCH)
    merged = open_checkpoint(str(tmp_path / "out"))
    kept = {n: read_stored(merged, merged.infos[n]).tobytes() for n in tensors}
    assert kept == {n: t.tobytes() for n, t in tensors.items()}


@pytest.mark.parametrize("tensors", [*SCALED, *PACKED], ids=lambda t: list(t)[-1])
def test_a_quantised_layer_is_refused_and_its_neighbour_is_not(base, tmp_path, tensors):
    folder = base(tensors)
    other = save(tmp_path / "other", pair(OUT, 16, 16, 2))
    lorakit.merge(folder, other, tmp_path / "out", run=SCRATCH)
    merged = open_checkpoint(str(tmp_path / "out"))
    kept = {n: read_stored(merged, merged.infos[n]).tobytes() for n in tensors}
    assert kept == {n: t.tobytes() for n, t in tensors.items()}
    adapter = save(tmp_path / "adapter", pair(Q, 16, 16, 2))
    with pytest.raises(InputError, match="is quantised"):
        lorakit.merge(folder, adapter, tmp_path / "out2", run=SCRATCH)


@pytest.mark.parametrize("tensors", STACKS, ids=lambda t: list(t)[-1])
def test_a_quantised_stack_of_experts_is_refused(base, tmp_path, tensors):
    factors = {f"{EXPERTS}.lora_A.weight": (8, 16), f"{EXPERTS}.lora_B.weight": (32, 8)}
    parameters = ["mlp.experts.gate_up_proj"]
    adapter = save(tmp_path / "adapter", factors, target_parameters=parameters)
    with pytest.raises(InputError, match="is quantised"):
        lorakit.merge(base(tensors, model_type="qwen3_moe"), adapter, tmp_path / "out", run=SCRATCH)


def test_a_whole_tensor_does_not_take_the_place_of_scaled_codes(base, tmp_path):
    folder, whole = base(SCALED[2]), {f"{Q}.weight": (16, 16)}
    adapter = save(tmp_path / "adapter", whole, modules_to_save=["q_proj"])
    with pytest.raises(InputError, match="with weight_scale"):
        lorakit.merge(folder, adapter, tmp_path / "out", run=SCRATCH)


def test_a_scale_beside_16_bits_is_a_parameter_of_its_own(base, tmp_path):
    folder = base({f"{OUT}.scale": ONE})
    adapter = save(tmp_path / "adapter", pair(OUT, 16, 16, 2))
    lorakit.merge(folder, adapter, tmp_path / "out", run=SCRATCH)


def test_a_whole_tensor_takes_the_place_of_codes_that_become_plain(base, tmp_path):
    folder = base(SCALED[2], quantization_config={"quant_method": "fp8"})
    whole = {f"{Q}.weight": (16, 16)}
    adapter = save(tmp_path / "adapter", whole, modules_to_save=["q_proj"])
    lorakit.merge(folder, adapter, tmp_path / "out", quant="keep-touched", run=SCRATCH)
    merged = open_checkpoint(str(tmp_path / "out"))
    assert merged.infos.keys() == {f"{OUT}.weight", f"{Q}.weight"}
    assert merged.infos[f"{Q}.weight"].dtype == "BF16"


@pytest.mark.parametrize(
    ("changed", "joined"),
    [("q_a_proj", "kv_a_proj_with_mqa"), ("in_proj_z", "in_proj_qkv"), ("up_proj", "gate_proj")],
)
def test_what_servers_join_becomes_plain_together(base, tmp_path, changed, joined):
    names = [f"model.layers.0.mixer.{n}" for n in (changed, joined, "other_proj")]
    codes = {f"{n}.weight": F8 for n in names} | {f"{n}.weight_scale": ONE for n in names}
    folder = base(codes, quantization_config={"quant_method": "fp8"})
    adapter = save(tmp_path / "adapter", pair(names[0], 16, 16, 2))
    lorakit.merge(folder, adapter, tmp_path / "out", quant="keep-touched", run=SCRATCH)
    merged = open_checkpoint(str(tmp_path / "out"))
    plain = [n for n in names if merged.infos[f"{n}.weight"].dtype == "BF16"]
    assert plain == names[:2]
