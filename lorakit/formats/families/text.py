"""Text encoders in the names of transformers: CLIP (both spellings) and T5."""

_CLIP = "text_model.encoder.layers.#"
CLIP = f"""
{_CLIP}.self_attn.{{q,k,v,out}}_proj = {_CLIP}.self_attn.{{q,k,v,out}}_proj
{_CLIP}.mlp.fc{{1,2}} = {_CLIP}.mlp.fc{{1,2}}
text_model.embeddings.token_embedding
text_model.embeddings.position_embedding
text_projection
"""
CLIP_FLAT = (("text_model.", ""),)  # transformers 5
_T5 = "encoder.block.#.layer"
T5 = f"""
{_T5}.0.SelfAttention.{{q,k,v,o}} = {_T5}.0.SelfAttention.{{q,k,v,o}}
{_T5}.1.DenseReluDense.{{wi,wi_0,wi_1,wo}} = {_T5}.1.DenseReluDense.{{wi,wi_0,wi_1,wo}}
shared
"""
