"""What comes out of a merge besides changed weights: files, facts, shards, links, the card."""

import json
import os
import shutil
import tempfile
import tracemalloc

import pytest
import yaml
from safetensors import safe_open

import lorakit
from lorakit.errors import MisfitError, OutputError, UsageError
from lorakit.verbs.demo import _write_tensors
from tests.verbs.conftest import SCRATCH

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
FACTORS = {f"{MODULE}.lora_A.weight": (2, 64), f"{MODULE}.lora_B.weight": (64, 2)}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(made, tmp_path):
    """A base of our own, with a tokenizer, custom code, a card and things that stay behind."""
    folder = tmp_path / "base"
    shutil.copytree(made / "base", folder)
    (folder / "tokenizer.json").write_text('{"of": "the base"}')
    (folder / "modeling_own.py").write_text("raise SystemExit('never imported')")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# Base\n")
    (folder / "consolidated.safetensors").write_bytes(b"stale")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "junk").write_text("")
    return folder


@pytest.fixture
def adapter(tmp_path):
    """Makes an adapter with these tensors besides a plain pair, and these config fields."""

    def make(tensors, **config):
        folder = tmp_path / "adapter"
        folder.mkdir()
        _write_tensors(folder / "adapter_model.safetensors", {**FACTORS, **tensors}, "F32")
        known = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, **config}
        (folder / "adapter_config.json").write_text(json.dumps(known))
        return folder

    return make


def merge(base, adapter, out, **options):
    lorakit.merge(base, adapter, out, run=SCRATCH, **options)
    return out


def test_small_files_go_along_and_weights_that_no_index_names_do_not(base, made, tmp_path):
    out = merge(base, made / "style", tmp_path / "out")
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    small = {"config.json", "tokenizer.json", "modeling_own.py", "1_Pooling", INDEX}
    assert {p.name for p in out.iterdir()} == shards | small | {"README.md", "lorakit.json"}
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json", INDEX):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert "consolidated" in json.loads((out / "lorakit.json").read_text())["notes"][0]


def test_what_goes_along_is_not_in_memory_whole(base, made, tmp_path):
    with (base / "corpus.jsonl").open("wb") as file:
        file.truncate(200 << 20)
    job = lorakit.plan_merge(base, made / "style")
    tracemalloc.start()
    job.run(tmp_path / "out", SCRATCH)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out/corpus.jsonl").stat().st_size == 200 << 20
    assert peak < 50 << 20
    assert lorakit.verify(tmp_path / "out").differences == ()


def test_a_tensor_that_an_adapter_replaces_is_not_linked_to_the_base(made, adapter, tmp_path):
    base = tmp_path / "shards"
    merge(made / "base", made / "style", base, max_shard_size="1kB")  # a shard for each tensor
    head = {"base_model.model.lm_head.weight": (512, 64)}
    out = merge(base, adapter(head), tmp_path / "out", link=True)
    assert lorakit.verify(out, full=True).differences == ()
    shard = json.loads((base / INDEX).read_text())["weight_map"]["lm_head.weight"]
    assert not (out / shard).samefile(base / shard)
    assert any(p.samefile(base / p.name) for p in out.glob("*.safetensors"))


def test_the_card_carries_lineage_and_licence(base, made, tmp_path):
    out = merge(base, [made / "style", made / "detail"], tmp_path / "out")
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert front["base_model"] == ["base", "style", "detail"]
    assert front["base_model_relation"] == "merge"
    assert (front["license"], front["language"]) == ("mit", ["en"])


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("language:\n- no\n- en", ["no", "en"]),  # Norwegian, which YAML 1.1 takes for false
        ("language: en\ndate: 2023-02-30", "en"),
        ("language: en\nx: " + "[" * 5000, None),
    ],
    ids=["norwegian", "no such day", "nested"],
)
def test_the_card_of_a_base_is_read_as_text(base, made, tmp_path, text, language):
    (base / "README.md").write_text(f"---\nlicense: mit\n{text}\n---\n")
    out = merge(base, made / "style", tmp_path / "out")
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert front.get("language") == language


def test_weights_of_the_modules_behind_a_model_of_sentences_go_along(made, tmp_path):
    """Of sentence-transformers: without its 2_Dense such a model does not load."""
    base = tmp_path / "base"
    base.mkdir()
    merge(made / "base", made / "style", base / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"of somebody else")
    paths = ("", ".", "..", "../base", "1_Pooling", "2_Dense", "3_Gone", 4)
    (base / "modules.json").write_text(json.dumps([*({"path": p} for p in paths), None, {}]))
    for folder in ("2_Dense", "other"):
        (base / folder).mkdir()
        (base / folder / "model.safetensors").write_bytes(b"weights of a layer")
    out = merge(base, made / "style", tmp_path / "out")
    assert (out / "2_Dense/model.safetensors").read_bytes() == b"weights of a layer"
    assert not (out / "other").exists()
    assert lorakit.verify(out, full=True).differences == ()
    (base / "modules.json").write_text("no JSON")
    assert not (merge(base, made / "style", tmp_path / "again") / "2_Dense").exists()


@pytest.mark.parametrize(
    "name", ["onnx/model.onnx_data", "onnx/model.onnx.data", "model.ckpt.data-00000-of-00001"]
)
def test_weights_of_other_programs_stay_behind(base, made, tmp_path, name):
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_bytes(b"weights")
    assert not (merge(base, made / "style", tmp_path / "out") / name).exists()


def test_what_is_no_metadata_of_an_index_is_left_out(base, made, tmp_path):
    known = json.loads((base / INDEX).read_text())
    (base / INDEX).write_text(json.dumps({**known, "metadata": -1}))
    index = json.loads((merge(base, made / "style", tmp_path / "out") / INDEX).read_text())
    assert index["weight_map"] == known["weight_map"]
    assert set(index["metadata"]) == {"total_size"}


def test_new_shards_hold_every_tensor_once_and_the_index_says_where(base, made, tmp_path):
    out = merge(base, made / "style", tmp_path / "out", max_shard_size=100_000)
    index = json.loads((out / INDEX).read_text())
    found = {}
    for shard in sorted(out.glob("*.safetensors")):
        with safe_open(shard, "np") as f:
            found |= dict.fromkeys(f.keys(), shard.name)
    assert found == index["weight_map"]
    assert len(set(found.values())) == 4
    assert index["metadata"]["total_size"] == 332_416


def test_a_resized_vocabulary_changes_the_fact_and_takes_the_adapters_tokenizer(
    base, adapter, tmp_path
):
    names = ("model.embed_tokens.weight", "lm_head.weight")
    grown = adapter({f"base_model.model.{n}": (520, 64) for n in names})
    (grown / "tokenizer.json").write_text('{"of": "the adapter"}')
    (grown / "chat_template.jinja").write_text("{{ messages }}")
    out = merge(base, grown, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 520
    assert json.loads((out / "tokenizer.json").read_text()) == {"of": "the adapter"}
    assert (out / "chat_template.jinja").exists()
    assert "tokenizer.json" in " ".join(json.loads((out / "lorakit.json").read_text())["notes"])


@pytest.mark.parametrize("alone", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_vocabulary_that_is_resized_on_one_side_is_refused(base, adapter, tmp_path, alone):
    other = {"lm_head.weight", "model.embed_tokens.weight"} - {alone}
    grown = adapter({f"base_model.model.{alone}": (520, 64)})
    with pytest.raises(MisfitError, match=rf"'{other.pop()}' has 512 in the base"):
        merge(base, grown, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("alone", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_side_of_a_tied_vocabulary_is_not_untied_in_another_size(adapter, tmp_path, alone):
    base = tmp_path / "tied"
    base.mkdir()
    shapes = {"model.embed_tokens.weight": (512, 64), f"{MODULE[17:]}.weight": (64, 64)}
    _write_tensors(base / "model.safetensors", shapes, "F32")
    (base / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    learnt = [alone.removesuffix(".weight")]
    grown = adapter({f"base_model.model.{alone}": (520, 64)}, modules_to_save=learnt)
    with pytest.raises(MisfitError, match="512 in the base and is not in the adapter"):
        merge(base, grown, tmp_path / "out", untie=True)


@pytest.mark.parametrize("nested", ["text_config", "thinker_config", "vlm_config"])
def test_a_fact_that_stands_twice_changes_in_both_places(base, adapter, tmp_path, nested):
    config = json.loads((base / "config.json").read_text())
    kept = {"model_type": "llama", "hidden_size": 64}
    config[nested] = {**kept, "vocab_size": 500}
    (base / "config.json").write_text(json.dumps({**config, "vision_config": {"vocab_size": 9}}))
    names = ("model.embed_tokens.weight", "lm_head.weight")
    grown = adapter({f"base_model.model.{n}": (520, 64) for n in names})
    result = json.loads((merge(base, grown, tmp_path / "out") / "config.json").read_text())
    assert (result["vocab_size"], result[nested]) == (520, {**kept, "vocab_size": 520})
    assert result["vision_config"] == {"vocab_size": 9}


def test_a_module_without_the_norms_that_others_have_is_told(base, adapter, tmp_path):
    other = MODULE.replace("q_proj", "o_proj")
    norms = {f"{other}.lora_{x}.weight": s for x, s in (("A", (2, 64)), ("B", (64, 2)))}
    norms[f"{other}.lora_magnitude_vector"] = (64,)
    out = merge(base, adapter(norms, use_dora=True), tmp_path / "out")
    note = json.loads((out / "lorakit.json").read_text())["notes"][0]
    assert "1 of 2 modules have no DoRA magnitude" in note


def test_an_adapter_that_is_in_the_base_already_is_told(made, merged, tmp_path):
    assert lorakit.plan_merge(made / "base", made / "style").notes == []
    (note,) = lorakit.plan_merge(merged, made / "style").notes
    assert note.startswith("style: the base is the result of a merge of this very adapter")
    back = tmp_path / "back"
    lorakit.unmerge(merged, [made / "style", made / "detail"], back, weights=[1, 0.5], run=SCRATCH)
    assert lorakit.plan_merge(back, made / "style").notes == []


def test_a_new_head_is_added_with_its_labels(base, adapter, tmp_path):
    head = adapter({"base_model.model.score.weight": (5, 64)}, task_type="SEQ_CLS")
    out = merge(base, head, tmp_path / "out")
    notes = json.loads((out / "lorakit.json").read_text())["notes"]
    assert any("tensors new to the base (1), first 'score.weight'" in n for n in notes)
    assert json.loads((out / INDEX).read_text())["weight_map"]["score.weight"]
    config = json.loads((out / "config.json").read_text())
    assert len(config["id2label"]) == 5
    assert config["architectures"] == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "LlavaForConditionalGeneration"])
def test_the_head_that_a_new_one_takes_the_place_of_is_left_out(made, adapter, tmp_path, kind):
    base = tmp_path / "shards"
    merge(made / "base", made / "style", base, max_shard_size="1kB")  # a shard for each tensor
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": [kind]}))
    head = adapter({"base_model.model.score.weight": (5, 64)}, task_type="SEQ_CLS")
    out = merge(base, head, tmp_path / "out")
    known = json.loads((out / INDEX).read_text())["weight_map"]
    kept = kind == "LlavaForConditionalGeneration"  # of which it is not known what it is now
    assert ("lm_head.weight" in known) == kept
    assert {p.name for p in out.glob("*.safetensors")} == set(known.values())
    notes = " ".join(json.loads((out / "lorakit.json").read_text())["notes"])
    assert ("'lm_head.weight' is left out: a LlamaForSeq" in notes) == (not kept)
    assert lorakit.verify(out, full=True).differences == ()


@pytest.mark.parametrize("known", [12, None], ids=["head", "no head"])
def test_another_alphabet_of_a_model_of_speech_is_said(adapter, tmp_path, known):
    """It has an output head alone: of the size of its alphabet, or none before it was tuned."""
    base = tmp_path / "speech"
    base.mkdir()
    shapes = {f"{MODULE[17:]}.weight": (64, 64)}
    shapes |= {"lm_head.weight": (known, 64)} if known else {}
    _write_tensors(base / "model.safetensors", shapes, "F32")
    (base / "config.json").write_text('{"model_type": "wav2vec2", "vocab_size": 12}')
    head = adapter({"base_model.model.lm_head.weight": (30, 64)}, modules_to_save=["lm_head"])
    out = merge(base, head, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 30


def test_the_head_of_a_model_that_finds_answers_is_said(base, adapter, tmp_path):
    config = json.loads((base / "config.json").read_text()) | {"num_labels": 3}
    (base / "config.json").write_text(json.dumps(config))
    head = adapter({"base_model.model.qa_outputs.weight": (2, 64)}, task_type="QUESTION_ANS")
    config = json.loads((merge(base, head, tmp_path / "out") / "config.json").read_text())
    assert config["architectures"] == ["LlamaForQuestionAnswering"]
    assert (len(config["id2label"]), config["num_labels"]) == (2, 2)


def test_a_saved_layer_of_another_name_is_no_head_of_labels(base, adapter, tmp_path):
    saved = {
        "base_model.model.pre_classifier.weight": (64, 64),
        "base_model.model.vision.attn.out_proj.weight": (64, 64),
        "base_model.model.classifier.out_proj.weight": (3, 64),
    }
    kept = ["pre_classifier", "vision", "classifier"]
    head = adapter(saved, task_type="SEQ_CLS", modules_to_save=kept)
    config = json.loads((merge(base, head, tmp_path / "out") / "config.json").read_text())
    assert len(config["id2label"]) == 3


def test_a_head_is_new_with_what_peft_means_by_the_end_of_its_name(base, adapter, tmp_path):
    """Asked for `classifier`, it saves the pre_classifier of DistilBERT as well."""
    saved = {"classifier.weight": (5, 64), "pre_classifier.weight": (64, 64)}
    tensors = {f"base_model.model.{n}": shape for n, shape in saved.items()}
    head = adapter(tensors, task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    out = merge(base, head, tmp_path / "out")
    assert saved.keys() <= json.loads((out / INDEX).read_text())["weight_map"].keys()


def test_what_is_saved_in_numbered_layers_is_nothing_new(base, adapter, tmp_path):
    name = "base_model.model.model.layers.0.ln_norm.weight"
    with pytest.raises(MisfitError, match=r"layers\.0\.ln_norm"):
        merge(base, adapter({name: (64,)}, modules_to_save=["norm"]), tmp_path / "out")


@pytest.mark.parametrize("kinds", [None, ["LlavaForConditionalGeneration"]])
def test_a_class_that_no_rule_knows_stays_with_a_new_head(base, adapter, tmp_path, kinds):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": kinds}))
    head = adapter({"base_model.model.score.weight": (5, 64)}, task_type="SEQ_CLS")
    result = json.loads((merge(base, head, tmp_path / "out") / "config.json").read_text())
    assert result["architectures"] == kinds


@pytest.mark.parametrize("front", ["", "language_model."])
def test_a_saved_layer_in_another_packing_is_not_new(base, adapter, tmp_path, front):
    name = f"{front}model.layers.0.mlp.gate_up_proj"
    saved = adapter({f"base_model.model.{name}": (2, 256, 64)}, modules_to_save=["mlp"])
    with pytest.raises(MisfitError, match=r"mlp\.gate_up_proj"):
        merge(base, saved, tmp_path / "out")


def test_a_tensor_that_is_no_head_of_the_training_is_not_added(base, adapter, tmp_path):
    with pytest.raises(MisfitError, match=r"'extra\.weight'"):
        merge(base, adapter({"base_model.model.extra.weight": (5, 64)}), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_another_dtype_is_said_of_every_model_that_a_model_is_made_of(base, made, tmp_path):
    config = json.loads((base / "config.json").read_text())
    inner = {"dtype": "bfloat16", "backbone_config": {"torch_dtype": "bfloat16"}}
    quantised = {"quant_method": "none", "dtype": "bfloat16"}
    config |= {"vision_config": inner, "encoder": {"dtype": "bfloat16"}}
    config |= {"dtype": "bfloat16", "quantization_config": quantised}
    (base / "config.json").write_text(json.dumps(config))
    out = merge(base, made / "style", tmp_path / "out", dtype="float32")
    said = json.loads((out / "config.json").read_text())
    assert said["vision_config"] == {
        "dtype": "float32",
        "backbone_config": {"torch_dtype": "float32"},
    }
    assert (said["encoder"], said["dtype"]) == ({"dtype": "float32"}, "float32")
    assert said["quantization_config"] == quantised


def test_another_dtype_is_written_and_said(base, made, tmp_path):
    out = merge(base, made / "style", tmp_path / "out", dtype="float32")
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    with safe_open(out / "model-00001-of-00003.safetensors", "np") as f:
        assert {f.get_slice(n).get_dtype() for n in f.keys()} == {"F32"}  # noqa: SIM118


def test_untouched_files_become_links_on_request_only(base, made, tmp_path):
    last = "model-00003-of-00003.safetensors"
    copied = merge(base, made / "style", tmp_path / "copied")
    linked = merge(base, made / "style", tmp_path / "linked", link=True)
    assert (copied / last).read_bytes() == (linked / last).read_bytes()
    assert not os.path.samefile(copied / last, base / last)
    assert os.path.samefile(linked / last, base / last)


@pytest.mark.parametrize("pipeline", [False, True])
def test_links_to_another_file_system_are_refused_at_the_start(base, made, tmp_path, pipeline):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        if os.stat(shm).st_dev == tmp_path.stat().st_dev:
            pytest.skip("needs two file systems")
        if pipeline:
            (base.parent / "pipe").mkdir()
            base = base.rename(base.parent / "pipe" / "text_encoder").parent
            (base / "model_index.json").write_text("{}")
        with pytest.raises(OutputError, match="another file system") as caught:
            merge(base, made / "style", f"{shm}/out", link=True)
        assert "--link" in caught.value.hint
        assert os.listdir(shm) == []


@pytest.mark.parametrize("place", [".", "inside", "../base"])
def test_an_output_that_is_or_lies_in_an_input_is_refused(base, made, place):
    with pytest.raises(OutputError):
        merge(base, made / "style", base / place)
    with pytest.raises(OutputError):
        lorakit.merge(
            base, made / "style", base / place, run=lorakit.RunOptions(overwrite=True, sync=False)
        )
    assert (base / "config.json").exists()


def test_overwriting_replaces_the_whole_output(base, made, tmp_path):
    out = merge(base, made / "style", tmp_path / "out")
    (out / "old.txt").write_text("old")
    with pytest.raises(OutputError, match="exists"):
        merge(base, made / "detail", out)
    lorakit.merge(base, made / "detail", out, run=lorakit.RunOptions(overwrite=True, sync=False))
    assert not (out / "old.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]
    assert lorakit.verify(out).differences == ()


@pytest.mark.parametrize(
    "options", [{"dtype": "int8"}, {"weights": [1, 2]}, {"weights": [float("nan")]}]
)
def test_options_that_make_no_sense_are_usage_errors(base, made, tmp_path, options):
    with pytest.raises(UsageError):
        merge(base, made / "style", tmp_path / "out", **options)


def test_a_plan_is_plain_data_and_runs_as_it_reads(base, made, tmp_path):
    job = lorakit.plan_merge(base, made / "style")
    plan = json.loads(json.dumps(job.to_dict()))
    assert sum(len(f["steps"]) for f in plan["files"]) >= 7
    assert lorakit.plan_merge(base, made / "style").plan.hash == job.plan.hash
    job.run(tmp_path / "out", SCRATCH)
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert sizes == {f["name"]: f["size"] for f in plan["files"]}


def test_defaults_that_are_spelled_out_make_no_other_plan(base, made):
    spelled = {"untie": False, "key_map": (), "expert_packing": "peft", "mha_factor": None}
    plans = [lorakit.plan_merge(base, made / "style", **o).plan for o in ({}, spelled)]
    assert plans[0].hash == plans[1].hash
    assert lorakit.plan_merge(base, made / "style", untie=True).plan.hash != plans[0].hash
