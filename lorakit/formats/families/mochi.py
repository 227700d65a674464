"""Mochi and HunyuanVideo 1.5, in their own names and in those of Diffusers.

Source of the names: huggingface/diffusers, src/diffusers/loaders/single_file_utils.py and
scripts/convert_hunyuan_video1_5_to_diffusers.py
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
x_embedder.proj = patch_embed.proj
t_embedder.mlp.{{0,2}} = time_embed.timestep_embedder.linear_{{1,2}}
t5_y_embedder.{{to_kv,to_q,to_out}} = time_embed.pooler.{{to_kv,to_q,to_out}}
t5_yproj = time_embed.caption_proj
final_layer.mod = norm_out.linear @swap
final_layer.linear = proj_out
"""

_D = "double_blocks.#"

HUNYUAN_VIDEO_15 = f"""
{_D}.img_attn_{{q,k,v,proj}} = {_T}.attn.{{to_q,to_k,to_v,to_out.0}}
{_D}.txt_attn_{{q,k,v,proj}} = {_T}.attn.{{add_q_proj,add_k_proj,add_v_proj,to_add_out}}
{_D}.{{img,txt}}_mod.linear = {_T}.{{norm1,norm1_context}}.linear
{_D}.img_mlp.fc{{1,2}} = {_T}.ff.net.{{0.proj,2}}
{_D}.txt_mlp.fc{{1,2}} = {_T}.ff_context.net.{{0.proj,2}}
img_in.proj = x_embedder.proj
vision_in.proj.{{1,3}} = image_embedder.linear_{{1,2}}
byt5_in.fc{{1,2,3}} = context_embedder_2.linear_{{1,2,3}}
time_in.mlp.{{0,2}} = time_embed.timestep_embedder.linear_{{1,2}}
{HUNYUAN_TEXT}
final_layer.linear = proj_out
final_layer.adaLN_modulation.1 = norm_out.linear @swap
"""
