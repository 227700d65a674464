"""Mochi and HunyuanVideo 1.5, in their own names and in those of Diffusers.

Source of the names: huggingface/diffusers, src/diffusers/loaders/single_file_utils.py and
scripts/convert_hunyuan_video1_5_to_diffusers.py; kohya-ss/musubi-tuner,
src/musubi_tuner/networks/convert_hunyuan_video_1_5_lora_to_comfy.py
"""

from lorakit.formats.families.video import HUNYUAN_TEXT

_T = "transformer_blocks.#"

# The last of 48 blocks has no more use for the text, and norms it in another module.
MOCHI = f"""
blocks.47.mod_y = transformer_blocks.47.norm1_context.linear_1
blocks.#.mod_{{x,y}} = {_T}.{{norm1,norm1_context}}.linear
blocks.#.attn.qkv_x = {_T}.attn1.{{to_q+to_k+to_v}} @even
blocks.#.attn.qkv_y = {_T}.attn1.{{add_q_proj+add_k_proj+add_v_proj}} @even
blocks.#.attn.proj_{{x,y}} = {_T}.attn1.{{to_out.0,to_add_out}}
blocks.#.mlp_{{x,y}}.w1 = {_T}.{{ff,ff_context}}.net.0.proj @swap
blocks.#.mlp_{{x,y}}.w2 = {_T}.{{ff,ff_context}}.net.2
x_embedder.proj = patch_embed.proj @conv-2
t_embedder.mlp.{{0,2}} = time_embed.timestep_embedder.linear_{{1,2}}
t5_y_embedder.{{to_kv,to_q,to_out}} = time_embed.pooler.{{to_kv,to_q,to_out}}
t5_yproj = time_embed.caption_proj
final_layer.mod = norm_out.linear @swap
final_layer.linear = proj_out
"""

_D = "double_blocks.#"
_ATTN = f"{_T}.attn."
_APART = f"""
{_D}.img_attn_{{q,k,v}} = {_ATTN}{{to_q,to_k,to_v}}
{_D}.txt_attn_{{q,k,v}} = {_ATTN}{{add_q_proj,add_k_proj,add_v_proj}}
"""
_FUSED = f"""
{_D}.img_attn_qkv = {_ATTN}{{to_q+to_k+to_v}}
{_D}.txt_attn_qkv = {_ATTN}{{add_q_proj+add_k_proj+add_v_proj}}
"""


def _hunyuan(attention: str) -> str:
    return f"""{attention}
{_D}.{{img,txt}}_attn_proj = {_ATTN}{{to_out.0,to_add_out}}
{_D}.{{img,txt}}_mod.linear = {_T}.{{norm1,norm1_context}}.linear
{_D}.{{img,txt}}_mlp.fc1 = {_T}.{{ff,ff_context}}.net.0.proj @rows-4/1
{_D}.{{img,txt}}_mlp.fc2 = {_T}.{{ff,ff_context}}.net.2 @rows-1/4
img_in.proj = x_embedder.proj
vision_in.proj.{{1,3}} = image_embedder.linear_{{1,2}}
byt5_in.fc{{1,2,3}} = context_embedder_2.linear_{{1,2,3}}
time_in.mlp.{{0,2}} = time_embed.timestep_embedder.linear_{{1,2}}
{HUNYUAN_TEXT}
final_layer.linear = proj_out
final_layer.adaLN_modulation.1 = norm_out.linear @swap
"""


HUNYUAN_VIDEO_15 = _hunyuan(_APART)
# Of ComfyUI, which has its queries, keys and values in one, under the names of HunyuanVideo.
HUNYUAN_VIDEO_15_COMFY = _hunyuan(_FUSED)
