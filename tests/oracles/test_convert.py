"""An adapter under other names is the same adapter: by algebra, by merges, and by PEFT."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorakit
from lorakit.errors import InputError, MisfitError
from tests.oracles.architectures.algebra import on_disk, save_expected
from tests.oracles.architectures.answers import answer, answer_of
from tests.oracles.architectures.case import Built
from tests.oracles.architectures.cases import CASES
from tests.oracles.architectures.test_architectures import assert_exact
from tests.oracles.architectures.workshop import Workshop
from tests.oracles.reading import Array, read_json, read_tensors

pytest.importorskip("peft", minversion="0.21")
pytest.importorskip("transformers", minversion="5")
SCRATCH = lorakit.RunOptions(sync=False)
PLAIN = [c.name for c in CASES if c.variant == "plain"]
PATTERNS = [c.name for c in CASES if c.variant == "patterns"]
BY_HAND = [c.name for c in CASES if c.by_hand]
STACKED = [c for c in CASES if c.lora.get("target_parameters") and c.names.startswith("v5")]
WOVEN = [c.name for c in CASES if c.model.startswith("gpt-oss") and c.variant == "plain"]
# Parts of a stack with scalings of their own: float32 cannot hold all that is multiplied into B.
UNEVEN = {c.name for c in CASES if c.variant == "uneven patterns"}
FITTING = [n for n in PLAIN if n not in WOVEN and "PEFT" not in n]
# A stack says nothing of modules that were not there, but that they change nothing.
WHOLE = [n for n in BY_HAND if n not in UNEVEN and not n.endswith(("-alone", "-regex"))]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("conversions"))


def converted(built: Built, folder: Path, names: str, **options: Any) -> Built:
    """A case with its adapter converted, in the layout that PEFT writes today."""
    read = {k: v for k, v in built.case.options.items() if k.startswith("expert")}
    lorakit.convert(
        built.adapter, folder, base=built.base, names=names, run=SCRATCH, **read, **options
    )
    times = 1.0 if "peft_version" in read_json(folder / "adapter_config.json") else None
    case = replace(
        built.case,
        packing="peft",
        in_first=None,
        embedding_times=times or built.case.embedding_times,
        options={"untie": True} if built.case.untied_head else {},
    )
    return replace(built, case=case, adapter=folder)


def changes(built: Built) -> dict[str, Array]:
    """What an adapter changes, by the tensors on disk; those that it adds zeros to are left out."""
    return {name: delta for name, delta in on_disk(built).items() if delta.any()}


@pytest.mark.parametrize("names", ["disk", "runtime-v5"])
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_every_delta_on_disk_is_the_same(
    workshop: Workshop, tmp_path: Path, name: str, names: str
) -> None:
    built = workshop.built(name)
    before, after = changes(built), changes(converted(built, tmp_path / "out", names))
    assert before.keys() == after.keys()
    loose = 1e-7 if name in UNEVEN and names != "disk" else 1e-14
    for tensor, delta in before.items():
        np.testing.assert_allclose(after[tensor], delta, rtol=0, atol=loose * np.abs(delta).max())


@pytest.mark.parametrize("names", ["disk", "runtime-v5"])
@pytest.mark.parametrize(
    ("name", "experts"),
    [(n, e) for n in FITTING for e in ("fused", "split")],
)
def test_a_merge_of_the_result_is_the_exact_one_rounded_once(
    workshop: Workshop, tmp_path: Path, name: str, names: str, experts: str
) -> None:
    built = workshop.built(name)
    other = converted(built, tmp_path / "other", names, experts=experts)
    options = dict(built.case.options) if built.case.untied_head else {}
    merged = tmp_path / "merged"
    lorakit.merge(built.base, other.adapter, merged, run=SCRATCH, **options)
    assert_exact(built, merged)


@pytest.mark.parametrize("name", [*PLAIN, *PATTERNS])
def test_peft_loads_the_names_of_the_model_and_every_tensor_under_them(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    import torch
    from peft import PeftModel, get_peft_model_state_dict

    built = workshop.built(name)
    adapter = converted(built, tmp_path / "out", "runtime-v5").adapter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = PeftModel.from_pretrained(built.kind.load(built.base), adapter).eval()
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert {n: t.double().numpy().tobytes() for n, t in state.items()} == {
        n: t.tobytes() for n, t in read_tensors(adapter).items()
    }
    save_expected(built, tmp_path / "expected")
    expected = answer_of(built.kind, tmp_path / "expected")
    torch.testing.assert_close(answer(model, built.kind.seen), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WHOLE)
def test_modules_of_transformers_4_come_back_from_stacks_byte_for_byte(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    built = workshop.built(name)
    there = converted(built, tmp_path / "there", "runtime-v5")
    back = converted(there, tmp_path / "back", "disk")
    assert _bytes(back.adapter) == _bytes(built.adapter)


@pytest.mark.parametrize("name", [case.name for case in STACKED])
def test_stacks_come_back_from_single_experts_byte_for_byte(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    built = workshop.built(name)
    there = converted(built, tmp_path / "there", "disk")
    back = converted(there, tmp_path / "back", "runtime-v5")
    assert _bytes(back.adapter) == _bytes(built.adapter)


def _bytes(adapter: Path) -> bytes:
    return (adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", sorted(UNEVEN))
def test_numbers_that_a_scaling_rounds_are_counted(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    built = workshop.built(name)
    done = lorakit.convert(
        built.adapter, tmp_path / "out", base=built.base, names="runtime-v5", run=SCRATCH
    )
    assert done.rounded > 0
    assert [note for note in done.notes if "scalings of their own" in note]


@pytest.mark.parametrize("name", WOVEN)
def test_gate_and_up_that_alternate_are_not_split(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    with pytest.raises(InputError, match="alternate"):
        converted(workshop.built(name), tmp_path / "out", "disk", experts="split")


@pytest.mark.parametrize("names", ["disk", "runtime-v5"])
@pytest.mark.parametrize("name", FITTING)
def test_a_module_that_the_base_lacks_is_refused_and_nothing_is_written(
    workshop: Workshop, tmp_path: Path, name: str, names: str
) -> None:
    from safetensors.numpy import save_file

    built = workshop.built(name)
    tensors = {n: t.astype(np.float32) for n, t in read_tensors(built.adapter).items()}
    first = next(n for n in sorted(tensors) if re.search(r"(attn|mixer)\..*lora_A", n))
    module = first.partition(".lora_A")[0]
    for role in "AB":
        tensors[f"{module}_too.lora_{role}.weight"] = tensors[f"{module}.lora_{role}.weight"]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = json.dumps(read_json(built.adapter / "adapter_config.json"))
    (adapter / "adapter_config.json").write_text(config)
    with pytest.raises(MisfitError, match="_too") as refusal:
        converted(replace(built, adapter=adapter), tmp_path / "out", names)
    assert refusal.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
