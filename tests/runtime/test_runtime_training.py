"""A trainable adapter learns, and what it learned is saved, read by others and merged offline."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit.runtime import (
    attach,
    disable_adapter,
    load_pretrained,
    parameters,
    save_adapter,
    unload,
)
from tests.oracles.reading import read_files, read_json
from tests.runtime import making
from tests.runtime.live import RELATIVE, answer, by_peft, far, shown, unchanged

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "dora": {"use_dora": True, "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "bias": {"lora_bias": True, "rank_pattern": {"q_proj": 2}},
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 9]},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.llama(tmp_path_factory.mktemp("training") / "base", attention_bias=True)


def train(model: Any, steps: int = 20) -> list[float]:
    """The losses of some steps on one batch."""
    ids = shown(model, rows=4)["input_ids"]
    optimiser = torch.optim.AdamW(parameters(model), lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@every_kind
def test_gradients_are_those_of_peft(base: Path, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    making.trained(making.load(base), tmp_path, **KINDS[kind])
    model = making.load(base)
    attach(model, tmp_path, trainable=True)
    theirs = PeftModel.from_pretrained(making.load(base), tmp_path, is_trainable=True).eval()
    ids = shown(model)["input_ids"]
    for one in (model, theirs):
        one(input_ids=ids, labels=ids).loss.backward()
    ours = sorted(float(p.grad.double().norm()) for p in parameters(model))
    others = (p.grad for p in theirs.parameters() if p.requires_grad)
    norms = sorted(float(g.double().norm()) for g in others if g is not None)
    assert torch.allclose(torch.tensor(ours), torch.tensor(norms), rtol=1e-4)
    assert [
        n for n, p in model.named_parameters() if p.grad is not None and "lorakit" not in n
    ] == []


@every_kind
def test_twenty_steps_lower_the_loss_and_the_result_is_read_by_all(
    base: Path, tmp_path: Path, kind: str
) -> None:
    making.trained(making.load(base), tmp_path / "start", **KINDS[kind])
    model = making.load(base)
    plain = answer(model)
    with unchanged(model):
        attach(model, tmp_path / "start", trainable=True)
        losses = train(model)
        assert losses[-1] < 0.7 * losses[0]
        ours = answer(model)
        with disable_adapter(model):
            assert torch.equal(answer(model), plain)
        assert save_adapter(model, tmp_path / "end") == tmp_path / "end"
        unload(model)
    lorakit.merge(base, tmp_path / "end", tmp_path / "merged")
    assert far(answer(making.load(tmp_path / "merged")), ours) < RELATIVE
    assert far(answer(by_peft(lambda: making.load(base), tmp_path / "end")), ours) < RELATIVE
    if kind != "dora":  # transformers 5.23 says that it leaves magnitudes out
        other = making.load(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other.load_adapter(str(tmp_path / "end"))
        assert far(answer(other), ours) < RELATIVE


def test_training_starts_from_what_init_wrote(base: Path, tmp_path: Path) -> None:
    lorakit.init(base, tmp_path / "fresh", rank=4, alpha=8, target_modules="all-linear")
    model = load_pretrained(base, tmp_path / "fresh", trainable=True)
    assert torch.equal(answer(model.eval()), answer(making.load(base)))
    losses = train(model)
    assert losses[-1] < 0.7 * losses[0]
    save_adapter(model, tmp_path / "trained")
    lorakit.merge(base, tmp_path / "trained", tmp_path / "merged")
    assert far(answer(making.load(tmp_path / "merged")), answer(model)) < RELATIVE


def test_a_residual_base_and_its_adapter_are_loaded_from_one_folder(
    base: Path, tmp_path: Path
) -> None:
    lorakit.init(base, tmp_path / "pair", rank=4, alpha=4, method="pissa")
    model = load_pretrained(tmp_path / "pair", trainable=True).eval()
    assert far(answer(model), answer(making.load(base))) < 1e-4
    assert train(model)[-1] < 2.0
    save_adapter(model, tmp_path / "trained")
    residual = tmp_path / "pair" / "base"
    lorakit.merge(residual, tmp_path / "trained", tmp_path / "merged", base_is_residual=True)
    assert far(answer(making.load(tmp_path / "merged")), answer(model)) < RELATIVE


@every_kind
def test_what_was_not_trained_is_saved_as_it_was_read(
    base: Path, tmp_path: Path, kind: str
) -> None:
    start = making.trained(making.load(base), tmp_path / "start", **KINDS[kind])
    model = making.load(base)
    attach(model, start)
    save_adapter(model, tmp_path / "again")
    tensors = [
        read_files(path)["adapter_model.safetensors"] for path in (start, tmp_path / "again")
    ]
    assert tensors[0] == tensors[1]
    config = "adapter_config.json"
    assert read_json(start / config) == read_json(tmp_path / "again" / config)


def test_dropout_is_applied_in_training_alone(base: Path, tmp_path: Path) -> None:
    making.trained(making.load(base), tmp_path, lora_dropout=0.5)
    model = making.load(base)
    attach(model, tmp_path, trainable=True)
    assert torch.equal(answer(model), answer(model))
    model.train()
    assert not torch.equal(answer(model), answer(model))
