"""The rules by which an update finds its place: names first, then spellings and stacks."""

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.errors import InputError, MisfitError
from tests.verbs.placing_scene import (
    DOWN,
    EXPERTS,
    GATE,
    UP,
    Scene,
    Tensors,
    by_expert,
    delta,
    dora,
    draw,
    pair,
    split_base,
    stacked,
    without,
)

# Names -----------------------------------------------------------------------------------------

OLD = "language_model.model.layers.0.self_attn.q_proj"
NEW = "model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("module", [OLD, NEW])
def test_the_exact_name_wins_whatever_the_canonical_names_say(tmp_path: Path, module: str) -> None:
    base = {f"{m}.weight": draw(m, 6, 4) for m in (OLD, NEW)}
    scene = Scene(tmp_path, base, pair(module, 6, 4), model_type="llava")
    scene.changes({f"{module}.weight": delta(scene.adapter, module)})


def test_another_spelling_is_found_where_it_can_be_only_one(tmp_path: Path) -> None:
    scene = Scene(tmp_path, {f"{OLD}.weight": draw(OLD, 6, 4)}, pair(NEW, 6, 4), model_type="llava")
    scene.changes({f"{OLD}.weight": delta(scene.adapter, NEW)})


def test_a_spelling_that_could_be_two_is_refused(tmp_path: Path) -> None:
    base = {f"{m}.weight": draw(m, 6, 4) for m in (OLD, NEW)}
    other = "model.layers.0.self_attn.q_proj"
    scene = Scene(tmp_path, base, pair(other, 6, 4), model_type="llava")
    error = scene.refused(MisfitError, "q_proj")
    assert error.exit_code == 4


def test_an_update_of_a_resized_head_goes_where_the_whole_of_it_goes(tmp_path: Path) -> None:
    """LoRA on a head after `resize_token_embeddings`: GPT-NeoX calls it embed_out on disk."""
    base = {"gpt_neox.embed_in.weight": draw("in", 9, 4), "embed_out.weight": draw("out", 9, 4)}
    names = ("gpt_neox.embed_in.base_layer.weight", "lm_head.base_layer.weight")
    adapter = {n: draw(n, 12, 4) for n in names} | pair("lm_head", 12, 4)
    scene = Scene(tmp_path, base, adapter, model_type="gpt_neox")
    merged = scene.merge()
    exact = adapter["lm_head.base_layer.weight"] + delta(adapter, "lm_head")
    np.testing.assert_allclose(merged["embed_out.weight"], exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged["gpt_neox.embed_in.weight"], adapter[names[0]])


@pytest.mark.parametrize("front", ["cls.", "text_decoder.cls.", ""])
@pytest.mark.parametrize("both", [False, True])
def test_a_bias_that_the_model_has_under_two_names_is_one_on_disk(
    tmp_path: Path, both: bool, front: str
) -> None:
    """The decoder of BERT shares its bias with the predictions around it; PEFT saves both."""
    bias = f"{front}predictions.bias"
    base = {bias: draw("bias", 6), "bert.q.weight": draw("q", 6, 4)}
    new = draw("new", 6)
    names = [f"{front}predictions.decoder.bias", *([bias] if both else [])]
    adapter = dict.fromkeys(names, new) | pair("bert.q", 6, 4)
    scene = Scene(tmp_path, base, adapter, model_type="bert", bias="all")
    np.testing.assert_array_equal(scene.merge()[bias], new)


def test_biases_of_b_for_layers_without_one_are_refused_as_such(tmp_path: Path) -> None:
    base = {"bert.q.weight": draw("q", 6, 4)}
    adapter = pair("bert.q", 6, 4) | {"bert.q.lora_B.bias": draw("bias", 6)}
    scene = Scene(tmp_path, base, adapter, model_type="bert", lora_bias=True)
    scene.refused(MisfitError, r"biases \(lora_bias\) for 1 layers that have none .* 'bert\.q'")
    saved = {"bert.q.base_layer.weight": draw("saved", 6, 4)}
    (tmp_path / "saved").mkdir()
    whole = Scene(tmp_path / "saved", base, adapter | saved, model_type="bert", lora_bias=True)
    whole.refused(MisfitError, r"biases \(lora_bias\) for 1 layers")
    merged = scene.merge(allow_unmatched="[.]bias$")
    exact = base["bert.q.weight"] + delta(adapter, "bert.q")
    np.testing.assert_allclose(merged["bert.q.weight"], exact, rtol=1e-5, atol=1e-5)


def test_two_names_of_a_bias_with_other_numbers_are_refused(tmp_path: Path) -> None:
    base = {"cls.predictions.bias": draw("bias", 6), "bert.q.weight": draw("q", 6, 4)}
    names = ("cls.predictions.decoder.bias", "cls.predictions.bias")
    adapter = {n: draw(n, 6) for n in names} | pair("bert.q", 6, 4)
    scene = Scene(tmp_path, base, adapter, model_type="bert", bias="all")
    scene.refused(MisfitError, r"cls\.predictions\.bias")


@pytest.mark.parametrize("rows", [5, 7, 12])
def test_an_exact_name_of_another_height_is_no_place_and_no_reason_to_look_elsewhere(
    tmp_path: Path, rows: int
) -> None:
    """Fewer rows than the update has, or more: keys of another number of heads, say."""
    base = {f"{OLD}.weight": draw(OLD, 6, 4), f"{NEW}.weight": draw(NEW, rows, 4)}
    scene = Scene(tmp_path, base, pair(NEW, 6, 4), model_type="llava")
    scene.refused(MisfitError, rf"is \[{rows}, 4\] in the base")


@pytest.mark.parametrize("rows", [5, 7, 12])
def test_a_spelling_of_another_height_is_no_place(tmp_path: Path, rows: int) -> None:
    base = {f"{OLD}.weight": draw(OLD, rows, 4)}
    scene = Scene(tmp_path, base, pair(NEW, 6, 4), model_type="llava")
    scene.refused(MisfitError, "q_proj")


# Experts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted", [[GATE, UP, DOWN], "all-linear", None, r".*\.(gate|up|down)_proj"]
)
def test_one_expert_less_than_the_config_says_is_a_misfit(tmp_path: Path, wanted: Any) -> None:
    adapter = without(by_expert(), f"experts.3.{DOWN}")
    scene = Scene(tmp_path, split_base(), adapter, target_modules=wanted)
    error = scene.refused(MisfitError, rf"lacks .*experts\.3\.{DOWN}")
    assert error.exit_code == 4


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_any_expert_may_be_the_missing_one(tmp_path: Path, lost: int) -> None:
    adapter = without(by_expert(), f"experts.{lost}.")
    scene = Scene(tmp_path, split_base(), adapter, target_modules=[GATE, UP, DOWN])
    scene.refused(MisfitError, rf"experts\.{lost}\.")


@pytest.mark.parametrize(
    "wanted",
    [
        [f"experts.{e}.{leaf}" for e in (0, 2) for leaf in (GATE, UP, DOWN)],
        r".*\.experts\.[02]\.\w+_proj",
    ],
    ids=["names", "regex"],
)
def test_fewer_experts_are_right_where_the_config_names_only_those(
    tmp_path: Path, wanted: Any
) -> None:
    adapter = without(without(by_expert(), "experts.1."), "experts.3.")
    scene = Scene(tmp_path, split_base(), adapter, target_modules=wanted)
    modules = [f"{EXPERTS}.{e}.{leaf}" for e in (0, 2) for leaf in (GATE, UP, DOWN)]
    scene.changes({f"{m}.weight": delta(adapter, m) for m in modules})


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("leaves", [(GATE, UP, DOWN), (UP,), (DOWN,)], ids="+".join)
def test_experts_of_their_own_land_in_the_stack_on_disk(
    tmp_path: Path, turned: bool, leaves: tuple[str, ...]
) -> None:
    scene = Scene(tmp_path, stacked(turned), by_expert(leaves), model_type="qwen3_vl_moe")
    changes = {n: np.zeros((4, 20, 6) if "gate" in n else (4, 6, 10)) for n in scene.base}
    for e in range(4):
        for leaf in leaves:
            rows = slice(10) if leaf == GATE else slice(10, 20) if leaf == UP else slice(6)
            name = f"{EXPERTS}.{DOWN if leaf == DOWN else 'gate_up_proj'}"
            changes[name][e, rows] += delta(scene.adapter, f"{EXPERTS}.{e}.{leaf}")
    scene.changes({n: c.swapaxes(1, 2) if turned else c for n, c in changes.items()})


def test_an_expert_missing_from_a_stack_is_a_misfit(tmp_path: Path) -> None:
    adapter = without(by_expert((DOWN,)), "experts.2.")
    Scene(tmp_path, stacked(False), adapter, target_modules=[DOWN]).refused(
        MisfitError, r"lacks .*experts\.2"
    )


@pytest.mark.parametrize("turned", [False, True])
def test_experts_that_are_smaller_than_those_of_the_stack_are_a_misfit(
    tmp_path: Path, turned: bool
) -> None:
    adapter: Tensors = {}
    for e in range(4):
        adapter |= pair(f"{EXPERTS}.{e}.{DOWN}", 5, 10)
    scene = Scene(tmp_path, stacked(turned), adapter, model_type="qwen3_vl_moe")
    scene.refused(MisfitError, r"experts")


def test_an_expert_beyond_the_stack_is_a_misfit(tmp_path: Path) -> None:
    scene = Scene(tmp_path, stacked(False), by_expert((DOWN,), 5))
    scene.refused(MisfitError, r"experts\.4\.")


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4"])
def test_experts_of_their_own_in_a_turned_square_stack_are_not_taken_for_straight(
    tmp_path: Path, model_type: str
) -> None:
    """Both store (experts, in, out), and those of gpt-oss are square."""
    base = {f"{EXPERTS}.down_proj": draw("square", 4, 6, 6)}
    adapter: Tensors = {}
    for e in range(4):
        adapter |= pair(f"{EXPERTS}.{e}.{DOWN}", 6, 6)
    scene = Scene(tmp_path, base, adapter, model_type=model_type)
    try:
        merged = scene.merge()
    except (MisfitError, InputError):
        return  # as good: refused by name
    for e in range(4):
        exact = base[f"{EXPERTS}.down_proj"][e] + delta(adapter, f"{EXPERTS}.{e}.{DOWN}").T
        np.testing.assert_allclose(merged[f"{EXPERTS}.down_proj"][e], exact, atol=1e-5)


def test_dora_of_one_expert_in_a_turned_stack_is_refused(tmp_path: Path) -> None:
    """Its norms run over columns of some rows of a stack, which no update here does."""
    adapter = by_expert((DOWN,))
    adapter = dora(adapter, f"{EXPERTS}.1.{DOWN}")
    scene = Scene(tmp_path, stacked(True), adapter, model_type="qwen3_vl_moe", use_dora=True)
    scene.refused(MisfitError, r"experts\.1\.")


def test_blocks_of_rows_need_not_line_up_with_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks of 7 rows and experts of 10."""
    from lorakit.engine import plan

    monkeypatch.setattr(plan, "BLOCK", 7 * 6)
    monkeypatch.setattr(plan, "STEP", 3 * 6)
    scene = Scene(tmp_path, stacked(False), by_expert((GATE, UP)), model_type="qwen3_vl_moe")
    change = np.zeros((4, 20, 6))
    assert prod(change.shape) > 4 * plan.BLOCK
    for e in range(4):
        for i, leaf in enumerate((GATE, UP)):
            change[e, 10 * i : 10 * i + 10] = delta(scene.adapter, f"{EXPERTS}.{e}.{leaf}")
    scene.changes({f"{EXPERTS}.gate_up_proj": change})
