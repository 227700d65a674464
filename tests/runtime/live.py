"""Models in memory: what they are shown, what they answer, and how they are held against others."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

RELATIVE = 1e-5  # of the largest number
# What the parts of `tests.oracles.models.conv_block` take.
SHAPES = {
    "conv_in": (2, 4, 6, 6),
    "conv_shortcut": (2, 8, 6, 6),
    "conv_down": (2, 8, 6, 9),
    "conv_time": (2, 8, 9),
    "conv_gate": (2, 12, 9),
    "conv_video": (2, 4, 4, 5, 5),
    "conv_frames": (2, 8, 5, 3, 3),
    "conv_voxel": (2, 8, 3, 3, 3),
    "proj": (2, 16),
    "mlp": (2, 32),
}


def shown(model: nn.Module, rows: int = 2) -> dict[str, Tensor]:
    """The same inputs every time, for a model of transformers."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (rows, 7), generator=generator)
    match model.config.model_type:
        case "whisper":
            sound = torch.randn(rows, 8, 32, generator=generator).to(model.dtype)
            return {"input_features": sound, "decoder_input_ids": ids}
        case "t5":
            return {"input_ids": ids, "decoder_input_ids": ids}
        case "vit":
            return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    return {"input_ids": ids}


@torch.no_grad()
def answer(model: nn.Module, **inputs: Any) -> Tensor:
    """What a model makes of inputs that are always the same: its logits, or what is its last."""
    if isinstance(model, nn.ModuleDict):
        return torch.cat([one.flatten() for one in _parts(model)])
    found = model(**(inputs or shown(model)))
    return found.logits if "logits" in found else found.last_hidden_state


def _parts(model: nn.ModuleDict) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    dtype = next(model.parameters()).dtype
    for name, part in model.items():
        if name in SHAPES:
            yield part(torch.randn(SHAPES[name], generator=generator).to(dtype))
        elif name == "attn":
            x = torch.randn(2, 5, 32, generator=generator).to(dtype)
            yield part(x, x, x, need_weights=False)[0]
        elif name == "module":
            yield part["out"](part["proj"](torch.randn(2, 32, generator=generator).to(dtype)))


def far(ours: Tensor, theirs: Tensor) -> float:
    """How far two answers are apart, in units of the largest number of the second."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """After this, the model has the very parameters that it had, in name, identity and bits."""
    before = {n: (p, p.detach().clone()) for n, p in _own(model).items()}
    there = {n: v.clone() for n, v in model.state_dict().items()}
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    modules = list(dict(model.named_modules()))
    yield
    after = _own(model)
    assert after.keys() == before.keys()
    assert [n for n, (p, bits) in before.items() if after[n] is not p or not same(p, bits)] == []
    assert list(model.state_dict()) == list(there)
    assert all(same(v, there[n]) for n, v in model.state_dict().items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trained
    assert list(dict(model.named_modules())) == modules


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    return one.dtype == other.dtype and torch.equal(
        one.detach().contiguous().view(torch.uint8), other.detach().contiguous().view(torch.uint8)
    )


def _own(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def no_hooks(model: nn.Module) -> bool:
    """Whether no module of a model calls lorakit before or after its forward."""
    hooks = (h for m in model.modules() for h in m._forward_hooks.values())
    before = (h for m in model.modules() for h in m._forward_pre_hooks.values())
    return not any(h.__module__.startswith("lorakit") for h in (*hooks, *before))


def by_peft(load: Callable[[], nn.Module], adapter: Any) -> nn.Module:
    """The model with an adapter on it, unmerged, as PEFT puts it there."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load(), adapter).eval().base_model.model
