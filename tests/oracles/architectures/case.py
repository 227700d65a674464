"""What a case is: an adapter in one spelling on one of the models; and then its files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.oracles.architectures.architecture import Architecture, Renames


@dataclass(frozen=True)
class Case:
    """An adapter on a model. `names` says whose names and layout it has, for the table of the docs.

    Trained by PEFT on the model of transformers 5, unless `by_hand` is a regex: then every matrix
    on disk whose module matches it gets factors of its own, as transformers 4 had its modules.
    """

    model: str  # key of BY_NAME
    names: str
    variant: str
    lora: Mapping[str, Any]  # of LoraConfig; rank 4 and alpha 6 unless it says otherwise
    by_hand: str = ""
    spelling: Renames = ()  # from the keys as they were made to those of the file
    config: Mapping[str, Any] = field(default_factory=dict)  # instead of what PEFT wrote
    in_first: bool | None = None  # A spans an expert's first dimension; None: if PEFT has it so now
    packing: str = "peft"  # of the experts in B
    embedding_times: float = 1.0  # of an embedding's delta, where training scaled it otherwise
    untied_head: str = ""  # what shared a tensor with the embedding and no longer can
    options: Mapping[str, Any] = field(default_factory=dict)  # of lorakit.merge

    @property
    def name(self) -> str:
        """The case in one word."""
        return f"{self.model}-{self.names}-{self.variant}".replace(",", "").replace(" ", "-")


@dataclass(frozen=True)
class Built:
    """The files of a case."""

    case: Case
    kind: Architecture
    base: Path
    adapter: Path

    @property
    def in_first(self) -> bool:
        """Whether A spans the first dimension of an expert and B the second."""
        return self.kind.in_first if self.case.in_first is None else self.case.in_first
