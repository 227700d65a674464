"""bitsandbytes quantises the Conv1D layers of transformers the other way round than they lie."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.quant.table import codec
from tests.verbs.adapters import drawn, pair, save
from tests.verbs.conftest import SCRATCH

SHAPES = {"c_attn": (64, 192), "c_proj": (64, 64)}  # (in, out), as GPT-2 has them
HEAD = {"wte.weight": np.ones((8, 64), "f4")}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def checkpoint(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors | HEAD, folder / "model.safetensors")
    said = {"model_type": "gpt2", "dtype": "float32", **config}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("quant", ["dequantize", "keep-touched"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_conv1d_comes_out_as_the_model_has_it(kind, quant, tmp_path):
    codes, values, found = {}, {}, codec(kind)
    for leaf, shape in SHAPES.items():
        name = f"h.0.attn.{leaf}.weight"
        q = found.quantise(np.ascontiguousarray(drawn(leaf, *shape).T))
        codes |= found.tensors(name, q, dtype="float32")
        values[name] = np.ascontiguousarray(found.dequantise(q).T)
    base = checkpoint(tmp_path / "base", codes, quantization_config=BITSANDBYTES)
    plain = checkpoint(tmp_path / "plain", values)
    factors = [pair(f"h.0.attn.{leaf}", *shape[::-1], 2) for leaf, shape in SHAPES.items()]
    adapter = save(tmp_path / "adapter", factors[0] | factors[1], target_modules=list(SHAPES))
    lorakit.merge(base, adapter, tmp_path / "out", quant=quant, run=SCRATCH)
    lorakit.merge(plain, adapter, tmp_path / "expected", run=SCRATCH)
    one, other = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "expected"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[n], other[n]) for n in one)
