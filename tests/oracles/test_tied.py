"""An embedding and a head that share a tensor stay one, or part on request; never by chance."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lorakit
from lorakit.errors import MisfitError
from tests.oracles.algebra import expected
from tests.oracles.case import Built
from tests.oracles.conftest import Build, Merge
from tests.oracles.merging import merge
from tests.oracles.reading import read_files, read_json, read_tensors
from tests.oracles.test_merge import assert_close
from tests.oracles.zoo_tied import INSEPARABLE, TIED

pytest.importorskip("peft", minversion="0.21")
APART = [case.name for case in TIED if case.untied_head]
TOGETHER = [case.name for case in TIED if not case.untied_head]


@pytest.mark.parametrize("name", APART)
def test_a_change_of_one_side_is_refused(built: Build, tmp_path: Path, name: str) -> None:
    with pytest.raises(MisfitError, match=r"shares between .* Pass --untie"):
        merge(built(name), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", APART)
def test_untied_each_side_gets_what_is_its_own(built: Build, merged: Merge, name: str) -> None:
    case = built(name)
    exact = expected(case.base, case.plain, untied_head=case.case.untied_head)
    assert_close(merged(case), exact)
    assert read_json(merged(case) / "config.json") == read_json(case.base / "config.json") | {
        "tie_word_embeddings": False
    }


@pytest.mark.parametrize("name", APART)
def test_an_untied_head_lies_behind_its_embedding(built: Build, merged: Merge, name: str) -> None:
    case = built(name)
    for file, before in read_files(case.base).items():
        after = list(read_files(merged(case))[file])
        if case.case.untied_head in after:
            at = after.index(case.case.untied_head)
            assert after.pop(at - 1).endswith(("embed_tokens.weight", "wte.weight"))
            assert len(after) == len(before)
        else:
            assert after == list(before)


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("untie", [False, True])
def test_sides_that_get_the_same_stay_one(
    built: Build, tmp_path: Path, name: str, untie: bool
) -> None:
    case = built(name)
    merge(case, tmp_path / "out", untie=untie)
    exact = expected(case.base, case.plain, untied_head="lm_head.weight")
    head = exact.pop("lm_head.weight")
    if any("lm_head" in key for key in read_tensors(case.plain)):
        assert np.array_equal(head, exact["model.embed_tokens.weight"])
    assert_close(tmp_path / "out", exact)
    facts = {"vocab_size": case.case.vocab_size} if case.case.vocab_size else {}
    after = read_json(tmp_path / "out" / "config.json")
    assert after == read_json(case.base / "config.json") | facts


def stored_twice(case: Built, folder: Path, *, silent: bool) -> Built:
    """The case on a base that holds the embedding once more as its head, as torch saves a model."""
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(case.base, folder)
    tensors = {n: t for f in base.glob("*.safetensors") for n, t in load_file(f).items()}
    for file in (*base.glob("*.safetensors"), *base.glob("*.index.json")):
        file.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = read_json(base / "config.json")
    if silent:
        del config["tie_word_embeddings"]
        (base / "config.json").write_text(json.dumps(config))
    return replace(case, base=base)


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("silent", [False, True])
def test_both_tensors_of_one_that_is_stored_twice_stay_the_same(
    built: Build, tmp_path: Path, name: str, silent: bool
) -> None:
    case = stored_twice(built(name), tmp_path / "base", silent=silent)
    merge(case, tmp_path / "out")
    after, exact = read_tensors(tmp_path / "out"), expected(built(name).base, case.plain)
    exact["lm_head.weight"] = exact["model.embed_tokens.weight"]
    assert np.array_equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert_close(tmp_path / "out", exact)
    lorakit.verify(tmp_path / "out", full=True)


def test_one_side_of_what_is_stored_twice_is_refused_and_untied(
    built: Build, tmp_path: Path
) -> None:
    case = stored_twice(built("tied-embedding"), tmp_path / "base", silent=False)
    with pytest.raises(MisfitError, match=r"shares between .* Pass --untie"):
        merge(case, tmp_path / "out")
    merge(case, tmp_path / "out", untie=True)
    assert_close(tmp_path / "out", expected(case.base, case.plain))
    assert read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", [case.name for case in INSEPARABLE])
def test_a_model_that_shares_more_is_not_untied(built: Build, tmp_path: Path, name: str) -> None:
    for untie in (False, True):
        with pytest.raises(MisfitError, match="cannot be untied"):
            merge(built(name), tmp_path / "out", untie=untie)


def test_an_untied_model_has_the_tensors_of_any_other(built: Build, merged: Merge) -> None:
    tied, other = built("tied-embedding"), built("embedding")
    assert read_tensors(merged(tied)).keys() == read_tensors(other.base).keys()
