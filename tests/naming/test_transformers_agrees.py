"""The built-in table and transformers' own mapping give the same places, family by family.

Each model is made on the meta device; its names on disk are what transformers' reverse mapping
says it would save.
"""

import re

import pytest

from lorakit.errors import InputError, MisfitError
from lorakit.naming.canonical import canonical
from lorakit.naming.families import REFUSED, REFUSED_PARTS
from lorakit.naming.from_transformers import meta_model, places_of
from lorakit.naming.places import Disk, Place, places
from lorakit.naming.runtime import by_transformers
from lorakit.tensors import TensorInfo
from tests.naming.tiny_models import tiny_model

transformers = pytest.importorskip("transformers", minversion="5.20")

FAMILIES = {
    "experts in one name for each": (
        "qwen2_moe qwen3_moe qwen3_next qwen3_omni_moe_thinker qwen3_5_moe qwen3_5_moe_text "
        "qwen4_exp qwen4_exp_text deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe glm4_moe_lite "
        "glm4v_moe glm_moe_dsa glm5_next glm5_next_text olmoe flex_olmo dots1 ernie4_5_moe "
        "hunyuan_v1_moe hy_v3 hy_v4 longcat_flash afmoe solar_open mellum beam cohere2_moe "
        "exaone_moe bailing_hybrid kimi_k25 mimo_v2_flash laguna flint kolibri1 axk1 axk2 "
        "deepseek_ocr2 dots3_note unlimited_ocr jamba nemotron_h"
    ),
    "experts of w1, w2 and w3": (
        "mixtral phimoe minimax minimax_m2 minimax_m3_vl deepseek_v4 kimi_linear mistral_large4 "
        "lfm2_moe"
    ),
    "experts stacked on disk": (
        "granitemoe granitemoeshared granitemoehybrid aria qwen3_vl_moe gpt_oss "
        "openai_privacy_filter llama4 llama4_text step3p7 ernie4_5_vl_moe"
    ),
    "text and images": (
        "gemma3 llava llava_next llava_next_video llava_onevision vipllava video_llava paligemma "
        "mistral3 internvl aya_vision got_ocr2 fuyu mllama emu3 qwen2_vl qwen2_5_vl qwen3_vl "
        "qwen3_5 qwen2_5_omni_thinker qwen2_audio voxtral granite_speech hunyuan_vl paddleocr_vl "
        "molmo2 qianfan_ocr cosmos3_edge cosmos3_omni idefics3 smolvlm lfm2_vl"
    ),
    "other names of leaves": (
        "vit deit beit ijepa vit_mae vit_msn vivit audio-spectrogram-transformer dinov2 "
        "dinov2_with_registers swin segformer clip clip_vision_model clip_text_model siglip "
        "siglip_vision_model radio sapiens2 rt_detr altclip timesfm2_5"
    ),
    "one projection for several": "nomic_bert gte jina_embeddings_v3 hrm_text olmo_hybrid",
    "nothing renamed": "llama qwen2 gemma3_text gpt2 gpt_neox phi3 glm4 mamba2 modernbert lfm2",
}
TYPES = [t for types in FAMILIES.values() for t in types.split()]
# Parameters that the table does not place and transformers does, each a refusal by lorakit.
NOT_PLACED = {
    # Its embedding is that of its base and that of its new tokens, one after the other.
    "molmo2": r"model\.language_model\.embed_tokens\.weight",
}


def on_disk(model):
    """What transformers would save: the names and shapes."""
    from transformers.core_model_loading import revert_weight_conversion

    state = revert_weight_conversion(model, dict(model.state_dict()))
    return {n: TensorInfo(n, "F32", tuple(t.shape)) for n, t in state.items()}


def matrices(model):
    """Module, parameter, shape of the weights that an adapter can be on."""
    for name, tensor in model.state_dict().items():
        if tensor.ndim >= 2:
            yield name, *name.rpartition(".")[::2], tuple(tensor.shape)


def out_of(name, shape):
    return shape[1] if ".experts." in name and len(shape) == 3 else shape[0]


def refused_or_places(module, parameter, disk, out):
    try:
        return places(module, parameter, disk, out)
    except InputError:
        return None


@pytest.mark.parametrize("model_type", TYPES)
def test_the_table_and_transformers_agree_on_every_weight(model_type):
    model = tiny_model(model_type)
    infos = on_disk(model)
    expected = places_of(model, infos)
    disk = Disk(infos, model_type)
    for name, module, parameter, shape in matrices(model):
        found = refused_or_places(module, parameter, disk, out_of(name, shape))
        assert name in expected or model_type in REFUSED
        if found is None:
            assert model_type in REFUSED
        elif re.fullmatch(NOT_PLACED.get(model_type, ""), name):
            assert found == []
        else:
            assert found == expected.get(name, [])


@pytest.mark.parametrize("model_type", TYPES)
def test_the_names_of_a_model_as_it_runs_are_found_in_a_checkpoint_of_them(model_type):
    model = tiny_model(model_type)
    infos = {n: TensorInfo(n, "F32", tuple(t.shape)) for n, t in model.state_dict().items()}
    disk = Disk(infos, model_type)
    expected = places_of(model, infos)
    for name, module, parameter, shape in matrices(model):
        assert places(module, parameter, disk, out_of(name, shape)) == [Place(name)]
        assert expected[name] == [Place(name)]


@pytest.mark.parametrize("model_type", TYPES)
def test_without_the_model_type_a_weight_is_found_where_it_is_or_not_at_all(model_type):
    model = tiny_model(model_type)
    infos = on_disk(model)
    expected, disk = places_of(model, infos), Disk(infos)
    for name, module, parameter, shape in matrices(model):
        try:
            found = places(module, parameter, disk, out_of(name, shape))
        except MisfitError:
            continue
        assert found in ([], expected.get(name, []))


@pytest.mark.parametrize(
    ("model_type", "saved", "on_the_hub"),
    [
        *((t, "vision_tower.", "vision_tower.vision_model.") for t in ("gemma3", "llava")),
        ("paligemma", "vision_tower.", "vision_tower.vision_model."),
        ("clip_vision_model", "", "vision_model."),
        ("clip_text_model", "", "text_model."),
        ("qwen3_5_text", "model.", "model.language_model."),
        ("qwen3_5_moe_text", "model.", "model.language_model."),
        ("qwen2_5_omni_thinker", "", "thinker."),
        ("gte", "", "new."),
        ("qwen2_vl", "visual.", "model.visual."),
        ("gpt_neox", "lm_head.", "embed_out."),
        ("vit", "", "vit."),
        ("dinov2", "", "dinov2."),
    ],
)
def test_checkpoints_of_older_releases_are_read_alike(model_type, saved, on_the_hub):
    model = tiny_model(model_type)
    pairs = ((re.sub(f"^{re.escape(saved)}", on_the_hub, n), i) for n, i in on_disk(model).items())
    infos = {name: TensorInfo(name, "F32", info.shape) for name, info in pairs}
    expected, disk = places_of(model, infos), Disk(infos, model_type)
    assert sum(on_the_hub in p.tensor for found in expected.values() for p in found) > 0
    for name, module, parameter, shape in matrices(model):
        assert places(module, parameter, disk, out_of(name, shape)) == expected.get(name, [])


@pytest.mark.parametrize("model_type", TYPES)
def test_canonical_names_are_their_own_and_apart(model_type):
    if model_type in REFUSED:
        return
    for names in (on_disk(tiny_model(model_type)), tiny_model(model_type).state_dict()):
        found = [canonical(name, model_type) for name in names]
        assert len(set(found)) == len(found)
        assert [canonical(name, model_type) for name in found] == found


@pytest.mark.parametrize("model_type", sorted(REFUSED.keys() & set(TYPES)))
def test_what_transformers_permutes_is_refused_and_never_placed(model_type):
    model = tiny_model(model_type)
    infos = on_disk(model)
    expected, disk = places_of(model, infos), Disk(infos, model_type)
    moved = [m for m in matrices(model) if m[0] not in expected]
    assert moved
    for name, module, parameter, shape in moved:
        with pytest.raises(InputError, match="cannot be placed"):
            places(module, parameter, disk, out_of(name, shape))


def test_every_family_that_transformers_permutes_is_refused_by_name():
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

    unsafe = ("PermuteForRope", "Interleave", "ErnieFuseAndSplitTextVisionExperts")
    found = {
        key
        for key, transforms in _build_checkpoint_conversion_mapping().items()
        for t in transforms
        for op in getattr(t, "operations", ())
        if type(op).__name__ in unsafe
    }
    assert found <= REFUSED.keys() | REFUSED_PARTS.keys()


def test_a_config_is_enough():
    config = tiny_model("mixtral").config.to_dict()
    disk = Disk(on_disk(tiny_model("mixtral")), "mixtral")
    found = by_transformers(config | {"architectures": ["MixtralForCausalLM"]}, disk)
    assert len(found.places["model.layers.0.mlp.experts.gate_up_proj"]) == 8
    assert found == by_transformers(config | {"architectures": None}, disk)


@pytest.mark.parametrize(
    "config",
    [
        *({}, {"model_type": "unheard_of"}, {"model_type": "llama", "hidden_size": "wide"}),
        {"model_type": "llama", "num_attention_heads": 0},
    ],
)
def test_a_config_that_transformers_cannot_build_gives_no_places(config):
    assert by_transformers(config, Disk({})) is None


def test_a_config_of_a_base_model_loads_a_checkpoint_of_the_whole_one():
    config = tiny_model("llama").config.to_dict() | {"architectures": ["LlamaModel"]}
    infos = on_disk(tiny_model("llama"))
    found = places_of(meta_model(config), infos)
    assert found["layers.0.mlp.up_proj.weight"] == [Place("model.layers.0.mlp.up_proj.weight")]
