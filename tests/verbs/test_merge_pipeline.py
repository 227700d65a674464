"""Merging into the folder of a whole pipeline: every model takes what is for it, all else stays."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.cli import main
from lorakit.errors import InputError, MisfitError, OutputError, UsageError
from lorakit.store.journal import JOURNAL
from lorakit.verbs.merge.planned import plan_any
from lorakit.verbs.verify import ResultError

SCRATCH = lorakit.RunOptions(sync=False)
UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
SHAPES = {"unet": (UNET, 6, 2048), "text_encoder": (CLIP, 8, 8), "text_encoder_2": (CLIP, 12, 12)}
FRONTS = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors"}


def weights(folder, component):
    return folder / component / WEIGHTS.get(component, "model.safetensors")


@pytest.fixture
def pipe(tmp_path):
    """The folder of a pipeline of SDXL with one layer a model."""
    folder, rng = tmp_path / "pipe", np.random.default_rng(0)
    for component, (module, out, inner) in SHAPES.items():
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text('{"sample_size": 8}')
        tensors = {f"{module}.weight": rng.standard_normal((out, inner)).astype("f4")}
        save_file(tensors, weights(folder, component))
    (folder / "vae").mkdir()
    save_file({"x": np.ones(9, "f4")}, folder / "vae/diffusion_pytorch_model.safetensors")
    (folder / "tokenizer/deep").mkdir(parents=True)
    (folder / "tokenizer/deep/vocab.json").write_text("{}")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    save_file({"x": np.ones(9, "f4")}, folder / "sdxl-in-one-file.safetensors")
    return folder


@pytest.fixture
def lora(tmp_path):
    return made(tmp_path / "lora.safetensors", SHAPES)


def made(path, components, seed=1):
    rng, tensors = np.random.default_rng(seed), {}
    for component in components:
        module, out, inner = SHAPES[component]
        name = FRONTS[component] + module.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = rng.standard_normal((2, inner)).astype("f4")
        tensors[f"{name}.lora_up.weight"] = rng.standard_normal((out, 2)).astype("f4")
        tensors[f"{name}.alpha"] = np.ones((), "f4")
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def delta(path, component):
    module, held = SHAPES[component][0], load_file(path)
    name = FRONTS[component] + module.replace(".", "_")
    a, b = (held[f"{name}.lora_{x}.weight"].astype("f8") for x in ("down", "up"))
    return b @ a / 2


def moved(pipe, out, component):
    name = f"{SHAPES[component][0]}.weight"
    before, after = (load_file(weights(p, component))[name] for p in (pipe, out))
    return after.astype("f8") - before


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_model_takes_what_is_for_it(pipe, lora, tmp_path):
    before = files(pipe)
    report = lorakit.merge(pipe, lora, tmp_path / "out", weights=[0.5], run=SCRATCH)
    for component in SHAPES:
        found = moved(pipe, tmp_path / "out", component)
        np.testing.assert_allclose(found, 0.5 * delta(lora, component), atol=1e-6)
    assert report.folded == 3
    assert set(report.figures) == {f"{c}/{module}.weight" for c, (module, *_) in SHAPES.items()}
    assert files(pipe) == before


def test_an_adapter_may_be_the_folder_that_diffusers_writes(pipe, lora, tmp_path):
    (tmp_path / "folder").mkdir()
    lora.rename(tmp_path / "folder/pytorch_lora_weights.safetensors")
    lorakit.merge(pipe, tmp_path / "folder", tmp_path / "out", run=SCRATCH)
    held = tmp_path / "folder/pytorch_lora_weights.safetensors"
    for component in SHAPES:
        found = moved(pipe, tmp_path / "out", component)
        np.testing.assert_allclose(found, delta(held, component), atol=1e-6)
    front = (tmp_path / "out/unet/README.md").read_text()
    assert "folder" in front.split("---")[1]


def test_all_else_is_as_it_was(pipe, lora, tmp_path):
    lorakit.merge(pipe, lora, tmp_path / "out", run=SCRATCH)
    before, after = files(pipe), files(tmp_path / "out")
    changed = {str(weights(pipe, c).relative_to(pipe)) for c in SHAPES}
    beside = {f"{c}/{n}" for c in SHAPES for n in ("README.md", "lorakit.json")}
    assert set(after) == set(before) - {"sdxl-in-one-file.safetensors"} | beside
    assert all(after[n] == before[n] for n in set(before) & set(after) - changed)


def test_each_model_is_what_a_merge_into_it_alone_writes(pipe, lora, tmp_path):
    lorakit.merge(pipe, lora, tmp_path / "out", run=SCRATCH)
    for component in SHAPES:
        alone = tmp_path / component
        lorakit.merge(pipe / component, lora, alone, component=component, run=SCRATCH)
        name = weights(pipe, component).name
        assert (alone / name).read_bytes() == weights(tmp_path / "out", component).read_bytes()


def test_models_that_no_adapter_is_for_are_copied_or_linked(pipe, tmp_path):
    lora = made(tmp_path / "lora.safetensors", ["text_encoder_2"])
    lorakit.merge(pipe, lora, tmp_path / "out", link=True, run=SCRATCH)
    assert weights(tmp_path / "out", "unet").samefile(weights(pipe, "unet"))
    assert (tmp_path / "out/text_encoder_2/lorakit.json").exists()
    assert not (tmp_path / "out/unet/lorakit.json").exists()


def test_several_adapters_go_where_each_belongs(pipe, tmp_path):
    one = made(tmp_path / "one.safetensors", ["unet", "text_encoder"])
    other = made(tmp_path / "other.safetensors", ["unet"], seed=2)
    lorakit.merge(pipe, [one, other], tmp_path / "out", weights=[1, -2], run=SCRATCH)
    wanted = delta(one, "unet") - 2 * delta(other, "unet")
    np.testing.assert_allclose(moved(pipe, tmp_path / "out", "unet"), wanted, atol=1e-5)
    found = moved(pipe, tmp_path / "out", "text_encoder")
    np.testing.assert_allclose(found, delta(one, "text_encoder"), atol=1e-6)


def test_adapters_of_peft_go_by_their_folders_or_by_what_they_fit(pipe, lora, tmp_path):
    lorakit.convert(lora, tmp_path / "peft", to="peft", run=SCRATCH)
    for source, parts in [("peft", SHAPES), ("peft/unet", ["unet"])]:
        out = tmp_path / source.replace("/", "-to-")
        lorakit.merge(pipe, tmp_path / source, tmp_path / f"{out}-out", run=SCRATCH)
        for component in parts:
            found = moved(pipe, tmp_path / f"{out}-out", component)
            np.testing.assert_allclose(found, delta(lora, component), atol=1e-6)


def test_an_adapter_that_fits_two_models_or_none_asks_for_the_folder(pipe, lora, tmp_path):
    lorakit.convert(lora, tmp_path / "peft", to="peft", run=SCRATCH)
    weights(pipe, "text_encoder_2").write_bytes(weights(pipe, "text_encoder").read_bytes())
    with pytest.raises(MisfitError, match="fits text_encoder and text_encoder_2"):
        lorakit.merge(pipe, tmp_path / "peft/text_encoder", tmp_path / "out", run=SCRATCH)
    with pytest.raises(MisfitError, match="fits none of the models"):
        lorakit.merge(pipe, tmp_path / "peft/text_encoder_2", tmp_path / "out", run=SCRATCH)


def test_a_model_that_the_pipeline_has_not_is_named(pipe, lora, tmp_path):
    for path in (pipe / "text_encoder_2").iterdir():
        path.unlink()
    (pipe / "text_encoder_2").rmdir()
    with pytest.raises(MisfitError, match="text_encoder_2, which this pipeline has not"):
        lorakit.merge(pipe, lora, tmp_path / "out", run=SCRATCH)
    assert not list(tmp_path.glob("out*"))


def test_the_result_is_verified_and_taken_back(pipe, lora, tmp_path):
    out = tmp_path / "out"
    lorakit.merge(pipe, lora, out, run=SCRATCH)
    assert lorakit.verify(out, full=True).folded_tensors == 3
    lorakit.unmerge(out, lora, tmp_path / "back", run=SCRATCH)
    for component in SHAPES:
        np.testing.assert_allclose(moved(pipe, tmp_path / "back", component), 0, atol=1e-5)
    (out / "tokenizer/deep/vocab.json").write_text("{ }")
    with pytest.raises(ResultError, match=r"vocab\.json is not that of the base"):
        lorakit.verify(out)


def test_a_run_that_was_cut_off_goes_on(pipe, lora, tmp_path):
    seen = []

    def stop(nbytes):
        seen.append(nbytes)
        if len(seen) == 2:
            raise KeyboardInterrupt

    job = plan_any("merge", pipe, lora, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        job.run(tmp_path / "out", SCRATCH.reporting(stop))
    assert (tmp_path / "out.partial").is_dir()
    assert not (tmp_path / "out").exists()
    done = list((tmp_path / "out.partial").glob("*/lorakit.json"))
    stamps = {p: p.stat().st_mtime_ns for p in done}
    assert stamps
    again = job.run(tmp_path / "out", SCRATCH)
    lorakit.merge(pipe, lora, tmp_path / "whole", run=SCRATCH)
    assert again.folded == 3
    assert not list(tmp_path.glob("out.partial"))
    parts = {n: b for n, b in files(tmp_path / "out").items() if n.endswith(".safetensors")}
    assert parts == {n: files(tmp_path / "whole")[n] for n in parts}
    for path, stamp in stamps.items():
        there = tmp_path / "out" / path.relative_to(tmp_path / "out.partial")
        assert there.stat().st_mtime_ns == stamp


def test_what_was_not_synced_is_written_anew_after_the_machine_went_down(pipe, lora, tmp_path):
    def stop(nbytes):
        if nbytes == (pipe / "vae/diffusion_pytorch_model.safetensors").stat().st_size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lorakit.merge(pipe, lora, tmp_path / "out", run=SCRATCH.reporting(stop))
    journal = tmp_path / "out.partial" / JOURNAL
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(lines) > 3
    assert all("boot" in line for line in lines[1:])
    lines[1:] = [line | {"boot": "before"} for line in lines[1:]]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (tmp_path / "out.partial").rglob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))  # the power went before the data was on disk
    lorakit.merge(pipe, lora, tmp_path / "out", run=SCRATCH)
    lorakit.merge(pipe, lora, tmp_path / "whole", run=SCRATCH)
    found, whole = (files(tmp_path / n) for n in ("out", "whole"))
    weighty = [n for n in whole if n.endswith(".safetensors")]
    assert {n: found[n] for n in weighty} == {n: whole[n] for n in weighty}


@pytest.mark.parametrize("changed", ["text_encoder_2/model", "vae/diffusion_pytorch_model"])
def test_a_run_that_was_cut_off_does_not_go_on_with_another_base(pipe, lora, tmp_path, changed):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lorakit.merge(pipe, lora, tmp_path / "out", run=SCRATCH.reporting(stop))
    path = pipe / f"{changed}.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(OutputError, match="other inputs or options"):
        lorakit.merge(pipe, lora, tmp_path / "out", run=SCRATCH)


def test_places_and_outputs_are_refused_as_for_one_model(pipe, lora, tmp_path):
    with pytest.raises(OutputError, match="never written to"):
        lorakit.merge(pipe, lora, pipe / "merged", run=SCRATCH)
    command = ["merge", str(pipe), str(lora), "-o", str(pipe / "merged"), "--dry-run"]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 7
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        lorakit.merge(pipe, lora, tmp_path / "out", run=SCRATCH)
    with pytest.raises(UsageError, match="a pipeline is written as a folder"):
        lorakit.merge(pipe, lora, tmp_path / "out.safetensors", run=SCRATCH)
    with pytest.raises(InputError):
        lorakit.merge(pipe, tmp_path / "none.safetensors", tmp_path / "new", run=SCRATCH)


def test_a_part_that_an_adapter_has_not_is_named(pipe, tmp_path):
    lora = made(tmp_path / "lora.safetensors", ["unet", "text_encoder"])
    with pytest.raises(MisfitError, match="text_encoder_2, only for text_encoder, unet"):
        lorakit.merge(
            pipe / "text_encoder_2", lora, tmp_path / "o", component="text_encoder_2", run=SCRATCH
        )


def test_the_command_shows_and_runs_it(pipe, lora, tmp_path, capsys):
    out = tmp_path / "out"

    def ran(*more):
        with pytest.raises(SystemExit) as end:
            main(["merge", str(pipe), str(lora), "-o", str(out), "--no-fsync", *more])
        assert not end.value.code
        return capsys.readouterr().out

    assert "what would be written to text_encoder_2" in ran("--dry-run")
    assert set(json.loads(ran("--dry-run", "--json"))["parts"]) == set(SHAPES)
    assert not out.exists()
    assert json.loads(ran("--json"))["folded"] == 3
    assert (out / "vae/diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize("both", [False, True])
def test_the_index_of_a_variant_goes_with_its_shards(pipe, lora, tmp_path, both):
    """`model.safetensors.index.fp16.json`, as Diffusers calls it."""
    place, stem = pipe / "unet", "diffusion_pytorch_model"
    weight = load_file(weights(pipe, "unet"))[f"{UNET}.weight"]
    if not both:
        weights(pipe, "unet").unlink()
    for number, (name, values) in enumerate(((f"{UNET}.weight", weight), ("x", weight[:1])), 1):
        shard = f"{stem}.fp16-0000{number}-of-00002.safetensors"
        save_file({name: values.astype("f2")}, place / shard)
    held = {f"{UNET}.weight": f"{stem}.fp16-00001-of-00002.safetensors"}
    held["x"] = f"{stem}.fp16-00002-of-00002.safetensors"
    index = f"{stem}.safetensors.index.fp16.json"
    (place / index).write_text(json.dumps({"metadata": {}, "weight_map": held}))
    lorakit.merge(pipe, lora, tmp_path / "out", run=SCRATCH)
    there = {p.name for p in (tmp_path / "out/unet").iterdir()}
    whole = {f"{stem}.safetensors"} if both else {index, *held.values()}
    assert there == {"README.md", "config.json", "lorakit.json", *whole}
    lorakit.verify(tmp_path / "out", full=True)
