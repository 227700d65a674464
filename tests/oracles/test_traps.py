"""KaSA, BD-LoRA, one rounding, and bases with files too many or too few, each from end to end."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import lorakit
from lorakit import RunOptions
from lorakit.errors import InputError, MisfitError
from tests.oracles.reading import Array, read_dtypes, read_files, read_json, read_tensors
from tests.oracles.rounding import rounded
from tests.oracles.test_merge import assert_close
from tests.oracles.trap_algebra import expected, smallest
from tests.oracles.trap_files import Files, made, merged_by_peft

pytest.importorskip("peft", minversion="0.21")
SCRATCH = RunOptions(sync=False)
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def far(ours: dict[str, Array], exact: dict[str, Array]) -> float:
    return max(float(abs(ours[name] - exact[name]).max()) for name in exact)


# KaSA ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def kasa(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    from peft.tuners.lora.config import KasaConfig

    lora = {"target_modules": TARGETS, "kasa_config": KasaConfig(), "use_rslora": True}
    return made(tmp_path_factory.mktemp("kasa"), "llama", lora, dtype=request.param)


@pytest.mark.parametrize("weight", [1.0, 0.5, -1.0])
def test_kasa_on_the_original_base_is_truncated_first(
    kasa: Files, tmp_path: Path, weight: float
) -> None:
    lorakit.merge(kasa.base, kasa.adapter, tmp_path / "out", weights=[weight], run=SCRATCH)
    exact = expected(read_tensors(kasa.base), kasa.adapter, taken=smallest, weight=weight)
    assert_close(tmp_path / "out", exact, read_tensors(kasa.base))
    assert not lorakit.verify(tmp_path / "out", full=True).differences


def test_kasa_on_the_base_that_it_truncated_is_only_added(kasa: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lorakit.merge(kasa.residual, kasa.adapter, out, base_is_residual=True, run=SCRATCH)
    assert_close(out, expected(read_tensors(kasa.residual), kasa.adapter))
    assert not lorakit.verify(out, full=True).differences


def test_peft_merges_kasa_as_the_algebra_does(kasa: Files) -> None:
    exact = expected(read_tensors(kasa.base), kasa.adapter, taken=smallest)
    change = far(read_tensors(kasa.base), exact)
    assert far(merged_by_peft(kasa), exact) < (1e-5 if kasa.dtype == "float32" else 0.02) * change


def test_kasa_cannot_be_taken_out_of_a_merge(kasa: Files, tmp_path: Path) -> None:
    lorakit.merge(kasa.base, kasa.adapter, tmp_path / "out", run=SCRATCH)
    with pytest.raises(InputError, match="cannot be taken out"):
        lorakit.unmerge(tmp_path / "out", kasa.adapter, tmp_path / "back", run=SCRATCH)
    assert not (tmp_path / "back").exists()


# BD-LoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_a", "in_b"),
    [
        (["o_proj", "down_proj"], None),
        (None, ["q_proj", "v_proj", "up_proj"]),
        (["o_proj", "down_proj"], ["q_proj", "v_proj", "up_proj"]),
    ],
    ids=["A", "B", "both"],
)
def test_factors_in_blocks_are_block_diagonal(
    tmp_path: Path, in_a: list[str] | None, in_b: list[str] | None
) -> None:
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(
        target_modules_bd_a=in_a, target_modules_bd_b=in_b, nblocks=2, match_strict=False
    )
    lora = {"target_modules": TARGETS, "use_bdlora": blocks}
    files = made(tmp_path, "llama", lora, dtype="bfloat16")
    exact = expected(read_tensors(files.base), files.adapter)
    assert far(merged_by_peft(files), exact) < 0.02 * far(read_tensors(files.base), exact)
    lorakit.merge(files.base, files.adapter, tmp_path / "out", run=SCRATCH)
    assert_close(tmp_path / "out", exact, read_tensors(files.base))
    assert not lorakit.verify(tmp_path / "out", full=True).differences
    lorakit.unmerge(tmp_path / "out", files.adapter, tmp_path / "back", run=SCRATCH)
    assert far(read_tensors(tmp_path / "back"), read_tensors(files.base)) < 2.0**-7


def test_a_block_that_is_no_whole_part_is_refused(tmp_path: Path) -> None:
    from peft.tuners.lora.config import BdLoraConfig
    from safetensors.numpy import load_file, save_file

    blocks = BdLoraConfig(target_modules_bd_a=["o_proj"], nblocks=2, match_strict=False)
    files = made(tmp_path, "llama", {"target_modules": ["o_proj"], "use_bdlora": blocks})
    weights = files.adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(k for k in tensors if "lora_A" in k)
    save_file(tensors | {key: np.ascontiguousarray(tensors[key][:, :-1])}, weights)
    with pytest.raises(MisfitError, match="o_proj"):
        lorakit.merge(files.base, files.adapter, tmp_path / "out", run=SCRATCH)
    assert not (tmp_path / "out").exists()


# One rounding ----------------------------------------------------------------------------------


def test_the_sum_is_rounded_once_and_not_the_delta_as_well(tmp_path: Path) -> None:
    """safe_merge of PEFT rounds the delta to the dtype of the base before it adds it."""
    lora = {"target_modules": TARGETS, "init_lora_weights": False}
    files = made(tmp_path, "llama", lora, dtype="bfloat16")
    lorakit.merge(files.base, files.adapter, tmp_path / "out", run=SCRATCH)
    base, exact = read_tensors(files.base), expected(read_tensors(files.base), files.adapter)
    touched = [name for name in exact if not np.array_equal(exact[name], base[name])]
    right = {name: rounded(exact[name], "BF16").astype(float) for name in touched}

    def wrong(tensors: dict[str, Array]) -> float:
        misses = sum(int((tensors[n] != right[n]).sum()) for n in touched)
        return misses / sum(right[n].size for n in touched)

    assert wrong(read_tensors(tmp_path / "out")) < 1e-3
    assert wrong(merged_by_peft(files)) < 1e-3
    assert wrong(merged_by_peft(files, safe_merge=True)) > 0.02


# Files beside the shards -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return made(tmp_path_factory.mktemp("sharded"), "llama", {"target_modules": TARGETS})


@pytest.fixture
def base(sharded: Files, tmp_path: Path) -> Path:
    """A copy of a base in shards."""
    assert len(list(sharded.base.glob("*.safetensors"))) > 1
    return Path(shutil.copytree(sharded.base, tmp_path / "base"))


@pytest.mark.parametrize("extra", ["consolidated.safetensors", "model-old.safetensors"])
def test_weights_beside_the_shards_are_neither_merged_nor_passed_on(
    sharded: Files, base: Path, tmp_path: Path, extra: str
) -> None:
    shutil.copy(sorted(base.glob("*.safetensors"))[0], base / extra)
    job = lorakit.plan_merge(base, sharded.adapter)
    assert [note for note in job.plan.notes if extra in note]
    job.run(tmp_path / "out", SCRATCH)
    assert not (tmp_path / "out" / extra).exists()
    assert_close(tmp_path / "out", expected(read_tensors(sharded.base), sharded.adapter))
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")["weight_map"]
    assert index == {n: f for f, there in read_files(tmp_path / "out").items() for n in there}
    assert index.keys() == read_dtypes(sharded.base).keys()


@pytest.mark.parametrize("fault", ["missing", "stale"])
def test_a_shard_that_is_missing_or_stale_stops_the_merge(
    sharded: Files, base: Path, tmp_path: Path, fault: str
) -> None:
    first, second, *_ = sorted(base.glob("*.safetensors"))
    if fault == "missing":
        first.unlink()
    else:
        shutil.copy(second, first)
    with pytest.raises(InputError, match=r"missing|contradicts") as error:
        lorakit.merge(base, sharded.adapter, tmp_path / "out", run=SCRATCH)
    assert error.value.exit_code == 3
    assert not (tmp_path / "out").exists()
