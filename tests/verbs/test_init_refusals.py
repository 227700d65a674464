"""What init refuses, in one line and before anything is written."""

import ml_dtypes  # noqa: F401  (bfloat16 for NumPy)
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.errors import InputError, MisfitError, ResourceError, UsageError
from tests.verbs.adapters import drawn
from tests.verbs.conftest import SCRATCH
from tests.verbs.init_scene import DOWN1, Q0, SHAPES, base, begun, checkpoint, stats

__all__ = ["base", "stats"]


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        ({"target_modules": "q_porj"}, "'q_porj'", "'q_proj'"),
        ({"target_modules": "q_proj,k_proj"}, "'k_proj'", "inspect"),
        ({"target_modules": "norm"}, "'norm'", "inspect"),
        ({"target_modules": ".*nothing"}, "nothing", "inspect"),
        ({"layers": "5"}, "in the layers asked for", ""),
        ({"exclude_modules": ".*"}, "that is not excluded", ""),
        ({"exclude_modules": "down_porj"}, "'down_porj', which is to be left out", "'down_proj'"),
        ({"exclude_modules": "down_proj,k_proj"}, "'k_proj'", "inspect"),
        ({"exclude_modules": "down_proj, k_proj"}, "'down_proj, k_proj'", "inspect"),
        ({"exclude_modules": "mlp"}, "'mlp'", r"'.*mlp.*'"),
    ],
)
def test_targets_that_mean_nothing_are_refused(base, tmp_path, options, said, hint):
    with pytest.raises(MisfitError, match=said) as caught:
        begun(base, tmp_path / "out", **options)
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_convolution_in_groups_is_refused(tmp_path):
    shapes = {
        "mixer.conv1d.weight": (8, 1, 4),
        "mixer.conv.weight": (8, 3, 4),
        f"{Q0}.weight": (8, 8),
    }
    base = checkpoint(tmp_path / "base", shapes)
    with pytest.raises(MisfitError, match="'conv1d': it is a convolution in groups"):
        begun(base, tmp_path / "out", target_modules="conv1d")
    begun(base, tmp_path / "out", target_modules="conv")


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_means_nothing_is_refused(base, tmp_path, option):
    said = r"meant by the pattern 'q_prj'. Is it 'q_proj'\? They end in down_proj, q_proj."
    with pytest.raises(MisfitError, match=said):
        begun(base, tmp_path / "out", **{option: (("q_proj", 2), ("q_prj", 2))})
    with pytest.raises(MisfitError, match=said):
        lorakit.loftq(base, tmp_path / "out", rank=4, run=SCRATCH, **{option: (("q_prj", 2),)})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank is 1 or more"),
        ({"rank_pattern": (("q_proj", 0),)}, "rank is 1 or more"),
        ({"alpha": 0.0}, "above 0"),
        ({"alpha": float("nan")}, "above 0"),
        ({"alpha_pattern": (("q", -1.0),)}, "above 0"),
        ({"method": "kaimin"}, "kaimin.* is none of kaiming"),
        ({"method": "loftq", "dora": True}, "does not go with loftq"),
        ({"method": "pissa", "dora": True}, "DoRA"),
        ({"method": "mica", "dora": True}, "does not load DoRA that mica began"),
        ({"method": "orthogonal", "rank": 3}, "not even"),
        ({"method": "pissa-fast", "adapter_only": True}, "cannot be computed again"),
        ({"method": "corda", "adapter_only": True}, "cannot be computed again"),
        ({"method": "eva"}, "pass --stats"),
        ({"stats": "stats.safetensors"}, "does not look at statistics"),
        ({"dtype": "int8"}, "int8"),
        ({"layers": "0-"}, "write numbers"),
        ({"target_modules": "("}, "no regular expression"),
        ({"exclude_modules": "["}, "no regular expression"),
    ],
)
def test_an_option_that_makes_no_sense(base, tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        begun(base, tmp_path / "out", **options)


@pytest.mark.parametrize("options", [{"rank": 13}, {"rank_pattern": (("q_proj", 13),)}])
def test_a_rank_that_a_weight_does_not_have_is_refused(base, tmp_path, options):
    with pytest.raises(MisfitError, match=r"rank 13 is more than .* \["):
        begun(base, tmp_path / "out", **options)


def test_kinds_that_a_method_is_not_for_are_refused(tmp_path):
    base = checkpoint(tmp_path / "base", {**SHAPES, "conv.weight": (8, 6, 3)})
    for method in ("pissa", "olora", "mica"):
        for module in ("conv", "embed_tokens"):
            with pytest.raises(MisfitError, match=f"no linear layer, and {method}"):
                begun(base, tmp_path / "out", method=method, target_modules=module)
    gpt2 = checkpoint(
        tmp_path / "gpt2", {"h.0.attn.c_attn.weight": (12, 36)}, {"model_type": "gpt2"}
    )
    with pytest.raises(MisfitError, match="readers do not take olora out"):
        begun(gpt2, tmp_path / "out", method="olora", adapter_only=True)
    stack = {"model.layers.0.mlp.experts.down_proj": (4, 20, 12)}
    oss = checkpoint(tmp_path / "oss", stack, {"model_type": "gpt_oss"})
    for options in ({"dora": True}, {"method": "mica"}):
        with pytest.raises(MisfitError, match="stack of experts"):
            begun(oss, tmp_path / "out", experts=True, **options)


def test_statistics_of_another_model_are_refused(base, stats, tmp_path):
    lacking = {n: t for n, t in load_file(stats).items() if DOWN1 not in n}
    other = {**lacking, DOWN1: np.ones(21, "f4")}
    for tensors, said in ((lacking, "has nothing of"), (other, r"has \[21\] for")):
        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(MisfitError, match=f"{said} .*layers.1.mlp.down_proj"):
            begun(base, tmp_path / "out", method="eva", stats=tmp_path / "other.safetensors")


def test_nan_is_refused_by_name_and_nothing_is_left(tmp_path):
    bad = drawn("x", 16, 12)
    bad[3, 3] = np.nan
    base = checkpoint(tmp_path / "base", **{f"{Q0}.weight".replace(".", "__"): bad})
    for method in ("pissa", "mica"):
        with pytest.raises(InputError, match=r"0\.self_attn\.q_proj\.weight': .*NaN"):
            begun(base, tmp_path / "out", method=method)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_quantised_base_is_refused(tmp_path):
    codes = np.zeros((16, 12), np.int8)
    base = checkpoint(tmp_path / "base", **{f"{Q0}.weight".replace(".", "__"): codes})
    with pytest.raises(InputError, match="quantised"):
        begun(base, tmp_path / "out")


def test_too_little_memory_is_told_before_anything_is_written(base, tmp_path):
    for method in ("kaiming", "pissa"):
        with pytest.raises(ResourceError, match="memory"):
            begun(base, tmp_path / "out", method=method, run=lorakit.RunOptions(max_memory=1000))
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
