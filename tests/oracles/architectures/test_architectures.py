"""A merge is the algebra in float64, rounded once, whatever the names and layout of an adapter."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lorakit.errors import MisfitError
from tests.oracles.architectures.algebra import expected, on_disk, save_expected, with_head
from tests.oracles.architectures.answers import answer_of
from tests.oracles.architectures.case import Built
from tests.oracles.architectures.cases import CASES
from tests.oracles.architectures.peft_outcomes import rows
from tests.oracles.architectures.workshop import Workshop, merge
from tests.oracles.reading import read_dtypes, read_files, read_json
from tests.oracles.test_merge import assert_close

pytest.importorskip("peft", minversion="0.21")
PAGE = Path(__file__).parents[3] / "docs/reference/architectures.md"
every_case = pytest.mark.parametrize("name", [case.name for case in CASES])
# Files of the same adapter that say neither who wrote them nor, in their shapes, which way.
SQUARE = ("llama4", "qwen3-moe-square")
ALONE = "-PEFT-{}-square-down_proj-alone"


def assert_exact(built: Built, merged: Path) -> None:
    base, changes = with_head(built), on_disk(built)
    operands = base, {name: changes.get(name, values) for name, values in base.items()}
    assert_close(merged, expected(built), *operands)


@every_case
def test_every_number_is_the_exact_one_rounded_once(workshop: Workshop, name: str) -> None:
    assert_exact(workshop.built(name), workshop.merged(name))


@every_case
def test_what_is_not_targeted_and_every_name_and_place_are_the_bases(
    workshop: Workshop, name: str
) -> None:
    built = workshop.built(name)
    before, after, changed = (
        read_files(built.base),
        read_files(workshop.merged(name)),
        on_disk(built),
    )
    assert list(before) == list(after)
    for file, tensors in before.items():
        assert [n for n in after[file] if n != built.case.untied_head] == list(tensors)
        assert [n for n, t in tensors.items() if n not in changed and t != after[file][n]] == []
    facts = {"tie_word_embeddings": False} if built.case.untied_head else {}
    config = read_json(built.base / "config.json")
    assert read_json(workshop.merged(name) / "config.json") == config | facts


@every_case
def test_the_merged_model_answers_as_the_reference(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    import torch

    built, merged = workshop.built(name), workshop.merged(name)
    # Rounded as on disk: an expert that is chosen by a hair would be another one otherwise.
    save_expected(built, tmp_path / "expected", dtypes=read_dtypes(merged))
    ours, exact = (answer_of(built.kind, folder) for folder in (merged, tmp_path / "expected"))
    effect = float((exact - workshop.base_answer(built.case.model)).abs().max())
    assert effect > 0.1
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-3 * effect)


@pytest.mark.parametrize("model", SQUARE)
def test_square_experts_of_an_unknown_writer_are_refused(
    workshop: Workshop, tmp_path: Path, model: str
) -> None:
    built = _anonymous(workshop.built(model + ALONE.format("0.21.2")), tmp_path)
    with pytest.raises(MisfitError, match="expert-orientation"):
        merge(built, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", SQUARE)
@pytest.mark.parametrize(("version", "said"), [("0.18.0", "in-out"), ("0.21.2", "out-in")])
def test_square_experts_are_taken_as_the_user_says(
    workshop: Workshop, tmp_path: Path, model: str, version: str, said: str
) -> None:
    built = _anonymous(workshop.built(model + ALONE.format(version)), tmp_path)
    merge(built, tmp_path / "out", expert_orientation=said)
    assert_exact(built, tmp_path / "out")


def _anonymous(built: Built, folder: Path) -> Built:
    """The same adapter without the version of PEFT that wrote it."""
    import shutil

    shutil.copytree(built.adapter, folder / "adapter")
    config = read_json(folder / "adapter" / "adapter_config.json")
    del config["peft_version"]
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return replace(built, adapter=folder / "adapter")


@pytest.mark.parametrize("model", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_packing_is_as_the_user_says_and_never_guessed(
    workshop: Workshop, tmp_path: Path, model: str
) -> None:
    packed = workshop.built(f"{model}-Unsloth-plain")
    merge(packed, tmp_path / "out", expert_packing="peft")
    other = replace(packed, case=replace(packed.case, packing="peft"))
    assert_exact(other, tmp_path / "out")


def test_every_case_has_a_row_in_the_page() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|", PAGE.read_text(), flags=re.M)[1:]
    told = {(model, names, one) for model, names, all_ in rows for one in all_.split(", ")}
    assert told == {(case.model, case.names, case.variant) for case in CASES}


def test_names_of_cases_are_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert np.all([re.fullmatch(r"[\w.-]+", case.name) for case in CASES])


@pytest.mark.slow
def test_the_page_says_what_peft_does(workshop: Workshop) -> None:
    import peft
    import transformers

    versions = peft.__version__, transformers.__version__.rpartition(".")[0]
    if versions != ("0.21.2", "5.23"):
        pytest.skip("the page is about other versions")
    told = PAGE.read_text()
    missing = [row for row in rows(workshop) if f"| {' | '.join(row)} |" not in told]
    assert missing == []
