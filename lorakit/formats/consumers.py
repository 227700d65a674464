"""What reads LoRA files, and what each of them takes: a table of obstacles.

Sources: vllm-project/vllm v0.11 vllm/lora/{models,peft_helper,utils}.py; huggingface/peft v0.21
src/peft/utils/save_and_load.py; sgl-project/sglang
python/sglang/srt/lora; huggingface/diffusers v0.42 src/diffusers/loaders; ml-explore/mlx-lm
mlx_lm/tuner/utils.py; what ComfyUI loads is described by its documentation and issue tracker.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Consumer:
    """What it takes: `formats` of files (the first is what to convert to), whether language models
    or pipelines, and the `obstacles` in an adapter that it stops at or passes over in silence.
    """

    name: str
    formats: tuple[str, ...]
    obstacles: tuple[str, ...]
    language: bool = True


AGREEING = ("spelling of PEFT, or of its dumps", "config and tensors", "token rows")
HELD = ("modules_to_save", "whole tensors")
SERVERS = (
    *("tuner", "spelling of PEFT", "dora", "patterns", "rank in the config", "bias"),
    *(*HELD, "embeddings", "training"),
)
# A new consumer: a row here.
CONSUMERS = {
    c.name: c
    for c in (
        Consumer("vllm", ("peft",), ("name of the file", "config", *SERVERS, "rank")),
        Consumer("sglang", ("peft",), ("config", *SERVERS)),
        Consumer("peft", ("peft",), ("name of the file", "config", *AGREEING)),
        Consumer("llama.cpp", ("gguf",), ("dora", "bias", *HELD, "training")),
        Consumer("mlx", ("mlx",), ("bias", *HELD, "training")),
        Consumer(
            "diffusers",
            ("diffusers",),
            (
                "algorithm",
                "norms of inputs",
                "spelling",
                "text encoders",
                "scaling in a config, for diffusers",
            ),
            language=False,
        ),
        Consumer(
            "comfyui",
            ("comfyui", "kohya", "onetrainer", "lycoris"),
            (
                "names of ComfyUI",
                "norms of PEFT",
                "scaling in metadata",
                "scaling in a config, for comfyui",
            ),
            language=False,
        ),
    )
}
# vLLM's choices for --max-lora-rank; 16 unless it is told otherwise.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Families that ComfyUI knows by Diffusers' names, flattened, behind a prefix of their own.
# Source: Comfy-Org/ComfyUI, comfy/lora.py (model_lora_keys_unet).
_UNETS = ("sd1", "sd2", "sdxl")
_LYCORIS = ("qwen_image", "qwen_image_21", "krea2", "z_image", "hidream", "ace_step")
PREFIXED = {"onetrainer": ("sd3", "flux"), "lycoris": (*_UNETS, "sd3", "flux", *_LYCORIS)}
