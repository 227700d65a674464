"""torchtune's adapter checkpoints: the same updates as on its model, whose queries and keys have
their rows in Meta's order.

The order is written here as torchtune's own converter of whole checkpoints does it.
Source: pytorch/torchtune, torchtune/models/convert_weights.py
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.cli import main
from tests.verbs.adapters import updates

SCRATCH = lorakit.RunOptions(sync=False)
WIDTH, RANK, ALPHA = 24, 3, 5.0
PLACES = {
    "layers.0.attn.q_proj": "model.layers.0.self_attn.q_proj",
    "layers.0.attn.k_proj": "model.layers.0.self_attn.k_proj",
    "layers.0.attn.v_proj": "model.layers.0.self_attn.v_proj",
    "layers.11.attn.output_proj": "model.layers.11.self_attn.o_proj",
    "layers.1.mlp.w1": "model.layers.1.mlp.gate_proj",
    "layers.1.mlp.w2": "model.layers.1.mlp.down_proj",
    "layers.1.mlp.w3": "model.layers.1.mlp.up_proj",
    "output": "lm_head",
}
HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
COUNTS = [(4, 4), (4, 2), (6, 1)]


def base(folder, kind="llama", heads=4, kv=2, dim=6, **more):
    folder.mkdir(parents=True, exist_ok=True)
    text = {
        "model_type": kind,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": dim,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def drawn(heads=4, kv=2, dim=6, *, dora=False, dtype="f4"):
    """The tensors of an adapter in torchtune's names."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name in PLACES:
        rows = {"q_proj": heads * dim, "k_proj": kv * dim}.get(name.rpartition(".")[2], 20)
        tensors[f"{name}.lora_a.weight"] = rng.standard_normal((RANK, WIDTH)).astype(dtype)
        tensors[f"{name}.lora_b.weight"] = rng.standard_normal((rows, RANK)).astype(dtype)
        if dora:
            tensors[f"{name}.magnitude"] = rng.standard_normal(rows).astype(dtype)
    return tensors


def unpermuted(values, heads):
    """From Meta's order to that of Hugging Face."""
    rest = values.shape[1:]
    pairs = values.reshape(heads, len(values) // heads // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(-1, *rest)


def expected(tensors, config):
    """The dense update of every module, in the order of Hugging Face."""
    found = {}
    for name, module in PLACES.items():
        a, b = (tensors[f"{name}.lora_{x}.weight"].astype("f8") for x in "ab")
        delta = ALPHA / RANK * b @ a
        if (field := HEADS.get(module.rpartition(".")[2])) and config["model_type"] != "qwen2":
            delta = unpermuted(delta, config[field])
        found[module] = delta
    return found


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def converted(source, out, folder, **options):
    options = {"to": "peft", "base": folder, "lora_alpha": ALPHA, "run": SCRATCH, **options}
    return lorakit.convert(source, out, **options)


@pytest.mark.parametrize(("heads", "kv"), COUNTS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "qwen2"])
def test_every_update_is_that_of_the_model_in_the_order_of_hugging_face(tmp_path, heads, kv, kind):
    folder = base(tmp_path / "base", kind, heads, kv)
    tensors = drawn(heads, kv)
    save_file(tensors, tmp_path / "a.safetensors")
    done = converted(tmp_path / "a.safetensors", tmp_path / "out", folder)
    assert (done.format, done.family) == ("torchtune", "language")
    found, wanted = updates(tmp_path / "out"), expected(tensors, config_of(folder))
    assert set(found) == set(wanted)
    for module, delta in wanted.items():
        np.testing.assert_allclose(found[module], delta, rtol=1e-12, atol=1e-12)


def test_factors_are_moved_and_not_computed(tmp_path):
    folder, tensors = base(tmp_path / "base"), drawn(dtype="f2")
    save_file(tensors, tmp_path / "a.safetensors")
    converted(tmp_path / "a.safetensors", tmp_path / "out", folder)
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    for name, module in PLACES.items():
        a, b = (found[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        assert a.tobytes() == tensors[f"{name}.lora_a.weight"].tobytes()
        assert sorted(b.ravel()) == sorted(tensors[f"{name}.lora_b.weight"].ravel())


def test_norms_of_dora_are_in_the_order_of_the_rows(tmp_path):
    folder, tensors = base(tmp_path / "base"), drawn(dora=True)
    save_file(tensors, tmp_path / "a.safetensors")
    converted(tmp_path / "a.safetensors", tmp_path / "out", folder)
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    for name, module in PLACES.items():
        norms = tensors[f"{name}.magnitude"]
        if field := HEADS.get(module.rpartition(".")[2]):
            norms = unpermuted(norms, config_of(folder)[field])
        there = found[f"base_model.model.{module}.lora_magnitude_vector"]
        np.testing.assert_array_equal(there, norms)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["use_dora"] is True


def test_what_torchtune_puts_beside_it_is_enough(tmp_path):
    """The config of the base, and that of PEFT with the alpha."""
    folder, tensors = base(tmp_path / "epoch_0"), drawn()
    save_file(tensors, folder / "adapter_0.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    lorakit.convert(folder / "adapter_0.safetensors", tmp_path / "out", to="peft", run=SCRATCH)
    found, wanted = updates(tmp_path / "out"), expected(tensors, config_of(folder))
    assert set(found) == set(wanted)
    assert all(np.allclose(found[m], d, rtol=1e-12) for m, d in wanted.items())


def test_a_pickle_is_read_on_request(tmp_path):
    torch = pytest.importorskip("torch")
    folder, tensors = base(tmp_path / "epoch_0"), drawn()
    path = folder / "adapter_model.pt"
    torch.save({n: torch.tensor(t) for n, t in tensors.items()}, path)
    with pytest.raises(lorakit.LorakitError, match="pickle"):
        converted(path, tmp_path / "out", "")
    converted(path, tmp_path / "out", "", allow_pickle=True)
    found, wanted = updates(tmp_path / "out"), expected(tensors, config_of(folder))
    assert all(np.allclose(found[m], d, rtol=1e-12) for m, d in wanted.items())


def test_it_goes_to_mlx_and_gguf_too(tmp_path):
    pytest.importorskip("gguf")
    folder = base(tmp_path / "base", num_hidden_layers=12)
    tensors = {n: t for n, t in drawn().items() if not n.startswith("output")}
    save_file(tensors, tmp_path / "a.safetensors")
    converted(tmp_path / "a.safetensors", tmp_path / "mlx", folder, to="mlx")
    converted(tmp_path / "a.safetensors", tmp_path / "gguf", folder, to="gguf")
    lorakit.convert(tmp_path / "gguf", tmp_path / "back", to="peft", base=folder, run=SCRATCH)
    for path in ("mlx", "back"):
        found = updates(tmp_path / path)
        for module, delta in expected({**drawn(), **tensors}, config_of(folder)).items():
            if module != "lm_head":
                np.testing.assert_allclose(found[module], delta, rtol=1e-6, atol=1e-6)


def test_without_queries_and_keys_no_base_is_needed(tmp_path):
    tensors = {n: t for n, t in drawn().items() if ".q_proj" not in n and ".k_proj" not in n}
    save_file(tensors, tmp_path / "a.safetensors")
    done = converted(tmp_path / "a.safetensors", tmp_path / "out", "")
    assert done.modules == len(PLACES) - 2


def broken(tensors, which):
    if which == "half":
        del tensors["layers.1.mlp.w1.lora_b.weight"]
    elif which == "ranks":
        tensors["layers.1.mlp.w1.lora_b.weight"] = np.zeros((20, RANK + 1), "f4")
    elif which == "unknown":
        tensors["decoder.layers.0.attn.q_proj.lora_a.weight"] = np.zeros((2, 2), "f4")
    return tensors


MISFITS = {
    "half": ("lacks one of its factors", {}, {}),
    "ranks": ("factors of", {}, {}),
    "unknown": ("decoder.layers.0", {}, {}),
    "alpha": ("keeps alpha in its recipe", {}, {"lora_alpha": None}),
    "no base": ("depends on the base", {}, {"base": ""}),
    "kind": ("'falcon' is not known", {"kind": "falcon"}, {}),
    "no heads": ("says no heads", {"heads": None, "kv": None}, {}),
    "other heads": ("says 3 heads", {"heads": 3}, {}),
    "other width": ("says 2 heads", {"dim": None, "hidden_size": 32}, {}),
}


@pytest.mark.parametrize("which", MISFITS)
def test_what_is_missing_or_does_not_fit_is_said_in_one_line(tmp_path, which):
    said, config, options = MISFITS[which]
    save_file(broken(drawn(), which), tmp_path / "a.safetensors")
    folder = base(tmp_path / "base", **config)
    with pytest.raises(lorakit.LorakitError, match=said) as caught:
        converted(tmp_path / "a.safetensors", tmp_path / "out", folder, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_inspect_and_check_name_it(tmp_path):
    folder = base(tmp_path / "base")
    save_file(drawn(), tmp_path / "a.safetensors")
    found = lorakit.inspect(tmp_path / "a.safetensors")
    assert (found.facts["format"], found.facts["names"]) == ("torchtune", "torchtune")
    assert found.facts["family"] == "a language model"
    assert not found.notes
    with pytest.raises(lorakit.LorakitError, match="torchtune") as caught:
        lorakit.check(tmp_path / "a.safetensors", "vllm", base=folder)
    assert "--to peft --base BASE --lora-alpha A" in caught.value.hint


def test_the_command_takes_the_base_and_the_alpha(tmp_path, capsys):
    folder = base(tmp_path / "base")
    save_file(drawn(), tmp_path / "a.safetensors")
    command = ["convert", str(tmp_path / "a.safetensors"), "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        main([*command, "--base", str(folder), "--lora-alpha", "5"])
    assert not end.value.code
    assert "torchtune" in capsys.readouterr().out
    found = updates(tmp_path / "out")
    wanted = expected(drawn(), config_of(folder))
    assert all(np.allclose(found[m], d, rtol=1e-12) for m, d in wanted.items())
