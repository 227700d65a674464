"""A base and an adapter of a few tensors on disk, and what a merge of them must change."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorakit
from lorakit.errors import LorakitError
from tests.verbs.conftest import SCRATCH

LAYER = "model.layers.0"
ATTENTION, MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"
EXPERTS = f"{MLP}.experts"
Tensors = dict[str, np.ndarray[Any, Any]]
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


def draw(name: str, *shape: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng([*name.encode()])
    return rng.standard_normal(shape).astype(np.float32)


def pair(module: str, out: int, inner: int, rank: int = 2) -> Tensors:
    a, b = draw(f"{module}.a", rank, inner), draw(f"{module}.b", out, rank)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def delta(adapter: Tensors, module: str) -> np.ndarray[Any, Any]:
    """alpha / rank is 3."""
    a, b = (adapter[f"{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    return 3 * (b @ a)


class Scene:
    """A base and an adapter on disk, in a folder of their own."""

    def __init__(self, folder: Path, base: Tensors, adapter: Tensors, **config: Any) -> None:
        from safetensors.numpy import save_file

        (folder / "base").mkdir()
        (folder / "adapter").mkdir()
        save_file(base, folder / "base/model.safetensors")
        model_type = config.pop("model_type", "qwen3_moe")
        (folder / "base/config.json").write_text(json.dumps({"model_type": model_type}))
        named = {f"base_model.model.{k}": np.ascontiguousarray(t) for k, t in adapter.items()}
        save_file(named, folder / "adapter/adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "peft_version": "0.21.2", **config}
        (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
        self.folder, self.base, self.adapter = folder, base, adapter

    def merge(self, **options: Any) -> Tensors:
        """The merged tensors; `verify` holds them against float64 as well."""
        from safetensors.numpy import load_file

        out = self.folder / "out"
        lorakit.merge(self.folder / "base", self.folder / "adapter", out, run=SCRATCH, **options)
        assert not lorakit.verify(out, full=True).differences
        return load_file(out / "model.safetensors")

    def changes(self, changed: Mapping[str, np.ndarray[Any, Any]], **options: Any) -> None:
        """These tensors change by that much, and no other."""
        merged = self.merge(**options)
        for name, w in self.base.items():
            if name in changed:
                exact = w + changed[name]
                np.testing.assert_allclose(merged[name], exact, rtol=1e-5, atol=1e-5, err_msg=name)
            else:
                np.testing.assert_array_equal(merged[name], w, err_msg=name)

    def refused(self, kind: type[LorakitError], match: str, **options: Any) -> LorakitError:
        with pytest.raises(kind, match=match) as error:
            self.merge(**options)
        assert not (self.folder / "out").exists()
        return error.value


def by_expert(leaves: tuple[str, ...] = (GATE, UP, DOWN), count: int = 4) -> Tensors:
    found: Tensors = {}
    for e in range(count):
        for leaf in leaves:
            out, inner = (6, 10) if leaf == DOWN else (10, 6)
            found |= pair(f"{EXPERTS}.{e}.{leaf}", out, inner)
    return found


def split_base(count: int = 4) -> Tensors:
    return {
        f"{EXPERTS}.{e}.{leaf}.weight": draw(f"{e}{leaf}", *((6, 10) if leaf == DOWN else (10, 6)))
        for e in range(count)
        for leaf in (GATE, UP, DOWN)
    }


def without(tensors: Tensors, part: str) -> Tensors:
    return {name: t for name, t in tensors.items() if part not in name}


def stacked(turned: bool) -> Tensors:
    """Experts of (20, 6) for gate and up, (6, 10) for down; the other way round if turned."""
    shapes = {"gate_up_proj": (4, 20, 6), "down_proj": (4, 6, 10)}
    base = {f"{EXPERTS}.{n}": draw(n, *s) for n, s in shapes.items()}
    return {n: np.ascontiguousarray(t.swapaxes(1, 2)) for n, t in base.items()} if turned else base


def dora(adapter: Tensors, module: str) -> Tensors:
    height = len(adapter[f"{module}.lora_B.weight"])
    return {**adapter, f"{module}.lora_magnitude_vector": abs(draw("m", height)) + 1}
