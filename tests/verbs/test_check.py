"""check: what loads where, and what is in the way."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.formats.consumers import CONSUMERS
from lorakit.verbs.check import OBSTACLES, UnloadableError
from tests.files.making_loras import RANK, diffusers_file
from tests.verbs.check_scene import BIASES, LANGUAGE, NORMS, PLAIN, obstacles, save

SCRATCH = lorakit.RunOptions(sync=False)
# What an adapter of PEFT has -> a word of what is in the way, and for whom.
WAYS = {
    "dora": (NORMS, {"use_dora": True}, "DoRA"),
    "patterns": ({}, {"alpha_pattern": {"q_proj": 7}}, "of their own"),
    "bias": (BIASES, {"lora_bias": True}, "biases"),
    "head": ({"lm_head.weight": (40, 12)}, {"modules_to_save": ["lm_head"]}, "whole modules"),
    "pissa": ({}, {"init_lora_weights": "pissa"}, "pissa changed"),
    "pissa_niter": ({}, {"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 changed"),
    "blocks": ({}, {"use_bdlora": {"nblocks": 2}}, "in blocks"),
    "replication": ({}, {"layer_replication": [[0, 2], [0, 2]]}, "repeats layers"),
    "invocation": ({}, {"alora_invocation_tokens": [1]}, "activated LoRA"),
    "type": ({}, {"peft_type": "IA3"}, "type IA3"),
    "stacks": ({}, {"target_parameters": ["experts.down_proj"]}, "in stacks"),
}


def loaded(family):
    """A file without the T5 of FLUX.1, of which Diffusers loads no adapters."""
    t5 = "text_encoder_2." if family == "flux" else "none"
    return {n: v for n, v in diffusers_file(family).items() if not n.startswith(t5)}


@pytest.mark.parametrize("consumer", LANGUAGE)
def test_a_plain_adapter_loads_everywhere(tmp_path, consumer):
    found = lorakit.check(save(tmp_path / "a", PLAIN), consumer)
    assert found.loads
    assert found.modules == 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("consumer", ["vllm", "sglang"])
def test_what_servers_stop_at_is_told_and_loads_in_peft(tmp_path, way, consumer):
    more, config, said = WAYS[way]
    path = save(tmp_path / "a", {**PLAIN, **more}, **config)
    assert any(said in what for what in obstacles(path, consumer))
    assert lorakit.check(path, "peft").loads


def test_flattened_patterns_are_no_longer_in_the_way(tmp_path):
    path = save(tmp_path / "a", PLAIN, alpha_pattern={"q_proj": 7})
    obstacles(path, "vllm")
    lorakit.edit(path, tmp_path / "b", flatten=True, run=SCRATCH)
    assert lorakit.check(tmp_path / "b", "vllm").loads


@pytest.mark.parametrize("consumer", ["diffusers", "comfyui"])
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_what_is_converted_as_it_says_loads(tmp_path, consumer, family):
    given = {"diffusers": "comfyui", "comfyui": "diffusers"}[consumer]
    save_file(loaded(family), tmp_path / "a.safetensors", metadata={"format": "pt"})
    path, out = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    lorakit.convert(tmp_path / "a.safetensors", path, to=given, family=family, run=SCRATCH)
    assert "in the format" in obstacles(path, consumer)[0]
    lorakit.convert(path, out, to=consumer, family=family, run=SCRATCH)
    assert lorakit.check(out, consumer).loads


def test_mlx_takes_what_was_converted_for_it(tmp_path):
    path = save(tmp_path / "a", PLAIN)
    assert "in the format" in obstacles(path, "mlx")[0]
    lorakit.convert(path, tmp_path / "b", to="mlx", run=SCRATCH)
    assert lorakit.check(tmp_path / "b", "mlx").loads


@pytest.mark.parametrize("consumer", ["peft", "vllm"])
def test_a_weight_file_of_another_name_is_in_the_way(tmp_path, consumer):
    path = save(tmp_path / "a", PLAIN)
    assert lorakit.check(path, consumer).loads
    (path / "adapter_model.safetensors").rename(path / "style.safetensors")
    assert obstacles(path, consumer) == ["its weight file is called 'style.safetensors'"]
    assert lorakit.check(path, "sglang").loads


def test_llama_cpp_takes_what_was_converted_for_it(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "num_hidden_layers": 2}')
    path = save(tmp_path / "a", PLAIN)
    assert "in the format" in obstacles(path, "llama.cpp")[0]
    lorakit.convert(path, tmp_path / "b", to="gguf", base=tmp_path, run=SCRATCH)
    assert lorakit.check(tmp_path / "b", "llama.cpp", base=tmp_path).loads


def test_the_wrong_kind_of_model_is_said_to_be_so(tmp_path):
    save_file(diffusers_file("flux"), tmp_path / "a.safetensors")
    assert "language models" in obstacles(tmp_path / "a.safetensors", "vllm")[0]
    assert "images" in obstacles(save(tmp_path / "b", PLAIN), "comfyui")[0]


@pytest.mark.parametrize(("family", "consumer"), [("flux", "diffusers"), ("sdxl", "comfyui")])
def test_scalings_in_a_config_beside_a_file_of_pipelines_are_in_the_way(tmp_path, family, consumer):
    path = tmp_path / "a/x.safetensors"
    path.parent.mkdir()
    save_file(loaded(family), tmp_path / "plain.safetensors")
    lorakit.convert(tmp_path / "plain.safetensors", path, to=consumer, family=family, run=SCRATCH)
    tensors = {n: v for n, v in load_file(path).items() if not n.endswith(".alpha")}
    save_file(tensors, path)
    config = path.parent / "adapter_config.json"
    for alpha, said in ((RANK, []), (3 * RANK, ["its scalings are in adapter_config.json"])):
        config.write_text(f'{{"peft_type": "LORA", "r": {RANK}, "lora_alpha": {alpha}}}')
        try:
            found = lorakit.check(path, consumer).obstacles
        except UnloadableError as error:
            found = error.checked.obstacles
        assert [o.what.partition(" beside")[0] for o in found] == said
    lorakit.convert(path, tmp_path / "b", to=consumer, family=family, run=SCRATCH)
    assert lorakit.check(tmp_path / "b", consumer).loads


def test_scalings_in_metadata_are_lost_on_comfyui(tmp_path):
    tensors = {
        f"transformer.x_embedder.lora_{x}.weight": t for x, t in zip("AB", _two(), strict=True)
    }
    metadata = {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 1}'}
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    assert any("metadata" in what for what in obstacles(tmp_path / "a.safetensors", "comfyui"))


def test_every_obstacle_of_the_table_is_known():
    assert {o for c in CONSUMERS.values() for o in c.obstacles} == set(OBSTACLES)


def test_a_consumer_that_is_not_known_is_answered_with_those_that_are(tmp_path):
    with pytest.raises(lorakit.LorakitError, match="none of"):
        lorakit.check(save(tmp_path / "a", PLAIN), "nothing")


def _two():
    found = diffusers_file("flux")
    return [found[f"transformer.x_embedder.lora_{x}.weight"] for x in "AB"]


def test_a_check_writes_nothing(tmp_path):
    path = save(tmp_path / "a", PLAIN)
    before = {p: p.stat().st_mtime_ns for p in path.iterdir()}
    lorakit.check(path, "vllm")
    assert {p: p.stat().st_mtime_ns for p in path.iterdir()} == before
    assert load_file(path / "adapter_model.safetensors")


LINEAR, OTHER = "transformer_blocks.0.norm1.linear", "single_transformer_blocks.0.attn.to_q"
TEXT = "text_model.encoder.layers.0.mlp.fc1"


def of(*names, ends=("lora_A.weight", "lora_B.weight")):
    """Factors of modules in FLUX.1, and more with the shape of their rows."""
    shapes = ((RANK, 16), (96 if "norm1" in names[0] else 16, RANK))
    return {f"{n}.{e}": np.ones(s, "f4") for n in names for e, s in zip(ends, shapes, strict=True)}


MIXED = {
    "bare": of(OTHER),
    "wrapped": of(f"transformer.base_model.model.{OTHER}"),
    "alpha": of(f"transformer.{OTHER}") | {f"transformer.{OTHER}.alpha": np.array(1, "f4")},
    "kohya's": of(f"transformer.{OTHER}", ends=("lora_down.weight", "lora_up.weight")),
    "text": of(f"lora_te1_{TEXT.replace('.', '_')}", ends=("lora_down.weight", "lora_up.weight")),
    "norms": of(f"transformer.{OTHER}")
    | {f"transformer.{OTHER}.dora_scale": np.ones((16, 1), "f4")},
}


@pytest.mark.parametrize("kind", MIXED)
def test_names_that_diffusers_does_not_read_are_in_the_way_and_are_written_anew(tmp_path, kind):
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    first = (
        {}
        if kind == "norms"
        else of(f"transformer.{LINEAR}", f"transformer.{LINEAR[:-7]}_context.linear")
    )
    save_file(first | MIXED[kind], path, metadata={"format": "pt"})
    assert "is not what it reads" in obstacles(path, "diffusers")[0]
    lorakit.convert(path, out, to="diffusers", family="flux", run=SCRATCH)
    assert out.read_bytes() != path.read_bytes()
    assert lorakit.check(out, "diffusers").loads
    assert set(load_file(out)) != set(load_file(path))


def test_a_text_encoder_that_diffusers_loads_nothing_for_is_in_the_way_and_told(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(diffusers_file("flux"), path, metadata={"format": "pt"})
    assert obstacles(path, "diffusers") == ["it loads no adapters of text_encoder_2"]
    done = lorakit.convert(path, tmp_path / "b", to="diffusers", family="flux", run=SCRATCH)
    assert any("no adapters of text_encoder_2" in note for note in done.notes)


@pytest.mark.parametrize("clip", ["text_model", "flat"])
def test_both_spellings_of_clip_load(tmp_path, clip):
    save_file(loaded("flux"), tmp_path / "a.safetensors", metadata={"format": "pt"})
    options = {"to": "diffusers", "family": "flux", "clip_prefix": clip, "run": SCRATCH}
    lorakit.convert(tmp_path / "a.safetensors", tmp_path / "b", **options)
    assert lorakit.check(tmp_path / "b", "diffusers").loads


def test_norms_in_the_spelling_of_peft_are_lost_on_comfyui(tmp_path):
    name = "diffusion_model.blocks.0.self_attn.q"
    tensors = of(name) | {f"{name}.lora_magnitude_vector": np.ones(16, "f4")}
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    assert "DoRA norms" in obstacles(path, "comfyui")[0]
    lorakit.convert(path, out, to="comfyui", run=SCRATCH)
    assert lorakit.check(out, "comfyui").loads
    assert load_file(out)[f"{name}.dora_scale"].shape == (16, 1)


def test_a_file_without_alphas_of_no_effect_is_copied(tmp_path):
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(of("diffusion_model.blocks.0.self_attn.q"), path, metadata={"format": "pt"})
    lorakit.convert(path, out, to="comfyui", run=SCRATCH)
    assert out.read_bytes() == path.read_bytes()
