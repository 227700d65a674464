"""The models: one of each architecture whose names or layout have led a merge astray."""

from typing import Any

from tests.oracles.architectures.architecture import Architecture

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LOCAL = TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = TEXT | {"num_experts": 4, "num_experts_per_tok": 2}
NARROW = EXPERTS | {"moe_intermediate_size": 16}
JAMBA = EXPERTS | {
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "use_mamba_kernels": False,
    "mamba_d_state": 4,
    "mamba_expand": 1,
    "mamba_dt_rank": 4,
}
DEEPSEEK = TEXT | {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
GPT_OSS = LOCAL | {"intermediate_size": 32, "head_dim": 8, "sliding_window": 16}
LLAMA4 = LOCAL | {
    "intermediate_size": 32,
    "intermediate_size_mlp": 48,
    "num_experts_per_tok": 1,
    "head_dim": 8,
    "interleave_moe_layer_step": 1,
    "attention_chunk_size": 32,
}
# Sixteen, so that the scale of the embedding is exactly four.
GEMMA = TEXT | {"hidden_size": 16, "head_dim": 4, "sliding_window": 16}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.1,
}
GEMMA_VLM = {
    "text_config": GEMMA,
    "vision_config": VISION | {"vision_use_head": False},
    "mm_tokens_per_image": 4,
    "image_token_index": 60,
    "boi_token_index": 61,
    "eoi_token_index": 62,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
    "window_size": 16,
    "initializer_range": 0.1,
}
QWEN_VL = {
    "text_config": TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
    "vision_config": QWEN_VISION,
    "image_token_id": 60,
    "video_token_id": 59,
    "vision_start_token_id": 61,
    "vision_end_token_id": 62,
}
LLAVA = {
    "text_config": TEXT | {"model_type": "llama"},
    "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
    "image_token_index": 60,
}

# How the names in the model of transformers 5 become those of files: of the hub, or of programs
# that write the model's own names.
BLOCK_SPARSE = ((r"\.mlp\.", ".block_sparse_moe."),)
GRANITE = (
    (r"\.router\.weight$", ".router.layer.weight"),
    (r"\.experts\.gate_up_proj$", ".input_linear.weight"),
    (r"\.experts\.down_proj$", ".output_linear.weight"),
)
LLAVA_OLD = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(?=vision_tower\.|multi_modal_projector\.)", ""),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
LLAVA_NEW = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(?=vision_tower\.|multi_modal_projector\.)", "model."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)
QWEN_OLD = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))
QWEN_NEW = (
    (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "model.language_model."),
    (r"^visual\.", "model.visual."),
)

QWEN_LEAVES = ("gate_proj", "up_proj", "down_proj")
W_LEAVES = ("w1", "w3", "w2")


def _causal(name: str, family: str, sizes: dict[str, Any], **options: Any) -> Architecture:
    return Architecture(name, f"{family}ForCausalLM", f"{family}Config", sizes, **options)


def _seeing(name: str, family: str, sizes: dict[str, Any], **options: Any) -> Architecture:
    kind = f"{family}ForConditionalGeneration"
    return Architecture(name, kind, f"{family}Config", sizes, seen=4, **options)


MODELS = [
    _causal("llama", "Llama", TEXT),
    _causal("llama-tied", "Llama", TEXT | {"tie_word_embeddings": True}, dtype="float32"),
    _causal("mixtral", "Mixtral", LOCAL, names=BLOCK_SPARSE, split=W_LEAVES),
    _causal(
        "qwen2-moe",
        "Qwen2Moe",
        NARROW | {"shared_expert_intermediate_size": 24},
        split=QWEN_LEAVES,
    ),
    _causal("qwen3-moe", "Qwen3Moe", NARROW | {"head_dim": 8}, split=QWEN_LEAVES),
    _causal(
        "qwen3-moe-square",
        "Qwen3Moe",
        EXPERTS | {"moe_intermediate_size": 32, "head_dim": 8},
        split=QWEN_LEAVES,
        dtype="float32",
    ),
    _causal("olmoe", "Olmoe", EXPERTS, split=QWEN_LEAVES),
    _causal(
        "phimoe",
        "Phimoe",
        LOCAL,
        names=((r"\.mlp\.router\.", ".mlp.gate."), *BLOCK_SPARSE),
        split=W_LEAVES,
    ),
    _causal("jamba", "Jamba", JAMBA, split=QWEN_LEAVES, dtype="float32"),
    _causal(
        "lfm2-moe",
        "Lfm2Moe",
        NARROW | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        split=W_LEAVES,
    ),
    _causal("deepseek-v3", "DeepseekV3", DEEPSEEK, split=QWEN_LEAVES),
    _causal("gpt-oss", "GptOss", GPT_OSS, in_first=True),
    _causal(
        "gpt-oss-square-gate",
        "GptOss",
        GPT_OSS | {"intermediate_size": 16},
        in_first=True,
        dtype="float32",
    ),
    _causal("granitemoe", "GraniteMoe", LOCAL, names=GRANITE),
    Architecture("llama4", "Llama4ForCausalLM", "Llama4TextConfig", LLAMA4),
    Architecture("gemma3-text", "Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA, dtype="float32"),
    _seeing("gemma3", "Gemma3", GEMMA_VLM, names=LLAVA_OLD, written=LLAVA_OLD),
    _seeing("gemma3-new", "Gemma3", GEMMA_VLM, names=LLAVA_NEW, written=LLAVA_NEW),
    _seeing("qwen2.5-vl", "Qwen2_5_VL", QWEN_VL, names=QWEN_OLD, written=QWEN_OLD),
    _seeing("qwen2.5-vl-new", "Qwen2_5_VL", QWEN_VL, names=QWEN_NEW, written=QWEN_NEW),
    _seeing("llava", "Llava", LLAVA, names=LLAVA_OLD, written=LLAVA_OLD),
    _seeing("llava-new", "Llava", LLAVA, names=LLAVA_NEW, written=LLAVA_NEW),
]
MODELS_BY_NAME = {model.name: model for model in MODELS}
