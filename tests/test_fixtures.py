"""Real adapters by their manifests, and bits that the changelog must announce if they change."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import lorakit
from lorakit.formats.peft import parse
from lorakit.store.header import format_header
from lorakit.tensors import TensorInfo
from lorakit.verbs.demo import _write_tensors

FIXTURES = Path(__file__).parent.parent / "fixtures"
MANIFESTS = sorted((FIXTURES / "manifests").glob("*.json"))
every_manifest = pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)

# The base that each adapter is for: (out, in) or (in, out) by its layers' class.
MATCHED = {
    "peft-gpt2_tigrinya": (36, True),
    "peft-niket": (6, True),
    "peft-opencalm1b_r1": (24, False),
    "peft-privacyfilter_tokcls": (34, False),
    "peft-bloom560m_old_enable_lora_bin": (24, False),
}


def base_of(tensors, out, *, transposed, blocks):
    """A base file with a weight for every module, all holes: only its header is ever read."""
    shapes = {}
    for name, (_, shape) in tensors.items():
        key = parse(name)
        if key.role == "full":
            shapes[f"{key.module}.{key.parameter}"] = tuple(shape)
        else:
            weight = shapes.setdefault(f"{key.module}.weight", [0, 0])
            weight[key.role == "a"] = shape[1] if key.role == "a" else shape[0] * blocks // 2
    turned = {n: tuple(s[::-1]) if transposed else tuple(s) for n, s in shapes.items()}
    infos = [TensorInfo(n, "BF16", s) for n, s in turned.items()]
    header = format_header(infos, {})
    with (out / "model.safetensors").open("wb") as f:
        f.write(header)
        f.truncate(len(header) + sum(i.nbytes for i in infos))


@every_manifest
def test_every_module_of_a_real_adapter_finds_its_tensor(path, tmp_path):
    manifest = json.loads(path.read_text())
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    adapter.mkdir()
    base.mkdir()
    shapes = {n: tuple(s) for n, (_, s) in manifest["tensors"].items()}
    _write_tensors(adapter / "adapter_model.safetensors", shapes, "F32")
    (adapter / "adapter_config.json").write_text(json.dumps(manifest["config"]))
    count, transposed = MATCHED[path.stem]
    blocks = 3 if "bloom" in path.stem else 2  # halves: two of the three blocks of qkv are adapted
    base_of(manifest["tensors"], base, transposed=transposed, blocks=blocks)
    job = lorakit.plan_merge(base, adapter)
    assert len(job.plan.folds) == count
    turned = {u["transposed"] for f in job.plan.folds for u in f.recipe.get("updates", ())}
    assert turned == {transposed}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_merge_still_gives_the_golden_bits(dtype, tmp_path):
    golden = FIXTURES / "golden"
    out = tmp_path / "out.safetensors"
    lorakit.merge(golden / "base.safetensors", golden / "adapter", out, dtype=dtype)
    ours, theirs = load_file(out), load_file(golden / f"{dtype}.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.view(np.uint8), theirs[name].view(np.uint8))
