"""LTX-2 and MiniMax-H3, which make video with sound, and ACE-Step, which makes music.

Source of the names: huggingface/diffusers, src/diffusers/loaders/single_file_utils.py and
lora_conversion_utils.py
"""

_T = "transformer_blocks.#"
_OUT = "{to_q,to_k,to_v,to_out.0,to_gate_logits}"
_EMBEDDER = "emb.timestep_embedder.linear_"


def _modulation(original: str, name: str) -> str:
    return f"""
{original}.{_EMBEDDER}{{1,2}} = {name}.{_EMBEDDER}{{1,2}}
{original}.linear = {name}.linear
"""


_MODULATIONS = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
LTX2 = f"""
{{patchify_proj,audio_patchify_proj}} = {{proj_in,audio_proj_in}}
{"".join(_modulation(a, b) for a, b in _MODULATIONS.items())}
caption_projection.linear_{{1,2}}
audio_caption_projection.linear_{{1,2}}
{_T}.attn1.{_OUT}
{_T}.attn2.{_OUT}
{_T}.audio_attn1.{_OUT}
{_T}.audio_attn2.{_OUT}
{_T}.audio_to_video_attn.{_OUT}
{_T}.video_to_audio_attn.{_OUT}
{_T}.ff.net.{{0.proj,2}}
{_T}.audio_ff.net.{{0.proj,2}}
{{proj_out,audio_proj_out}}
"""
# What lies between the text encoder of LTX-2 and its transformer.
CONNECTORS = """
{aggregate_embed,video_aggregate_embed} = {text_proj_in,video_text_proj_in}
audio_aggregate_embed = audio_text_proj_in
"""


def _minimax(block: str, name: str) -> str:
    return f"""
{block}.#.attn.qkv_proj = {name}.#.attn.{{to_q+to_k+to_v}} @head-128
{block}.#.attn.out_proj = {name}.#.attn.to_out.0
{block}.#.mlp.fc1 = {name}.#.ff.net.0.proj @swap
{block}.#.mlp.fc2 = {name}.#.ff.net.2
"""


MINIMAX_H3 = f"""
{_minimax("blocks", "transformer_blocks")}
{_minimax("token_refiner.blocks", "token_refiner.refiner_blocks")}
blocks.#.adaln_proj.linear = {_T}.adaln_proj.linear
{{video,audio}}_patch_proj = {{proj_in,audio_proj_in}}
condition_proj = context_embedder
time_embedder.proj_{{in,out}} = time_embedder.linear_{{1,2}}
final_layer.adaln_proj.linear = norm_out.linear
final_layer.{{video,audio}}_out = {{proj_out,audio_proj_out}}
"""

_L = "layers.#"
ACE_STEP = f"""
{_L}.self_attn.{{q_proj,k_proj,v_proj,o_proj}} = {_L}.self_attn.{{to_q,to_k,to_v,to_out.0}}
{_L}.cross_attn.{{q_proj,k_proj,v_proj,o_proj}} = {_L}.cross_attn.{{to_q,to_k,to_v,to_out.0}}
{_L}.mlp.{{gate_proj,up_proj,down_proj}}
{{time_embed,time_embed_r}}.linear_1
{{time_embed,time_embed_r}}.linear_2
{{time_embed,time_embed_r}}.time_proj
condition_embedder
proj_in.1 = proj_in_conv
"""
