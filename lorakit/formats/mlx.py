"""What MLX-LM calls the tensors of an adapted module.

Source: ml-explore/mlx-lm, mlx_lm/tuner/{lora,dora}.py
"""

from collections.abc import Iterable

ENDINGS = {"a": "lora_a", "b": "lora_b", "magnitude": "m"}
ROLES = {ending: role for role, ending in ENDINGS.items()}


def in_mlx_names(names: Iterable[str]) -> bool:
    """Whether a file of tensors with these names has factors as MLX-LM writes them, transposed."""
    return any(name.endswith((".lora_a", ".lora_b")) for name in names)


def in_both(module: str) -> str:
    """What to say of an embedding that goes to MLX, or comes from there."""
    return (
        f"a model whose head is its embedding has {module!r} in both with MLX, else in the "
        "embedding alone."
    )
