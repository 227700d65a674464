"""Krea 2, Ideogram 4 and Qwen-Image 2.1, in their own names and in those of Diffusers.

Source of the names: huggingface/diffusers, src/diffusers/loaders/single_file_utils.py and
lora_conversion_utils.py
"""


def _krea(block: str, name: str) -> str:
    return f"""
{block}.#.attn.{{wq,wk,wv,wo,gate}} = {name}.#.attn.{{to_q,to_k,to_v,to_out.0,to_gate}}
{block}.#.mlp.{{gate,up,down}} = {name}.#.ff.{{gate,up,down}}
"""


_FUSION = ("layerwise_blocks", "refiner_blocks")
KREA2 = f"""
{_krea("blocks", "transformer_blocks")}
{"".join(_krea(f"txtfusion.{b}", f"text_fusion.{b}") for b in _FUSION)}
txtfusion.projector = text_fusion.projector
first = img_in
tmlp.{{0,2}} = time_embed.linear_{{1,2}}
tproj.1 = time_mod_proj
txtmlp.{{1,3}} = txt_in.linear_{{1,2}}
last.linear = final_layer.linear
"""

IDEOGRAM4 = """
layers.#.attention.qkv = layers.#.attention.{to_q+to_k+to_v}
layers.#.attention.o = layers.#.attention.to_out.0
layers.#.feed_forward.w{1,2,3}
layers.#.adaln_modulation
{input_proj,llm_cond_proj,adaln_proj}
t_embedding.mlp_{in,out}
final_layer.{linear,adaln_modulation}
"""

_T = "transformer_blocks.#"
QWEN_IMAGE_21 = f"""
{_T}.attn.{{to_q,to_k,to_v,to_out.0}}
{_T}.img_mlp.gate_up = {_T}.img_mlp.{{gate_layer+proj}} @even
{_T}.img_mlp.out
time_text_embed.timestep_embedder.linear_{{1,2}}
txt_in.{{in,out}}_layer
modulation.1
img_in
norm_out.linear
proj_out
"""
