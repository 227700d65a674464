"""How the keys of an adapter come to be spelt when something other than PEFT saved them.

Every function takes a key as `save_pretrained` writes it, `base_model.model.` + module + role, and
gives the same key as another program leaves it behind.
"""

import re
from collections.abc import Callable

Spelling = Callable[[str], str]
PREFIX = "base_model.model."


def raw_dump(key: str) -> str:
    """As in `model.state_dict()`: the adapter's name is still there, magnitudes are modules."""
    key = key.replace(".score.weight", ".score.modules_to_save.default.weight")
    key = re.sub(r"\.(lora_[AB])\.(weight|bias)$", r".\1.default.\2", key)
    key = re.sub(r"\.(lora_embedding_[AB])$", r".\1.default", key)
    return re.sub(r"\.lora_magnitude_vector$", ".lora_magnitude_vector.default.weight", key)


def other_adapter_name(key: str) -> str:
    """A raw dump of an adapter that was not called `default`."""
    return raw_dump(key).replace(".default", ".my_style")


def magnitude_weight(key: str) -> str:
    """DoRA magnitudes with `.weight`, as PEFT itself wrote them for a while."""
    return re.sub(r"\.lora_magnitude_vector$", ".lora_magnitude_vector.weight", key)


def compiled(key: str) -> str:
    """torch.compile on the PEFT model."""
    return f"_orig_mod.{key}"


def compiled_layers(key: str) -> str:
    """torch.compile on the base model and on every layer of it, before PEFT wrapped it."""
    return re.sub(r"\.layers\.(\d+)\.", r".layers.\1._orig_mod.", f"{PREFIX}_orig_mod.{bare(key)}")


def data_parallel(key: str) -> str:
    """DistributedDataParallel around the PEFT model."""
    return f"module.{key}"


def fully_sharded(key: str) -> str:
    """FSDP around the PEFT model and around every layer."""
    layer = r".layers.\1._fsdp_wrapped_module."
    return "_fsdp_wrapped_module." + re.sub(r"\.layers\.(\d+)\.", layer, key)


def bare(key: str) -> str:
    """No prefix at all: the module's own path."""
    return key.removeprefix(PREFIX)


def everything_at_once(key: str) -> str:
    """A raw dump of a compiled model under DistributedDataParallel."""
    return data_parallel(compiled(raw_dump(key)))


VIT_LEAVES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def vit_on_disk(key: str) -> str:
    """transformers 5 renamed the modules of ViT; checkpoints kept the names of transformers 4."""
    key = key.replace(".vit.layers.", ".vit.encoder.layer.")
    for runtime, disk in VIT_LEAVES.items():
        key = key.replace(f".{runtime}.", f".{disk}.")
    return key
