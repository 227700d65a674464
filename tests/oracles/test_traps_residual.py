"""Adapters whose initialisation took something out of the base: computed again, or refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lorakit
from lorakit import RunOptions
from lorakit.errors import InputError, UsageError
from tests.oracles.reading import Array, read_json, read_tensors
from tests.oracles.test_merge import assert_close
from tests.oracles.trap_algebra import changes, expected, first_columns, principal
from tests.oracles.trap_files import Files, made, merged_by_peft

pytest.importorskip("peft", minversion="0.21")
SCRATCH = RunOptions(sync=False)
TARGETS = ["q_proj", "v_proj", "down_proj"]
TAKEN = {"pissa": principal, "olora": first_columns}
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "pissa": ("llama", "pissa", "float32", {}),
    "pissa-bfloat16": ("llama", "pissa", "bfloat16", {}),
    "pissa-rslora": ("llama", "pissa", "bfloat16", {"use_rslora": True}),
    "pissa-patterns": (
        *("llama", "pissa", "bfloat16"),
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 9}},
    ),
    "pissa-conv1d": ("gpt2", "pissa", "bfloat16", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "olora": ("llama", "olora", "float32", {"lora_alpha": 2}),
    "olora-bfloat16": ("llama", "olora", "bfloat16", {}),
    "olora-rslora": ("llama", "olora", "bfloat16", {"use_rslora": True, "lora_alpha": 1}),
}
every_case = pytest.mark.parametrize("name", CASES)
LOST = ("pissa_niter_4", "corda", "lora_ga")


def far(ours: dict[str, Array], exact: dict[str, Array]) -> float:
    return max(float(abs(ours[name] - exact[name]).max()) for name in exact)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    done: dict[str, Files] = {}

    def once(name: str) -> Files:
        if name not in done:
            done[name] = _made(name, tmp_path_factory.mktemp(name))
        return done[name]

    return once


def _made(name: str, folder: Path) -> Files:
    if name not in CASES:
        return _initialised(name, folder)
    model, init, dtype, more = CASES[name]
    lora = {"target_modules": TARGETS, "init_lora_weights": init, **more}
    return made(folder, model, lora, dtype=dtype)


def _exact(name: str, files: Files, weight: float = 1.0) -> dict[str, Array]:
    model, init, _, _ = CASES[name]
    return expected(
        read_tensors(files.base),
        files.adapter,
        taken=TAKEN[init],
        weight=weight,
        transposed=model == "gpt2",
    )


@every_case
@pytest.mark.parametrize("weight", [1.0, 0.3, -1.0])
def test_on_the_original_base_the_part_is_computed_again(
    files: Any, tmp_path: Path, name: str, weight: float
) -> None:
    out = tmp_path / "out"
    lorakit.merge(files(name).base, files(name).adapter, out, weights=[weight], run=SCRATCH)
    assert_close(out, _exact(name, files(name), weight), read_tensors(files(name).base))
    assert not lorakit.verify(out, full=True).differences


@every_case
def test_on_the_residual_base_the_adapter_is_only_added(
    files: Any, tmp_path: Path, name: str
) -> None:
    made, out = files(name), tmp_path / "out"
    lorakit.merge(made.residual, made.adapter, out, base_is_residual=True, run=SCRATCH)
    residual = read_tensors(made.residual)
    assert_close(out, expected(residual, made.adapter, transposed=made.model == "gpt2"), residual)
    assert not lorakit.verify(out, full=True).differences


@every_case
def test_both_ways_give_the_same_model_and_so_does_peft(files: Any, name: str) -> None:
    made, exact = files(name), _exact(name, files(name))
    by_residual = expected(
        read_tensors(made.residual), made.adapter, transposed=made.model == "gpt2"
    )
    change = far(read_tensors(made.base), exact)
    rounding = 1e-5 if made.dtype == "float32" else 2.0**-6
    assert far(by_residual, exact) < rounding * change
    assert far(merged_by_peft(made), exact) < 2 * rounding * change


@every_case
def test_it_cannot_be_taken_out_again(files: Any, tmp_path: Path, name: str) -> None:
    """The part was computed from the base, which the merge is no more."""
    lorakit.merge(files(name).base, files(name).adapter, tmp_path / "out", run=SCRATCH)
    with pytest.raises(InputError, match="cannot be taken out"):
        lorakit.unmerge(tmp_path / "out", files(name).adapter, tmp_path / "back", run=SCRATCH)
    assert not (tmp_path / "back").exists()


def test_from_the_residual_base_it_can_be_taken_out(files: Any, tmp_path: Path) -> None:
    made = files("pissa-bfloat16")
    options = {"base_is_residual": True, "run": SCRATCH}
    lorakit.merge(made.residual, made.adapter, tmp_path / "out", **options)
    report = lorakit.unmerge(tmp_path / "out", made.adapter, tmp_path / "back", **options)
    error = far(read_tensors(tmp_path / "back"), read_tensors(made.residual))
    assert 0 < error <= report.undo_error


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, -2.0]])
def test_beside_another_adapter_each_changes_the_original_base(
    files: Any, tmp_path: Path, weights: list[float]
) -> None:
    pissa = files("pissa-bfloat16")
    (tmp_path / "plain").mkdir()
    plain = made(tmp_path / "plain", "llama", {"target_modules": TARGETS}, dtype="bfloat16")
    base = read_tensors(pissa.base)
    assert far(read_tensors(plain.base), base) == 0
    out, both = tmp_path / "out", [pissa.adapter, plain.adapter]
    lorakit.merge(pissa.base, both, out, weights=weights, run=SCRATCH)
    steps = [
        expected(base, pissa.adapter, taken=principal, weight=weights[0]),
        expected(base, plain.adapter, weight=weights[1]),
    ]
    exact = {name: w + sum(step[name] - w for step in steps) for name, w in base.items()}
    assert_close(out, exact, base, *steps)
    assert not lorakit.verify(out, full=True).differences


# Initialisations that only the adapter as it was before training tells of ------------------------


def _with_eigens(model: Any, config: Any) -> None:
    """What `preprocess_corda` leaves on each layer, from a covariance of random inputs."""
    import torch

    for name, module in model.named_modules():
        if name.endswith(tuple(config.target_modules)):
            width = module.weight.shape[1]
            x = torch.randn(50, width)
            covariance = x.T @ x / 50 + torch.eye(width)
            u, s, vh = torch.linalg.svd(module.weight.data @ covariance, full_matrices=False)
            v = (vh @ torch.linalg.inv(covariance)).T
            module.eigens = SimpleNamespace(U_WC=u[:, -4:], S_WC=s[-4:], V_WC=v[:, -4:])


def _with_gradients(model: Any, config: Any) -> None:
    import torch
    from peft.tuners.lora.loraga import preprocess_loraga

    ids = torch.arange(64).reshape(4, 16)
    preprocess_loraga(model, config, lambda: model(ids, labels=ids).loss.backward())


def _initialised(init: str, folder: Path) -> Files:
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig

    lora: dict[str, Any] = {"target_modules": TARGETS, "init_lora_weights": init}
    if init == "corda":
        lora["corda_config"] = CordaConfig()
        return made(folder, "llama", lora, prepare=_with_eigens)
    if init == "lora_ga":
        lora["lora_ga_config"] = LoraGAConfig()
        return made(folder, "llama", lora, prepare=_with_gradients)
    return made(folder, "llama", lora)


def _trained_difference(files: Files) -> dict[str, Array]:
    """The base and what training changed of the adapter: what was taken out came back with it."""
    base = read_tensors(files.base)
    now, was = changes(files.adapter, base), changes(files.initial, base)
    return base | {f"{m}.weight": base[f"{m}.weight"] + now[m][0] - was[m][0] for m in now}


def _saved_as_peft_says(files: Files, folder: Path) -> Path:
    """The initial adapter with the `init_lora_weights: true` under which PEFT has it saved."""
    import shutil

    shutil.copytree(files.initial, folder)
    config = read_json(folder / "adapter_config.json") | {"init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("init", LOST)
def test_without_the_initial_adapter_it_is_refused(files: Any, tmp_path: Path, init: str) -> None:
    with pytest.raises(InputError, match="--init-adapter"):
        lorakit.merge(files(init).base, files(init).adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("init", [*LOST, "pissa", "olora"])
@pytest.mark.parametrize("saved", ["as it was", "as PEFT says"])
def test_with_the_initial_adapter_it_is_exact(
    files: Any, tmp_path: Path, init: str, saved: str
) -> None:
    made, out = files(init), tmp_path / "out"
    initial = made.initial
    if saved == "as PEFT says":
        initial = _saved_as_peft_says(made, tmp_path / "initial")
    lorakit.merge(made.base, made.adapter, out, init_adapter=initial, run=SCRATCH)
    base = read_tensors(made.base)
    parts = changes(made.initial, base)
    operand = {name: w + abs(w).max() for name, w in base.items()}
    operand |= {
        f"{m}.weight": abs(c).max() + operand[f"{m}.weight"] for m, (c, *_) in parts.items()
    }
    assert_close(out, _trained_difference(made), operand)
    assert not lorakit.verify(out, full=True).differences


@pytest.mark.parametrize("init", LOST)
@pytest.mark.parametrize("weight", [0.5, -1.0])
def test_a_weight_is_of_the_difference(
    files: Any, tmp_path: Path, init: str, weight: float
) -> None:
    made, out = files(init), tmp_path / "out"
    options = {"init_adapter": made.initial, "weights": [weight], "run": SCRATCH}
    lorakit.merge(made.base, made.adapter, out, **options)
    base, once = read_tensors(made.base), _trained_difference(made)
    exact = {name: w + weight * (once[name] - w) for name, w in base.items()}
    assert far(read_tensors(out), exact) < 1e-6


@pytest.mark.parametrize("init", LOST)
def test_peft_reloads_it_wrongly_or_not_at_all(files: Any, init: str) -> None:
    exact = _trained_difference(files(init))
    change = far(read_tensors(files(init).base), exact)
    if init == "corda":
        with pytest.raises(ValueError, match="eigens"):
            merged_by_peft(files(init))
    else:
        assert far(merged_by_peft(files(init)), exact) > 0.05 * change  # and says nothing


def test_loftq_is_refused_but_on_its_own_base(files: Any, tmp_path: Path) -> None:
    made = files("pissa")
    initial = _saved_as_peft_says(made, tmp_path / "initial")
    config = read_json(initial / "adapter_config.json")
    (initial / "adapter_config.json").write_text(
        json.dumps(config | {"init_lora_weights": "loftq"})
    )
    for options in ({}, {"init_adapter": made.initial}):
        with pytest.raises(InputError, match="loftq"):
            lorakit.merge(made.base, initial, tmp_path / "out", **options)
    lorakit.merge(made.residual, initial, tmp_path / "out", base_is_residual=True, run=SCRATCH)
    assert_close(tmp_path / "out", expected(read_tensors(made.residual), initial))


def test_an_initial_adapter_needs_one_that_it_became(files: Any, tmp_path: Path) -> None:
    made = files("pissa")
    plain = _saved_as_peft_says(made, tmp_path / "plain")
    for adapters in ([plain], [made.adapter, made.adapter]):
        with pytest.raises(UsageError, match="init"):
            lorakit.merge(made.base, adapters, tmp_path / "out", init_adapter=made.initial)
