"""Names of a family that the built-in table does not have are found by transformers' own."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorakit import merge
from lorakit.errors import MisfitError
from tests.naming.test_transformers_agrees import on_disk
from tests.naming.tiny_models import tiny_model

pytest.importorskip("transformers", minversion="5.20")
MODULE, TENSOR = (
    "model.encoder.text_model.layers.0.mlp.down_proj",
    "model.encoder.layers.0.mlp.down_proj.weight",
)


def test_a_family_that_only_transformers_knows_is_merged_by_its_table(tmp_path):
    model = tiny_model("t5gemma2")
    infos = {n: i for n, i in on_disk(model).items() if ".layers.0.mlp.down_proj." in n}
    values = np.random.default_rng(0)
    base = {n: values.standard_normal(i.shape).astype(np.float32) for n, i in infos.items()}
    out, inner = infos[TENSOR].shape
    a, b = (values.standard_normal(s).astype(np.float32) for s in ((2, inner), (out, 2)))
    start = f"base_model.model.{MODULE}.lora_"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    for folder in ("base", "adapter"):
        (tmp_path / folder).mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    save_file(
        {f"{start}A.weight": a, f"{start}B.weight": b},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(MisfitError, match=r"could be 'model\.decoder"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")  # no config, no family
    model.config.save_pretrained(tmp_path / "base")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")

    from safetensors.numpy import load_file

    merged = load_file(tmp_path / "out" / "model.safetensors")
    exact = base[TENSOR].astype(np.float64) + b.astype(np.float64) @ a
    assert np.abs(merged.pop(TENSOR) - exact).max() < 1e-5
    assert all(np.array_equal(tensor, base[name]) for name, tensor in merged.items())
