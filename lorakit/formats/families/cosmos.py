"""Cosmos and Anima, in their own names and in those of Diffusers; and what Anima has between its
text encoder and its transformer, which is a part of the latter in its own code.

Source of the names: huggingface/diffusers, src/diffusers/loaders/lora_conversion_utils.py and
src/diffusers/models/condition_embedders/condition_embedder_anima.py
"""

_T = "transformer_blocks.#"
_ATTENTION = "{q_proj,k_proj,v_proj,output_proj}"
COSMOS = f"""
blocks.#.self_attn.{_ATTENTION} = {_T}.attn1.{{to_q,to_k,to_v,to_out.0}}
blocks.#.cross_attn.{_ATTENTION} = {_T}.attn2.{{to_q,to_k,to_v,to_out.0}}
blocks.#.mlp.layer{{1,2}} = {_T}.ff.net.{{0.proj,2}}
blocks.#.adaln_modulation_self_attn.{{1,2}} = {_T}.norm1.linear_{{1,2}}
blocks.#.adaln_modulation_cross_attn.{{1,2}} = {_T}.norm2.linear_{{1,2}}
blocks.#.adaln_modulation_mlp.{{1,2}} = {_T}.norm3.linear_{{1,2}}
x_embedder.proj.1 = patch_embed.proj
t_embedder.1.linear_{{1,2}} = time_embed.t_embedder.linear_{{1,2}}
final_layer.adaln_modulation.{{1,2}} = norm_out.linear_{{1,2}}
final_layer.linear = proj_out
"""
TEXT_CONDITIONER = """
blocks.#.self_attn.{q,k,v,o}_proj
blocks.#.cross_attn.{q,k,v,o}_proj
blocks.#.mlp.0
blocks.#.mlp.2
in_proj
out_proj
embed
"""
