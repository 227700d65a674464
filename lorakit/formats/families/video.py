"""Video: Wan 2.x, HunyuanVideo and LTX, in their own names and in those of Diffusers."""

from lorakit.formats.families.flux import LINEAR1


def _wan(block: str) -> str:
    return f"""
{block}.#.self_attn.{{q,k,v,o}} = {block}.#.attn1.{{to_q,to_k,to_v,to_out.0}}
{block}.#.cross_attn.{{q,k,v,o}} = {block}.#.attn2.{{to_q,to_k,to_v,to_out.0}}
{block}.#.cross_attn.{{k_img,v_img}} = {block}.#.attn2.{{add_k_proj,add_v_proj}}
{block}.#.ffn.{{0,2}} = {block}.#.ffn.net.{{0.proj,2}}
{block}.#.modulation = {block}.#.scale_shift_table @bare
{block}.#.norm3 = {block}.#.norm2
{block}.#.self_attn.norm_{{q,k}} = {block}.#.attn1.norm_{{q,k}}
{block}.#.cross_attn.{{norm_q,norm_k,norm_k_img}} = {block}.#.attn2.{{norm_q,norm_k,norm_added_k}}
"""


# What Wan Animate has beside Wan.
_FACE = "face_adapter.fuser_blocks.#"
_ANIMATE = f"""
pose_patch_embedding
{_FACE}.linear1_kv = face_adapter.#.{{to_k+to_v}} @even
{_FACE}.{{linear1_q,linear2}} = face_adapter.#.{{to_q,to_out}}
{_FACE}.{{q_norm,k_norm}} = face_adapter.#.{{norm_q,norm_k}}
face_encoder.{{conv1_local,conv2,conv3}}.conv = face_encoder.{{conv1_local,conv2,conv3}}
face_encoder.out_proj
"""
WAN = f"""
{_wan("blocks")}
{_wan("vace_blocks")}
vace_blocks.#.{{before_proj,after_proj}} = vace_blocks.#.{{proj_in,proj_out}}
vace_patch_embedding
time_embedding.{{0,2}} = condition_embedder.time_embedder.linear_{{1,2}}
text_embedding.{{0,2}} = condition_embedder.text_embedder.linear_{{1,2}}
time_projection.1 = condition_embedder.time_proj
img_emb.proj.{{1,3}} = condition_embedder.image_embedder.ff.net.{{0.proj,2}}
img_emb.proj.{{0,4}} = condition_embedder.image_embedder.{{norm1,norm2}}
patch_embedding
head.head = proj_out
head.modulation = scale_shift_table @bare
{_ANIMATE}
"""
_TEXT = "context_embedder.token_refiner.refiner_blocks.#"
_REFINER = "txt_in.individual_token_refiner.blocks.#"
# The rows of the text's refiner, which HunyuanVideo 1.5 has too.
HUNYUAN_TEXT = f"""
txt_in.input_embedder = context_embedder.proj_in
txt_in.t_embedder.mlp.{{0,2}} = context_embedder.time_text_embed.timestep_embedder.linear_{{1,2}}
txt_in.c_embedder.linear_{{1,2}} = context_embedder.time_text_embed.text_embedder.linear_{{1,2}}
{_REFINER}.self_attn_qkv = {_TEXT}.attn.{{to_q+to_k+to_v}}
{_REFINER}.self_attn_proj = {_TEXT}.attn.to_out.0
{_REFINER}.mlp.fc{{1,2}} = {_TEXT}.ff.net.{{0.proj,2}}
{_REFINER}.adaLN_modulation.1 = {_TEXT}.norm_out.linear
"""
HUNYUAN_VIDEO = f"""
double_blocks.#.img_attn_qkv = transformer_blocks.#.attn.{{to_q+to_k+to_v}}
double_blocks.#.txt_attn_qkv = transformer_blocks.#.attn.{{add_q_proj+add_k_proj+add_v_proj}}
double_blocks.#.{{img,txt}}_attn_proj = transformer_blocks.#.attn.{{to_out.0,to_add_out}}
double_blocks.#.{{img,txt}}_mod.linear = transformer_blocks.#.{{norm1,norm1_context}}.linear
double_blocks.#.{{img,txt}}_mlp.fc1 = transformer_blocks.#.{{ff,ff_context}}.net.0.proj @rows-4/1
double_blocks.#.{{img,txt}}_mlp.fc2 = transformer_blocks.#.{{ff,ff_context}}.net.2 @rows-1/4
single_blocks.#.linear1 = {LINEAR1} @rows-7/1
single_blocks.#.linear2 = single_transformer_blocks.#.proj_out @rows-1/5
single_blocks.#.modulation.linear = single_transformer_blocks.#.norm.linear
img_in.proj = x_embedder.proj
{HUNYUAN_TEXT}
time_in.mlp.{{0,2}} = time_text_embed.timestep_embedder.linear_{{1,2}}
vector_in.{{in,out}}_layer = time_text_embed.text_embedder.linear_{{1,2}}
guidance_in.mlp.{{0,2}} = time_text_embed.guidance_embedder.linear_{{1,2}}
final_layer.linear = proj_out
final_layer.adaLN_modulation.1 = norm_out.linear @swap
"""
# How ComfyUI and files made for it spell the names on the left.
HUNYUAN_COMFY = (
    ("_attn_qkv", "_attn.qkv"),
    ("_attn_proj", "_attn.proj"),
    ("_mod.linear", "_mod.lin"),
    ("modulation.linear", "modulation.lin"),
    ("img_mlp.fc1", "img_mlp.0"),
    ("img_mlp.fc2", "img_mlp.2"),
    ("txt_mlp.fc1", "txt_mlp.0"),
    ("txt_mlp.fc2", "txt_mlp.2"),
    (".mlp.fc1", ".mlp.0"),
    (".mlp.fc2", ".mlp.2"),
    ("self_attn_", "self_attn."),
    ("_embedder.mlp.0", "_embedder.in_layer"),
    ("_embedder.mlp.2", "_embedder.out_layer"),
    ("_in.mlp.0", "_in.in_layer"),
    ("_in.mlp.2", "_in.out_layer"),
    ("c_embedder.linear_1", "c_embedder.in_layer"),
    ("c_embedder.linear_2", "c_embedder.out_layer"),
)
_LTX = "transformer_blocks.#"
LTX = f"""
patchify_proj = proj_in
adaln_single.emb.timestep_embedder.linear_{{1,2}} = time_embed.emb.timestep_embedder.linear_{{1,2}}
adaln_single.linear = time_embed.linear
caption_projection.linear_1
caption_projection.linear_2
{_LTX}.attn1.{{to_q,to_k,to_v,to_out.0}}
{_LTX}.attn2.{{to_q,to_k,to_v,to_out.0}}
{_LTX}.ff.net.{{0.proj,2}}
proj_out
"""
