"""What a tiny model of these tests is: classes and sizes, and where its parameters lie on disk.

The names on disk are written down here by hand, and `test_reference.py` holds them against what
transformers itself reads from the files.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles.reading import Array

Renames = tuple[tuple[str, str], ...]  # regex and replacement, each tried in turn


@dataclass(frozen=True)
class Architecture:
    """A model of transformers 5, tiny, and the way from its parameters to the tensors on disk.

    `names` turns a parameter's name in the model into its name on disk, and leaves names as they
    are on disk alone. `split` names the tensors that an expert's gate, up and down projections are
    on disk, where the model holds all experts in one; empty where it does so on disk as well.
    `in_first` says that the class stores experts (E, in, out) and says so to PEFT.
    """

    name: str
    model: str  # class
    config: str  # class
    sizes: Mapping[str, Any] = field(default_factory=dict)
    names: Renames = ()
    split: tuple[str, str, str] | None = None
    in_first: bool = False
    dtype: str = "bfloat16"
    written: Renames = ()  # from what save_pretrained writes to what files on the hub say
    seen: int = 0  # image tokens that the model is shown; 0 for a model that only reads

    def make(self) -> Any:
        """The model with weights drawn from torch's global generator."""
        import torch
        import transformers

        config = getattr(transformers, self.config)(**self.sizes)
        model = getattr(transformers, self.model)(config).to(getattr(torch, self.dtype))
        for values in model.parameters():
            if values.ndim == 1 or not values.any():  # what begins at one, and at zero
                values.data += 0.1 * torch.randn_like(values)
        return model

    def save(self, folder: Path, shard_size: str) -> None:
        """Write a model as `save_pretrained` does, with the names that the hub has."""
        self.make().save_pretrained(folder, max_shard_size=shard_size)
        if self.written:
            for file in folder.glob("*.safetensors"):
                _rename_tensors(file, self.written)
            _rename_index(folder / "model.safetensors.index.json", self.written)

    def load(self, folder: Path, dtype: str = "float32", **options: Any) -> Any:
        """The model in a folder."""
        import torch
        import transformers

        kind = getattr(transformers, self.model)
        return kind.from_pretrained(folder, dtype=getattr(torch, dtype), **options).eval()

    def on_disk(self, parameters: Mapping[str, Array]) -> dict[str, Array]:
        """Parameters of the model, or changes of them, as they lie on disk."""
        found: dict[str, Array] = {}
        for name, values in parameters.items():
            found |= self._parts(renamed(name, self.names), values)
        return found

    def _parts(self, name: str, values: Array) -> dict[str, Array]:
        """One stacked tensor as the tensors of its experts; any other as itself."""
        if not self.split or not re.search(r"\.experts\.(gate_up_proj|down_proj)$", name):
            return {name: values}
        stem, _, leaf = name.rpartition(".")
        gate, up, down = (f"{stem}.{{}}.{part}.weight" for part in self.split)
        if leaf == "down_proj":
            return {down.format(e): one for e, one in enumerate(values)}
        halves = [np.split(one, 2) for one in values]
        gates = {gate.format(e): one for e, (one, _) in enumerate(halves)}
        return gates | {up.format(e): one for e, (_, one) in enumerate(halves)}


def renamed(name: str, renames: Renames) -> str:
    """A name after every rename in turn."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _rename_tensors(file: Path, renames: Renames) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {renamed(name, renames): values for name, values in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _rename_index(file: Path, renames: Renames) -> None:
    index = json.loads(file.read_text())
    index["weight_map"] = {renamed(name, renames): at for name, at in index["weight_map"].items()}
    file.write_text(json.dumps(index, indent=2, sort_keys=True))
