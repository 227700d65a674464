"""`all-linear` means the layers that PEFT would choose, model type by model type."""

import json

import pytest

from lorakit.naming.linear import linear_layers
from lorakit.tensors import TensorInfo

transformers = pytest.importorskip("transformers", minversion="5.20")
peft = pytest.importorskip("peft", minversion="0.21")

LANGUAGE = (
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3 gemma3_text phi phi3 gpt2 gpt_neox gptj opt "
    "falcon bloom mpt stablelm starcoder2 olmo2 cohere2 glm4 smollm3 mixtral qwen2_moe qwen3_moe "
    "deepseek_v2 deepseek_v3 gpt_oss llama4 phimoe granitemoe jamba mamba2 bert roberta albert "
    "distilbert electra deberta-v2 mpnet modernbert xlm-roberta t5 mt5 umt5 bart pegasus whisper"
)
IMAGES = (
    "clip siglip siglip2 vit deit dinov2 beit swin llava paligemma qwen2_vl qwen2_5_vl qwen3_vl "
    "idefics3 internvl mllama wav2vec2 hubert lfm2_vl"
)
TYPES = [*LANGUAGE.split(), *IMAGES.split()]
CLASSIFIERS = ("llama", "gpt2", "t5", "bert", "roberta", "mixtral", "qwen3_moe", "gemma3_text")


def of_peft(model, **options):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    config = LoraConfig(target_modules="all-linear", **options)
    return set(_maybe_include_all_linear_layers(config, model).target_modules)


def of_lorakit(model):
    tensors = model.state_dict(keep_vars=True).items()
    infos = {n: TensorInfo(n, "F32", tuple(t.shape)) for n, t in tensors}
    config = json.loads(json.dumps(model.config.to_dict(), default=str))
    return set(linear_layers(infos, {**config, "architectures": [type(model).__name__]}))


@pytest.mark.parametrize("model_type", TYPES)
def test_the_linear_layers_are_those_of_peft(model_type):
    from tests.naming.tiny_models import tiny_model

    model = tiny_model(model_type)
    assert of_lorakit(model) == of_peft(model)


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_a_head_for_classes_is_left_out_as_well(model_type):
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from tests.naming.tiny_models import _shrink

    config = AutoConfig.for_model(model_type)
    _shrink(config)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    assert of_lorakit(model) == of_peft(model, task_type="SEQ_CLS")
