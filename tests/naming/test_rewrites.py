"""A rewrite leads a whole model to where it lies, and nothing of another model into this one."""

import pytest

from lorakit.naming.resolve import Wanted, resolve
from lorakit.tensors import TensorInfo


def resolved(modules, names, parameters=("weight",)):
    disk = {n: TensorInfo(n, "F32", (4, 4)) for n in names}
    return resolve([Wanted(m, parameters, lambda shape: shape == (4, 4)) for m in modules], disk)


def test_exact_names_beside_the_layers_do_not_hold_back_a_rewrite_of_these():
    modules = ["lm_head", "model.layers.0.q", "model.layers.1.q"]
    names = ["lm_head.weight", "lm.model.layers.0.q.weight", "lm.model.layers.1.q.weight"]
    assert sorted(resolved(modules, names).tensors.values()) == sorted(names)


def test_the_layers_of_a_tower_that_is_not_there_do_not_slip_into_those_that_are():
    names = ["model.layers.0.q.weight", "model.layers.0.k.weight"]
    found = resolved(["model.layers.0.q", "vision.layers.0.k"], names)
    assert [w.module for w in found.left] == ["vision.layers.0.k"]


@pytest.mark.parametrize("module", ["blocks.0.q", "vision.blocks.0.q"])
def test_a_stack_of_layers_keeps_its_own_name(module):
    assert resolved([module], ["model.layers.0.q.weight"]).tensors == {}


def test_a_bias_does_not_leave_its_weight():
    found = resolve(
        [Wanted("decoder.0.q", (p,), lambda shape: True) for p in ("weight", "bias")],
        {n: TensorInfo(n, "F32", (4,)) for n in ("decoder.0.q.weight", "x.decoder.0.q.bias")},
    )
    assert [w.parameters for w in found.left] == [("bias",)]
