"""Models that have one name for a module in their own code and in Diffusers: HiDream, CogVideoX,
CogView 3 and 4, Kandinsky 5 and Ernie.

Source of the names: huggingface/diffusers, src/diffusers/models/transformers
"""


def _hidream(block: str) -> str:
    return f"""
{block}.#.block.adaLN_modulation.1
{block}.#.block.attn1.{{to_q,to_k,to_v,to_out}}
{block}.#.block.ff_i.shared_experts.w{{1,2,3}}
{block}.#.block.ff_i.experts.#.w{{1,2,3}}
"""


HIDREAM = f"""
{"".join(map(_hidream, ("double_stream_blocks", "single_stream_blocks")))}
double_stream_blocks.#.block.attn1.{{to_q_t,to_k_t,to_v_t,to_out_t}}
double_stream_blocks.#.block.ff_t.w{{1,2,3}}
t_embedder.timestep_embedder.linear_{{1,2}}
p_embedder.pooled_embedder.linear_{{1,2}}
caption_projection.#.linear
x_embedder.proj
final_layer.linear
final_layer.adaLN_modulation.1
"""

_T = "transformer_blocks.#"
_COG = f"""
{_T}.attn1.{{to_q,to_k,to_v,to_out.0}}
{_T}.ff.net.{{0.proj,2}}
{_T}.norm1.linear
patch_embed.{{proj,text_proj}}
norm_out.linear
proj_out
"""
COGVIDEOX = f"""{_COG}
{_T}.norm2.linear
{{time_embedding,ofs_embedding}}.linear_1
{{time_embedding,ofs_embedding}}.linear_2
"""
COGVIEW = f"""{_COG}
time_condition_embed.{{timestep,condition}}_embedder.linear_1
time_condition_embed.{{timestep,condition}}_embedder.linear_2
"""


def _kandinsky(kind: str) -> str:
    return f"""
{kind}_transformer_blocks.#.{kind}_modulation.out_layer
{kind}_transformer_blocks.#.self_attention.{{to_query,to_key,to_value,out_layer}}
{kind}_transformer_blocks.#.feed_forward.{{in,out}}_layer
"""


KANDINSKY5 = f"""
{"".join(map(_kandinsky, ("text", "visual")))}
visual_transformer_blocks.#.cross_attention.{{to_query,to_key,to_value,out_layer}}
{{time,text,pooled_text,visual}}_embeddings.in_layer
time_embeddings.out_layer
out_layer.modulation.out_layer
out_layer.out_layer
"""

ERNIE = """
layers.#.self_attention.{to_q,to_k,to_v,to_out.0}
layers.#.mlp.{gate_proj,up_proj,linear_fc2}
x_embedder.proj
text_proj
time_embedding.linear_{1,2}
adaLN_modulation.1
final_norm.linear
final_linear
"""
