"""Files that other converters get wrong, the algebra of what they mean, and a record of the peers.

Sources of the faults: huggingface/diffusers, ostris/ai-toolkit, kohya-ss/musubi-tuner and
huggingface/peft as they were in November 2026; what stands here is what ours makes of their input.
"""

import json
import logging
import re

import numpy as np
from safetensors.numpy import load_file, save_file

import lorakit

SCRATCH = lorakit.RunOptions(sync=False)
KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def pair(module, out, inner, *, rank=2, alpha=None, names=KOHYA, seed=0):
    """The tensors of one module: A, B and where one is given the alpha."""
    seed += sum(map(ord, module))
    down, up = names
    found = {
        module + down: drawn(seed, rank, inner),
        module + up: drawn(seed + 1, out, rank),
    }
    return found | ({} if alpha is None else {f"{module}.alpha": np.array(alpha, "f4")})


def update(tensors, module, *, names=KOHYA):
    """alpha / rank * B @ A of a module, in float64: (out, in)."""
    a, b = (tensors[module + n].astype("f8") for n in names)
    alpha = tensors.get(f"{module}.alpha")
    scaling = 1.0 if alpha is None else float(alpha) / len(a)
    return scaling * b.reshape(len(b), -1) @ a.reshape(len(a), -1)


def saved(path, tensors, **metadata):
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    return path


def converted(path, out, to, **options):
    """The report, and the tensors that were written."""
    report = lorakit.convert(path, out, to=to, run=SCRATCH, **options)
    files = sorted(out.rglob("*.safetensors")) if out.is_dir() else [out]
    return report, {n: t for f in files for n, t in load_file(f).items()}


def folded(path, folder, **options):
    """The updates of a file by module in Diffusers' names, scalings being in the factors."""
    out = folder / "folded"
    _, tensors = converted(path, out, "diffusers", alpha="fold", **options)
    modules = {n.removesuffix(PEFT[0]) for n in tensors if n.endswith(PEFT[0])}
    return {m: update(tensors, m, names=PEFT) for m in modules}


def same(found, expected, *, tolerance=1e-5):
    assert set(found) == set(expected)
    for module, delta in expected.items():
        size = np.abs(delta).max()
        np.testing.assert_allclose(found[module], delta, rtol=0, atol=tolerance * size)


def scalings(folder):
    """What a PEFT config says that a module is multiplied with: a function of its name."""
    config = json.loads((folder / "adapter_config.json").read_text())

    def first(kind, module, otherwise):
        """The rule of PEFT: the first pattern that the end of the name matches."""
        patterns = config[f"{kind}_pattern"].items()
        return next((v for p, v in patterns if re.match(rf"(.*\.)?({p})$", module)), otherwise)

    def scaling(module, rank):
        assert first("rank", module, config["r"]) == rank
        return first("alpha", module, config["lora_alpha"]) / rank

    return scaling


def halves_swapped(delta):
    half = len(delta) // 2
    return np.concatenate([delta[half:], delta[:half]])


class Peer:
    """What a peer makes of a file. It never fails a test: the next release may be right."""

    def __init__(self, record):
        self.record = record

    def holds(self, fault, wrong):
        """Note whether the fault is there; what a peer stops with counts as one."""
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        try:
            found = bool(wrong())
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
            found = f"{type(e).__name__}: {str(e)[:80]}"
        self.record(f"diffusers {fault}", str(found))


# Parts of the fused projections of FLUX.1, by the end of the name in the original code.
FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
PLAIN = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
}


def placed_in_flux(kind, number, end, delta):
    """The update of a module of the original code as those of Diffusers' modules, by slicing rows.

    `kind` is "double" or "single", `end` what follows the block's number.
    """
    block = f"transformer.{'single_' if kind == 'single' else ''}transformer_blocks.{number}"
    if end in PLAIN:
        return {f"{block}.{PLAIN[end]}": delta}
    width = delta.shape[1]
    stops = [width, 2 * width, 3 * width][: len(FUSED[end]) - 1]
    rows = np.split(delta, stops)
    return {f"{block}.{part}": r for part, r in zip(FUSED[end], rows, strict=True)}
