"""AuraFlow and Sana.

Source of the names: huggingface/diffusers, src/diffusers/loaders/single_file_utils.py
"""

_DOUBLE, _SINGLE = "double_layers.#", "single_layers.#"
_JOINT, _ALONE = "joint_transformer_blocks.#", "single_transformer_blocks.#"

AURA_FLOW = f"""
{_DOUBLE}.attn.{{w2q,w2k,w2v,w2o}} = {_JOINT}.attn.{{to_q,to_k,to_v,to_out.0}}
{_DOUBLE}.attn.{{w1q,w1k,w1v,w1o}} = {_JOINT}.attn.{{add_q_proj,add_k_proj,add_v_proj,to_add_out}}
{_DOUBLE}.mlpX.{{c_fc1,c_fc2,c_proj}} = {_JOINT}.ff.{{linear_1,linear_2,out_projection}}
{_DOUBLE}.mlpC.{{c_fc1,c_fc2,c_proj}} = {_JOINT}.ff_context.{{linear_1,linear_2,out_projection}}
{_DOUBLE}.{{modX,modC}}.1 = {_JOINT}.{{norm1,norm1_context}}.linear
{_SINGLE}.attn.{{w1q,w1k,w1v,w1o}} = {_ALONE}.attn.{{to_q,to_k,to_v,to_out.0}}
{_SINGLE}.mlp.{{c_fc1,c_fc2,c_proj}} = {_ALONE}.ff.{{linear_1,linear_2,out_projection}}
{_SINGLE}.modCX.1 = {_ALONE}.norm1.linear
t_embedder.mlp.{{0,2}} = time_step_proj.linear_{{1,2}}
cond_seq_linear = context_embedder
init_x_linear = pos_embed.proj
modF.1 = norm_out.linear @swap
final_linear = proj_out
"""

_SANA = "transformer_blocks.#"

SANA = f"""
blocks.#.attn.qkv = {_SANA}.attn1.{{to_q+to_k+to_v}}
blocks.#.attn.proj = {_SANA}.attn1.to_out.0
blocks.#.cross_attn.q_linear = {_SANA}.attn2.to_q
blocks.#.cross_attn.kv_linear = {_SANA}.attn2.{{to_k+to_v}} @even
blocks.#.cross_attn.proj = {_SANA}.attn2.to_out.0
blocks.#.mlp.{{inverted,depth,point}}_conv.conv = {_SANA}.ff.conv_{{inverted,depth,point}}
t_embedder.mlp.{{0,2}} = time_embed.emb.timestep_embedder.linear_{{1,2}}
t_block.1 = time_embed.linear
y_embedder.y_proj.fc{{1,2}} = caption_projection.linear_{{1,2}}
x_embedder.proj = patch_embed.proj
final_layer.linear = proj_out
"""
