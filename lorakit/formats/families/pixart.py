"""PixArt (Alpha and Sigma), in its own names and in those of Diffusers.

Source of the names: huggingface/diffusers, scripts/convert_pixart_sigma_to_diffusers.py
"""

_T = "transformer_blocks.#"
_EMBEDDERS = "{timestep,resolution,aspect_ratio}_embedder"

PIXART = f"""
blocks.#.attn.qkv = {_T}.attn1.{{to_q+to_k+to_v}}
blocks.#.attn.proj = {_T}.attn1.to_out.0
blocks.#.cross_attn.q_linear = {_T}.attn2.to_q
blocks.#.cross_attn.kv_linear = {_T}.attn2.{{to_k+to_v}} @even
blocks.#.cross_attn.proj = {_T}.attn2.to_out.0
blocks.#.mlp.fc{{1,2}} = {_T}.ff.net.{{0.proj,2}}
x_embedder.proj = pos_embed.proj @conv-2
{{t,csize,ar}}_embedder.mlp.0 = adaln_single.emb.{_EMBEDDERS}.linear_1
{{t,csize,ar}}_embedder.mlp.2 = adaln_single.emb.{_EMBEDDERS}.linear_2
t_block.1 = adaln_single.linear
y_embedder.y_proj.fc{{1,2}} = caption_projection.linear_{{1,2}}
final_layer.linear = proj_out
"""
