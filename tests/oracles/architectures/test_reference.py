"""The reference is known good: transformers reads these names, and PEFT trained these changes."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.oracles.architectures.algebra import deltas, on_disk, save_expected, with_head
from tests.oracles.architectures.answers import answer, answer_of
from tests.oracles.architectures.cases import CASES
from tests.oracles.architectures.models import MODELS, MODELS_BY_NAME
from tests.oracles.architectures.workshop import Workshop
from tests.oracles.reading import read_files, read_tensors

pytest.importorskip("peft", minversion="0.21")
# PEFT's own adapters, in the names of the model that they were trained on.
OURS = [c.name for c in CASES if c.names.startswith(("v5", "any")) and not c.config]
# Adapters of transformers 4 that PEFT knows how to read.
READ = [f"{m}-v4-plain" for m in ("mixtral", "qwen3-moe", "olmoe", "gemma3")]


def attached(workshop: Workshop, name: str) -> Any:
    """The model of a case with its adapter, as PEFT loads it, unmerged."""
    from peft import PeftModel

    built = workshop.built(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(built.kind.load(built.base), built.adapter).eval()


@pytest.mark.parametrize("name", [model.name for model in MODELS])
def test_every_parameter_lies_where_transformers_finds_it(workshop: Workshop, name: str) -> None:
    kind = MODELS_BY_NAME[name]
    disk = read_tensors(workshop.base(name))
    state = kind.load(workshop.base(name)).state_dict()
    found = kind.on_disk({key: values.double().numpy() for key, values in state.items()})
    assert {n for n in found.keys() ^ disk.keys() if not n.endswith("lm_head.weight")} == set()
    assert [n for n, values in disk.items() if not np.array_equal(found[n], values)] == []
    assert list(kind.on_disk(disk)) == list(disk)  # names on disk mean themselves


@pytest.mark.parametrize("name", [model.name for model in MODELS if model.split])
def test_the_experts_of_a_layer_are_torn_between_shards(workshop: Workshop, name: str) -> None:
    files: dict[str, set[str]] = {}
    for file, tensors in read_files(workshop.base(name)).items():
        for tensor in tensors:
            for layer in re.findall(r"layers\.\d+(?=.*\.experts\.)", tensor):
                files.setdefault(layer, set()).add(file)
    assert files
    assert all(len(shards) > 1 for shards in files.values())


@pytest.mark.parametrize("name", OURS)
def test_the_changes_are_those_that_peft_computes(workshop: Workshop, name: str) -> None:
    from peft.tuners.lora import LoraLayer

    found = {}
    for module, layer in attached(workshop, name).base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            owner = re.sub(r"(\.base_layer)+$", "", module)
            parameter = f"{owner}.{getattr(layer, 'parameter_name', 'weight')}"
            found[parameter] = layer.get_delta_weight("default").double().detach().numpy()
    ours = deltas(workshop.built(name))
    assert ours.keys() == found.keys()
    for parameter, values in found.items():
        np.testing.assert_allclose(ours[parameter], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*OURS, *READ])
def test_the_reference_answers_as_the_adapter_unmerged(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    import torch

    built = workshop.built(name)
    save_expected(built, tmp_path / "expected")
    ours = answer_of(built.kind, tmp_path / "expected")
    theirs = answer(attached(workshop, name), built.kind.seen)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - workshop.base_answer(built.case.model)).abs().max() > 0.1


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_every_case_changes_what_is_on_disk_and_by_no_little(workshop: Workshop, name: str) -> None:
    built = workshop.built(name)
    base, changes = with_head(built), on_disk(built)
    assert changes.keys() <= base.keys()
    for tensor, change in changes.items():
        assert change.shape == base[tensor].shape
        assert np.linalg.norm(change) > 0.05 * np.linalg.norm(base[tensor])
