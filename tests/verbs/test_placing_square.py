"""Square stacks, whose orientation no shape tells, and the packing of B, which nothing does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorakit
from lorakit.errors import MisfitError, UsageError
from tests.verbs.placing_scene import (
    EXPERTS,
    Scene,
    draw,
    pair,
    stacked,
)

SQUARE = f"{EXPERTS}.down_proj"


def square(tmp_path: Path, model_type: str, **config: Any) -> tuple[Scene, np.ndarray[Any, Any]]:
    """An adapter of a stack of square experts, and B A of each."""
    adapter = pair(EXPERTS, 6, 6, rank=8)
    config = {"target_parameters": ["experts.down_proj"], "target_modules": [], **config}
    scene = Scene(
        tmp_path, {SQUARE: draw("square", 4, 6, 6)}, adapter, **config, model_type=model_type
    )
    a, b = (t.astype(np.float64) for t in adapter.values())
    products = [3 * b[:, e::4] @ a[2 * e : 2 * e + 2] for e in range(4)]
    return scene, np.stack(products)


@pytest.mark.parametrize(
    ("model_type", "version", "in_first"),
    [
        ("qwen3_moe", "0.17.1", True),
        ("qwen3_moe", "0.18.0", True),
        ("qwen3_moe", "0.18.1", True),
        ("qwen3_moe", "0.19.0", True),
        ("qwen3_moe", "0.19.1", False),
        ("qwen3_moe", "0.21.2", False),
        ("qwen3_moe", "0.21.1.dev0@abcdef", False),
        ("gpt_oss", "0.18.0", True),
        ("gpt_oss", "0.19.0", False),
        ("gpt_oss", "0.19.1", True),
        ("gpt_oss", "0.21.2", True),
        ("gpt_oss", "1.0.0", True),
    ],
)
def test_a_square_stack_is_turned_as_the_version_of_peft_had_it(
    tmp_path: Path, model_type: str, version: str, in_first: bool
) -> None:
    scene, products = square(tmp_path, model_type, peft_version=version)
    scene.changes({SQUARE: products.swapaxes(1, 2) if in_first else products})


@pytest.mark.parametrize("version", ["0.18.0", "0.21.2", None])
@pytest.mark.parametrize("said", ["in-out", "out-in"])
def test_what_the_user_says_of_a_square_stack_counts(
    tmp_path: Path, version: str | None, said: str
) -> None:
    scene, products = square(tmp_path, "qwen3_moe", peft_version=version)
    turned = products.swapaxes(1, 2) if said == "in-out" else products
    scene.changes({SQUARE: turned}, expert_orientation=said)


def test_a_square_stack_of_an_unknown_writer_is_refused(tmp_path: Path) -> None:
    scene, _ = square(tmp_path, "qwen3_moe", peft_version=None)
    error = scene.refused(MisfitError, "--expert-orientation")
    assert error.tensor


@pytest.mark.parametrize(
    ("version", "silent"),
    [("0.18.0", ""), ("0.21.2", "base does not say"), (None, "adapter does not say with which")],
)
def test_a_base_of_an_unknown_type_is_asked_for_only_where_types_differ(
    tmp_path: Path, version: str | None, silent: str
) -> None:
    scene, products = square(tmp_path, "", peft_version=version)
    if silent:
        scene.refused(MisfitError, f"square, and the {silent}")
    else:
        scene.changes({SQUARE: products.swapaxes(1, 2)})


def test_a_stack_that_is_not_square_needs_no_version_and_heeds_no_word(tmp_path: Path) -> None:
    adapter = pair(EXPERTS, 6, 10, rank=8)
    config = {
        "target_parameters": ["experts.down_proj"],
        "target_modules": [],
        "peft_version": None,
    }
    scene = Scene(tmp_path, stacked(False), adapter, **config)
    a, b = (t.astype(np.float64) for t in adapter.values())
    products = np.stack([3 * b[:, e::4] @ a[2 * e : 2 * e + 2] for e in range(4)])
    scene.changes({SQUARE: products}, expert_orientation="in-out")


def test_unsloth_packs_the_experts_of_b_one_after_the_other(tmp_path: Path) -> None:
    scene, _ = square(tmp_path, "qwen3_moe")
    a, b = (t.astype(np.float64) for t in scene.adapter.values())
    products = [3 * b[:, 2 * e : 2 * e + 2] @ a[2 * e : 2 * e + 2] for e in range(4)]
    scene.changes({SQUARE: np.stack(products)}, expert_packing="unsloth")


@pytest.mark.parametrize(
    "option",
    [{"expert_packing": "Unsloth"}, {"expert_packing": ""}, {"expert_orientation": "in_out"}],
    ids=str,
)
def test_a_choice_that_is_none_is_an_error_on_disk_and_in_memory(
    tmp_path: Path, option: dict[str, str]
) -> None:
    scene, _ = square(tmp_path, "qwen3_moe")
    scene.refused(UsageError, "is none of", **option)
    with pytest.raises(UsageError, match="is none of"):
        lorakit.merge(scene.base, tmp_path / "adapter", **option)
