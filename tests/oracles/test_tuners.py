"""PEFT's LoHa, LoKr and AdaLoRA: merged as their own formulas say, and as PEFT merges them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorakit
from lorakit.errors import InputError, MisfitError
from lorakit.verbs.check import UnloadableError
from tests.oracles.models import MODELS
from tests.oracles.reading import Array, read_tensors

pytest.importorskip("peft", minversion="0.21")
SCRATCH = lorakit.RunOptions(sync=False)
PREFIX = "base_model.model."
LINEAR = ("q_proj", "up_proj", "down_proj")
CONVOLUTIONS = ("conv_in", "conv_shortcut", "conv_down", "proj")
KEPT = {"q_proj": [True, False, True, True, False, False], "up_proj": [False] * 6}


@dataclass(frozen=True)
class Tuned:
    """An adapter of a tuner on a tiny base: the class of its config, and what that is told."""

    config: str
    model: str
    targets: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


LOHA = {"r": 4, "alpha": 6, "init_weights": False}
LOKR = {"r": 4, "alpha": 6, "init_weights": False}
ADALORA = {"init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 5}
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 3}}
CASES = {
    "loha": Tuned("LoHaConfig", "llama", LINEAR, LOHA | PATTERNS),
    "loha-head": Tuned(
        "LoHaConfig", "llama_classifier", LINEAR, LOHA | {"modules_to_save": ["score"]}
    ),
    "loha-conv": Tuned("LoHaConfig", "conv_block", (*CONVOLUTIONS, "conv_time"), LOHA),
    "loha-conv-core": Tuned(
        "LoHaConfig",
        "conv_block",
        (*CONVOLUTIONS, "conv_time"),
        LOHA | {"use_effective_conv2d": True},
    ),
    "lokr": Tuned("LoKrConfig", "llama", LINEAR, LOKR | PATTERNS),
    "lokr-whole": Tuned("LoKrConfig", "llama", LINEAR, LOKR | {"rank_pattern": {"q_proj": 32}}),
    "lokr-both": Tuned("LoKrConfig", "llama", LINEAR, LOKR | {"r": 1, "decompose_both": True}),
    "lokr-conv": Tuned("LoKrConfig", "conv_block", CONVOLUTIONS, LOKR | {"r": 1}),
    "lokr-conv-core": Tuned(
        "LoKrConfig", "conv_block", CONVOLUTIONS, LOKR | {"r": 1, "use_effective_conv2d": True}
    ),
    "lokr-conv-whole": Tuned("LoKrConfig", "conv_block", CONVOLUTIONS, LOKR | {"r": 16}),
    "adalora": Tuned("AdaLoraConfig", "llama", LINEAR, ADALORA),
    "adalora-alpha-of-rank": Tuned("AdaLoraConfig", "llama", LINEAR, ADALORA | {"lora_alpha": 0}),
    "adalora-transposed": Tuned("AdaLoraConfig", "gpt2", ("c_attn", "c_proj", "c_fc"), ADALORA),
}


@pytest.fixture(scope="module", params=CASES)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with `base`, `adapter`, and what PEFT merges them to, `peft.safetensors`."""
    folder = tmp_path_factory.mktemp(request.param)
    build(CASES[request.param], folder)
    return folder


def build(case: Tuned, folder: Path) -> None:
    import peft
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tiny = MODELS[case.model]
        tiny.save(tiny.make(), folder / "base", "")
        config = getattr(peft, case.config)(target_modules=list(case.targets), **case.options)
        model = peft.get_peft_model(tiny.load(folder / "base", "float32"), config)
        for values in model.parameters():
            if values.requires_grad:
                values.data.normal_(std=0.3)
        if case.config == "AdaLoraConfig":
            prune(model)
        model.save_pretrained(folder / "adapter")
        merged = model.merge_and_unload().state_dict()
    save_file({n: v.clone() for n, v in merged.items()}, folder / "peft.safetensors")


def prune(model: Any) -> None:
    """Leave AdaLoRA some of the ranks, as its training does in the end; of one module none."""
    kept = {}
    for name, _ in model.named_parameters():
        module, _, role = name.removeprefix(PREFIX).partition(".lora_E")
        if role and (mask := KEPT.get(module.rpartition(".")[2])):
            kept[f"{module}.lora_E{role}"] = mask
    model.peft_config["default"].rank_pattern = kept
    model.base_model.resize_modules_by_rank_pattern(kept, "default")


def merged(folder: Path) -> dict[str, Array]:
    output = folder / "merged"
    if not output.exists():
        lorakit.merge(folder / "base", [folder / "adapter"], output, run=SCRATCH)
        assert lorakit.verify(output, full=True).differences == ()
    return read_tensors(output)


def expected(folder: Path) -> dict[str, Array]:
    """The formulas of the papers in float64, with the scalings of PEFT."""
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    found, modules = read_tensors(folder / "base"), {}
    for name, values in read_tensors(folder / "adapter").items():
        module, _, role = name.removeprefix(PREFIX).rpartition(".")
        if role == "weight":
            found[f"{module}.weight"] = values
        else:
            modules.setdefault(module, {})[role] = values
    for module, tensors in modules.items():
        rank = tensors["lora_E"].size if "lora_E" in tensors else 0
        delta = FORMULAS[config["peft_type"]](tensors) * scaling(config, module, rank)
        weight = found[f"{module}.weight"]
        turned = delta.ndim == 2 and weight.shape == delta.T.shape and "c_" in module
        found[f"{module}.weight"] = weight + (delta.T if turned else delta.reshape(weight.shape))
    return found


def scaling(config: dict[str, Any], module: str, left: int) -> float:
    if config["peft_type"] == "ADALORA":
        return (config["lora_alpha"] or left) / (config["init_r"] + 1e-5)
    ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
    rank = next((r for p, r in ranks.items() if module.endswith(p)), config["r"])
    special = bool(alphas) and module.endswith("layers.1.mlp.up_proj")
    return float(next(iter(alphas.values())) if special else config["alpha"]) / rank


def hadamard(t: dict[str, Array]) -> Array:
    if "hada_t1" in t:
        one, two = (
            np.einsum("ijkl,jr,ip->prkl", t[f"hada_t{n}"], t[f"hada_w{n}_b"], t[f"hada_w{n}_a"])
            for n in (1, 2)
        )
        return one * two
    return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def kronecker(t: dict[str, Array]) -> Array:
    one = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_t2" in t:
        two = np.einsum("ijkl,ip,jr->prkl", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        two = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    return np.kron(one.reshape(*one.shape, *(1,) * (two.ndim - 2)), two)


def singular(t: dict[str, Array]) -> Array:
    return t["lora_B"] @ (t["lora_E"] * t["lora_A"])


FORMULAS = {"LOHA": hadamard, "LOKR": kronecker, "ADALORA": singular}


def assert_close(found: dict[str, Array], wanted: dict[str, Array]) -> None:
    assert found.keys() <= wanted.keys()
    for name, values in found.items():
        allowed = 2.0**-21 * max(1.0, abs(wanted[name]).max())
        assert (abs(values - wanted[name]) <= allowed).all(), name


def test_a_merge_is_the_formula(tuned: Path) -> None:
    result, base = merged(tuned), read_tensors(tuned / "base")
    assert_close(result, expected(tuned))
    changed = {n for n in result if n not in base or not np.array_equal(result[n], base[n])}
    adapted = {f"{n.removeprefix(PREFIX).rpartition('.')[0]}.weight" for n in ours(tuned)}
    assert changed == adapted


def ours(folder: Path) -> dict[str, Array]:
    """The tensors of the adapter, but for modules of which no rank is left."""
    return {n: v for n, v in read_tensors(folder / "adapter").items() if v.size}


def test_a_merge_is_that_of_peft(tuned: Path) -> None:
    assert_close(merged(tuned), read_tensors(tuned / "peft.safetensors"))


def test_an_unmerge_gives_the_base_again(tuned: Path) -> None:
    merged(tuned)
    if any(n.endswith("score.weight") for n in read_tensors(tuned / "adapter")):
        with pytest.raises(InputError, match="the original is gone"):
            lorakit.unmerge(tuned / "merged", [tuned / "adapter"], tuned / "back", run=SCRATCH)
        return
    lorakit.unmerge(tuned / "merged", [tuned / "adapter"], tuned / "back", run=SCRATCH)
    assert_close(read_tensors(tuned / "back"), read_tensors(tuned / "base"))


def test_peft_loads_what_convert_makes_of_it(tuned: Path) -> None:
    import peft

    name = next(c for c in CASES if tuned.name.startswith(c) and tuned.name[len(c) :].isdigit())
    output = tuned / "converted"
    lorakit.convert(tuned / "adapter", output, to="peft", keep_unknown=True, run=SCRATCH)
    said = json.loads((output / "adapter_config.json").read_text())
    assert said["peft_type"] == "LORA"
    assert lorakit.check(output, consumer="peft").obstacles == ()
    if CASES[name].model == "conv_block":  # no class of transformers that a task could be of
        return
    model = MODELS[CASES[name].model].load(tuned / "base", "float32")
    result = peft.PeftModel.from_pretrained(model, output).merge_and_unload().state_dict()
    wanted = merged(tuned)
    assert_close({n: v.double().numpy() for n, v in result.items() if n in wanted}, wanted)


@pytest.mark.parametrize("name", ["loha", "lokr", "adalora"])
def test_servers_are_told_to_take_plain_lora(name: str, tmp_path: Path) -> None:
    build(CASES[name], tmp_path)
    with pytest.raises(UnloadableError) as caught:
        lorakit.check(tmp_path / "adapter", consumer="vllm")
    found = caught.value.checked.obstacles
    assert any(name.upper() in o.what and "convert" in o.then for o in found)
    kind = lorakit.inspect(tmp_path / "adapter").facts["type"]
    assert kind == f"{name.upper()}, read as plain LoRA"


@pytest.mark.parametrize(("name", "other"), [("loha", "LOKR"), ("adalora", "LOHA")])
def test_a_config_of_another_tuner_is_refused(name: str, other: str, tmp_path: Path) -> None:
    build(CASES[name], tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": other}))
    with pytest.raises(MisfitError, match="its config says it is of"):
        lorakit.open_adapter(tmp_path / "adapter")


def test_a_conv1d_of_lokr_is_refused(tmp_path: Path) -> None:
    build(Tuned("LoKrConfig", "conv_block", ("conv_time",), LOKR | {"r": 16}), tmp_path)
    with pytest.raises(MisfitError, match="Conv1d of LoKr"):
        lorakit.open_adapter(tmp_path / "adapter")


def test_an_unknown_alpha_of_a_tuner_is_refused(tmp_path: Path) -> None:
    build(CASES["loha"], tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha": None}))
    with pytest.raises(InputError, match="alpha"):
        lorakit.open_adapter(tmp_path / "adapter")
