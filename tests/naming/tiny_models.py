"""Small models of every family, on the meta device: names and shapes, no weights."""

from typing import Any

LAYERS = {"num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers", "n_layer"}
EXPERTS = {
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    *("num_total_experts",),
}
PER_LAYER = {"layer_types", "mlp_layer_types", "layers_block_type", "moe_layers"}
SIZE = 4
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 128,
    "indexer_budget": 64,
    "indexer_compress_ratio": 16,
}
# What a config leaves open, by model type; under the name of a part of it, what that one does.
SETTINGS: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"num_attention_heads": 16}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * 3]}},
    "dots1": {"n_routed_experts": SIZE, "n_shared_experts": 1, "moe_intermediate_size": 64},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 3, "<image>": 4}},
    "hunyuan_v1_moe": {"head_dim": 64},
    "hunyuan_vl": {"text_config": {"head_dim": 64}},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 2},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
}


def tiny_model(model_type: str, **settings: Any) -> Any:
    """A model of a few layers and experts, of the class that the type has by default."""
    import torch
    from transformers import AutoConfig

    from lorakit.naming.from_transformers import model_class

    config = AutoConfig.for_model(model_type)
    _shrink(config)
    _set(config, SETTINGS.get(model_type, {}) | settings)
    with torch.device("meta"):
        return model_class((), config)(config)


def _shrink(config: Any) -> None:
    from transformers import PreTrainedConfig

    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _shrink(value)
        elif key in LAYERS | EXPERTS and isinstance(value, int) and value > SIZE:
            setattr(config, key, SIZE)
        elif key in PER_LAYER and isinstance(value, (list, tuple)):
            setattr(config, key, value[:SIZE])


def _set(config: Any, settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(value, dict) and key.endswith("_config"):
            _set(getattr(config, key), value)
        else:
            setattr(config, key, value)
