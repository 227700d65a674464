"""What `init` writes is what PEFT makes of the loaded model, up to signs and seeds."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorakit
from lorakit.math.initial import METHODS
from tests.oracles.models import LLAMA, MODELS, TinyModel
from tests.oracles.test_loading import answer

pytest.importorskip("peft", minversion="0.21")
pytest.importorskip("transformers", minversion="5.20")
SCRATCH = lorakit.RunOptions(sync=False)
MIXTRAL = TinyModel("MixtralForCausalLM", "MixtralConfig", LLAMA | {"num_local_experts": 4})
KNOWN = {**MODELS, "mixtral": MIXTRAL}
RANK, ALPHA = 4, 6
Bases = Callable[[str], Path]
# Of PEFT's LoraConfig, where it has another word or wants to be told more.
IN_PEFT: dict[str, Any] = {
    "kaiming": True,
    "gaussian": "gaussian",
    "random": False,
    "orthogonal": "orthogonal",
    "mica": "mica",
    "pissa": "pissa",
    "olora": "olora",
}
DRAWN = ("kaiming", "gaussian", "random", "orthogonal")
TARGETS = {
    "llama": "all-linear",
    "gpt2": "all-linear",
    "t5": "all-linear",
    "bert_masked": "all-linear",
    "whisper": "all-linear",
    "llama_classifier": "all-linear",
    "conv_block": "conv_in,conv_shortcut,conv_down,proj",
    "nested_block": "all-linear",
}
DATA_DRIVEN = ("eva", "corda")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Tiny bases in float32, by the name of the model; nobody writes to them."""
    done: dict[str, Path] = {}

    def once(name: str) -> Path:
        import torch

        if name not in done:
            done[name] = tmp_path_factory.mktemp(name) / "base"
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(11)
                KNOWN[name].save(KNOWN[name].make(), done[name], "")
        return done[name]

    return once


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """No warnings, and one thread: more of them only wait for each other with models so small."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def begun(base: Path, out: Path, **options: Any) -> Path:
    """The adapter that `init` writes."""
    lorakit.init(base, out, run=SCRATCH, **{"rank": RANK, "alpha": ALPHA, **options})
    return out / "adapter" if (out / "adapter").exists() else out


def base_of(adapter: Path, base: Path) -> Path:
    beside = adapter.parent / "base"
    return beside if adapter.name == "adapter" else base


def in_peft(name: str, base: Path, targets: Any, **options: Any) -> Any:
    """What PEFT makes of the loaded model."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    named = targets if targets == "all-linear" or "*" in targets else targets.split(",")
    config = LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": named, **options})
    return get_peft_model(KNOWN[name].load(base, "float32"), config)


def loaded(name: str, adapter: Path, base: Path) -> Any:
    """The adapter on a base, as one loads it to train it."""
    from peft import PeftModel

    model = KNOWN[name].load(base, "float32")
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def factors(model: Any) -> dict[str, Any]:
    return {n: p.detach().numpy() for n, p in model.named_parameters() if "lora_" in n}


def weights(model: Any) -> dict[str, Any]:
    """The base's weights in a PEFT model."""
    return {
        n.replace(".base_layer", ""): p.detach().numpy()
        for n, p in model.named_parameters()
        if "lora_" not in n
    }


def task(name: str) -> dict[str, Any]:
    return {"task_type": "SEQ_CLS"} if name.endswith("classifier") else {}


@pytest.mark.parametrize("name", TARGETS)
def test_the_factors_have_the_names_and_shapes_of_peft(
    bases: Bases, tmp_path: Path, name: str
) -> None:
    adapter = begun(bases(name), tmp_path / "out", target_modules=TARGETS[name])
    theirs = factors(in_peft(name, bases(name), TARGETS[name], **task(name)))
    ours = factors(loaded(name, adapter, bases(name)))
    assert {n: x.shape for n, x in ours.items()} == {n: x.shape for n, x in theirs.items()}
    written = lorakit.open_adapter(adapter).modules
    assert 2 * len(written) == len(ours)


@pytest.mark.parametrize(
    ("name", "targets", "method"),
    [
        *(("llama", "all-linear", m) for m in DRAWN),
        *(("gpt2", "all-linear", m) for m in ("kaiming", "orthogonal")),
        *(("llama", "embed_tokens", m) for m in DRAWN),
        *(("conv_block", "conv_in,conv_shortcut,conv_down", m) for m in DRAWN[:3]),
    ],
)
def test_the_numbers_are_spread_as_those_of_peft(
    bases: Bases, tmp_path: Path, name: str, targets: str, method: str
) -> None:
    adapter = begun(bases(name), tmp_path / "out", target_modules=targets, method=method)
    ours = factors(loaded(name, adapter, bases(name)))
    theirs = factors(in_peft(name, bases(name), targets, init_lora_weights=IN_PEFT[method]))
    for role in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        by_shape: dict[Any, list[list[Any]]] = {}
        for key in (n for n in theirs if f".{role}." in n):
            pair = by_shape.setdefault(theirs[key].shape, [[], []])
            pair[0].append(ours[key].ravel())
            pair[1].append(theirs[key].ravel())
        for one, other in ((np.concatenate(a), np.concatenate(b)) for a, b in by_shape.values()):
            assert_alike(one, other, independent=method != "orthogonal")


def assert_alike(one: Any, other: Any, *, independent: bool) -> None:
    """Two samples of one distribution: mean, deviation and, of independent numbers, all of it."""
    noise = 12 / np.sqrt(other.size)
    assert abs(one.mean() - other.mean()) <= noise * other.std()
    assert one.std() == pytest.approx(other.std(), rel=noise)
    if other.std() and independent:
        assert abs(one).max() == pytest.approx(abs(other).max(), rel=0.5)
        quantiles = [np.quantile(x, np.linspace(0.1, 0.9, 9)) for x in (one, other)]
        np.testing.assert_allclose(*quantiles, rtol=0, atol=noise * other.std())


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", "pissa"), ("gpt2", "pissa"), ("t5", "pissa"), ("llama", "olora"), ("t5", "olora")],
)
def test_parts_of_the_base_are_those_that_peft_takes_out(
    bases: Bases, tmp_path: Path, name: str, method: str
) -> None:
    adapter = begun(bases(name), tmp_path / "out", method=method)
    ours = loaded(name, adapter, base_of(adapter, bases(name)))
    theirs = in_peft(name, bases(name), "all-linear", init_lora_weights=method)
    assert_same_up_to_signs(factors(ours), factors(theirs))
    for key, rest in weights(theirs).items():
        np.testing.assert_allclose(weights(ours)[key], rest, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_minor_components_are_those_of_peft(bases: Bases, tmp_path: Path, name: str) -> None:
    adapter = begun(bases(name), tmp_path / "out", method="mica")
    ours = loaded(name, adapter, bases(name))
    theirs = in_peft(name, bases(name), "all-linear", init_lora_weights="mica")
    assert_same_up_to_signs(factors(ours), factors(theirs))
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert not any("lora_B" in n for n in trained)


def assert_same_up_to_signs(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Each row of A and column of B is theirs or its negative, both by one sign."""
    for key, a in ((n, x) for n, x in theirs.items() if "lora_A" in n):
        other = key.replace("lora_A", "lora_B")
        found = np.concatenate([ours[key], ours[other].T], axis=1)
        expected = np.concatenate([a, theirs[other].T], axis=1)
        signs = np.sign((found * expected).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(found * signs, expected, atol=1e-4, err_msg=key)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", "all-linear"),
        ("gpt2", "all-linear"),
        ("llama", "embed_tokens"),
        ("conv_block", ""),
    ],
)
def test_magnitudes_are_those_of_peft(
    bases: Bases, tmp_path: Path, name: str, targets: str
) -> None:
    targets = targets or "conv_in,conv_shortcut,conv_down,proj"
    adapter = begun(bases(name), tmp_path / "out", target_modules=targets, dora=True)
    ours = factors(loaded(name, adapter, bases(name)))
    theirs = factors(in_peft(name, bases(name), targets, use_dora=True))
    found = [n for n in theirs if "magnitude" in n]
    assert found
    for key in found:
        assert ours[key].shape == theirs[key].shape
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5)


def test_magnitudes_of_a_random_start_leave_it_as_it_is(bases: Bases, tmp_path: Path) -> None:
    import torch

    plain, dora = (
        loaded(
            "llama",
            begun(bases("llama"), tmp_path / str(use), method="random", dora=use),
            bases("llama"),
        )
        for use in (False, True)
    )
    torch.testing.assert_close(answer(dora), answer(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in DATA_DRIVEN])
def test_peft_loads_and_trains_it_from_where_the_base_is(
    bases: Bases, tmp_path: Path, method: str
) -> None:
    import torch

    adapter = begun(bases("llama"), tmp_path / "out", method=method)
    model = loaded("llama", adapter, base_of(adapter, bases("llama")))
    expected = answer(KNOWN["llama"].load(bases("llama"), "float32"))
    if method != "random":
        torch.testing.assert_close(answer(model), expected, rtol=1e-4, atol=1e-5)
    losses = trained(model)
    assert losses[-1] < 0.99 * losses[0]


def trained(model: Any, steps: int = 6) -> list[float]:
    """The losses of a few steps on one batch."""
    import torch

    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("name", "method"), [("llama", "pissa"), ("llama", "olora")])
def test_peft_reads_an_adapter_alone_with_the_original_base(
    bases: Bases, tmp_path: Path, name: str, method: str
) -> None:
    import torch

    adapter = begun(bases(name), tmp_path / "out", method=method, adapter_only=True)
    expected = answer(KNOWN[name].load(bases(name), "float32"))
    model = loaded(name, adapter, bases(name))
    torch.testing.assert_close(answer(model), expected, rtol=1e-4, atol=1e-5)
    trained(model)
    model.save_pretrained(tmp_path / "trained")
    lorakit.merge(bases(name), tmp_path / "trained", tmp_path / "merged", run=SCRATCH)
    merged = answer(KNOWN[name].load(tmp_path / "merged", "float32"))
    torch.testing.assert_close(merged, answer(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["kaiming", "gaussian", "pissa"])
def test_experts_begin_where_the_base_is(bases: Bases, tmp_path: Path, method: str) -> None:
    import torch

    base = bases("mixtral")
    adapter = begun(base, tmp_path / "out", method=method, experts=True)
    model = loaded("mixtral", adapter, base_of(adapter, base))
    expected = answer(KNOWN["mixtral"].load(base, "float32"))
    torch.testing.assert_close(answer(model), expected, rtol=1e-4, atol=1e-4)
    stacks = [n for n in factors(model) if ".experts." in n]
    assert len(stacks) == 8  # two stacks of two factors, two layers
    losses = trained(model)
    assert losses[-1] < losses[0]


def test_eva_has_the_components_that_peft_finds(bases: Bases, tmp_path: Path) -> None:
    import torch
    from peft.tuners.lora.eva import SVDHook
    from safetensors.numpy import save_file

    module = "model.layers.0.self_attn.q_proj"
    x = spread(32)
    x -= x.mean(axis=0)  # PEFT takes the mean out, statistics of lorakit do not know it
    hook = SVDHook(RANK, 0.99, name=module)
    hook(None, torch.from_numpy(x), None)
    save_file({module: x.T @ x / len(x)}, tmp_path / "stats.safetensors")
    options = {"method": "eva", "stats": tmp_path / "stats.safetensors"}
    adapter = begun(bases("llama"), tmp_path / "out", target_modules=module, **options)
    a = next(v for n, v in factors(loaded("llama", adapter, bases("llama"))).items() if "_A" in n)
    np.testing.assert_allclose(abs(a @ hook.svd.components_.numpy().T), np.eye(RANK), atol=2e-2)


def spread(width: int) -> Any:
    """Inputs that vary much in some directions."""
    rng = np.random.default_rng(4)
    turned = np.linalg.qr(rng.standard_normal((width, width)))[0] * np.geomspace(1, 0.05, width)
    return (rng.standard_normal((500, width)) @ turned.T).astype("f4")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_corda_is_that_of_peft_for_the_same_covariances(
    bases: Bases, tmp_path: Path, name: str
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig

    pytest.importorskip("attr", reason="PEFT's CorDA imports attrs, which PEFT does not require")
    from peft.tuners.lora.corda import preprocess_corda
    from safetensors.numpy import save_file

    targets = {"llama": ["q_proj", "o_proj"], "gpt2": ["c_attn"]}[name]
    x = spread(32)
    moments = (x.T @ x) / np.diagonal(x.T @ x).mean()  # PEFT's balance of A and B goes by the unit
    model = KNOWN[name].load(bases(name), "float32")
    found = [n for n, _ in model.named_modules() if n.endswith(tuple(targets))]
    save_file(dict.fromkeys(found, moments), tmp_path / "stats.safetensors")
    (tmp_path / "peft").mkdir()
    torch.save(dict.fromkeys(found, torch.from_numpy(moments)), tmp_path / "peft/covariance")
    corda = CordaConfig(covariance_file=str(tmp_path / "peft/covariance"))
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights="corda",
        corda_config=corda, fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        # torch.load of a file that this test wrote; PEFT 0.21.2 does not say weights_only
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        preprocess_corda(model, config)
    theirs = get_peft_model(model, config)
    options = {"method": "corda", "stats": tmp_path / "stats.safetensors"}
    adapter = begun(bases(name), tmp_path / "out", target_modules=",".join(targets), **options)
    ours = loaded(name, adapter, base_of(adapter, bases(name)))
    assert_same_up_to_signs(factors(ours), factors(theirs))
    for key, rest in weights(theirs).items():
        np.testing.assert_allclose(weights(ours)[key], rest, atol=2e-5, err_msg=key)
