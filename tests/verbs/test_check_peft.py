"""What PEFT and the servers pass over or stop at in a folder of PEFT, and what puts it right."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.errors import MisfitError
from lorakit.verbs.check import UnloadableError
from tests.verbs.adapters import config_of, pair, tensors_of
from tests.verbs.check_scene import BIASES, LANGUAGE, NORMS, PLAIN, Q, obstacles, save

SCRATCH = lorakit.RunOptions(sync=False)


@pytest.mark.parametrize("consumer", LANGUAGE)
def test_an_adapter_without_its_config_is_in_the_way(tmp_path, consumer):
    path = save(tmp_path / "a", PLAIN)
    (path / "adapter_config.json").unlink()
    assert obstacles(path, consumer) == ["no adapter_config.json is beside it"]


HEAD = {"lm_head.weight": (40, 12)}
TOKENS = "model.embed_tokens"
ROWS = {f"{TOKENS}.token_adapter.trainable_tokens_delta": (3, 8)}
# What PEFT passes over or stops at in a folder of its own -> tensors, config, and a word of it.
# With PEFT 0.21.2: what is not targeted, normed, biased or named so is dropped without a word, what
# has no norm or bias keeps a drawn one, and other ranks and numbers of rows raise.
UNLIKE = {
    "targets": ({}, {"target_modules": ["q_proj"]}, "does not target"),
    "no targets": ({}, {"target_modules": None}, "does not target"),
    "exclusion": ({}, {"exclude_modules": ["up_proj"]}, "does not target"),
    "layers": ({}, {"layers_to_transform": [0]}, "does not target"),
    "one layer": ({}, {"layers_to_transform": 0, "layers_pattern": "layers"}, "does not target"),
    "no layer": ({}, {"layers_to_transform": "first"}, "does not target"),
    "rank": ({}, {"r": 4}, "the rank of"),
    "pattern": ({}, {"rank_pattern": {"q_proj": 4}}, "the rank of"),
    "norms": (NORMS, {}, "it has DoRA norms"),
    "no norms": ({}, {"use_dora": True}, "it has no DoRA norms"),
    "biases": (BIASES, {}, "it has biases of B"),
    "a bias": ({f"{Q}.lora_B.bias": (12,)}, {"lora_bias": True}, "it lacks"),
    "alpha": ({f"{Q}.alpha": np.array(3, "f4")}, {}, "is not what it reads"),
}


@pytest.mark.parametrize("kind", UNLIKE)
@pytest.mark.parametrize("more", [{}, HEAD])
def test_what_peft_passes_over_is_in_the_way_and_convert_puts_it_right(tmp_path, kind, more):
    tensors, config, said = UNLIKE[kind]
    config = config | ({"modules_to_save": ["lm_head"]} if more else {})
    path = save(tmp_path / "a", {**PLAIN, **tensors, **more}, **config)
    with pytest.raises(UnloadableError) as caught:
        lorakit.check(path, "peft")
    found = caught.value.checked.obstacles
    assert any(said in o.what for o in found)
    assert "--to peft" in found[0].then
    assert ("--keep-unknown" in found[0].then) == bool(more)
    lorakit.convert(path, tmp_path / "b", to="peft", keep_unknown=bool(more), run=SCRATCH)
    assert lorakit.check(tmp_path / "b", "peft").loads
    assert config_of(tmp_path / "b")["modules_to_save"] == (["lm_head"] if more else None)


SPELLINGS = {
    "bare": lambda n: n.removeprefix("base_model.model."),
    "compiled": lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."),
    "parallel": lambda n: f"module.{n}",
    "kohya": lambda n: n.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    "short": lambda n: n.removesuffix(".weight"),
    "dump": lambda n: n.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("kind", SPELLINGS)
@pytest.mark.parametrize("consumer", LANGUAGE)
def test_names_that_peft_does_not_read_are_in_the_way_and_are_written_anew(
    tmp_path, kind, consumer
):
    """PEFT itself reads those of a dump."""
    path = save(tmp_path / "a", PLAIN)
    plain = load_file(path / "adapter_model.safetensors")
    spelled = {SPELLINGS[kind](n): t for n, t in plain.items()}
    save_file(spelled, path / "adapter_model.safetensors", metadata={"format": "pt"})
    if (kind, consumer) == ("dump", "peft"):
        assert lorakit.check(path, consumer).loads
    else:
        assert any("is not what it reads" in what for what in obstacles(path, consumer))
    lorakit.convert(path, tmp_path / "b", to="peft", run=SCRATCH)
    assert lorakit.check(tmp_path / "b", consumer).loads
    written = tensors_of(tmp_path / "b")
    assert written.keys() == PLAIN.keys()
    assert all(written[n].tobytes() == plain[f"base_model.model.{n}"].tobytes() for n in PLAIN)


@pytest.mark.parametrize("consumer", ["vllm", "sglang"])
def test_servers_take_the_rank_of_the_config_for_that_of_all(tmp_path, consumer):
    path = save(tmp_path / "a", PLAIN, r=4)
    assert obstacles(path, consumer) == [f"the rank of {Q!r} is 2, and its config says 4"]


@pytest.mark.parametrize("indices", [None, [1, 2], {"embed_tokens": [1, 2]}])
def test_token_rows_take_as_many_indices(tmp_path, indices):
    path = save(tmp_path / "a", {**PLAIN, **ROWS}, trainable_token_indices=indices)
    assert any("it has 3 token rows" in what for what in obstacles(path, "peft"))
    config = {"trainable_token_indices": [1, 2, 3]}
    assert lorakit.check(save(tmp_path / "b", {**PLAIN, **ROWS}, **config), "peft").loads


def test_token_rows_beside_the_update_of_an_embedding_are_in_the_way(tmp_path):
    """PEFT builds one of the two for a module, and raises."""
    both = {f"{TOKENS}.lora_embedding_A": (2, 40), f"{TOKENS}.lora_embedding_B": (8, 2), **ROWS}
    config = {
        "target_modules": ["q_proj", "up_proj", "embed_tokens"],
        "trainable_token_indices": {"embed_tokens": [1, 2, 3]},
    }
    path = save(tmp_path / "a", {**PLAIN, **both}, **config)
    assert obstacles(path, "peft") == [f"it has token rows beside the update of {TOKENS!r}"]


@pytest.mark.parametrize("consumer", ["llama.cpp", "mlx"])
def test_what_is_to_be_typed_first_comes_first(tmp_path, consumer):
    """convert refuses what has other obstacles than its names."""
    path = save(tmp_path / "a", {**PLAIN, **HEAD}, modules_to_save=["lm_head"])
    with pytest.raises(UnloadableError) as caught:
        lorakit.check(path, consumer)
    assert caught.value.hint.startswith("lorakit merge BASE")
    assert caught.value.checked.obstacles[-1].what == "it is in the format 'peft'"


def test_a_file_of_mlx_is_not_asked_to_be_called_as_one_of_peft(tmp_path):
    lorakit.convert(save(tmp_path / "a", PLAIN), tmp_path / "b", to="mlx", run=SCRATCH)
    assert obstacles(tmp_path / "b", "vllm") == ["it is in the format 'mlx'"]


STACK = "model.layers.0.mlp.experts"


def stacked(folder):
    """An adapter of a stack of four experts, each of rank 2, beside two layers."""
    return save(
        folder, {**PLAIN, **pair(STACK, 20, 12, 8)}, target_parameters=["mlp.experts.down_proj"]
    )


@pytest.mark.parametrize("consumer", ["vllm", "sglang"])
def test_the_ranks_of_all_experts_are_no_rank_of_their_own(tmp_path, consumer):
    with pytest.raises(UnloadableError) as caught:
        lorakit.check(stacked(tmp_path / "a"), consumer)
    (one,) = caught.value.checked.obstacles
    assert "in stacks" in one.what
    assert "--experts split" in one.then


@pytest.mark.parametrize("consumer", ["llama.cpp", "mlx"])
def test_stacks_are_split_before_they_are_converted(tmp_path, consumer):
    with pytest.raises(UnloadableError) as caught:
        lorakit.check(stacked(tmp_path / "a"), consumer)
    first, last = caught.value.checked.obstacles
    assert "--experts split" in first.then
    assert "in the format" in last.what


def test_layers_that_are_all_there_are_in_nobodys_way(tmp_path):
    config = {"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]}
    assert lorakit.check(save(tmp_path / "a", PLAIN, **config), "peft").loads


def test_a_stack_of_experts_loads_in_peft(tmp_path):
    assert lorakit.check(stacked(tmp_path / "a"), "peft").loads


@pytest.mark.parametrize("shape", [(), (0,), (0, 30), (4,)])
def test_factors_of_no_rank_are_refused_like_any_without_a_product(tmp_path, shape):
    tensors = {**pair("layers.0.q_proj", 40, 30, 4), "layers.0.q_proj.lora_A.weight": shape}
    adapter = save(tmp_path / "adapter", tensors, target_modules=["q_proj"])
    with pytest.raises(MisfitError, match="no pair"):
        lorakit.check(adapter, "peft")
    with pytest.raises(MisfitError, match="no pair"):
        lorakit.convert(adapter, tmp_path / "out", to="mlx")
