"""Opening an adapter: every tensor of it is accounted for, or the file is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lorakit import open_adapter
from lorakit.adapter.adapter import read_adapter
from lorakit.adapter.config import AdapterConfig
from lorakit.adapter.load import check_finite
from lorakit.adapter.pieces import pieces
from lorakit.errors import InputError, MisfitError
from lorakit.store.hub import Located
from lorakit.store.memory import MemorySource

Q = "base_model.model.layers.0.q_proj"
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
Tensors = dict[str, np.ndarray]


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def pair(module: str = Q, rank: int = 2) -> Tensors:
    return {f"{module}.lora_A.weight": ones(rank, 8), f"{module}.lora_B.weight": ones(6, rank)}


def read(tensors: Tensors, **config: object):
    located = Located(Path("adapter_model.safetensors"), None, None)
    return read_adapter(located, AdapterConfig({**PLAIN, **config}), MemorySource(tensors))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter into a folder below the test's own."""

    def once(name: str = "", **tensors: np.ndarray) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        save_file(tensors or pair(), folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(PLAIN))
        return folder

    return once


# Where it is -----------------------------------------------------------------------------------


def test_a_folder_or_its_weight_file_is_the_adapter(write):
    folder = write()
    for path in (folder, folder / "adapter_model.safetensors"):
        assert list(open_adapter(str(path)).modules) == ["layers.0.q_proj"]


def test_an_open_adapter_is_the_adapter(write):
    opened = open_adapter(write())
    assert open_adapter(opened) is opened


def test_the_one_named_adapter_of_a_folder_is_taken(write, tmp_path):
    write("style")
    (tmp_path / "runs").mkdir()
    assert open_adapter(str(tmp_path)).path.parent.name == "style"


def test_of_two_named_adapters_one_has_to_be_named(write, tmp_path):
    write("style"), write("voice")
    with pytest.raises(InputError, match=r"2 adapters. Name one: style, voice"):
        open_adapter(str(tmp_path))
    assert open_adapter(str(tmp_path / "voice")).path.parent.name == "voice"


def test_an_adapter_in_the_folder_itself_goes_before_named_ones(write, tmp_path):
    write("style"), write()
    assert open_adapter(str(tmp_path)).path.parent == tmp_path


@pytest.mark.parametrize("files", [[], ["model"], ["model-1", "model-2"]])
def test_a_folder_without_an_adapter_is_refused(tmp_path, files):
    for name in files:
        save_file({"w": np.zeros(2, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="no adapter is in it") as refused:
        open_adapter(str(tmp_path))
    assert all(f"{name}.safetensors" in str(refused.value) for name in files)


def test_the_only_weight_file_of_a_folder_is_taken(write):
    folder = write()
    (folder / "adapter_model.safetensors").rename(folder / "my style.safetensors")
    found = open_adapter(str(folder))
    assert (found.name, list(found.modules)) == ("my style", ["layers.0.q_proj"])
    (folder / "my style.safetensors").rename(folder / "other.safetensors")
    shutil.copy(folder / "other.safetensors", folder / "my style.safetensors")
    with pytest.raises(InputError, match=r"name it: my style\.safetensors, other\.safetensors"):
        open_adapter(str(folder))


def test_what_is_in_gguf_is_to_be_converted_first(tmp_path):
    (tmp_path / "lora.gguf").write_bytes(b"GGUF")
    for place in (tmp_path, tmp_path / "lora.gguf"):
        with pytest.raises(InputError, match=r"lorakit convert .*lora\.gguf --to peft --base"):
            open_adapter(str(place))


def test_a_folder_with_an_adapter_and_a_file_that_may_be_one_is_refused(write, tmp_path):
    write("style")
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"name it: style, model\.safetensors"):
        open_adapter(str(tmp_path))


def test_weights_without_a_config_are_refused(write):
    folder = write()
    (folder / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="alpha"):
        open_adapter(str(folder))


def test_a_config_without_weights_is_refused(write):
    folder = write()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="no adapter is in it"):
        open_adapter(str(folder))


def test_a_pickle_is_read_on_request_only(write):
    torch = pytest.importorskip("torch")
    folder = write()
    (folder / "adapter_model.safetensors").unlink()
    tensors = {name: torch.from_numpy(values) for name, values in pair().items()}
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(InputError, match="--allow-pickle"):
        open_adapter(str(folder))
    assert list(open_adapter(str(folder), allow_pickle=True).modules) == ["layers.0.q_proj"]


# What is in it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["lora_A.weight", "lora_B.weight"])
@pytest.mark.parametrize("extra", ["lora_magnitude_vector", "lora_B.bias"])
def test_half_a_pair_is_refused(missing, extra):
    tensors = pair() | {f"{Q}.{extra}": ones(6)}
    del tensors[f"{Q}.{missing}"]
    with pytest.raises(MisfitError, match="half a pair") as error:
        read(tensors)
    assert "'layers.0.q_proj'" in str(error.value)


@pytest.mark.parametrize("alone", ["lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"])
def test_a_part_without_its_pair_is_refused(alone):
    with pytest.raises(MisfitError, match="half a pair"):
        read({**pair(), f"base_model.model.embed.{alone}": ones(2, 8)})


def test_factors_of_two_kinds_in_one_module_are_refused():
    with pytest.raises(MisfitError, match="only one of them"):
        read(pair() | {f"{Q}.lora_embedding_A": ones(2, 8), f"{Q}.lora_embedding_B": ones(6, 2)})


@pytest.mark.parametrize(
    ("a", "b"),
    [
        *(((2, 8), (6, 3)), ((2,), (6, 2)), ((2, 8), (6,)), ((4, 8, 3), (6, 2, 1))),
        *(((0, 8), (6, 0)), ((2, 0), (6, 2)), ((2, 8), (0, 2))),
    ],
)
def test_factors_that_cannot_be_multiplied_are_refused(a, b):
    with pytest.raises(MisfitError, match=r"factors of 'layers\.0\.q_proj'"):
        read({f"{Q}.lora_A.weight": ones(*a), f"{Q}.lora_B.weight": ones(*b)})


@pytest.mark.parametrize("name", [f"{Q}.lora_A.weight", "base_model.model.lm_head.weight"])
def test_a_weight_that_zero_3_has_not_gathered_is_refused_as_that(name):
    with pytest.raises(MisfitError, match="ZeRO-3") as error:
        read(pair() | {name: ones(0)})
    assert name in str(error.value)


def test_dora_without_any_magnitude_is_refused():
    with pytest.raises(MisfitError, match="lora_magnitude_vector"):
        read(pair(), use_dora=True)
    assert read(pair() | {f"{Q}.lora_magnitude_vector": ones(6)}, use_dora=True).modules


@pytest.mark.parametrize("shape", [(5,), (8,), (1,), (2, 6)])
def test_a_magnitude_of_another_size_is_refused(shape):
    with pytest.raises(MisfitError, match="magnitude"):
        read(pair() | {f"{Q}.lora_magnitude_vector": ones(*shape)})


def test_the_same_tensor_under_two_names_counts_once():
    tensors = pair() | {f"{Q}.lora_A.default.weight": ones(2, 8)}
    adapter = read(tensors)
    assert adapter.unused == (f"{Q}.lora_A.default.weight",)


@pytest.mark.parametrize(
    "other", [2 * ones(2, 8), ones(2, 9), ones(2, 8).astype(np.float16), np.ones((2, 8), np.int32)]
)
def test_two_tensors_for_one_place_are_refused(other):
    with pytest.raises(MisfitError, match="claim the same place"):
        read(pair() | {f"{Q}.lora_A.default.weight": other})


def test_two_adapters_in_one_dump_are_refused():
    both = {
        key.replace(".weight", f".{name}.weight"): factor * values
        for name, factor in (("style", 1), ("voice", 2))
        for key, values in pair().items()
    }
    with pytest.raises(MisfitError, match="claim the same place"):
        read(both)


def test_a_kind_that_is_not_folded_is_known_by_its_tensors():
    with pytest.raises(InputError, match="AdaLoRA"):
        read(pair() | {f"{Q}.lora_E": ones(2, 8)})


@pytest.mark.parametrize("shape", [(3,), (2, 6), (1, 1)])
def test_a_bias_that_is_not_of_the_outputs_is_refused(shape):
    with pytest.raises(MisfitError, match=r"the bias of 'layers\.0\.q_proj' has"):
        read(pair() | {f"{Q}.lora_B.bias": ones(*shape)})


def test_a_diagonal_without_the_config_of_kasa_is_refused():
    with pytest.raises(MisfitError, match="config is not KaSA's"):
        read(pair() | {f"{Q}.lora_diag": ones(2)})


def test_half_a_pair_of_a_wrapped_parameter_is_refused():
    with pytest.raises(MisfitError, match="half a pair"):
        read(pair() | {"base_model.model.experts.base_layer.lora_A.weight": ones(2, 8)})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_counted(value):
    tensors = pair()
    tensors[f"{Q}.lora_B.weight"][3, 1] = value
    with pytest.raises(MisfitError, match=r"lora_B.weight' has 1 NaN or Inf of 12"):
        check_finite(read(tensors).source, "adapter")


MODULES = st.lists(st.sampled_from(["a", "b.c", "b.d", "e"]), min_size=1, unique=True)
FULL = st.lists(st.sampled_from(["norm.weight", "a.bias", "b.c.base_layer.bias"]), unique=True)
TRAINING = st.lists(st.sampled_from(["a.lora_velora_embed", "e.original_module.weight"]))


@given(MODULES, FULL, TRAINING, st.booleans())
def test_every_tensor_is_in_one_place(modules, full, training, dora):
    tensors = {k: v for m in modules for k, v in pair(f"base_model.model.{m}").items()}
    tensors |= {f"base_model.model.{name}": ones(6) for name in (*full, *training)}
    if dora:
        tensors |= {f"base_model.model.{m}.lora_magnitude_vector": ones(6) for m in modules}
    adapter = read(tensors)
    used = [info.name for piece in pieces(adapter, 0) for info in piece.tensors]
    assert sorted([*used, *adapter.unused]) == sorted(tensors)


# How often -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "wanted", "times"),
    [
        (None, None, 2),
        ("0.15.0", None, 2),
        ("0.21.2", None, 2),
        ("0.21.3", None, 1),
        ("0.22.0.dev0@abc", None, 1),
        ("0.22.0", 2, 2),
        (None, 1, 1),
    ],
)
def test_the_output_of_an_attention_is_updated_as_often_as_in_training(version, wanted, times):
    names = {"attn": "base_model.model.attn", "out": "base_model.model.attn.base_layer.out_proj"}
    adapter = read(pair(names["attn"]) | pair(names["out"]), peft_version=version)
    weights = {p.module: p.spec["weight"] for p in pieces(adapter, 0, mha_factor=wanted)}
    assert weights == {"attn": 1, "attn.out_proj": times}


def test_patterns_see_the_attention_and_not_its_output_projection():
    tensors = pair("base_model.model.attn.base_layer.out_proj")
    adapter = read(tensors, alpha_pattern={"attn": 10, "out_proj": 6})
    (piece,) = pieces(adapter, 0)
    assert piece.spec["scaling"] == 5
