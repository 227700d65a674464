"""The law of lorakit.math.blocks, and PEFT's BD-LoRA as a second opinion."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import block_diag

from lorakit.errors import MisfitError
from lorakit.math.blocks import blocks_of, expand
from lorakit.math.lowrank import LowRank, delta

few = st.integers(1, 5)


@given(few, few, few)
def test_an_expanded_factor_has_its_blocks_on_the_diagonal(height, width, blocks):
    x = np.random.default_rng(0).standard_normal((height * blocks, width))
    assert np.array_equal(expand(x, blocks), block_diag(*np.split(x, blocks)))


@given(few, few)
def test_one_block_is_the_factor_itself(height, width):
    x = np.random.default_rng(0).standard_normal((height, width)).astype(np.float32)
    assert np.array_equal(expand(x, 1), x)
    assert expand(x, 1).dtype == x.dtype


@given(few, few, few, few)
def test_the_shapes_tell_which_factor_is_in_blocks(height, width, other, blocks):
    rank = height * blocks
    plain_a, plain_b = (rank, width * blocks), (other * blocks, rank)
    weight = (plain_b[0], plain_a[1])
    assert blocks_of(plain_a, plain_b, weight) == (1, 1)
    assert blocks_of((rank, width), plain_b, weight) == (blocks, 1)
    assert blocks_of(plain_a, (plain_b[0], height), weight) == (1, blocks)


@pytest.mark.parametrize(
    ("a", "b", "weight"),
    [
        ((4, 3), (8, 4), (8, 8)),  # not a whole number of blocks
        ((4, 8), (9, 4), (8, 8)),  # another height
        ((4, 2), (8, 1), (8, 8)),  # both in blocks
        ((3, 4), (8, 3), (8, 8)),  # a rank that two blocks do not cut
        ((4, 16), (8, 4), (8, 8)),
        ((4, 8), (8, 8), (8, 8)),
    ],
)
def test_shapes_that_make_no_update_are_refused(a, b, weight):
    with pytest.raises(MisfitError, match="no update"):
        blocks_of(a, b, weight)


@pytest.mark.parametrize("blocks", [0, -1, 3])
def test_rows_that_cannot_be_cut_so_are_refused(blocks):
    with pytest.raises(MisfitError, match="equal blocks"):
        expand(np.ones((4, 2)), blocks)


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_an_expanded_update_is_what_peft_merges(side, blocks):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    config_of = getattr(peft, "BdLoraConfig", None) or pytest.importorskip(
        "peft.tuners.lora.config"
    ).__dict__.get("BdLoraConfig")
    if config_of is None:
        pytest.skip("this PEFT has no BD-LoRA")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(12, 8, bias=False))
    before = base[0].weight.detach().clone()
    bd = config_of(nblocks=blocks, **{f"target_modules_bd_{side}": ["0"]})
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_bdlora=bd)
    model = peft.get_peft_model(base, config)
    layer = model.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    a, b = (f["default"].weight.detach() for f in (layer.lora_A, layer.lora_B))
    merged = model.merge_and_unload()[0].weight.detach()
    counts = blocks_of(tuple(a.shape), tuple(b.shape), tuple(before.shape))
    assert counts == ((blocks, 1) if side == "a" else (1, blocks))
    whole = LowRank(expand(a, counts[0]), expand(b, counts[1]), 6 / 4)
    torch.testing.assert_close(before + delta(whole), merged, rtol=1e-6, atol=1e-6)
