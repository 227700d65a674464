"""What a case of the zoo is: one adapter on one base, and then the files of the two."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.oracles.spellings import Spelling

CRASHES = "crashes"
TIES = "gives the change of one side of a tie to both"
ROUNDS_TWICE = "rounds the delta to the dtype of the base before it adds it"


@dataclass(frozen=True)
class Case:
    """One adapter on one base; `tests.oracles.training.build` makes the files of it."""

    name: str
    model: str  # key of MODELS: the model the adapter was trained on
    lora: Mapping[str, Any]  # of LoraConfig; rank 4 and alpha 6 unless it says otherwise
    dtype: str = "bfloat16"  # of the base
    shard_size: str = "40KB"
    on_disk: str = ""  # key of MODELS: what the base on disk is, if not `model`
    load: Mapping[str, Any] = field(default_factory=dict)  # of from_pretrained, beyond the dtype
    vocab_size: int = 0  # to which the embeddings were resized before training; 0: they were not
    also_trained: str = ""  # regex of frozen parameters that moved in training all the same
    adapter_dtype: str = ""  # to which the saved adapter is cast; "": left as PEFT wrote it
    adapter_name: str = "default"
    save: Mapping[str, Any] = field(default_factory=dict)  # of PeftModel.save_pretrained
    spelling: Spelling | None = None  # of the keys handed to lorakit
    disk_names: Spelling | None = None  # from the model's names to those of its checkpoint
    key_map: tuple[str, ...] = ()  # `--key-map` options without which the names do not meet
    untied_head: str = ""  # what shared a tensor with the embedding and no longer can; "": nothing
    peft_fault: str = ""  # what PEFT 0.21.2 does wrong when it merges this; "": nothing


@dataclass(frozen=True)
class Built:
    """The files of a case.

    `adapter` is the folder to hand to lorakit. `plain` is the same adapter in PEFT's own spelling
    with the names on disk, for the algebra, which reads no other; the two differ only where
    the case is about names. `peft` is absent where PEFT cannot merge.
    """

    case: Case
    base: Path
    adapter: Path
    plain: Path
    peft: Path
