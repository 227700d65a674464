"""FLUX.1, 2 and 3 and Chroma: transformers of black-forest-labs/flux and of Diffusers."""

LINEAR1 = "single_transformer_blocks.#.{attn.to_q+attn.to_k+attn.to_v+proj_mlp}"
_BLOCKS = f"""
double_blocks.#.img_attn.qkv = transformer_blocks.#.attn.{{to_q+to_k+to_v}}
double_blocks.#.txt_attn.qkv = transformer_blocks.#.attn.{{add_q_proj+add_k_proj+add_v_proj}}
double_blocks.#.{{img,txt}}_attn.proj = transformer_blocks.#.attn.{{to_out.0,to_add_out}}
double_blocks.#.{{img,txt}}_mlp.0 = transformer_blocks.#.{{ff,ff_context}}.net.0.proj @rows-4/1
double_blocks.#.{{img,txt}}_mlp.2 = transformer_blocks.#.{{ff,ff_context}}.net.2 @rows-1/4
single_blocks.#.linear1 = {LINEAR1} @rows-7/1
single_blocks.#.linear2 = single_transformer_blocks.#.proj_out @rows-1/5
img_in = x_embedder
txt_in = context_embedder
final_layer.linear = proj_out
"""
_NORMS = "{query,key}_norm"  # which control files take the place of
FLUX = f"""{_BLOCKS}
double_blocks.#.{{img,txt}}_mod.lin = transformer_blocks.#.{{norm1,norm1_context}}.linear
single_blocks.#.modulation.lin = single_transformer_blocks.#.norm.linear
time_in.{{in,out}}_layer = time_text_embed.timestep_embedder.linear_{{1,2}}
vector_in.{{in,out}}_layer = time_text_embed.text_embedder.linear_{{1,2}}
guidance_in.{{in,out}}_layer = time_text_embed.guidance_embedder.linear_{{1,2}}
final_layer.adaLN_modulation.1 = norm_out.linear @swap
single_blocks.#.linear1_qkv = single_transformer_blocks.#.attn.{{to_q+to_k+to_v}}
double_blocks.#.img_attn.norm.{_NORMS} = transformer_blocks.#.attn.norm_{{q,k}}
double_blocks.#.txt_attn.norm.{_NORMS} = transformer_blocks.#.attn.norm_added_{{q,k}}
single_blocks.#.norm.{_NORMS} = single_transformer_blocks.#.attn.norm_{{q,k}}
"""
CHROMA = f"""{_BLOCKS}
distilled_guidance_layer.{{in,out}}_proj
distilled_guidance_layer.layers.#.in_layer = distilled_guidance_layer.layers.#.linear_1
distilled_guidance_layer.layers.#.out_layer = distilled_guidance_layer.layers.#.linear_2
"""
FLUX2 = """
double_blocks.#.img_attn.qkv = transformer_blocks.#.attn.{to_q+to_k+to_v}
double_blocks.#.txt_attn.qkv = transformer_blocks.#.attn.{add_q_proj+add_k_proj+add_v_proj}
double_blocks.#.{img,txt}_attn.proj = transformer_blocks.#.attn.{to_out.0,to_add_out}
double_blocks.#.{img,txt}_mlp.0 = transformer_blocks.#.{ff,ff_context}.linear_in @rows-6/1
double_blocks.#.{img,txt}_mlp.2 = transformer_blocks.#.{ff,ff_context}.linear_out @rows-1/3
single_blocks.#.linear1 = single_transformer_blocks.#.attn.to_qkv_mlp_proj @rows-9/1
single_blocks.#.linear2 = single_transformer_blocks.#.attn.to_out @rows-1/4
double_stream_modulation_{img,txt}.lin = double_stream_modulation_{img,txt}.linear
single_stream_modulation.lin = single_stream_modulation.linear
time_in.{in,out}_layer = time_guidance_embed.timestep_embedder.linear_{1,2}
guidance_in.{in,out}_layer = time_guidance_embed.guidance_embedder.linear_{1,2}
img_in = x_embedder
txt_in = context_embedder
final_layer.linear = proj_out
final_layer.adaLN_modulation.1 = norm_out.linear @swap
"""


def _flux3(block: str, name: str) -> str:
    return f"""
{block}.#.{{q_proj,k_proj,v_proj}} = {name}.#.attn.{{to_q,to_k,to_v}}
{block}.#.{{attn_out,mlp_in,mlp_out}} = {name}.#.{{attn.to_out.0,ff.linear_in,ff.linear_out}}
"""


_FLUX3 = {
    "content_mode_blocks.image": "mode_blocks.image",
    "content_mode_blocks.image_cond": "mode_blocks.image_cond",
    "txt_mode_blocks": "txt_mode_blocks",
    "single_blocks": "single_transformer_blocks",
}
_MODES = [f"{x}_stream_modulations.{{image,image_cond,txt}}" for x in ("early", "single")]
FLUX3 = f"""
{"".join(_flux3(a, b) for a, b in _FLUX3.items())}
{_MODES[0]}.lin = {_MODES[0]}.linear
{_MODES[1]}.lin = {_MODES[1]}.linear
emb_in.{{image,image_cond}} = x_embedders.{{image,image_cond}}
txt_in = context_embedder
time_in.{{in,out}}_layer = timestep_embedder.linear_{{1,2}}
ref_time_in.{{in,out}}_layer = target_timestep_embedder.linear_{{1,2}}
final_layer.image.linear = proj_out
final_layer.image.adaLN_modulation.1 = norm_out.linear @swap
"""
