"""What loftq writes, loaded by transformers, bitsandbytes and PEFT: bytes, logits, training, and
the way back into a base.
"""

import copy

import numpy as np
import pytest
from safetensors.numpy import load_file

import lorakit
from lorakit import RunOptions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

SCRATCH = RunOptions(sync=False)
LLAMA = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama in bfloat16, sharded, and its logits."""
    return saved(tmp_path_factory.mktemp("llama"), torch.bfloat16, max_shard_size="300KB")


def saved(folder, dtype, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    model.save_pretrained(folder, **options)
    return folder, logits(model)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def off(model, wanted):
    return float((logits(model) - wanted).norm() / wanted.norm())


def completed(out):
    return peft.PeftModel.from_pretrained(load(out / "base"), out / "adapter").eval()


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_bytes_are_those_that_transformers_writes_of_the_same_values(tmp_path, quant):
    """In float32 the values tell the codes: quantising them again gives these very tensors."""
    base, _ = saved(tmp_path / "base", torch.float32)
    kinds = {"packed": "quantized", "values": "dequantized"}
    for name, save in kinds.items():
        lorakit.loftq(base, tmp_path / name, rank=8, iters=3, quant=quant, save=save, run=SCRATCH)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant, bnb_4bit_compute_dtype=torch.float32
    )
    again = load(tmp_path / "values/base", quantization_config=config)
    again.save_pretrained(tmp_path / "again")
    theirs = load_file(tmp_path / "again/model.safetensors")
    ours = load_file(tmp_path / "packed/base/model.safetensors")
    assert set(theirs) == set(ours)
    for name, values in theirs.items():
        assert (values.dtype, values.shape) == (ours[name].dtype, ours[name].shape), name
        np.testing.assert_array_equal(unsigned(values, quant), unsigned(ours[name], quant), name)


def unsigned(values, quant):
    """fp4 has two codes for zero, which its values do not tell apart."""
    if quant != "fp4" or values.dtype != np.uint8 or values.shape[-1:] != (1,):
        return values
    return np.where(values >> 4 == 8, 0, values >> 4), np.where(values & 15 == 8, 0, values & 15)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 16},
        {"alpha": 64, "rslora": True},
        {"double_quant": True, "absmax": "search"},
        {"quant": "fp4", "start": "lowrank"},
        {"block": 128, "dtype": "bfloat16"},
        {"quant": "uniform", "bits": 3, "save": "dequantized"},
        {"quant": "int8"},
    ],
    ids=str,
)
def test_logits_are_nearer_than_those_of_the_quantised_base(llama, tmp_path, options):
    base, wanted = llama
    lorakit.loftq(base, tmp_path / "out", rank=32, run=SCRATCH, **options)
    with_adapter = off(completed(tmp_path / "out"), wanted)
    alone = off(load(tmp_path / "out/base"), wanted)
    assert with_adapter < (0.95 if options.get("quant") == "int8" else 0.6) * alone


def plain_nf4():
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def test_logits_are_nearer_than_those_of_plain_nf4(llama, tmp_path):
    base, wanted = llama
    lorakit.loftq(base, tmp_path / "out", rank=32, run=SCRATCH)
    plain = off(load(base, quantization_config=plain_nf4()), wanted)
    assert off(completed(tmp_path / "out"), wanted) <= 0.8 * plain


def test_an_adapter_alone_completes_a_base_that_is_quantised_as_it_is_loaded(llama, tmp_path):
    base, wanted = llama
    lorakit.loftq(base, tmp_path / "out", rank=32, save="adapter-only", run=SCRATCH)
    model = load(base, quantization_config=plain_nf4())
    completed = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
    plain = off(load(base, quantization_config=plain_nf4()), wanted)
    assert off(completed, wanted) <= 0.8 * plain


def test_only_what_is_asked_for_is_quantised(llama, tmp_path):
    base, wanted = llama
    lorakit.loftq(base, tmp_path / "out", rank=8, target_modules="q_proj,v_proj", run=SCRATCH)
    model = completed(tmp_path / "out")
    kinds = {n.rpartition(".")[2]: type(m).__name__ for n, m in model.named_modules()}
    assert kinds["q_proj"] == "Linear4bit"
    assert kinds["up_proj"] == "Linear"
    assert off(model, wanted) < off(load(base, quantization_config=plain_nf4()), wanted)


def test_a_gpt2_is_loaded_too(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    config.bos_token_id = config.eos_token_id = 0
    model = transformers.GPT2LMHeadModel(config).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "base")
    wanted = logits(model)
    lorakit.loftq(tmp_path / "base", tmp_path / "out", rank=16, run=SCRATCH)
    assert off(completed(tmp_path / "out"), wanted) < 0.8 * off(load(tmp_path / "out/base"), wanted)


BERT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
T5 = {"vocab_size": 320, "d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 1, "num_heads": 2}
DISTIL = {"vocab_size": 320, "dim": 64, "hidden_dim": 128, "n_layers": 1, "n_heads": 2}


@pytest.mark.parametrize(
    ("kind", "settings", "plain"),
    [
        ("T5ForConditionalGeneration", T5, {"wo"}),
        ("BertForMaskedLM", BERT, {"decoder"}),
        ("RobertaForMaskedLM", BERT, {"decoder"}),
        ("BioGptForCausalLM", BERT, {"output_projection"}),
        ("DistilBertForSequenceClassification", DISTIL, {"pre_classifier", "classifier"}),
    ],
)
def test_what_transformers_never_quantises_stays_plain(tmp_path, kind, settings, plain):
    """Codes in a layer that is no Linear4bit do not load, nor a Linear4bit without codes."""
    torch.manual_seed(0)
    known = getattr(transformers, kind)
    model = known(known.config_class(**settings)).eval()
    model.save_pretrained(tmp_path / "base")
    done = lorakit.loftq(tmp_path / "base", tmp_path / "out", rank=8, run=SCRATCH)
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if kind.startswith("T5") else {})}
    there = known.from_pretrained(tmp_path / "out/base").eval()
    kinds = {n.rpartition(".")[2]: type(m).__name__ for n, m in there.named_modules()}
    assert {n for n, k in kinds.items() if k == "Linear"} - {"lm_head"} == plain
    assert sum(type(m).__name__ == "Linear4bit" for m in there.modules()) == len(done.rows)
    with torch.no_grad():
        there(**inputs)


def test_training_starts_from_it_and_the_result_goes_into_either_base(llama, tmp_path):
    base, _ = llama
    options = {"rank": 16, "iters": 3, "run": SCRATCH}
    lorakit.loftq(base, tmp_path / "out", **options)
    lorakit.loftq(base, tmp_path / "values", save="dequantized", **options)
    model = peft.PeftModel.from_pretrained(
        load(tmp_path / "out/base"), tmp_path / "out/adapter", is_trainable=True
    )
    start = copy.deepcopy(peft.get_peft_model_state_dict(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(20):
        loss = model(IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    assert any(
        not torch.equal(v, start[n]) for n, v in peft.get_peft_model_state_dict(model).items()
    )
    model.save_pretrained(tmp_path / "trained")
    trained = logits(
        peft.PeftModel.from_pretrained(load(tmp_path / "out/base"), tmp_path / "trained").eval()
    )
    errors = {}
    for name, into in (("values", tmp_path / "values/base"), ("16 bit", base)):
        lorakit.merge(into, tmp_path / "trained", tmp_path / f"merged {name}", run=SCRATCH)
        errors[name] = off(load(tmp_path / f"merged {name}"), trained)
    assert errors["values"] < 0.03  # rounded to bfloat16
    assert np.isfinite(errors["16 bit"])
    assert errors["values"] < errors["16 bit"]  # which lacks what quantising lost
