"""check: what loads where, and what is in the way."""

import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.formats.consumers import CONSUMERS
from lorakit.verbs.check import OBSTACLES, UnloadableError
from tests.files.making_loras import RANK, diffusers_file
from tests.verbs.adapters import pair, save

SCRATCH = lorakit.RunOptions(sync=False)
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
PLAIN = {**pair(Q, 12, 8, 2), **pair(UP, 20, 12, 2)}
LANGUAGE = ("vllm", "sglang", "peft")
# What an adapter of PEFT has -> a word of what is in the way, and for whom.
WAYS = {
    "dora": ({f"{Q}.lora_magnitude_vector": (12,)}, {"use_dora": True}, "DoRA"),
    "patterns": ({}, {"alpha_pattern": {"q_proj": 7}}, "of their own"),
    "bias": ({f"{Q}.lora_B.bias": (12,)}, {"lora_bias": True}, "biases"),
    "head": ({"lm_head.weight": (40, 12)}, {"modules_to_save": ["lm_head"]}, "whole modules"),
    "pissa": ({}, {"init_lora_weights": "pissa"}, "pissa changed"),
    "stacks": ({}, {"target_parameters": ["experts.down_proj"]}, "in stacks"),
}


def obstacles(path, consumer):
    with pytest.raises(UnloadableError) as caught:
        lorakit.check(path, consumer)
    assert caught.value.exit_code == 8
    return [o.what for o in caught.value.checked.obstacles]


@pytest.mark.parametrize("consumer", LANGUAGE)
def test_a_plain_adapter_loads_everywhere(tmp_path, consumer):
    found = lorakit.check(save(tmp_path / "a", PLAIN), consumer)
    assert found.loads
    assert found.modules == 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("consumer", ["vllm", "sglang"])
def test_servers_stop_at(tmp_path, way, consumer):
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
    save_file(diffusers_file(family), tmp_path / "a.safetensors", metadata={"format": "pt"})
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
    save_file(diffusers_file(family), tmp_path / "plain.safetensors")
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


def test_no_such_consumer(tmp_path):
    with pytest.raises(lorakit.LorakitError, match="none of"):
        lorakit.check(save(tmp_path / "a", PLAIN), "nothing")


def _two():
    found = diffusers_file("flux")
    return [found[f"transformer.x_embedder.lora_{x}.weight"] for x in "AB"]


def test_nothing_is_written(tmp_path):
    path = save(tmp_path / "a", PLAIN)
    before = {p: p.stat().st_mtime_ns for p in path.iterdir()}
    lorakit.check(path, "vllm")
    assert {p: p.stat().st_mtime_ns for p in path.iterdir()} == before
    assert load_file(path / "adapter_model.safetensors")
