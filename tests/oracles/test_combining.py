"""peft's `add_weighted_adapter` and its merge functions give the numbers of `compat`.

The random masks of peft are recorded while it draws them, and handed to `compat`.
"""

import numpy as np
import pytest

from lorakit.math.combining.compat import NAMES, compat
from lorakit.math.combining.methods import METHODS, combined
from lorakit.math.combining.setting import Setting
from lorakit.math.lowrank import LowRank, delta

peft = pytest.importorskip("peft", minversion="0.21")
torch = pytest.importorskip("torch")

ADAPTERS = {"one": (4, 8), "two": (4, 2), "three": (4, 4)}  # r and alpha
WEIGHTS = [0.7, -1.3, 1.0]
NEAR = 1e-5  # relative; cutting between two close singular values enlarges the rounding of float32
every_name = pytest.mark.parametrize("method", NAMES)
majorities = pytest.mark.parametrize("majority", ["total", "frequency"])


@pytest.fixture
def masks(monkeypatch):
    """The masks that torch draws from here on, as arrays."""
    drawn, bernoulli = [], torch.bernoulli

    def recording(chances):
        mask = bernoulli(chances)
        drawn.append(mask.numpy())
        return mask

    monkeypatch.setattr(torch, "bernoulli", recording)
    return drawn


def replayed(left):
    """A `draw` that gives the recorded masks in their order."""
    return lambda shape, density: next(left)


class Tiny(torch.nn.Module):
    """Two layers of different shapes."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(24, 40)
        self.down = torch.nn.Linear(40, 16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    options = {"target_modules": ["up", "down"], "init_lora_weights": False}
    configs = {n: peft.LoraConfig(r=r, lora_alpha=a, **options) for n, (r, a) in ADAPTERS.items()}
    made = peft.PeftModel(Tiny(), configs["one"], "one")
    for name in ("two", "three"):
        made.add_adapter(name, configs[name])
    return made


def update(layer, name):
    """An adapter of a layer of peft."""
    a, b = (getattr(layer, f)[name].weight.detach().numpy() for f in ("lora_A", "lora_B"))
    return LowRank(a, b, layer.scaling[name])


def parts_of(layer):
    return [update(layer, name) for name in ADAPTERS]


def theirs(model, method, **options):
    """Each layer and what peft combines it to."""
    model.add_weighted_adapter(list(ADAPTERS), WEIGHTS, "sum", method, **options)
    layers = [model.base_model.model.up, model.base_model.model.down]
    return [(layer, update(layer, "sum")) for layer in layers]


def close(one, other, rtol=1e-6):
    np.testing.assert_allclose(one, other, rtol=0, atol=rtol * np.linalg.norm(other))


@majorities
@every_name
def test_a_model_is_combined_as_by_peft(model, masks, method, majority):
    setting = Setting(density=0.6, majority=majority)
    left = iter(masks)
    for layer, expected in theirs(model, method, density=0.6, majority_sign_method=majority):
        found = compat(method, parts_of(layer), WEIGHTS, setting, replayed(left))
        assert found.low.a.shape == expected.a.shape
        close(delta(found.low), delta(expected), NEAR if "svd" in method else 1e-6)
        if "svd" in method:
            close(np.linalg.norm(found.low.b, axis=0), np.linalg.norm(expected.b, axis=0))
        else:
            close(found.low.a, expected.a)
            close(found.low.b, expected.b)
    assert next(left, None) is None  # as many masks were drawn as by peft


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_a_model_is_combined_to_a_rank_as_by_peft(model, rank):
    for layer, expected in theirs(model, "svd", svd_rank=rank):
        found = compat("svd", parts_of(layer), WEIGHTS, Setting(rank=rank))
        assert found.low.rank == min(rank, sum(r for r, _ in ADAPTERS.values()))
        close(delta(found.low), delta(expected), NEAR)


@pytest.mark.parametrize("method", ["svd", "cat"])
def test_what_peft_does_right_is_the_method_of_the_same_name(model, method):
    for layer, expected in theirs(model, method):
        found = combined(method, parts_of(layer), WEIGHTS, Setting())
        close(delta(found.low), delta(expected), NEAR)


@pytest.mark.parametrize("method", ["dare_linear_svd", "magnitude_prune_svd"])
def test_methods_without_a_vote_differ_from_those_of_peft_by_their_masks_only(model, masks, method):
    for layer, expected in theirs(model, method, density=1.0):
        found = combined(method, parts_of(layer), WEIGHTS, Setting())
        close(delta(found.low), delta(expected), NEAR)


@pytest.mark.parametrize("rule", ["ties", "dare_ties", "dare_linear", "magnitude_prune"])
@majorities
def test_the_merge_functions_of_peft_join_dense_updates_alike(masks, rule, majority):
    from peft.utils import merge_utils

    rng = np.random.default_rng(0)
    square = [LowRank(np.eye(12, dtype="f4"), rng.standard_normal((12, 12), "f4")) for _ in "abc"]
    tensors = [torch.from_numpy(p.b) for p in square]
    options = {"majority_sign_method": majority} if "ties" in rule else {}
    function = getattr(merge_utils, rule)
    expected = function(tensors, torch.tensor(WEIGHTS), 0.4, **options).numpy()
    setting = Setting(density=0.4, majority=majority, rank=12)
    found = compat(f"{rule}_svd", square, WEIGHTS, setting, replayed(iter(masks)))
    close(delta(found.low), expected)


def test_positive_weights_of_equal_size_make_the_same_vote_as_in_peft(model):
    layer = model.base_model.model.up
    found = combined("ties", parts_of(layer), [1.0] * 3, Setting(density=0.5, exact=True))
    theirs = compat("ties_svd", parts_of(layer), [1.0] * 3, Setting(density=0.5))
    close(delta(found.low), delta(theirs.low), NEAR)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("method", METHODS)
def test_torch_tensors_are_combined_as_arrays_are(model, method, device):
    layer = model.base_model.model.up
    setting = Setting(density=0.5)
    expected = combined(method, parts_of(layer), WEIGHTS, setting)
    tensors = [
        LowRank(*(torch.from_numpy(x).to(device) for x in (p.a, p.b)), p.scaling)
        for p in parts_of(layer)
    ]
    found = combined(method, tensors, WEIGHTS, setting)
    assert found.low.a.device.type == device
    assert found.retained == pytest.approx(expected.retained, rel=1e-5)
    close(delta(found.low).cpu().numpy(), delta(expected.low), NEAR)
