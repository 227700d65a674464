"""The spectrum of an adapter is that of its dense deltas, and its picture is one."""

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorakit
from lorakit.adapter.adapter import open_adapter
from lorakit.errors import InputError, OutputError, UsageError
from lorakit.verbs.inspect.plotting import draw
from lorakit.verbs.inspect.spectra import spectra
from tests.verbs.adapters import deltas, pair, save

WEIGHTS = {
    **pair("model.layers.0.q", 9, 7, 3),
    **pair("model.layers.1.q", 9, 7, 2),
    "embed.lora_embedding_A": (2, 10),
    "embed.lora_embedding_B": (6, 2),
    "mlp.experts.lora_A.weight": (6, 4),
    "mlp.experts.lora_B.weight": (6, 6),
}
CONFIG = {"target_parameters": ["experts.down_proj"], "peft_version": "0.21.2"}
BEGINNINGS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.fixture
def adapter(tmp_path):
    return save(tmp_path / "a", WEIGHTS, **CONFIG)


def needed(values, level):
    held = np.cumsum(values**2) / (values**2).sum()
    return int(np.searchsorted(held, level)) + 1


def test_every_figure_is_that_of_the_dense_deltas(adapter):
    dense = deltas(adapter)
    total = sum(np.vdot(d, d) for d in dense.values())
    found = spectra(open_adapter(str(adapter)))
    assert [s.name for s in found] == list(dense)
    for one in found:
        values = [np.linalg.svd(e, compute_uv=False) for e in dense[one.name]]
        for mine, theirs in zip(one.values, values, strict=True):
            np.testing.assert_allclose(mine, theirs[: len(mine)], rtol=1e-9)
        assert one.norm == pytest.approx(np.linalg.norm(dense[one.name]))
        assert one.share == pytest.approx(np.vdot(dense[one.name], dense[one.name]) / total)
        assert one.largest == pytest.approx(max(v[0] for v in values))
        assert one.rank_90 == max(needed(v, 0.9) for v in values)
        assert one.rank_99 == max(needed(v, 0.99) for v in values)
        energies = [v[v > 1e-12] ** 2 / (v**2).sum() for v in values]
        ranks = [np.exp(-(p * np.log(p)).sum()) for p in energies]
        assert one.effective_rank == pytest.approx(np.mean(ranks))
    assert sum(s.share for s in found) == pytest.approx(1)


def test_the_result_does_not_depend_on_the_number_of_workers(adapter):
    opened = open_adapter(str(adapter))
    assert spectra(opened, jobs=1) == spectra(opened, jobs=3)


def test_an_update_of_zeros_has_no_rank(tmp_path):
    tensors = {**pair("q", 8, 6, 2), "q.lora_B.weight": np.zeros((8, 2), "f4")}
    (one,) = spectra(open_adapter(str(save(tmp_path / "a", tensors))))
    figures = (one.norm, one.share, one.largest, one.effective_rank, one.rank_90, one.rank_99)
    assert figures == (0, 0, 0, 0, 0, 0)


def test_numbers_that_are_none_are_refused_by_name(tmp_path):
    tensors = {**pair("q", 8, 6, 2), "q.lora_B.weight": np.full((8, 2), np.nan, "f4")}
    with pytest.raises(InputError, match=r"'q.weight': .*NaN"):
        spectra(open_adapter(str(save(tmp_path / "a", tensors))))


def test_inspect_has_spectra_where_they_are_asked_for(adapter):
    assert lorakit.inspect(adapter).spectra is None
    assert "spectra" not in lorakit.inspect(adapter).to_dict()
    found = lorakit.inspect(adapter, spectrum=True)
    assert found.spectra == spectra(open_adapter(str(adapter)))
    assert found.to_dict()["spectra"][0]["name"] == "embed.weight"


def test_the_spectrum_of_dora_is_said_to_be_of_its_low_rank_part(tmp_path):
    tensors = {**pair("q", 8, 6, 2), "q.lora_magnitude_vector": np.ones(8, "f4")}
    found = lorakit.inspect(save(tmp_path / "a", tensors, use_dora=True), spectrum=True)
    assert any("DoRA's delta depends on the base" in note for note in found.notes)


def test_what_is_no_adapter_has_no_spectrum(made, adapter):
    with pytest.raises(InputError, match="no spectrum"):
        lorakit.inspect(made / "base", spectrum=True)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="no spectrum"):
        lorakit.inspect(adapter / "adapter_model.safetensors", spectrum=True)


def test_files_of_other_formats_have_a_spectrum_too(tmp_path):
    down, up = (np.random.default_rng(0).standard_normal(s).astype("f4") for s in [(2, 9), (7, 2)])
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.array(1.0, "f4")}
    save_file({f"{name}.{n}": t for n, t in tensors.items()}, tmp_path / "lora.safetensors")
    (found,) = lorakit.inspect(tmp_path / "lora.safetensors", spectrum=True).spectra
    expected = np.linalg.svd(up.astype("f8") @ down / 2, compute_uv=False)[:2]
    np.testing.assert_allclose(found.values[0], expected, rtol=1e-6)


@pytest.mark.parametrize("suffix", BEGINNINGS)
def test_a_picture_is_drawn_the_same_every_time(adapter, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    one, other = (tmp_path / f"{n}.{suffix}" for n in ("one", "other"))
    for path in (one, other):
        lorakit.inspect(adapter, plot=path)
    assert one.read_bytes().startswith(BEGINNINGS[suffix])
    assert one.read_bytes() == other.read_bytes()


def test_a_picture_names_every_layer_and_kind_of_module(tmp_path):
    pytest.importorskip("matplotlib")
    names = ["down.0.attn.1.to_q", "up.0.attn.1.to_q", "up.10.attn.1.to_k", "head"]
    tensors = {}
    for name in names:
        tensors |= pair(name, 8, 6, 2)
    tensors["head.lora_B.weight"] = np.zeros((8, 2), "f4")
    path = tmp_path / "one.svg"
    draw(spectra(open_adapter(str(save(tmp_path / "a", tensors)))), path, "mine")
    text = path.read_text()
    labels = ["mine", "down 0.1", "up 0.1", "up 10.1", "attn.*.to_q", "attn.*.to_k", "head"]
    assert [label for label in labels if f"<!-- {label} -->" not in text] == []


def test_a_picture_that_exists_is_replaced_on_request_only(adapter, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "one.png"
    path.write_text("mine")
    with pytest.raises(OutputError, match="the picture exists"):
        lorakit.inspect(adapter, plot=path)
    assert path.read_text() == "mine"
    lorakit.inspect(adapter, plot=path, overwrite=True)
    assert path.read_bytes().startswith(BEGINNINGS["png"])
    with pytest.raises(OutputError, match="no such folder"):
        lorakit.inspect(adapter, plot=tmp_path / "nowhere/one.png")


def test_a_picture_of_another_format_is_refused(adapter, tmp_path):
    with pytest.raises(UsageError, match=r"ends in .png, .svg, .pdf"):
        lorakit.inspect(adapter, plot=tmp_path / "one.jpg")
