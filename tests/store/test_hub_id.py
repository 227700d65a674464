"""A hub id is taken apart in one way, and asks for each set of weights once."""

import pytest

from lorakit.errors import InputError
from lorakit.store.hub_id import choose_weights, parse_hub_id


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("org/name", ("org/name", None, "")),
        ("org/name/", ("org/name", None, "")),
        ("org/na.me_1@v1.0", ("org/na.me_1", "v1.0", "")),
        ("org/name/unet/lora", ("org/name", None, "unet/lora")),
        ("org/name@refs/pr/12/unet", ("org/name", "refs/pr/12", "unet")),
        ("org/name@main/x.safetensors", ("org/name", "main", "x.safetensors")),
        ("org/name/x.gguf", ("org/name", None, "x.gguf")),
    ],
)
def test_a_hub_id_is_repository_revision_and_subfolder(reference, parts):
    found = parse_hub_id(reference)
    assert found
    assert (found.repo, found.revision, found.inside) == parts


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ("model.safetensors model.bin", "model.safetensors"),
        (
            "model-00001-of-00002.safetensors model-00002-of-00002.safetensors"
            " consolidated.safetensors",
            "model-00001-of-00002.safetensors model-00002-of-00002.safetensors",
        ),
        ("consolidated.safetensors", "consolidated.safetensors"),
        (
            "unet/m.safetensors unet/m.fp16.safetensors vae/m.safetensors",
            "unet/m.safetensors vae/m.safetensors",
        ),
        (
            "m.fp16-00001-of-00001.safetensors m-00001-of-00001.safetensors",
            "m-00001-of-00001.safetensors",
        ),
        ("m.fp16.safetensors", "m.fp16.safetensors"),
        ("a.safetensors optimizer.safetensors", "a.safetensors"),
        ("a.bin training_args.bin optimizer.bin rng_state_0.bin", "a.bin"),
        ("scheduler/model.safetensors", "scheduler/model.safetensors"),
    ],
)
def test_the_same_weights_are_not_chosen_twice(names, chosen):
    wanted = parse_hub_id("org/name")
    found = choose_weights(wanted, names.split(), ["*.safetensors"], allow_pickle=True)
    assert found == chosen.split()


def test_weights_elsewhere_in_the_repository_are_named():
    names = ["model.Q4_0.gguf", "checkpoint-5/model.safetensors"]
    with pytest.raises(InputError, match=r"org/name/model.Q4_0.gguf, org/name/checkpoint-5/model"):
        choose_weights(parse_hub_id("org/name"), names, ["*.safetensors"], allow_pickle=True)
