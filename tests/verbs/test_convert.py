"""convert: what goes along with factors, what is refused, and an output that is whole or absent."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.errors import InputError, MisfitError, OutputError, UsageError
from tests.verbs.adapters import PREFIX, config_of, drawn, tensors_of
from tests.verbs.conftest import SCRATCH

LAYER = "model.layers.0"
H, INNER, EXPERTS, R = 8, 6, 3, 2
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
FUSED = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}


def saved(folder, tensors, config, file, name="config.json"):
    folder.mkdir()
    save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / name).write_text(json.dumps(config))
    return folder


def base(folder, shapes, config=LLAMA):
    tensors = {n: drawn(n, *shape) for n, shape in shapes.items()}
    return saved(folder / "base", tensors, config, "model.safetensors")


def adapter(folder, tensors, **config):
    """An adapter with these tensors, by name without the prefix: an array, or a shape to draw."""
    made = {PREFIX + n: t if hasattr(t, "dtype") else drawn(n, *t) for n, t in tensors.items()}
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 3, **config}
    return saved(
        folder / "adapter", made, config, "adapter_model.safetensors", "adapter_config.json"
    )


def pair(module, out, inner, rank=R):
    return {f"{module}.lora_A.weight": (rank, inner), f"{module}.lora_B.weight": (out, rank)}


def converted(folder, names="disk", name="out", **options):
    return lorakit.convert(
        folder / "adapter", folder / name, base=folder / "base", names=names, run=SCRATCH, **options
    )


def assert_same_merge(folder, name="out"):
    """Merging the result changes the base as merging the adapter does."""
    for which in ("adapter", name):
        lorakit.merge(folder / "base", folder / which, folder / f"merged-{which}", run=SCRATCH)
    one, other = (
        load_file(folder / f"merged-{which}/model.safetensors") for which in ("adapter", name)
    )
    assert one.keys() == other.keys()
    for tensor, values in one.items():
        np.testing.assert_allclose(other[tensor], values, rtol=1e-5, atol=1e-6)
    before = load_file(folder / "base/model.safetensors")
    assert any(n not in before or not np.array_equal(t, before[n]) for n, t in one.items())


@pytest.fixture
def parted(tmp_path):
    """A base with one tensor for queries, keys and values, and an adapter with three modules."""
    base(
        tmp_path,
        {
            f"{LAYER}.self_attn.qkv_proj.weight": (H + 8, H),
            f"{LAYER}.self_attn.qkv_proj.bias": (H + 8,),
        },
        FUSED,
    )
    sizes = {"q_proj": H, "k_proj": 4, "v_proj": 4}
    return tmp_path, {f"{LAYER}.self_attn.{n}": out for n, out in sizes.items()}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_projections_become_the_rows_of_a_fused_one(parted, use_dora, use_rslora):
    folder, modules = parted
    tensors = {}
    for module, out in modules.items():
        tensors |= pair(module, out, H) | {f"{module}.lora_B.bias": (out,)}
        if use_dora:
            tensors[f"{module}.lora_magnitude_vector"] = np.abs(drawn(module, out)) + 1
    adapter(folder, tensors, use_dora=use_dora, use_rslora=use_rslora, lora_bias=True)
    done = converted(folder)
    assert (done.counts["fused"], done.rounded, done.tensors) == (1, 0, 4 if use_dora else 3)
    found = tensors_of(folder / "out")
    assert found[f"{LAYER}.self_attn.qkv_proj.lora_A.weight"].shape == (3 * R, H)
    assert_same_merge(folder)


def test_projections_with_one_a_share_it_in_the_fused_one(parted):
    folder, modules = parted
    shared, tensors = drawn("a", R, H), {}
    for module, out in modules.items():
        tensors |= pair(module, out, H) | {f"{module}.lora_A.weight": shared}
    adapter(folder, tensors)
    converted(folder)
    found = tensors_of(folder / "out")
    np.testing.assert_array_equal(found[f"{LAYER}.self_attn.qkv_proj.lora_A.weight"], shared)
    ups = [tensors_of(folder / "adapter")[f"{m}.lora_B.weight"] for m in modules]
    up = found[f"{LAYER}.self_attn.qkv_proj.lora_B.weight"]
    np.testing.assert_array_equal(up, np.concatenate(ups))
    assert_same_merge(folder)


def test_dora_of_some_rows_of_a_fused_projection_is_refused(parted):
    folder, modules = parted
    (module, out), *_ = modules.items()
    tensors = pair(module, out, H) | {f"{module}.lora_magnitude_vector": (out,)}
    adapter(folder, tensors, use_dora=True)
    with pytest.raises(InputError, match="some of its rows only"):
        converted(folder)


def test_a_fused_projection_comes_apart_with_its_dora_and_bias(tmp_path):
    module = f"{LAYER}.self_attn"
    sizes = {"q_proj": H, "k_proj": 4, "v_proj": 4}
    shapes = {f"{module}.{n}.weight": (out, H) for n, out in sizes.items()}
    base(tmp_path, shapes | {f"{module}.{n}.bias": (out,) for n, out in sizes.items()})
    fused = f"{module}.qkv_proj"
    tensors = pair(fused, H + 8, H) | {
        f"{fused}.lora_magnitude_vector": np.abs(drawn(fused, H + 8)) + 1,
        f"{fused}.lora_B.bias": (H + 8,),
    }
    adapter(tmp_path, tensors, use_dora=True, lora_bias=True)
    done = converted(tmp_path)
    assert done.counts["split"] == 3
    before, after = tensors_of(tmp_path / "adapter"), tensors_of(tmp_path / "out")
    for role in ("lora_B.weight", "lora_magnitude_vector", "lora_B.bias"):
        parts = [after[f"{module}.{n}.{role}"] for n in sizes]
        np.testing.assert_array_equal(np.concatenate(parts), before[f"{fused}.{role}"])
    assert_same_merge(tmp_path)


def test_all_else_of_an_adapter_goes_along_under_its_new_name(tmp_path):
    old, new = "language_model.model", "model.language_model"
    shapes = {
        f"{old}.embed_tokens.weight": (10, H),
        f"{old}.layers.0.self_attn.q_proj.weight": (H, H),
        f"{old}.layers.0.self_attn.q_proj.bias": (H,),
        f"{old}.norm.weight": (H,),
        "language_model.lm_head.weight": (10, H),
    }
    base(tmp_path, shapes, {"model_type": "llava"})
    embedding, query = f"{new}.embed_tokens", f"{new}.layers.0.self_attn.q_proj"
    tensors = {
        f"{embedding}.lora_embedding_A": (R, 10),
        f"{embedding}.lora_embedding_B": (H, R),
        f"{embedding}.token_adapter.trainable_tokens_delta": (2, H),
        f"{embedding}.base_layer.weight": (10, H),
        f"{query}.base_layer.bias": (H,),
        f"{query}.lora_magnitude_vector": np.abs(drawn("m", H)) + 1,
        **pair(query, H, H),
        f"{new}.norm.weight": (H,),
        "lm_head.weight": (10, H),
    }
    adapter(
        tmp_path,
        tensors,
        use_dora=True,
        modules_to_save=["norm", "lm_head"],
        trainable_token_indices={f"{new}.embed_tokens": [3, 5]},
        unknown=None,
    )
    converted(tmp_path)
    before, after = tensors_of(tmp_path / "adapter"), tensors_of(tmp_path / "out")
    renamed = {n.replace(new, old): t for n, t in before.items() if n != "lm_head.weight"}
    renamed["language_model.lm_head.weight"] = before["lm_head.weight"]
    assert renamed.keys() == after.keys()
    assert all(np.array_equal(after[n], t) for n, t in renamed.items())
    config = config_of(tmp_path / "out")
    assert config["modules_to_save"] == ["norm", "lm_head"]
    assert config["trainable_token_indices"] == {f"{old}.embed_tokens": [3, 5]}
    assert config["target_modules"] == [f"{old}.embed_tokens", query.replace(new, old)]
    assert "unknown" in config
    assert_same_merge(tmp_path)


def experts(stem, leaves=("gate_proj", "up_proj", "down_proj")):
    shapes = {"gate_proj": (INNER, H), "up_proj": (INNER, H), "down_proj": (H, INNER)}
    return {f"{stem}.{e}.{leaf}": shapes[leaf] for e in range(EXPERTS) for leaf in leaves}


@pytest.fixture
def single(tmp_path):
    """A base with experts one by one."""
    stem = f"{LAYER}.mlp.experts"
    shapes = {f"{m}.weight": shape for m, shape in experts(stem).items()}
    base(tmp_path, shapes | {f"{LAYER}.mlp.gate.weight": (EXPERTS, H)}, {"model_type": "qwen3_moe"})
    return tmp_path, stem


def test_experts_of_unequal_rank_and_dtype_are_filled_up_and_said_to_be(single):
    folder, stem = single
    tensors = {}
    for module, (out, inner) in experts(stem, ["down_proj"]).items():
        number = int(module.split(".")[-2])
        dtype = np.float16 if number == 1 else np.float32
        made = pair(module, out, inner, rank=number + 1)
        tensors |= {n: drawn(n, *shape).astype(dtype) for n, shape in made.items()}
    ranks = {f"{stem}.{e}.down_proj": e + 1 for e in range(EXPERTS)}
    adapter(folder, tensors, rank_pattern=ranks, alpha_pattern=ranks)
    done = converted(folder, experts="fused")
    assert done.rounded == 0
    assert [n for n in done.notes if "filled up with zeros" in n]
    found = tensors_of(folder / "out")[f"{stem}.lora_A.weight"]
    assert (found.shape, found.dtype) == ((EXPERTS * EXPERTS, INNER), np.float32)
    assert_same_merge(folder)


@pytest.mark.parametrize(("factor", "rounded"), [(2, False), (3, True)])
def test_scalings_of_their_own_are_multiplied_in_and_counted(single, factor, rounded):
    folder, stem = single
    tensors = {}
    for module, shape in experts(stem, ["down_proj"]).items():
        tensors |= pair(module, *shape)
    adapter(folder, tensors, alpha_pattern={f"{stem}.1.down_proj": 3 * factor})
    done = converted(folder, experts="fused")
    assert (done.rounded > 0) is rounded
    assert config_of(folder / "out")["lora_alpha"] == 3
    assert_same_merge(folder)


def test_a_scaling_that_the_dtype_cannot_hold_is_refused(single):
    folder, stem = single
    tensors = {}
    for module, shape in experts(stem, ["down_proj"]).items():
        made = {n: drawn(n, *s).astype(np.float16) for n, s in pair(module, *shape).items()}
        tensors |= made
    adapter(folder, tensors, alpha_pattern={f"{stem}.1.down_proj": 3e6})
    with pytest.raises(MisfitError, match="does not fit float16"):
        converted(folder, experts="fused")
    assert not (folder / "out").exists()
    assert not (folder / "out.partial").exists()


@pytest.mark.parametrize(
    ("extra", "config", "match"),
    [
        ({"lora_magnitude_vector": (H,)}, {"use_dora": True}, "DoRA"),
        ({}, {"init_lora_weights": "pissa"}, "variant"),
        ({}, {"init_lora_weights": "olora"}, "variant"),
        ({}, {"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({}, {"brand_new": 1}, "brand_new"),
    ],
)
def test_what_a_stack_cannot_hold_is_refused_by_name(single, extra, config, match):
    folder, stem = single
    tensors = {}
    for module, (out, inner) in experts(stem, ["down_proj"]).items():
        tensors |= pair(module, out, inner) | {f"{module}.{n}": s for n, s in extra.items()}
    adapter(folder, tensors, **config)
    with pytest.raises(InputError, match=match):
        converted(folder, experts="fused")
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", "base"]


def test_experts_that_lie_in_out_are_split_with_a_over_their_input(tmp_path):
    stem = f"{LAYER}.feed_forward.experts"
    shapes = {
        f"{stem}.gate_up_proj": (EXPERTS, H, 2 * INNER),
        f"{stem}.down_proj": (EXPERTS, INNER, H),
    }
    base(tmp_path, shapes, {"model_type": "llama4_text"})
    tensors = {
        f"{stem}.base_layer.lora_A.weight": (EXPERTS * R, 2 * INNER),
        f"{stem}.base_layer.lora_B.weight": (H, R * EXPERTS),
        f"{stem}.lora_A.weight": (EXPERTS * R, H),
        f"{stem}.lora_B.weight": (INNER, R * EXPERTS),
    }
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    adapter(tmp_path, tensors, target_modules=[], target_parameters=targets, peft_version="0.21.2")
    converted(tmp_path, experts="split")
    found = tensors_of(tmp_path / "out")
    assert {n: found[n].shape for n in sorted(found) if ".0." in n.removeprefix(LAYER)} == {
        f"{stem}.0.down_proj.lora_A.weight": (R, INNER),
        f"{stem}.0.down_proj.lora_B.weight": (H, R),
        f"{stem}.0.gate_proj.lora_A.weight": (R, H),
        f"{stem}.0.gate_proj.lora_B.weight": (INNER, R),
        f"{stem}.0.up_proj.lora_A.weight": (R, H),
        f"{stem}.0.up_proj.lora_B.weight": (INNER, R),
    }
    assert_same_merge(tmp_path)


def test_a_square_stack_that_lies_as_none_of_its_family_is_not_split(tmp_path):
    stem = f"{LAYER}.mlp.experts"
    shapes = {f"{stem}.gate_up_proj": (EXPERTS, H, 2 * H), f"{stem}.down_proj": (EXPERTS, H, H)}
    base(tmp_path, shapes, {"model_type": "qwen3_moe"})
    tensors = {
        f"{stem}.lora_A.weight": (EXPERTS * R, H),
        f"{stem}.lora_B.weight": (H, R * EXPERTS),
    }
    targets = ["experts.down_proj"]
    adapter(tmp_path, tensors, target_modules=[], target_parameters=targets, peft_version="0.21.2")
    with pytest.raises(InputError, match="square"):
        converted(tmp_path, experts="split")


def test_a_conversion_leaves_small_files_beside_the_weights_and_nothing_else(made, tmp_path):
    import shutil

    shutil.copytree(made / "style", tmp_path / "style")
    (tmp_path / "style/README.md").write_text("mine")
    (tmp_path / "style/tokenizer.json").write_text("{}")
    (tmp_path / "style/optimizer.pt").write_text("large")
    out = tmp_path / "out"
    lorakit.convert(tmp_path / "style", out, base=made / "base", names="disk", run=SCRATCH)
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert (out / "README.md").read_text() == "mine"


def test_an_adapter_that_has_the_names_already_is_the_same_bytes(made, tmp_path):
    out = tmp_path / "out"
    done = lorakit.convert(made / "style", out, base=made / "base", names="disk", run=SCRATCH)
    assert {c.how for c in done.changes} == {"kept"}
    one, other = (load_file(f / "adapter_model.safetensors") for f in (made / "style", out))
    assert {n: t.tobytes() for n, t in one.items()} == {n: t.tobytes() for n, t in other.items()}


def test_an_output_that_exists_or_is_an_input_is_left_alone(made, tmp_path):
    out = tmp_path / "out"
    options = {"base": made / "base", "names": "disk"}
    lorakit.convert(made / "style", out, run=SCRATCH, **options)
    with pytest.raises(OutputError, match="exists"):
        lorakit.convert(made / "style", out, run=SCRATCH, **options)
    again = lorakit.RunOptions(overwrite=True, sync=False)
    lorakit.convert(made / "style", out, run=again, **options)
    with pytest.raises(OutputError, match="never written to"):
        lorakit.convert(made / "style", made / "style", run=again, **options)
    with pytest.raises(UsageError, match="a folder"):
        lorakit.convert(made / "style", tmp_path / "x.safetensors", **options)


@pytest.mark.parametrize(
    "options", [{"to": "kohya"}, {"names": "v3"}, {"experts": "some"}, {"expert_packing": "x"}]
)
def test_a_choice_that_is_not_there_is_a_usage_error_that_says_what_is(made, options):
    with pytest.raises(UsageError, match="is none of"):
        lorakit.plan_convert(made / "style", base=made / "base", **options)
