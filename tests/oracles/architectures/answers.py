"""What a model in a folder answers: its logits, in float32, on inputs that are always the same."""

from pathlib import Path
from typing import Any

from tests.oracles.architectures.architecture import Architecture

IMAGE = 60  # the token that stands for a patch


def answer(model: Any, seen: int) -> Any:
    """The logits of a model; `seen` is how many image tokens it is shown."""
    import torch

    with torch.no_grad():
        return model(**_inputs(model, seen)).logits


def answer_of(kind: Architecture, folder: Path) -> Any:
    """The logits of the model in a folder, computed in float32."""
    return answer(kind.load(folder), kind.seen)


def _inputs(model: Any, seen: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 58, (1, 12), generator=generator)
    if not seen:
        return {"input_ids": ids}
    ids[0, 2 : 2 + seen] = IMAGE
    if "qwen" in model.config.model_type:
        ids[0, 1], ids[0, 2 + seen] = 61, 62
        kinds = (ids == IMAGE).int()
        pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        grid = torch.tensor([[1, 4, 4]])
        return {
            "input_ids": ids,
            "pixel_values": pixels,
            "image_grid_thw": grid,
            "mm_token_type_ids": kinds,
        }
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}
