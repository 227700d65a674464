"""Image transformers but for FLUX: SD3, Qwen-Image, Z-Image and Lumina 2."""

_T = "transformer_blocks.#"
SD3 = f"""
joint_blocks.#.x_block.attn.qkv = {_T}.attn.{{to_q+to_k+to_v}}
joint_blocks.#.x_block.attn2.qkv = {_T}.attn2.{{to_q+to_k+to_v}}
joint_blocks.#.context_block.attn.qkv = {_T}.attn.{{add_q_proj+add_k_proj+add_v_proj}}
joint_blocks.#.{{x_block,context_block}}.attn.proj = {_T}.attn.{{to_out.0,to_add_out}}
joint_blocks.#.x_block.attn2.proj = {_T}.attn2.to_out.0
joint_blocks.#.x_block.mlp.fc{{1,2}} = {_T}.ff.net.{{0.proj,2}}
joint_blocks.#.context_block.mlp.fc{{1,2}} = {_T}.ff_context.net.{{0.proj,2}}
joint_blocks.#.x_block.adaLN_modulation.1 = {_T}.norm1.linear
joint_blocks.#.context_block.adaLN_modulation.1 = {_T}.norm1_context.linear @swap-last
x_embedder.proj = pos_embed.proj @conv-2
context_embedder
t_embedder.mlp.{{0,2}} = time_text_embed.timestep_embedder.linear_{{1,2}}
y_embedder.mlp.{{0,2}} = time_text_embed.text_embedder.linear_{{1,2}}
final_layer.linear = proj_out
final_layer.adaLN_modulation.1 = norm_out.linear @swap
"""
QWEN_IMAGE = f"""
{_T}.attn.to_{{q,k,v}}
{_T}.attn.add_{{q,k,v}}_proj
{_T}.attn.{{to_out.0,to_add_out}}
{_T}.{{img,txt}}_mod.1
{_T}.img_mlp.net.{{0.proj,2}}
{_T}.txt_mlp.net.{{0.proj,2}}
time_text_embed.timestep_embedder.linear_1
time_text_embed.timestep_embedder.linear_2
img_in
txt_in
norm_out.linear
proj_out
"""


def _z_image(block: str) -> str:
    return f"""
{block}.#.attention.qkv = {block}.#.attention.{{to_q+to_k+to_v}} @rows-3/1
{block}.#.attention.out = {block}.#.attention.to_out.0
{block}.#.feed_forward.w{{1,3}} @rows-8/3
{block}.#.feed_forward.w2 @rows-3/8
"""


Z_IMAGE = f"""
{"".join(map(_z_image, ("layers", "noise_refiner", "context_refiner")))}
layers.#.adaLN_modulation.0
noise_refiner.#.adaLN_modulation.0
t_embedder.mlp.0
t_embedder.mlp.2
cap_embedder.1
x_embedder = all_x_embedder.2-1
final_layer.linear = all_final_layer.2-1.linear
final_layer.adaLN_modulation.1 = all_final_layer.2-1.adaLN_modulation.1
"""


def _lumina2(block: str) -> str:
    return f"""
{block}.#.attention.qkv = {block}.#.attn.{{to_q+to_k+to_v}} @grouped
{block}.#.attention.out = {block}.#.attn.to_out.0
{block}.#.feed_forward.w{{1,2,3}} = {block}.#.feed_forward.linear_{{1,2,3}}
"""


LUMINA2 = f"""
{"".join(map(_lumina2, ("layers", "noise_refiner", "context_refiner")))}
{{layers,noise_refiner}}.#.adaLN_modulation.1 = {{layers,noise_refiner}}.#.norm1.linear
x_embedder
t_embedder.mlp.{{0,2}} = time_caption_embed.timestep_embedder.linear_{{1,2}}
cap_embedder.1 = time_caption_embed.caption_embedder.1
final_layer.linear = norm_out.linear_2
final_layer.adaLN_modulation.1 = norm_out.linear_1
"""
