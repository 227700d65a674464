"""The demo's adapters spoiled for the commands that make an adapter of them."""

import json
import shutil
from pathlib import Path

from tests.cli.spoil import CONFIG, LAYER, edit, put, read, tensor, write

COMBINE = ["combine", "style", "detail", "-o", "both"]
RESIZE = ["resize", "style", "-o", "small"]
INIT = ["init", "base", "-o", "fresh", "--rank", "4"]
HEAD = "base_model.model.lm_head.weight"
MAGNITUDE = f"base_model.model.{LAYER}.lora_magnitude_vector"
TO_MLX = ["convert", "style", "-o", "out", "--to", "mlx"]


def whole_differ() -> list[str]:
    """Two adapters that hold a head whole, and differ in it."""
    put(Path("style/adapter_model.safetensors"), {HEAD: tensor((512, 64))})
    info, data = tensor((512, 64))
    put(Path("detail/adapter_model.safetensors"), {HEAD: (info, b"\1" + data[1:])})
    return COMBINE


def no_common_module() -> list[str]:
    """Two adapters whose modules are called otherwise."""
    path = Path("detail/adapter_model.safetensors")
    write(path, {n.replace("model.layers", "layers"): t for n, t in read(path).items()})
    return COMBINE


def other_model() -> list[str]:
    """Two adapters of modules of other shapes."""
    name = f"base_model.model.{LAYER}.lora_A.weight"
    put(Path("detail/adapter_model.safetensors"), {name: tensor((8, 128))})
    return COMBINE


def dora() -> list[str]:
    """An adapter whose delta depends on the base."""
    put(Path("style/adapter_model.safetensors"), {MAGNITUDE: tensor((64,))})
    edit(CONFIG, use_dora=True)
    return COMBINE


def changed_base(*command: str) -> list[str]:
    """An adapter that was trained on what was left of its base."""
    edit(CONFIG, init_lora_weights="pissa")
    return list(command)


def begun() -> list[str]:
    """The same, resized."""
    return changed_base(*RESIZE, "--rank", "2")


def unknown_start() -> list[str]:
    """An adapter whose base lost what only the adapter as initialised tells."""
    edit(CONFIG, init_lora_weights="pissa_niter_4")
    return ["extract", "base", "--adapter", "style", "-o", "lora", "--rank", "4"]


def too_large() -> list[str]:
    """An adapter with a number that is finite, and far too large for 16 bits."""
    name = f"base_model.model.{LAYER}.lora_A.weight"
    info = tensor(read(Path("detail/adapter_model.safetensors"))[name][0].shape)[0]
    huge = b"\xca\xf2\x49\x71"  # 1e30 in float32
    put(Path("detail/adapter_model.safetensors"), {name: (info, huge * info.numel)})
    return [*COMBINE, "--dtype", "float16"]


def other_layers() -> list[str]:
    """Two adapters of other stacks of layers."""
    shutil.copytree("style", "deep")
    config = json.loads(Path("deep/adapter_config.json").read_text())
    config["layer_replication"] = [[0, 2], [1, 2]]
    Path("deep/adapter_config.json").write_text(json.dumps(config))
    return ["combine", "style", "deep", "-o", "both"]


def tuned(*options: str) -> list[str]:
    """A fine-tune of the base, or what is taken for one, and its extraction."""
    shutil.copytree("base", "tuned")
    return ["extract", "base", "tuned", "-o", "lora", "--rank", "4", *options]


def same_model() -> list[str]:
    """A fine-tune that changed nothing."""
    return tuned()


def other_head() -> list[str]:
    """A fine-tune that changed what gets no factors."""
    command = tuned()
    name = "model.norm.weight"
    path = next(p for p in Path("tuned").glob("*.safetensors") if name in read(p))
    info, data = read(path)[name]
    put(path, {name: (info, bytes(len(data)))})
    return command


def weight_not_finite() -> list[str]:
    """A base with NaN in a weight that the method looks at."""
    name = f"{LAYER}.weight"
    path = next(p for p in Path("base").glob("*.safetensors") if name in read(p))
    info, data = read(path)[name]
    put(path, {name: (info, b"\xff\xff" + data[2:])})
    return [*INIT, "--method", "pissa"]


def other_statistics() -> list[str]:
    """Statistics of a layer of another width."""
    write(Path("stats.safetensors"), {f"{LAYER}.second_moment": tensor((128,))})
    return [*INIT, "--method", "eva", "--target-modules", LAYER, "--stats", "stats.safetensors"]
