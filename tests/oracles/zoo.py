"""Every kind of PEFT adapter that lorakit folds, each on a tiny base, as files in a folder.

A case is built by PEFT and transformers themselves: the base and the adapter are written by their
`save_pretrained`, and `peft.safetensors` holds what PEFT merges them to, under the names on disk.
"""

from typing import Any

from tests.oracles import spellings
from tests.oracles.case import CRASHES, ROUNDS_TWICE, Case

PLAIN: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}

VIT = {"target_modules": ["q_proj", "v_proj", "o_proj", "fc1", "fc2"]}
VIT_KEY_MAP = (
    r"^vit\.layers=vit.encoder.layer",
    r"attention\.q_proj=attention.attention.query",
    r"attention\.v_proj=attention.attention.value",
    r"attention\.o_proj=attention.output.dense",
    r"mlp\.fc1=intermediate.dense",
    r"mlp\.fc2=output.dense",
)


def targets(*names: str, **options: Any) -> dict[str, Any]:
    return {"target_modules": list(names), **options}


LINEAR = [
    Case("linear", "llama", PLAIN),
    Case("linear-float16", "llama", PLAIN, dtype="float16", shard_size=""),
    Case("linear-float32", "llama", PLAIN, dtype="float32", shard_size="80KB"),
    Case("linear-all", "llama", {"target_modules": "all-linear"}),
    Case("linear-regex", "llama", {"target_modules": r".*\.(q_proj|gate_proj)"}, shard_size=""),
    Case("linear-float-alpha", "llama", PLAIN | {"lora_alpha": 5.3}),
    Case("lm-head", "llama", targets("lm_head", "k_proj")),
    Case("rslora", "llama", PLAIN | {"use_rslora": True}),
    Case(
        "patterns",
        "llama",
        PLAIN
        | {
            "rank_pattern": {r"layers\.0\..*\.q_proj": 2, "up_proj": 8, "v_proj": 1},
            "alpha_pattern": {r"^model\.layers\.1\.mlp\.(up|down)_proj": 3.5, "v_proj": 11},
        },
    ),
    Case(
        "patterns-rslora",
        "bert",
        targets(
            "query",
            "dense",
            use_rslora=True,
            rank_pattern={"query": 9},
            alpha_pattern={r"layer\.[01]\.output\.dense": 2},
        ),
    ),
    Case("bert", "bert", targets("query", "value", "dense"), dtype="float16"),
    Case("t5", "t5", targets("q", "v", "wi", "wo"), shard_size="60KB"),
    Case("whisper", "whisper", targets("q_proj", "v_proj", "fc1", "conv1", "conv2")),
]
TRANSPOSED = [
    Case("conv1d", "gpt2", targets("c_attn", "c_proj", "c_fc"), shard_size="60KB"),
    Case("conv1d-square-only", "gpt2", targets("attn.c_proj"), shard_size=""),
    Case("conv1d-dora", "gpt2", targets("c_attn", "c_proj", "c_fc", use_dora=True)),
    Case("conv1d-hub-names", "gpt2", targets("c_attn", "c_proj", "c_fc"), on_disk="gpt2_backbone"),
]
DORA = [
    Case("dora", "llama", PLAIN | {"use_dora": True}),
    Case(
        "dora-rslora-float16",
        "bert",
        targets("query", "dense", use_dora=True, use_rslora=True),
        dtype="float16",
    ),
    Case("dora-embedding", "llama", targets("embed_tokens", "q_proj", use_dora=True)),
    Case(
        "dora-conv2d",
        "conv_block",
        targets("conv_in", "conv_down", "conv_shortcut", "proj", use_dora=True),
    ),
    Case("dora-conv1d", "conv_block", targets("conv_time", "conv_gate", use_dora=True)),
    Case("dora-conv3d", "conv_block", targets("conv_video", "conv_frames", use_dora=True)),
]
OTHER_LAYERS = [
    Case(
        "embedding",
        "llama",
        targets("embed_tokens", "q_proj"),
        save={"save_embedding_layers": False},
        peft_fault=ROUNDS_TWICE,
    ),
    Case(
        "embedding-saved",
        "llama",
        targets("embed_tokens", "lm_head", "q_proj"),
        peft_fault=ROUNDS_TWICE,
    ),
    Case(
        "embedding-saved-and-moved",
        "llama",
        targets("embed_tokens", "lm_head", "q_proj"),
        also_trained=r"(embed_tokens|lm_head)\.base_layer\.weight",
        peft_fault=ROUNDS_TWICE,
    ),
    Case(
        "embedding-bert",
        "bert",
        targets("word_embeddings", "position_embeddings", "query"),
        peft_fault=ROUNDS_TWICE,
    ),
    Case("conv2d", "conv_block", targets("conv_in", "conv_down", "conv_shortcut", "proj")),
    Case(
        "conv-float32", "conv_block", targets("conv_in", "conv_time", "conv_gate"), dtype="float32"
    ),
    Case("conv3d", "conv_block", targets("conv_video", "conv_frames"), dtype="float16"),
    Case("conv3d-pointwise", "conv_block", targets("conv_voxel"), peft_fault=CRASHES),
    Case("vit-patches", "vit", targets("projection", "classifier")),
    Case("attention", "attention_block", targets("attn", "mlp"), peft_fault=ROUNDS_TWICE),
    Case(
        "attention-patterns",
        "attention_block",
        targets("attn", "mlp", alpha_pattern={"attn": 9}, rank_pattern={"attn": 3}),
        peft_fault=ROUNDS_TWICE,
    ),
    Case(
        "attention-rslora-float16",
        "attention_block",
        targets("attn", use_rslora=True),
        dtype="float16",
        peft_fault=ROUNDS_TWICE,
    ),
]
BIASES = [
    Case("lora-bias", "bert", targets("query", "dense", lora_bias=True)),
    Case("lora-bias-conv1d", "gpt2", targets("c_attn", "c_proj", lora_bias=True), dtype="float16"),
    Case("lora-bias-conv2d", "conv_block", targets("conv_in", "conv_time", lora_bias=True)),
    Case("bias-all", "bert", targets("query", "dense", bias="all")),
    Case(
        "bias-all-attention",
        "attention_block",
        targets("attn", "mlp", bias="all"),
        peft_fault=ROUNDS_TWICE,
    ),
    Case("bias-lora-only", "gpt2", targets("c_attn", "c_fc", bias="lora_only")),
    Case("bias-all-and-lora-bias", "whisper", targets("q_proj", "fc2", bias="all", lora_bias=True)),
]
SAVED = [
    Case("head-saved", "bert", targets("query", task_type="SEQ_CLS")),
    Case(
        "head-of-another-size",
        "bert",
        targets("query", task_type="SEQ_CLS"),
        load={"num_labels": 7, "ignore_mismatched_sizes": True},
    ),
    Case(
        "head-new",
        "llama_classifier",
        targets("q_proj", task_type="SEQ_CLS"),
        on_disk="llama",
        load={"num_labels": 5},
    ),
    Case("norms-saved", "llama", targets("q_proj", modules_to_save=["input_layernorm", "lm_head"])),
    Case(
        "vocabulary-resized",
        "llama",
        PLAIN,
        vocab_size=72,
        also_trained=r"(embed_tokens|lm_head)\.weight",
    ),
    Case(
        "vocabulary-resized-and-saved",
        "llama",
        PLAIN | {"modules_to_save": ["embed_tokens", "lm_head"]},
        vocab_size=70,
    ),
    Case(
        "vocabulary-resized-and-targeted",
        "llama",
        targets("embed_tokens", "lm_head", "v_proj"),
        vocab_size=72,
        peft_fault=ROUNDS_TWICE,
    ),
    Case("tokens-list", "llama", PLAIN | {"trainable_token_indices": [3, 0, 61]}),
    Case(
        "tokens-dict",
        "llama",
        PLAIN | {"trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [7, 2, 63]}},
    ),
]
FILES = [
    Case("adapter-float16", "llama", PLAIN, adapter_dtype="float16"),
    Case("adapter-bfloat16", "llama", PLAIN, dtype="float16", adapter_dtype="bfloat16"),
    Case("adapter-bfloat16-dora", "llama", PLAIN | {"use_dora": True}, adapter_dtype="bfloat16"),
    Case("adapter-named", "llama", PLAIN, adapter_name="my_style"),
    Case("adapter-pickled", "llama", PLAIN, save={"safe_serialization": False}),
    Case("velora", "llama", PLAIN | {"velora_config": {"num_groups": 8, "init_type": "random"}}),
    Case("monteclora", "llama", PLAIN | {"monteclora_config": {}}),
    Case("mica", "llama", PLAIN | {"init_lora_weights": "mica"}, peft_fault=ROUNDS_TWICE),
]
NAMES = [
    Case("names-raw-dump", "llama", PLAIN | {"use_dora": True}, spelling=spellings.raw_dump),
    Case(
        "names-raw-dump-embedding",
        "llama",
        targets("embed_tokens", "v_proj"),
        spelling=spellings.raw_dump,
        save={"save_embedding_layers": False},
        peft_fault=ROUNDS_TWICE,
    ),
    Case(
        "names-raw-dump-bias",
        "bert",
        targets("query", lora_bias=True, bias="all"),
        spelling=spellings.raw_dump,
    ),
    Case(
        "names-raw-dump-saved",
        "llama_classifier",
        targets("q_proj", task_type="SEQ_CLS"),
        on_disk="llama",
        load={"num_labels": 5},
        spelling=spellings.raw_dump,
    ),
    Case("names-other-adapter", "llama", PLAIN, spelling=spellings.other_adapter_name),
    Case(
        "names-magnitude-weight",
        "llama",
        PLAIN | {"use_dora": True},
        spelling=spellings.magnitude_weight,
    ),
    Case("names-compiled", "llama", PLAIN, spelling=spellings.compiled),
    Case("names-compiled-layers", "llama", PLAIN, spelling=spellings.compiled_layers),
    Case("names-data-parallel", "llama", PLAIN, spelling=spellings.data_parallel),
    Case("names-fully-sharded", "llama", PLAIN, spelling=spellings.fully_sharded),
    Case("names-bare", "llama", PLAIN, spelling=spellings.bare),
    Case(
        "names-everything",
        "llama",
        PLAIN | {"use_dora": True},
        spelling=spellings.everything_at_once,
    ),
    Case("names-module-called-module", "nested_block", targets("proj", "out")),
    Case("names-of-backbone", "llama_backbone", PLAIN, on_disk="llama"),
    Case("vit", "vit", VIT, spelling=spellings.vit_on_disk, disk_names=spellings.vit_on_disk),
    Case(
        "vit-of-transformers-5", "vit", VIT, disk_names=spellings.vit_on_disk, key_map=VIT_KEY_MAP
    ),
]
CASES = [*LINEAR, *TRANSPOSED, *DORA, *OTHER_LAYERS, *BIASES, *SAVED, *FILES, *NAMES]
