"""Text encoders in the names of transformers: CLIP (in both spellings, and as open_clip), T5, and
language models (Qwen 3, Gemma 2).
"""

_CLIP = "text_model.encoder.layers.#"
CLIP = f"""
{_CLIP}.self_attn.{{q,k,v,out}}_proj
{_CLIP}.mlp.fc{{1,2}}
text_model.embeddings.token_embedding
text_model.embeddings.position_embedding
text_projection
{_CLIP}.layer_norm1
{_CLIP}.layer_norm2
text_model.final_layer_norm
"""
CLIP_FLAT = (("text_model.", ""),)  # transformers 5
# Source: mlfoundations/open_clip, src/open_clip/transformer.py
_OPEN = "transformer.resblocks.#"
OPEN_CLIP = f"""
{_OPEN}.attn.in_proj = {_CLIP}.self_attn.{{q_proj+k_proj+v_proj}}
{_OPEN}.attn.out_proj = {_CLIP}.self_attn.out_proj
{_OPEN}.mlp.{{c_fc,c_proj}} = {_CLIP}.mlp.{{fc1,fc2}}
token_embedding = text_model.embeddings.token_embedding
text_projection @turned
{_OPEN}.ln_{{1,2}} = {_CLIP}.layer_norm{{1,2}}
ln_final = text_model.final_layer_norm
"""
_T5 = "encoder.block.#.layer"
T5 = f"""
{_T5}.0.SelfAttention.{{q,k,v,o}}
{_T5}.1.DenseReluDense.{{wi,wi_0,wi_1,wo}}
shared
"""
LANGUAGE_MODEL = """
layers.#.self_attn.{q,k,v,o}_proj
layers.#.mlp.{gate,up,down}_proj
embed_tokens
"""
IN_CAUSAL = (("layers.", "model.layers."), ("embed_tokens", "model.embed_tokens"))
