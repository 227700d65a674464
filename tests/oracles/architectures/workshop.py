"""Where the files of cases are made, each once."""

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.oracles.architectures.adapters import build
from tests.oracles.architectures.answers import answer_of
from tests.oracles.architectures.case import Built
from tests.oracles.architectures.cases import BY_NAME
from tests.oracles.architectures.models import MODELS_BY_NAME

SHARD = "8KB"  # less than the experts of a layer


@dataclass
class Workshop:
    """A folder with models, adapters and merges. Tests must leave those they are given as is."""

    root: Path
    _answers: dict[str, Any] = field(default_factory=dict)

    def base(self, model: str) -> Path:
        """The folder of a model."""
        import torch

        folder = self.root / "models" / model
        if not folder.exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(model.encode()))
                MODELS_BY_NAME[model].save(folder, SHARD)
        return folder

    def built(self, name: str) -> Built:
        """The files of a case."""
        case, base = BY_NAME[name], self.base(BY_NAME[name].model)
        kind, folder = MODELS_BY_NAME[case.model], self.root / "cases" / name
        if not folder.exists():
            build(case, kind, base, folder)
        return Built(case, kind, base, folder / "adapter")

    def merged(self, name: str) -> Path:
        """The folder that lorakit merges a case to."""
        folder = self.root / "merged" / name
        if not folder.exists():
            merge(self.built(name), folder)
        return folder

    def base_answer(self, model: str) -> Any:
        """The logits of a model without an adapter."""
        if model not in self._answers:
            self._answers[model] = answer_of(MODELS_BY_NAME[model], self.base(model))
        return self._answers[model]


def merge(built: Built, output: Path, **options: Any) -> None:
    """Merge a case as a user would, with the options that it needs."""
    import lorakit

    options = {**built.case.options, **options}
    run = lorakit.RunOptions(sync=False)
    lorakit.merge(built.base, [built.adapter], output, run=run, **options)
