"""The formats that LoRA files are written in, a row each; `lorakit.formats.spelling` has the names
of those that go by templates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.adapter.delta import Delta
from lorakit.adapter.files.gguf import gguf_tensors
from lorakit.adapter.files.mlx import mlx_config, mlx_tensors
from lorakit.adapter.files.saving import saved_of
from lorakit.adapter.files.spelling import Tensors
from lorakit.adapter.new_config import PLAIN, WRITTEN, config_of
from lorakit.adapter.weight_file import DIFFUSERS, MLX, PEFT

Plain = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """How a format is written.

    `tensors` gives the modules of an adapter of which that is not by a spelling, from its deltas
    and the config of its base; `config` what lies beside the weights, from the modules and the
    config of the source, which says of tensors held whole what is so of the result.
    """

    file: str = ""  # of the weights, in a folder; "" for one called as the folder is
    suffix: str = ".safetensors"
    images: bool = True  # whether it has names for models of images, video and sound
    language: bool = False  # and for language models
    one_scale: bool = False  # for all modules
    tensors: Callable[[Sequence[Delta], Plain], Sequence[Tensors]] | None = None
    config: Callable[[Sequence[Tensors], Plain], dict[str, Any]] | None = None


def _peft_config(made: Sequence[Tensors], source: Plain) -> dict[str, Any]:
    deltas = [t.delta for t in made if t.delta is not None]
    raw = {
        **PLAIN,
        "task_type": None,
        "base_model_name_or_path": None,
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        **{k: v for k, v in source.items() if k != "loftq_config"},
        "use_dora": any("magnitude" in d.tensors for d in deltas),
        "lora_bias": any("bias" in d.tensors for d in deltas),
        "use_rslora": False,
    }
    return config_of(raw, saved_of(made), {}, version=WRITTEN)


FORMATS = {
    "kohya": Format(),
    "comfyui": Format(),
    "diffusers": Format(DIFFUSERS),
    "peft": Format(PEFT, language=True, config=_peft_config),
    "mlx": Format(
        MLX,
        images=False,
        language=True,
        one_scale=True,
        tensors=mlx_tensors,
        config=lambda made, _: mlx_config(made),
    ),
    "gguf": Format(
        suffix=".gguf", images=False, language=True, one_scale=True, tensors=gguf_tensors
    ),
}
FOLDERS = [name for name, form in FORMATS.items() if form.config]
