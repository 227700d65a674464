"""Small LoRA files of every family, from the templates: a few numbers for each index, narrow
weights, ranks of two.
"""

import numpy as np
from safetensors.numpy import save_file

from lorakit.adapter.files.reading import open_file
from lorakit.formats.families import FAMILIES
from lorakit.formats.templates import denoiser, encoder, filled
from lorakit.verbs.reformat.projecting import as_plain

WIDTH, RANK = 16, 2
INDICES = ("0", "3")


def modules(family):
    """(component, module) of every template, in Diffusers' names."""
    known = FAMILIES[family]
    found = []
    for component, names in [
        (known.component, denoiser(family)),
        *((e.component, encoder(e.kind)) for e in known.encoders),
    ]:
        for template, row, _ in names.templates("diffusers"):
            if not row.bare and not row.original.endswith("linear1_qkv"):
                found += [(component, n) for n in _numbered(template)]
    return list(dict.fromkeys(found))


def _numbered(template):
    holes = template.count("#")
    return [filled(template, (i,) * holes) for i in (INDICES if holes else ("",))]


def height(family, module):
    """The output rows: those of parts of fused projections are as real ones are."""
    if module.endswith("proj_mlp"):
        return 4 * WIDTH
    if family == "lumina2" and module.endswith(("to_k", "to_v")):
        return WIDTH // 2
    if family == "sd3" and module.endswith("3.norm1_context.linear"):
        return 2 * WIDTH  # the last block
    if module.endswith(("norm1.linear", "norm1_context.linear")):
        return 6 * WIDTH
    return 2 * WIDTH if module.endswith("norm_out.linear") else WIDTH


def width(family, module):
    cross = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
    if family in cross and module.endswith(("attn2.to_k", "attn2.to_v")):
        return cross[family]
    return WIDTH


def drawn(name, *shape, dtype="float32"):
    seed = sum(map(ord, name)) + len(name) * 1000
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def pairs(family, *, dtype="float32"):
    """Factors of every module: {(component, module): (a, b)}."""
    found = {}
    for component, module in modules(family):
        name = f"{component}.{module}"
        shape = (RANK, width(family, module)), (height(family, module), RANK)
        found[component, module] = tuple(
            drawn(name + x, *s, dtype=dtype) for x, s in zip("ab", shape, strict=True)
        )
    return found


def diffusers_file(family, **options):
    """The tensors of a file in the names of Diffusers."""
    return {
        f"{component}.{module}.lora_{x}.weight": values
        for (component, module), both in pairs(family, **options).items()
        for x, values in zip("AB", both, strict=True)
    }


SHARED = {
    "lora_unet_img_in.lora_down.weight": (RANK, 8),
    "lora_unet_img_in.lora_up.weight": (8, RANK),
}


def kohya(path, tensors, alpha=1.0, **more):
    rng = np.random.default_rng(1)
    made = {n: rng.standard_normal(s).astype("f4") for n, s in tensors.items()}
    modules = dict.fromkeys(n.partition(".")[0] for n in tensors)
    made |= {f"{m}.alpha": np.array(alpha, "f4") for m in modules}
    save_file({**made, **more}, path, metadata={"ss_network_module": "networks.lora"})
    return path


def dense(delta):
    delta = as_plain(delta)
    a, b = (delta.tensors[r].read().astype("f8") for r in "ab")
    return delta.scaling * b.reshape(len(b), -1) @ a.reshape(len(a), -1)


def updates(path, **options):
    return {(d.component, d.module): dense(d) for d in open_file(path, **options).deltas}


def weights(out):
    return out if out.suffix else next(out.glob("*.safetensors"))
