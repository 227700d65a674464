"""Merging into quantised experts: they become the parameters of the model, and stay together."""

import ml_dtypes
import numpy as np
import pytest

import lorakit
from lorakit.errors import InputError
from lorakit.store.checkpoint import open_checkpoint
from tests.verbs.adapters import save
from tests.verbs.quantised_scene import checkpoint, config_of, experts, tensors_of

SCRATCH = lorakit.RunOptions(sync=False)


def test_experts_of_four_bits_become_the_parameters_of_the_model(tmp_path):
    base, adapter = experts(tmp_path)
    with pytest.raises(InputError, match=r"quantised .*down_proj_blocks.*--quant dequantize"):
        lorakit.plan_merge(base, adapter)
    lorakit.merge(base, adapter, tmp_path / "out", quant="dequantize", run=SCRATCH)
    plain = open_checkpoint(str(tmp_path / "out"))
    assert {n.rpartition(".")[2]: i.shape for n, i in plain.infos.items()} == {
        "weight": (64,),
        "gate_up_proj": (2, 64, 64),
        "down_proj": (2, 32, 64),
    }
    assert lorakit.verify(tmp_path / "out", full=True).differences == ()
    lorakit.merge(tmp_path / "out", adapter, tmp_path / "twice", run=SCRATCH)
    once, twice = (tensors_of(tmp_path / n) for n in ("out", "twice"))
    for name, change in (("gate_up_proj", 0), ("down_proj", 1)):
        full = f"model.layers.0.mlp.experts.{name}"
        moved = twice[full].astype("f4") - once[full].astype("f4")
        assert (np.abs(moved).max() > 0) == bool(change)


def test_experts_stay_together(tmp_path):
    base, adapter = experts(tmp_path)
    lorakit.merge(base, adapter, tmp_path / "out", quant="keep-touched", run=SCRATCH)
    said = config_of(tmp_path / "out")
    assert "_blocks" not in "".join(tensors_of(tmp_path / "out"))
    assert "quantization_config" not in said  # they were all that is quantised


def test_scales_of_experts_in_a_stack_are_seen(tmp_path):
    name = "model.layers.0.mlp.experts.down_proj"
    codes = np.ones((2, 32, 64), ml_dtypes.float8_e4m3fn)
    tensors = {name: codes, f"{name}_scale_inv": np.ones((2, 1, 1), "f4")}
    base = checkpoint(tmp_path / "base", [tensors], {"model_type": "qwen3_moe"})
    front = name.rpartition(".")[0]
    pair = {f"{front}.lora_A.weight": (4, 64), f"{front}.lora_B.weight": (32, 4)}
    chosen = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []}
    adapter = save(tmp_path / "adapter", pair, **chosen)
    with pytest.raises(InputError, match=r"quantised .F8_E4M3, with down_proj_scale_inv"):
        lorakit.plan_merge(base, adapter)
