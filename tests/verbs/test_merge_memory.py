"""merge on a state dict: the bytes of a merge on files, and the same objects where none change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lorakit import RunOptions, merge
from lorakit.errors import InputError, MisfitError, UsageError
from tests.oracles.reading import read_files

Q = "model.layers.0.self_attn.q_proj"
EMBED = "model.embed_tokens"
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
FILE = "adapter_model.safetensors"
State = dict[str, Any]


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def base(dtype: type) -> State:
    shapes = {
        f"{EMBED}.weight": (16, 8),
        f"{Q}.weight": (12, 8),
        f"{Q}.bias": (12,),
        "model.norm.weight": (8,),
        "conv.weight": (6, 4, 3, 3),
        "lm_head.weight": (16, 8),
    }
    weights = {n: draw(i, *s).astype(dtype) for i, (n, s) in enumerate(shapes.items())}
    return {**weights, "position_ids": np.arange(16)[None]}


ADAPTERS: dict[str, State] = {
    "lora": {f"{Q}.lora_A.weight": draw(20, 2, 8), f"{Q}.lora_B.weight": draw(21, 12, 2)},
    "dora": {
        f"{Q}.lora_A.weight": draw(20, 2, 8),
        f"{Q}.lora_B.weight": draw(21, 12, 2),
        f"{Q}.lora_magnitude_vector": abs(draw(22, 12)),
    },
    "dora of an embedding": {
        f"{EMBED}.lora_embedding_A": draw(23, 2, 16),
        f"{EMBED}.lora_embedding_B": draw(24, 8, 2),
        f"{EMBED}.lora_magnitude_vector": abs(draw(25, 8)),
    },
    "bias": {
        f"{Q}.lora_A.weight": draw(20, 2, 8),
        f"{Q}.lora_B.weight": draw(21, 12, 2),
        f"{Q}.lora_B.bias": draw(26, 12),
    },
    "convolution": {
        "conv.lora_A.weight": draw(27, 2, 4, 3, 3),
        "conv.lora_B.weight": draw(28, 6, 2, 1, 1),
    },
    "tokens": {f"{EMBED}.token_adapter.trainable_tokens_delta": draw(29, 3, 8)},
    "saved": {"model.norm.weight": draw(30, 8), "lm_head.weight": draw(31, 16, 8)},
    "a head": {"score.weight": draw(32, 5, 8)},
    "a longer vocabulary": {f"{EMBED}.weight": draw(33, 18, 8), "lm_head.weight": draw(34, 18, 8)},
}
every_adapter = pytest.mark.parametrize("name", ADAPTERS)


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[[str], Path]:
    """Writes an adapter into a folder."""

    def write(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tensors = {f"base_model.model.{key}": values for key, values in ADAPTERS[name].items()}
        save_file(tensors, folder / FILE)
        (folder / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "modules_to_save": ["score"],'
            ' "trainable_token_indices": [4, 0, 15]}'
        )
        return folder

    return write


def on_disk(state: State, adapter: Path, folder: Path, **options: Any) -> dict[str, Any]:
    """What a merge of files makes of the same tensors."""
    save_file(state, folder / "base.safetensors")
    merge(
        folder / "base.safetensors", adapter, folder / "out", run=RunOptions(sync=False), **options
    )
    return read_files(folder / "out")["base.safetensors"]


def changed(before: State, after: State) -> set[str]:
    return {name for name in after if after[name] is not before.get(name)}


@pytest.mark.parametrize("code", DTYPES)
@every_adapter
def test_arrays_get_the_bytes_of_a_merge_on_files(adapter, tmp_path, name, code):
    state = base(DTYPES[code])
    folder = adapter(name)
    files = on_disk(state, folder, tmp_path)
    merged = merge(state, folder)
    assert list(merged) == [*state, *(files.keys() - state.keys())]
    assert {n: v.tobytes() for n, v in merged.items()} == {n: s.data for n, s in files.items()}
    assert all(merged[n].dtype == v.dtype for n, v in state.items())


@pytest.mark.parametrize("code", DTYPES)
@every_adapter
def test_tensors_of_torch_get_the_bytes_of_a_merge_on_files(adapter, tmp_path, name, code):
    torch = pytest.importorskip("torch")
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    arrays, folder = base(DTYPES[code]), adapter(name)
    state = {
        n: torch.from_numpy(v.astype(np.float64)).to(dtypes.get(code, torch.float64))
        if v.dtype != np.int64
        else torch.from_numpy(v)
        for n, v in arrays.items()
    }
    merged = merge(state, folder)
    files = on_disk(arrays, folder, tmp_path)
    raw = {n: bytes(v.contiguous().view(torch.uint8).numpy()) for n, v in merged.items()}
    assert raw == {n: stored.data for n, stored in files.items()}
    assert all(merged[n].dtype == v.dtype for n, v in state.items())


@pytest.mark.parametrize("weight", [0.3, -1.0])
def test_a_weight_is_the_same_in_memory_and_on_files(adapter, tmp_path, weight):
    state, folder = base(ml_dtypes.bfloat16), adapter("saved")
    merged = merge(state, folder, weights=[weight])
    files = on_disk(state, folder, tmp_path, weights=[weight])
    assert {n: v.tobytes() for n, v in merged.items()} == {n: s.data for n, s in files.items()}


def test_several_adapters_are_merged_at_once(adapter, tmp_path):
    state, both = base(ml_dtypes.bfloat16), [adapter("lora"), adapter("dora")]
    merged = merge(state, both, weights=[1.0, -0.5])
    files = on_disk(state, both, tmp_path, weights=[1.0, -0.5])
    assert {n: v.tobytes() for n, v in merged.items()} == {n: s.data for n, s in files.items()}


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("lora", {f"{Q}.weight"}),
        ("bias", {f"{Q}.weight", f"{Q}.bias"}),
        ("tokens", {f"{EMBED}.weight"}),
        ("saved", {"model.norm.weight", "lm_head.weight"}),
        ("a head", {"score.weight"}),
    ],
)
def test_what_is_not_touched_is_the_very_same_object(adapter, name, names):
    state = base(np.float16)
    before = {n: v.copy() for n, v in state.items()}
    assert changed(state, merge(state, adapter(name))) == names
    assert all(np.array_equal(state[n], v) for n, v in before.items())


def test_parameters_and_what_requires_grad_are_merged_as_values(adapter):
    torch = pytest.importorskip("torch")
    values = {n: torch.from_numpy(v) for n, v in base(np.float32).items()}
    state = {n: torch.nn.Parameter(v) if v.is_floating_point() else v for n, v in values.items()}
    folder = adapter("lora")
    merged, plain = merge(state, folder), merge(values, folder)
    assert changed(state, merged) == {f"{Q}.weight"}
    assert torch.equal(merged[f"{Q}.weight"], plain[f"{Q}.weight"])
    assert not merged[f"{Q}.weight"].requires_grad
    assert state[f"{Q}.weight"].requires_grad


def test_a_live_module_takes_its_merged_state(adapter):
    torch = pytest.importorskip("torch")
    module = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(4, 6, 3, bias=False)})
    merged = merge(module.state_dict(), adapter("convolution"))
    before = module["conv"].weight.detach().clone()
    module.load_state_dict(merged)
    delta = np.einsum("or,rikl->oikl", draw(28, 6, 2), draw(27, 2, 4, 3, 3)) * 1.5
    assert np.allclose((module["conv"].weight.detach() - before).numpy(), delta, atol=1e-5)


def test_a_fused_projection_of_old_is_updated_block_by_block(tmp_path):
    module, rank = "h.0.attn.c_attn", 2
    a, b = draw(40, 2 * rank, 8), draw(41, 16, rank)
    factors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file({f"base_model.model.{n}": v for n, v in factors.items()}, tmp_path / FILE)
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "enable_lora": [true, false, true]}'
    )
    state = {f"{module}.weight": draw(42, 8, 24)}
    merged = merge(state, tmp_path)[f"{module}.weight"]
    first, third = b[:8] @ a[:rank], b[8:] @ a[rank:]
    delta = np.concatenate([first, np.zeros((8, 8), np.float32), third]).T * 1.5
    assert np.allclose(merged, state[f"{module}.weight"] + delta, rtol=1e-6, atol=1e-6)


def test_strided_views_are_merged_as_what_they_show(adapter):
    state, folder = base(np.float32), adapter("lora")
    turned = {**state, f"{Q}.weight": np.asfortranarray(state[f"{Q}.weight"])}
    assert np.array_equal(merge(turned, folder)[f"{Q}.weight"], merge(state, folder)[f"{Q}.weight"])


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({}, MisfitError),
        ({f"{Q}.weight": np.zeros((8, 12), np.int8)}, InputError),
        ({f"{Q}.weight": "weights"}, InputError),
        ({f"{Q}.weight": np.zeros((5, 8), np.float32)}, MisfitError),
    ],
)
def test_what_is_no_base_for_the_adapter_is_refused(adapter, state, error):
    with pytest.raises(error):
        merge(state, adapter("lora"))


def test_one_side_of_a_tie_is_refused_or_parted(adapter):
    state, folder = base(np.float32), adapter("dora of an embedding")
    del state["lm_head.weight"]
    with pytest.raises(MisfitError, match="shares"):
        merge(state, folder)
    merged = merge(state, folder, untie=True)
    assert np.array_equal(merged["lm_head.weight"], state[f"{EMBED}.weight"])
    assert not np.array_equal(merged[f"{EMBED}.weight"], state[f"{EMBED}.weight"])


def test_a_path_needs_an_output(adapter, tmp_path):
    save_file(base(np.float32), tmp_path / "base.safetensors")
    with pytest.raises(UsageError, match="output"):
        merge(tmp_path / "base.safetensors", adapter("lora"))


@pytest.mark.parametrize("option", [{"quant": "requantize"}, {"link": True}, {"alone": "one"}])
def test_an_option_of_files_is_refused(adapter, option):
    with pytest.raises(UsageError, match=f"{next(iter(option))} is for files"):
        merge({"q.weight": np.ones((2, 2), "f4")}, adapter("lora"), **option)
