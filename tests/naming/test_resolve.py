"""Names: exact first, else one rewrite for all, never a guess."""

import pytest

from lorakit.errors import InputError, MisfitError, UsageError
from lorakit.naming.resolve import Wanted, nearest, renamed, resolve
from lorakit.tensors import TensorInfo


def disk(*names, shape=(4, 4)):
    return {n: TensorInfo(n, "F32", shape) for n in names}


def wanted(*modules, shape=(4, 4)):
    return [Wanted(m, ("weight", "in_proj_weight"), lambda s: s == shape) for m in modules]


def found(modules, names, **kwargs):
    resolved = resolve(wanted(*modules), disk(*names, **kwargs))
    return {w.module: n for w, n in resolved.tensors.items()}, resolved


def test_the_exact_name_counts_whatever_else_is_there():
    tensors, resolved = found(["h.0.q"], ["h.0.q.weight", "model.h.0.q.weight"])
    assert tensors == {"h.0.q": "h.0.q.weight"}
    assert resolved.rewrite is None


def test_the_first_parameter_that_is_there_counts():
    tensors, _ = found(["attn"], ["attn.in_proj_weight"])
    assert tensors == {"attn": "attn.in_proj_weight"}


@pytest.mark.parametrize(
    ("module", "there"),
    [
        ("transformer.h.{}.attn", "h.{}.attn.weight"),
        ("layers.{}.q", "model.layers.{}.q.weight"),
        ("model.layers.{}.q", "language_model.model.layers.{}.q.weight"),
        ("model.language_model.layers.{}.q", "model.layers.{}.q.weight"),
    ],
)
def test_one_rewrite_of_the_front_finds_all_modules(module, there):
    modules = [module.format(i) for i in range(3)]
    tensors, resolved = found(modules, [there.format(i) for i in range(3)])
    assert tensors == {module.format(i): there.format(i) for i in range(3)}
    assert resolved.rewrite


def test_a_rewrite_never_moves_a_layer():
    _, resolved = found(["model.layers.31.q"], ["model.layers.0.q.weight"])
    assert [w.module for w in resolved.left] == ["model.layers.31.q"]


def test_a_rewrite_has_to_find_every_module():
    names = ["h.0.q.weight", "h.1.q.weight"]
    tensors, resolved = found(["m.h.0.q", "m.h.1.q", "m.h.2.q"], names)
    assert tensors == {}
    assert len(resolved.left) == 3


def test_a_rewrite_leads_only_to_tensors_of_the_right_shape():
    names = {**disk("vision.layers.0.q.weight", shape=(8, 8)), **disk("text.layers.0.q.weight")}
    resolved = resolve(wanted("layers.0.q"), names)
    assert list(resolved.tensors.values()) == ["text.layers.0.q.weight"]


def test_two_rewrites_of_the_same_length_are_ambiguous():
    with pytest.raises(MisfitError, match="--key-map"):
        found(["layers.0.q"], ["vision.layers.0.q.weight", "text.layers.0.q.weight"])


def test_the_rewrite_that_keeps_more_of_the_name_wins():
    names = ["lm.model.layers.0.q.weight", "vision.layers.0.q.weight"]
    tensors, _ = found(["model.layers.0.q"], names)
    assert tensors == {"model.layers.0.q": "lm.model.layers.0.q.weight"}


def test_a_rewrite_takes_no_tensor_that_is_found_by_name():
    tensors, resolved = found(["h.0.q", "m.h.0.q"], ["h.0.q.weight"])
    assert tensors == {"h.0.q": "h.0.q.weight"}
    assert [w.module for w in resolved.left] == ["m.h.0.q"]


def test_a_key_map_renames_in_the_order_given():
    assert renamed("a.b.c", ["^a=x", r"x\.(\w+)=y.\1"]) == "y.b.c"


def test_a_key_map_that_is_none_is_a_usage_error():
    with pytest.raises(UsageError):
        renamed("a", ["nothing"])
    with pytest.raises(InputError):
        renamed("a", ["(=x"])


def test_the_nearest_names_are_found_among_many():
    names = disk(*(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(20_000)))
    assert nearest("model.layers.7.attn.q_proj.weight", names)
