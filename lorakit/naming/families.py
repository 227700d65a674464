"""What differs between a checkpoint on disk and the modules of a model, by model type: tables only.

A rule is `old>new`: whole dot-separated segments, `#` for a number, `^` for the start of the name.
The rules of a family apply one after the other to names whose front is already off (no `model.`, no
`language_model.`), each at its first match, and leave what they made alone.

Sources (facts): huggingface/transformers v5.23 `conversion_mapping.py` and the models it names;
huggingface/peft v0.21.2 `utils/transformers_weight_conversion.py`.
"""

# Segments in front of a name that say only in which class the module was wrapped.
WRAPPERS = r"^(?:(?:thinker|model|language_model|llm|gpt_neox|transformer)\.)*"

# Everywhere. A tower in a tower was one module too many; the rest are experts and their routers.
GENERIC = (
    "vision_tower.vision_model>vision_tower image_tower.vision_model>image_tower "
    "vision_model.vision_model>vision_model ^embed_out>lm_head "
    "LayerNorm.gamma>LayerNorm.weight LayerNorm.beta>LayerNorm.bias "
    "block_sparse_moe>mlp mlp.input_linear.weight>mlp.experts.gate_up_proj "
    "mlp.output_linear.weight>mlp.experts.down_proj mlp.input_linear>mlp.experts.gate_up_proj "
    "mlp.output_linear>mlp.experts.down_proj mlp.router.layer>mlp.gate mlp.router.gate>mlp.gate "
    "mlp.router>mlp.gate experts.#.w1>experts.#.gate_proj experts.#.w3>experts.#.up_proj "
    "experts.#.w2>experts.#.down_proj experts.gate_up_proj.weight>experts.gate_up_proj "
    "experts.down_proj.weight>experts.down_proj Wqkv>qkv_proj w_qkv>qkv_proj qkv>qkv_proj "
    "in_proj_weight>qkv_proj.weight in_proj_bias>qkv_proj.bias"
)
# What a leaf of a layer is a concatenation of along its rows, in this order. The keys and values
# are of the same size; where the first part is not, the layout is that of grouped queries.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_gate_proj": ("up_proj", "gate_proj"),
    "gqkv_proj": ("gate_proj", "q_proj", "k_proj", "v_proj"),
    "conv1d": ("q_conv1d", "k_conv1d", "v_conv1d"),
}

_VIT = (
    "encoder.layer>layers attention.query>q_proj attention.key>k_proj attention.value>v_proj "
    "attention.output.dense>attention.o_proj intermediate.dense>mlp.fc1 output.dense>mlp.fc2"
)
_DINO = (
    "attention.attention.query>attention.q_proj attention.attention.key>attention.k_proj "
    "attention.attention.value>attention.v_proj attention.output.dense>attention.o_proj "
    "mlp.weights_in>mlp.gate_up_proj mlp.weights_out>mlp.down_proj"
)
_SELF = (
    "attention.self.query>attention.q_proj attention.self.key>attention.k_proj "
    "attention.self.value>attention.v_proj"
)
_DETR = (
    "backbone.conv_encoder>backbone out_proj>o_proj layers.#.fc1>layers.#.mlp.fc1 "
    "layers.#.fc2>layers.#.mlp.fc2"
)
_RT_DETR = f"{_DETR} encoder.encoder.#.layers>encoder.aifi.#.layers"
_GATES = (
    "self_attn.f_a_proj>self_attn.forget_gate.f_a_proj "
    "self_attn.f_b_proj>self_attn.forget_gate.f_b_proj "
    "self_attn.dt_bias>self_attn.forget_gate.dt_bias self_attn.A_log>self_attn.forget_gate.A_log"
)
_NEW_NORMS = "norm1>post_attention_layernorm norm2>post_mlp_layernorm emb_ln>embeddings.LayerNorm"
_COSMOS = (
    "self_attn.to_q>self_attn.q_proj self_attn.to_k>self_attn.k_proj "
    "self_attn.to_v>self_attn.v_proj self_attn.to_out>self_attn.o_proj"
)
_SAM = (
    "neck.0>neck.conv1 neck.1>neck.layer_norm1 neck.2>neck.conv2 neck.3>neck.layer_norm2 "
    "net_2>proj.conv1 net_3>proj.conv2 patch_embed.proj>patch_embed.projection "
    "sam_encoder.blocks>sam_encoder.layers"
)
_VISION_EXPERTS = (
    "experts.#.fc1>experts.#.gate_proj experts.#.fc3>experts.#.up_proj "
    "experts.#.fc2>experts.#.down_proj"
)

# By model type (the one of config.json). Types of one family are in one key.
RULES = {
    "vit deit ijepa vit_mae vit_msn vivit": f"^vit> ^deit> ^ijepa> ^vivit> {_VIT}",
    "audio-spectrogram-transformer": f"^audio_spectrogram_transformer> {_VIT}",
    "beit": f"^beit> {_VIT} encoder.relative_position_bias>shared_position_bias "
    "attention.attention.relative_position_bias>relative_position_bias",
    "pixio": f"^pixio> ^encoder> {_VIT} layer>layers norm1>layernorm_before norm2>layernorm_after",
    "dinov2": f"^dinov2> {_DINO}",
    "dinov2_with_registers": f"^dinov2_with_registers> {_DINO}",
    "lw_detr": f"{_DINO} attention.output>attention.o_proj",
    "swin": f"^swin> {_SELF} attention.self.relative_position_bias_table>"
    "attention.relative_position_bias.relative_position_bias_table "
    "attention.output.dense>attention.o_proj intermediate.dense>mlp.fc1 output.dense>mlp.fc2",
    "segformer": "^segformer> encoder.patch_embeddings.#>stages.#.patch_embeddings "
    f"encoder.block.#>stages.#.blocks encoder.layer_norm.#>stages.#.layer_norm {_SELF} "
    "attention.self.sr>attention.sequence_reduction.sequence_reduction "
    "attention.self.layer_norm>attention.sequence_reduction.layer_norm "
    "attention.output.dense>attention.o_proj mlp.dense1>mlp.fc1 mlp.dense2>mlp.fc2 "
    "decode_head.linear_c>decode_head.linear_projections",
    "maskformer detr conditional_detr deformable_detr": _DETR,
    "rt_detr rt_detr_v2 pp_doclayout_v2 pp_doclayout_v3": _RT_DETR,
    "clip_vision_model siglip_vision_model siglip2_vision_model mlcd mlcd_vision": "^vision_model>",
    "clip_text_model siglip_text_model siglip2_text_model": "^text_model>",
    "radio": "^radio_model.model.blocks>encoder.layer attn.proj>attention.o_proj "
    "attn.qkv_proj>attention.qkv_proj "
    "^radio_model.model.patch_generator.video_embedder>embeddings.video_patch_projection "
    "^radio_model.model.patch_generator.embedder>embeddings.patch_projection "
    "^radio_model.model.patch_generator.pos_embed>embeddings.position_embedding "
    "^radio_model.model.patch_generator.cls_token.token>embeddings.cls_register_token "
    "^radio_model>",
    "nomic_bert": f"encoder.layers>layers attn>self_attn self_attn.out_proj>self_attn.o_proj "
    f"fc11>up_proj fc12>gate_proj fc2>down_proj {_NEW_NORMS}",
    "gte": "^new> encoder.layer>layers attention>self_attn "
    "attn_ln>post_attention_layernorm mlp_ln>post_mlp_layernorm lm_head.norm>lm_head.layer_norm",
    "jina_embeddings_v3": f"encoder.layers>layers mixer>self_attn "
    f"self_attn.out_proj>self_attn.o_proj {_NEW_NORMS}",
    "hrm_text": "attn>self_attn",
    "sapiens2": "^backbone> blocks>layer attn>attention attention.proj>attention.o_proj "
    "attention.wq>attention.q_proj attention.wk>attention.k_proj attention.wv>attention.v_proj "
    "ffn.w12>mlp.gate_up_proj ffn.w3>mlp.down_proj patch_embed.projection>"
    "embeddings.patch_embeddings ^cls_token>embeddings.cls_token "
    "^storage_tokens>embeddings.register_tokens",
    "emu3": "^text_model> ^model>",
    "nemotron_h nemotron_h_omni": "^backbone>",
    "altclip": "layer>layers",
    "olmo_hybrid": "attention_layer_norm>input_layernorm "
    "feedforward_layer_norm>post_attention_layernorm",
    "cosmos3_omni": f"^blocks>visual.blocks ^merger>visual.merger ^patch_embed>visual.patch_embed "
    f"^pos_embed>visual.pos_embed ^deepstack_merger_list>visual.deepstack_merger_list {_COSMOS} "
    "self_attn.norm_q>self_attn.q_norm self_attn.norm_k>self_attn.k_norm",
    "cosmos3_edge": f"{_COSMOS} mlp.up_proj>mlp.fc1 mlp.down_proj>mlp.fc2",
    "paddleocr_vl": "^mlp_AR>projector",
    "lfm3": "self_attn.gate_proj>self_attn.g_proj",
    "hunyuan_vl": "mlp.dense_h_to_4h>mlp.fc1 mlp.dense_4h_to_h>mlp.fc2 ^vit>vision_tower "
    "^vision_tower.layers.#.input_layernorm>vision_tower.layers.#.layer_norm1 "
    "^vision_tower.layers.#.post_attention_layernorm>vision_tower.layers.#.layer_norm2 "
    "perceive.proj.0>perceive.proj_conv perceive.proj.2>perceive.proj_out perceive>patch_merger",
    "hyperclovax_vision_v2": "^vision_projector>projector",
    "kimi_k25": "^blocks>layers ^mm_projector.proj.0>mm_projector.in_proj "
    "^mm_projector.proj.2>mm_projector.out_proj",
    "glm5_next glm5_next_text": f"{_GATES} hc_attn_fn>attn_hc.fn hc_ffn_fn>ffn_hc.fn",
    "kimi_linear": _GATES,
    "bailing_hybrid": "^word_embeddings>embed_tokens attention>self_attn "
    "self_attn.f_proj>self_attn.forget_gate.f_proj self_attn.dense>self_attn.o_proj",
    "axk2": "W_down>mlp.fc1 W_up>mlp.fc2 self_attn.q_b_proj>self_attn.q_gate_proj",
    "hy_v3": "mlp.shared_mlp>mlp.shared_experts",
    "hy_v4": "linear_gate>gate_proj hc_pre.hc_attn_layer.hc_fn>attn_hc.fn "
    "hc_pre.hc_mlp_layer.hc_fn>ffn_hc.fn hc_pre.hc_head>hc_head hc_head_fn>hc_fn",
    "ernie4_5_moe": "mlp.moe_statics>mlp.gate.moe_statics",
    "laguna": "mlp.shared_expert>mlp.shared_experts",
    "kolibri1": "post_attn_norm>post_self_attn_layernorm post_ffn_norm>post_mlp_layernorm",
    "step3p7": "moe>mlp mlp.gate_proj.weight>mlp.experts.gate_proj "
    "mlp.up_proj.weight>mlp.experts.up_proj mlp.down_proj.weight>mlp.experts.down_proj "
    "share_expert>mlp.shared_experts ^vit_large_projector>multi_modal_projector "
    "^vision_model.conv1>vision_model.embeddings.patch_embedding "
    "^vision_model.positional_embedding>vision_model.embeddings.position_embedding.weight "
    "^vision_model.transformer.resblocks>vision_model.layers vision_model.vit_downsampler1>"
    "vision_model.downsampler1 vision_model.vit_downsampler2>vision_model.downsampler2 "
    "mlp.c_fc>mlp.fc1 mlp.c_proj>mlp.fc2 attn>self_attn",
    "aria aria_text": "mlp.experts.fc1.weight>mlp.experts.gate_up_proj "
    "mlp.experts.fc2.weight>mlp.experts.down_proj mlp.experts.fc1>mlp.experts.gate_up_proj "
    "mlp.experts.fc2>mlp.experts.down_proj",
    "minimax_m3_vl": "^vision_tower.embeddings.patch_embedding>vision_tower.embeddings.proj "
    "^vision_tower.encoder.layers>vision_tower.layers "
    "^patch_merge_mlp.linear_1>multi_modal_projector.merge_linear_1 "
    "^patch_merge_mlp.linear_2>multi_modal_projector.merge_linear_2 "
    "self_attn.index_q_proj>self_attn.indexer.q_proj "
    "self_attn.index_k_proj>self_attn.indexer.k_proj",
    "deepseek_v4": "attn>self_attn ffn>mlp indexer.compressor>compressor.indexer "
    "^embed>embed_tokens ^head>lm_head indexer.weights_proj>compressor.indexer.scorer.weights_proj "
    "indexer.wq_b>compressor.indexer.q_b_proj wq_a>q_a_proj self_attn.wq_b>self_attn.q_b_proj "
    "wkv>kv_proj wgate>gate_proj wo_a>o_a_proj wo_b>o_b_proj ape>position_bias "
    "hc_attn_fn>attn_hc.fn hc_ffn_fn>ffn_hc.fn ^hc_head_fn>hc_head.hc_fn "
    "shared_experts.w1>shared_experts.gate_proj shared_experts.w2>shared_experts.down_proj "
    "shared_experts.w3>shared_experts.up_proj",
    "mistral_large4 mistral_large4_text": "^vision_encoder>vision_tower "
    "^tok_embeddings>embed_tokens ^output>lm_head ^patch_merger>multi_modal_projector.patch_merger "
    "^vision_language_adapter.w_in>multi_modal_projector.linear_1 "
    "^vision_language_adapter.w_out>multi_modal_projector.linear_2 wv>v_proj wo>o_proj "
    "^layers.#.attention>layers.#.self_attn ^layers.#.feed_forward>layers.#.mlp "
    "^layers.#.gate>layers.#.mlp.gate ^layers.#.experts>layers.#.mlp.experts "
    "^layers.#.shared_experts>layers.#.mlp.shared_experts mlp.w1>mlp.gate_proj "
    "mlp.w2>mlp.down_proj mlp.w3>mlp.up_proj shared_experts.w1>shared_experts.gate_proj "
    "shared_experts.w2>shared_experts.down_proj shared_experts.w3>shared_experts.up_proj "
    "feed_forward.w1>feed_forward.gate_proj feed_forward.w2>feed_forward.down_proj "
    "feed_forward.w3>feed_forward.up_proj self_attn.wq>self_attn.q_proj wkv_b>kv_b_proj "
    "wkv_a_with_mqa>kv_a_proj_with_mqa",
    "deepseek_ocr2": "^sam_model>vision_tower.sam_encoder "
    "^qwen2_model.model.model>vision_tower.vision_encoder "
    "^qwen2_model.query_768>vision_tower.query_768_resolution "
    "^qwen2_model.query_1024>vision_tower.query_1024_resolution "
    f"^projector.layers>multi_modal_projector {_SAM}",
    "unlimited_ocr": "^sam_model>vision_tower.sam_encoder "
    "^vision_model>vision_tower.vision_encoder vision_encoder.transformer>vision_encoder.encoder "
    f"^projector.layers>multi_modal_projector {_SAM}",
    "dots3_note": "^vision_encoder>vision_tower ^audio_encoder>audio_tower "
    "^vision_tower.adapter>vision_tower.merger ^audio_adapter>audio_tower.adapter "
    "^audio_tower.audio_adapter>audio_tower.adapter adapter.proj.1>adapter.fc1 "
    "adapter.proj.3>adapter.fc2 ^audio_tower.dots_encoder.speech_encoder>audio_tower "
    "^audio_tower.conv2d1>audio_tower.conv_stem.convs.0 "
    "^audio_tower.conv2d2>audio_tower.conv_stem.convs.1 "
    "^audio_tower.conv2d3>audio_tower.conv_stem.convs.2 "
    "^audio_tower.conv_out>audio_tower.conv_stem.conv_out "
    "^audio_tower.layers.#.self_attn.out_proj>audio_tower.layers.#.self_attn.o_proj "
    "^audio_tower.layers.#.fc1>audio_tower.layers.#.mlp.gate_up_proj "
    "^audio_tower.layers.#.fc2>audio_tower.layers.#.mlp.down_proj "
    f"{_VISION_EXPERTS} mlp.fc1>mlp.gate_proj mlp.fc2>mlp.down_proj mlp.fc3>mlp.up_proj "
    "mlp.gate_weight>mlp.gate.weight",
    "molmo2": "^blocks>layers ^wte>embed_tokens self_attn.att_proj>self_attn.qkv_proj "
    "self_attn.attn_out>self_attn.o_proj mlp.ff_proj>mlp.up_gate_proj mlp.ff_out>mlp.down_proj "
    "^vision_backbone.image_vit.transformer.resblocks>vision_tower.layers "
    "^vision_backbone.image_vit>vision_tower "
    "^vision_backbone.image_pooling_2d>multi_modal_projector.image_pooling_2d "
    "^vision_backbone.image_projector>multi_modal_projector.image_projector "
    "attention.wq>self_attn.q_proj attention.wk>self_attn.k_proj attention.wv>self_attn.v_proj "
    "attention.wo>self_attn.o_proj feed_forward.w1>mlp.fc1 feed_forward.w2>mlp.fc2 "
    "image_pooling_2d.wq>image_pooling_2d.q_proj image_pooling_2d.wk>image_pooling_2d.k_proj "
    "image_pooling_2d.wv>image_pooling_2d.v_proj image_pooling_2d.wo>image_pooling_2d.o_proj "
    "image_projector.w1>image_projector.gate_proj image_projector.w2>image_projector.down_proj "
    "image_projector.w3>image_projector.up_proj",
    "qianfan_ocr": "^encoder.layers>layers ^vision_model>vision_tower "
    "^vision_tower.encoder.layers>vision_tower.layers "
    "^mlp1.1>multi_modal_projector.linear_1 ^mlp1.3>multi_modal_projector.linear_2 "
    "attn.qkv_proj>attention.qkv_proj attn.proj>attention.projection_layer "
    "embeddings.class_embedding>embeddings.cls_token "
    "embeddings.position_embedding>embeddings.position_embeddings "
    "embeddings.patch_embedding>embeddings.patch_embeddings.projection",
    "timesfm2_5": "mlp.ff0>mlp.fc1 mlp.ff1>mlp.fc2",
    "ernie4_5_vl_moe": "^vision_model>vision_tower spatial_linear.0>spatial_linear.fc1 "
    "spatial_linear.2>spatial_linear.fc2 temporal_linear.0>temporal_linear.fc1 "
    "temporal_linear.2>temporal_linear.fc2",
}

_ROPE = "its queries and keys are stored in another order of rows than the model's (RoPE)"
_WOVEN = "its gate and up rows alternate on disk"
# Where more than names stands between disk and model: a pattern of canonical names, and the reason.
REFUSED = {
    "kimi_k25": (r"vision_tower\.", _ROPE),
    "mistral_large4": (r"vision_tower\..*\.[qk]_proj\.", _ROPE),
    "step3p7": (r"vision_model\..*\.[qkv]_proj\.", _ROPE),
    "step3p5_vision": (r".*\.[qkv]_proj\.", _ROPE),
    "gradium_phonon_tts": ("", _ROPE),
    "inkling_mm_model": ("", _WOVEN),
    "inkling2": ("", _WOVEN),
    "inkling2_text": ("", _WOVEN),
    "ernie4_5_vl_moe": (
        r".*\.mlp\.(?:experts|gate|text_moe|vision_moe)\.",
        "the experts of its text and of its images share one list on disk",
    ),
}
# Where names are as they seem but the parts of a fused weight are not one after the other.
REFUSED_PARTS = {
    "gpt_oss": (r".*\.experts\..*(?:gate|up)_proj", _WOVEN),
    "openai_privacy_filter": (r".*\.experts\..*(?:gate|up)_proj", _WOVEN),
    "codegen": (r".*\.(?:qkv|[qkv])_proj\.", "its qkv_proj is cut into blocks of each"),
}
