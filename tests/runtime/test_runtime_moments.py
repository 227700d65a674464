"""Second moments collected from a live model are those of its inputs, and are of use."""

import numpy as np
import pytest
from safetensors.numpy import load_file

import lorakit
from lorakit.errors import UsageError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from lorakit.runtime import collect_moments  # noqa: E402

SCRATCH = lorakit.RunOptions(sync=False)
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    made = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # inputs that differ in size, as those of trained models do
        for layer in made.model.layers:
            layer.input_layernorm.weight.copy_(torch.logspace(-2, 1, 64))
    return made


def batches(seed):
    draws = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 64, (4, 16), generator=draws)} for _ in range(3)]


def inputs_of(model, name):
    """All inputs of a layer, (positions, in), float64."""
    seen = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches(0):
            model(**batch)
    hook.remove()
    return torch.cat(seen).double().numpy()


@pytest.mark.parametrize("full", [False, True])
def test_moments_are_means_over_all_positions(model, full):
    found = collect_moments(model, batches(0), full=full)
    assert len(found) == 14  # every linear layer but the head
    x = inputs_of(model, Q)
    expected = x.T @ x / len(x) if full else (x * x).mean(0)
    np.testing.assert_allclose(found[f"{Q}.second_moment"], expected, rtol=1e-5, atol=1e-9)
    assert not model.get_submodule(Q)._forward_pre_hooks


class Named(torch.nn.Module):
    """A model whose layer is called by keyword, and whose expert gets whatever there is."""

    def __init__(self):
        super().__init__()
        self.one, self.expert = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)

    def forward(self, x, chosen):
        return self.one(input=x), self.expert(x[chosen])


def test_batches_may_be_tuples_and_an_expert_without_tokens_has_no_moments(tmp_path):
    x, path = torch.arange(8.0).reshape(2, 4), tmp_path / "stats.safetensors"
    path.write_bytes(b"of before")
    found = collect_moments(Named(), [(x, torch.zeros(2, dtype=torch.bool))], path=path)
    assert list(found) == ["one.second_moment"] == list(load_file(path))
    np.testing.assert_allclose(found["one.second_moment"], (x**2).mean(0))
    assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors"]


def test_a_layer_that_is_not_there_is_named(model):
    with pytest.raises(UsageError, match="nothing"):
        collect_moments(model, batches(0), modules=["nothing"])
    with pytest.raises(UsageError, match="no batch"):
        collect_moments(model, [])


@pytest.mark.parametrize("full", [False, True])
def test_with_them_outputs_are_nearer_than_without(model, tmp_path, full):
    model.save_pretrained(tmp_path / "base")
    collect_moments(model, batches(0), full=full, path=tmp_path / "stats.safetensors")
    options = {"rank": 8, "save": "dequantized", "run": SCRATCH}
    lorakit.loftq(tmp_path / "base", tmp_path / "plain", **options)
    stats = tmp_path / "stats.safetensors"
    lorakit.loftq(tmp_path / "base", tmp_path / "weighted", stats=stats, **options)
    x, off = inputs_of(model, Q), {}
    w = model.get_submodule(Q).weight.detach().double().numpy()
    for name in ("plain", "weighted"):
        out = tmp_path / name
        lorakit.merge(out / "base", out / "adapter", out / "merged", run=SCRATCH)
        merged = load_file(out / "merged/model.safetensors")[f"{Q}.weight"].astype("f8")
        off[name] = np.linalg.norm(x @ (merged - w).T)
    assert off["weighted"] < 0.8 * off["plain"]
