"""What the tensors of an adapted module are called, in every spelling that files are found in.

A key is the name of a module, and an ending that says the algorithm and the role. The names of the
roles here are those of `lorakit.adapter.delta.Delta`.
"""

import re
from dataclasses import dataclass

from lorakit.formats.peft import unwrapped

# Ending -> (algorithm, role). "" is for what any algorithm may have.
ENDINGS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        (
            ".lora_down.weight",
            ".lora_A.weight",
            ".lora_A",
            ".lora.down.weight",
            "_lora.down.weight",
            ".lora_linear_layer.down.weight",
            ".lora_a.weight",
            ".lora_a",
            ".lora_embedding_A",
        ),
        ("lora", "a"),
    ),
    **dict.fromkeys(
        (
            ".lora_up.weight",
            ".lora_B.weight",
            ".lora_B",
            ".lora.up.weight",
            "_lora.up.weight",
            ".lora_linear_layer.up.weight",
            ".lora_b.weight",
            ".lora_b",
            ".lora_embedding_B",
        ),
        ("lora", "b"),
    ),
    ".lora_mid.weight": ("lora", "mid"),
    ".lora_E": ("lora", "diag"),
    ".lora_B.bias": ("", "bias"),
    ".diff_b": ("", "bias"),
    **dict.fromkeys((".alpha", ".lora_alpha"), ("", "alpha")),
    **dict.fromkeys(
        (
            ".dora_scale",
            ".lora_magnitude_vector",
            ".lora_magnitude_vector.weight",
            ".magnitude",
        ),
        ("", "magnitude"),
    ),
    **{f".hada_w{n}_{x}": ("loha", f"w{n}_{x}") for n in (1, 2) for x in "ab"},
    **{f".hada_t{n}": ("loha", f"t{n}") for n in (1, 2)},
    **{f".lokr_w{n}": ("lokr", f"w{n}") for n in (1, 2)},
    **{f".lokr_w{n}_{x}": ("lokr", f"w{n}_{x}") for n in (1, 2) for x in "ab"},
    ".lokr_t2": ("lokr", "t2"),
    **{f".{x}{n}.weight": ("glora", f"{x}{n}") for n in (1, 2) for x in "ab"},
    ".bm.weight": ("glora", "bm"),
    ".oft_blocks": ("oft", "blocks"),
    ".rescale": ("oft", "rescale"),
    ".oft_R.weight": ("oft_v2", "blocks"),
    ".on_input": ("ia3", "on_input"),
    ".diff": ("full", "diff"),
    ".set_weight": ("set", "value"),
    ".w_norm": ("norm", "weight"),
    ".b_norm": ("norm", "bias"),
}
# Endings that mean something beside another one only: (algorithm, role) -> ending.
BESIDE = {("ia3", "weight"): ".weight"}
# Names of old attention processors -> the layers that they stand for.
_PROCESSOR = re.compile(r"(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_CLIP = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_XLABS = re.compile(
    r"^(?P<block>(?P<kind>double|single)_blocks\.\d+)\.processor\."
    r"(?P<what>qkv|proj)_lora(?P<stream>[12]?)\.(?P<way>down|up)\.weight$"
)
_STREAMS = {"1": "img", "2": "txt"}
# Norms of queries and keys that control files have in whole, in their own names and in Diffusers'.
_NORM = re.compile(
    r"(?P<own>.*\.norm\.(?:query|key)_norm)\.scale"
    r"|(?P<diffusers>transformer\..*\.attn\.norm_(?:added_)?[qk])\.weight"
)
_MODULATION = ".diff_m"  # LightX2V's difference of a parameter that is called so
_BY_LENGTH = sorted(ENDINGS, key=len, reverse=True)
_ADAPTER = re.compile(
    r"\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)\.(?!weight$|bias$)\w+(?=\.|$)"
)
WAYS = {"down": "a", "up": "b"}


@dataclass(frozen=True)
class Key:
    """What a tensor is: the module in the file's spelling, the algorithm ("" if any) and role."""

    module: str
    algo: str
    role: str


def parse_key(name: str) -> Key | None:
    """What the tensor of this name is; None for what is no part of an adapted module."""
    if found := _XLABS.match(name):
        return Key(_xlabs(found), "lora", WAYS[found["way"]])
    if old := _PROCESSOR.search(name):
        text = ".self_attn." in f"{name[: old.start()]}."
        layer = (_CLIP if text else _ATTENTION)[old[1]]
        return Key(f"{name[: old.start()]}.{layer}", "lora", WAYS[old[2]])
    if name.endswith(_MODULATION):
        return Key(f"{name.removesuffix(_MODULATION)}.modulation", "full", "diff")
    name = _ADAPTER.sub(r".\1", unwrapped(name))  # the name of the adapter, in raw dumps
    ending = next((e for e in _BY_LENGTH if name.endswith(e)), None)
    if ending is None:
        return None
    return Key(name.removesuffix(ending), *ENDINGS[ending])


def parse_norm(name: str) -> Key | None:
    """What a tensor is that beside factors takes the place of a norm, and alone is a model's own;
    None for another.
    """
    found = _NORM.fullmatch(name)
    return Key(found["own"] or found["diffusers"], "set", "value") if found else None


def _xlabs(found: re.Match[str]) -> str:
    if found["kind"] == "single":
        return f"{found['block']}.{'linear1_qkv' if found['what'] == 'qkv' else 'linear2_attn'}"
    return f"{found['block']}.{_STREAMS[found['stream'] or '1']}_attn.{found['what']}"
