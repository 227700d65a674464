"""verify finds every change of a result, wherever it is, and nothing in a sound one."""

import json
import shutil

import pytest

import lorakit
from lorakit.errors import DifferenceError, InputError
from lorakit.store.checkpoint import open_checkpoint
from tests.verbs.adapters import save
from tests.verbs.conftest import SCRATCH


def flip(folder, name, byte=1):
    """Turn the lowest bit of a byte of a tensor."""
    part = open_checkpoint(str(folder)).home(name)
    at = part.infos[name].start + byte
    data = bytearray(part.path.read_bytes())
    data[at] ^= 1
    part.path.write_bytes(data)


def test_a_sound_result_has_no_differences(merged):
    found = lorakit.verify(merged, full=True)
    assert found.differences == ()
    assert found.folded_tensors == 14
    assert found.checked_numbers == 100_352
    assert found.wrong_rounded <= 20  # 0.01 % and a few


def test_every_untouched_byte_counts(merged):
    flip(merged, "model.embed_tokens.weight", 12_345)
    with pytest.raises(DifferenceError, match=r"'model.embed_tokens.weight' in .* differs"):
        lorakit.verify(merged)


def test_a_changed_number_of_a_folded_tensor_is_found(merged):
    flip(merged, "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(DifferenceError, match=r"'model.layers.1.mlp.down_proj.weight'.* 1 of"):
        lorakit.verify(merged, full=True)


def test_a_base_in_the_place_of_the_result_is_found(merged, made):
    for shard in (made / "base").glob("*.safetensors"):
        shutil.copy(shard, merged)
    with pytest.raises(DifferenceError) as error:
        lorakit.verify(merged)
    assert len(error.value.verified.differences) == 14


def test_missing_truncated_and_relabelled_files_are_found(merged):
    (shard, *_) = sorted(merged.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(DifferenceError, match="another size"):
        lorakit.verify(merged)
    shard.write_bytes(whole.replace(b'"pt"', b'"np"'))
    with pytest.raises(DifferenceError, match="another header"):
        lorakit.verify(merged)
    shard.unlink()
    with pytest.raises(DifferenceError, match="missing"):
        lorakit.verify(merged)


def removed(path):
    path.unlink()


def emptied(path):
    path.write_text("{}")


def edited(path):
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("config.json", removed, "config.json is missing"),
        ("config.json", emptied, "config.json is not as it was written"),
        ("config.json", edited, "config.json is not as it was written"),
        ("model.safetensors.index.json", emptied, "index"),
        ("pytorch_model.bin", emptied, "pytorch_model.bin is no file of this result"),
        ("adapter_config.json", emptied, "adapter_config.json is no file of this result"),
        ("diffusion.index.json", emptied, "diffusion.index.json is no file of this result"),
    ],
)
def test_what_a_loader_reads_beside_the_weights_counts(merged, name, change, said):
    change(merged / name)
    with pytest.raises(DifferenceError, match=said) as error:
        lorakit.verify(merged)
    assert len(error.value.verified.differences) == 1


def test_a_file_from_elsewhere_hides_no_other_difference(merged):
    edited(merged / "config.json")
    emptied(merged / "adapter_config.json")
    with pytest.raises(DifferenceError) as error:
        lorakit.verify(merged)
    assert len(error.value.verified.differences) == 2


def test_a_tokenizer_in_a_folder_of_its_own_counts(made, tmp_path):
    base, out = shutil.copytree(made / "base", tmp_path / "base"), tmp_path / "out"
    (base / "tokenizer").mkdir()
    (base / "tokenizer/vocab.json").write_text("{}")
    lorakit.merge(base, made / "style", out, run=SCRATCH)
    (base / "notes.txt").write_text("later")
    assert lorakit.verify(out).differences == ()
    edited(out / "tokenizer/vocab.json")
    with pytest.raises(DifferenceError, match=r"tokenizer/vocab.json is not as it was written"):
        lorakit.verify(out)


def test_the_card_is_the_users_to_edit(merged):
    (merged / "README.md").write_text("mine")
    assert lorakit.verify(merged).differences == ()


def test_a_manifest_that_names_a_file_elsewhere_is_refused(merged):
    manifest = json.loads((merged / "lorakit.json").read_text())
    manifest["beside"] = {"../secret": "0" * 64}
    (merged / "lorakit.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="not a manifest"):
        lorakit.verify(merged)


def test_the_checksums_of_a_merge_are_held_against_the_files(made, tmp_path):
    run = lorakit.RunOptions(sync=False, checksum=True)
    out = tmp_path / "out"
    report = lorakit.merge(made / "base", made / "style", out, run=run)
    assert len(report.sha256) == 3
    assert lorakit.verify(out).differences == ()
    manifest = json.loads((out / "lorakit.json").read_text())
    name = next(iter(manifest["files"]))
    manifest["files"][name]["sha256"] = "0" * 64
    (out / "lorakit.json").write_text(json.dumps(manifest))
    with pytest.raises(DifferenceError, match="sha256"):
        lorakit.verify(out)


def test_inputs_that_have_moved_can_be_named_and_others_are_refused(merged, made, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(made, moved)
    adapters = [str(moved / "style"), str(moved / "detail")]
    found = lorakit.verify(merged, base=str(moved / "base"), adapters=adapters)
    assert found.differences == ()
    with pytest.raises(InputError, match="was made from"):
        lorakit.verify(merged, adapters=adapters[::-1])


def test_a_folder_without_a_manifest_is_none_of_ours(made, merged):
    with pytest.raises(InputError, match=r"lorakit.json"):
        lorakit.verify(made / "base")
    with pytest.raises(InputError, match="it lies in a result") as error:
        lorakit.verify(merged / "lorakit.json")
    assert error.value.hint == f"`lorakit verify {merged}`."


def test_inputs_and_outputs_whose_names_are_no_utf8(made, tmp_path):
    for name in ("base", "style"):
        shutil.copytree(made / name, tmp_path / f"{name}\udcff")
    inputs = (tmp_path / "base\udcff", tmp_path / "style\udcff")
    for out in (tmp_path / "out\udcff", tmp_path / "out\udcff.safetensors"):
        lorakit.merge(*inputs, out, run=SCRATCH)
        assert lorakit.verify(out).differences == ()


@pytest.mark.filterwarnings("error")
def test_infinite_numbers_of_the_base_warn_of_nothing(made, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    shutil.copytree(made / "base", tmp_path / "base")
    part = open_checkpoint(str(tmp_path / "base")).home(name)
    data = bytearray(part.path.read_bytes())
    start = part.infos[name].start
    data[start : start + 2] = b"\x80\x7f"  # +Inf of bfloat16
    part.path.write_bytes(data)
    lorakit.merge(tmp_path / "base", made / "style", tmp_path / "out", run=SCRATCH)
    assert lorakit.verify(tmp_path / "out", full=True).differences == ()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_results_of_another_dtype_and_of_new_shards_verify(made, tmp_path, dtype):
    out = tmp_path / "out"
    lorakit.merge(
        made / "base", made / "detail", out, dtype=dtype, max_shard_size=100_000, run=SCRATCH
    )
    assert lorakit.verify(out, full=True).differences == ()


def test_an_unmerged_result_verifies_too(made, merged, tmp_path):
    out = tmp_path / "back"
    both = [made / "style", made / "detail"]
    lorakit.unmerge(merged, both, out, weights=[1, 0.5], run=SCRATCH)
    assert lorakit.verify(out, full=True).differences == ()


def test_a_single_file_verifies_by_the_manifest_beside_it(made, tmp_path):
    out = tmp_path / "one.safetensors"
    lorakit.merge(made / "base", made / "style", out, run=SCRATCH)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.lorakit.json", "one.safetensors"]
    assert lorakit.verify(out, full=True).differences == ()


@pytest.mark.parametrize("weight", [0.3, -1.0, 0.9])
def test_token_rows_that_are_a_step_away_are_no_difference(made, tmp_path, weight):
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": (40, 64)}
    indices = {"trainable_token_indices": list(range(3, 43))}
    tokens = save(tmp_path / "tokens", rows, target_modules=[], **indices)
    out = tmp_path / "out"
    options = {"weights": [weight], "dtype": "float32", "run": SCRATCH}
    lorakit.merge(made / "base", tokens, out, **options)
    assert lorakit.verify(out, full=True).differences == ()
    flip(out, "model.embed_tokens.weight", 4 * 64 * 5 + 2)  # in a row that changed
    with pytest.raises(DifferenceError, match="embed_tokens"):
        lorakit.verify(out, full=True)


def test_what_has_no_manifest_is_told_why(made, tmp_path):
    lorakit.init(made / "base", tmp_path / "pair", rank=2, method="pissa", run=SCRATCH)
    for output, said in (
        (made / "style", "adapters have none"),
        (tmp_path / "pair", f"`lorakit verify {tmp_path / 'pair/base'}`"),
        (made / "base", "no merge, unmerge or loftq of lorakit wrote it"),
    ):
        with pytest.raises(InputError) as caught:
            lorakit.verify(output)
        assert said in str(caught.value)
    assert lorakit.verify(tmp_path / "pair/base").folded_tensors == 14


def test_a_merge_into_another_base_than_the_one_that_is_named_gets_a_note(made, tmp_path):
    pair = tmp_path / "pair"
    lorakit.init(made / "base", pair, rank=2, method="pissa", run=SCRATCH)
    assert lorakit.plan_merge(pair / "base", pair / "adapter").notes == []
    job = lorakit.plan_merge(made / "base", pair / "adapter")
    assert job.notes == [f"adapter: its config names the base {pair / 'base'}, not this one."]
    assert list(job.run(tmp_path / "out", SCRATCH).notes) == job.notes
    pair.rename(tmp_path / "moved")
    there = tmp_path / "moved/base"
    (note,) = lorakit.plan_merge(made / "base", tmp_path / "moved/adapter").notes
    assert str(there) in note
    assert lorakit.plan_merge(there, tmp_path / "moved/adapter").notes == []
    moved = tmp_path / "moved/adapter"
    assert lorakit.verify(tmp_path / "out", adapters=[str(moved)]).differences == ()
    assert lorakit.plan_unmerge(tmp_path / "out", moved).notes == []


@pytest.mark.parametrize("name", ["private/llama", "long" * 100])
def test_a_base_that_is_named_may_lie_where_nobody_may_look(outsider, name):
    folder = lorakit.demo(outsider / "try")
    (outsider / "private").mkdir(mode=0)
    config = json.loads((folder / "style/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(outsider / name)
    (folder / "style/adapter_config.json").write_text(json.dumps(config))
    assert lorakit.plan_merge(folder / "base", folder / "style").notes == []
