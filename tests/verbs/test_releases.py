"""What a result says of the PEFT that wrote it: readers take it for what it was made of."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.errors import MisfitError
from tests.verbs.adapters import config_of, drawn, save
from tests.verbs.conftest import SCRATCH

STACK = "model.layers.0.mlp.experts.down_proj"
TABLE = "model.embed_tokens.weight"


def base_of(folder, model_type):
    folder.mkdir()
    shapes = {STACK: (2, 6, 6), TABLE: (9, 6), "lm_head.weight": (9, 6)}
    save_file({n: drawn(n, *s) for n, s in shapes.items()}, folder / "model.safetensors")
    config = {"model_type": model_type, "hidden_size": 6, "vocab_size": 9}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stack(folder, version):
    experts = "model.layers.0.mlp.experts"
    tensors = {f"{experts}.lora_A.weight": (4, 6), f"{experts}.lora_B.weight": (6, 4)}
    config = {"target_parameters": ["experts.down_proj"], "target_modules": []}
    return save(folder, tensors, peft_version=version, **config)


def table(folder, version):
    module = "model.embed_tokens"
    tensors = {f"{module}.lora_embedding_A": (2, 9), f"{module}.lora_embedding_B": (6, 2)}
    return save(folder, tensors, peft_version=version, target_modules=["embed_tokens"])


def merged(base, adapter, out):
    lorakit.merge(base, adapter, out, run=SCRATCH)
    return load_file(out / "model.safetensors")


WAYS = {
    "resize": lambda base, adapter, out: lorakit.resize(adapter, out, rank=2, run=SCRATCH),
    "combine": lambda base, adapter, out: lorakit.combine([adapter], out, run=SCRATCH),
    "extract": lambda base, adapter, out: lorakit.extract(
        base, adapter=adapter, output=out, rank=2, run=SCRATCH
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("kind", "model_type", "version"),
    [
        (stack, "qwen3_moe", "0.18.0"),
        (stack, "qwen3_moe", "0.19.0"),
        (stack, "qwen3_moe", "0.21.2"),
        (stack, "gpt_oss", "0.19.0"),
        (table, "gemma3_text", None),
        (table, "gemma3_text", "0.17.1"),
        (table, "gemma3_text", "0.18.0"),
    ],
)
def test_a_result_changes_the_base_as_what_it_was_made_of(tmp_path, way, kind, model_type, version):
    base, adapter = base_of(tmp_path / "base", model_type), kind(tmp_path / "adapter", version)
    WAYS[way](base, adapter, tmp_path / "out")
    expected = merged(base, adapter, tmp_path / "expected")
    found = merged(base, tmp_path / "out", tmp_path / "found")
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5)


@pytest.mark.parametrize("verb", ["combine", "compare"])
def test_square_stacks_that_lie_otherwise_are_refused_unless_the_base_has_them_alike(
    tmp_path, verb
):
    two = [stack(tmp_path / v, v) for v in ("0.18.0", "0.21.2")]

    def tried(base):
        if verb == "compare":
            return lorakit.compare(*two, base=base)
        return lorakit.combine(two, tmp_path / "out", base=base, run=SCRATCH)

    for base in ("", base_of(tmp_path / "qwen", "qwen3_moe")):
        with pytest.raises(MisfitError, match=r"lie otherwise .* PEFT 0\.21\.2 .* 0\.18\.0"):
            tried(base)
    tried(base_of(tmp_path / "oss", "gpt_oss"))


def test_stacks_combine_once_the_older_is_converted(tmp_path):
    base = base_of(tmp_path / "base", "qwen3_moe")
    old, new = stack(tmp_path / "old", "0.18.0"), stack(tmp_path / "new", "0.21.2")
    lorakit.convert(old, tmp_path / "mended", names="disk", base=base, run=SCRATCH)
    lorakit.combine([tmp_path / "mended", new], tmp_path / "out", run=SCRATCH)
    lorakit.merge(base, [old, new], tmp_path / "both", run=SCRATCH)
    expected = load_file(tmp_path / "both" / "model.safetensors")[STACK]
    found = merged(base, tmp_path / "out", tmp_path / "found")[STACK]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_embeddings_that_no_release_reads_alike_are_told(tmp_path):
    two = [table(tmp_path / f"of{v}", v) for v in ("0.17.1", "0.18.0")]
    report = lorakit.combine(two, tmp_path / "out", run=SCRATCH)
    assert "before 0.18" in report.notes[0]
    assert config_of(tmp_path / "out")["peft_version"] == "0.21.2"
