"""`lorakit compare` parses, compares and tells."""

import pytest

from tests.cli.spoil import CONFIG, edit, put, tensor
from tests.cli.wrong_adapters import HEAD, MAGNITUDE, no_common_module, other_layers, other_model


def test_two_adapters_are_told_by_kind_of_module_and_over_all(run, folder):
    before = sorted(folder.rglob("*"))
    ran = run("compare", "style", "detail")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == "1 is style, 2 is detail"
    row = next(line for line in lines if "self_attn.q_proj" in line)
    assert row.split()[:2] == ["model.layers.*.self_attn.q_proj", "2"]
    assert next(line for line in lines if "k_proj" in line).split()[2:] == [
        "–",
        "only",
        "in",
        "2",
        "–",
        "–",
    ]
    assert lines[-1].startswith("cosine 0.0012, norms 0.214 and 0.717, difference 1.04; ")
    assert lines[-1].endswith("4 modules in both, 10 only in 2")
    assert sorted(folder.rglob("*")) == before


def test_an_adapter_is_told_to_be_itself(run):
    ran = run("compare", "style", "style", "--tolerance", "0")
    assert ran.code == 0
    assert ran.out.splitlines()[-1].startswith("cosine 1.0000, ")


def test_a_verbose_one_has_each_module(run):
    ran = run("compare", "style", "detail", "-v")
    assert "model.layers.1.self_attn.q_proj " in ran.out
    assert sum("model.layers." in line for line in ran.out.splitlines()) == 14


def test_of_several_there_is_a_table_of_all_pairs(run):
    ran = run("compare", "style", "detail", "style")
    lines = ran.out.splitlines()
    assert lines[1].split() == ["adapter", "modules", "norm", "1", "2", "3"]
    assert lines[3].split() == ["1", "style", "4", "0.214", "1.0000", "0.0012", "1.0000"]
    assert lines[-1] == "4 of 14 modules in all 3 adapters"
    ran = run("compare", "style", "detail", "style", "-v")
    assert "1 · 2" in ran.out
    assert "model.layers.1.self_attn.q_proj " in ran.out


def test_json_has_what_the_table_has_and_more(run):
    found = run("compare", "style", "detail", "--json").json
    assert found["adapters"] == ["style", "detail"]
    assert (len(found["rows"]), found["common"], found["whole"]) == (14, 4, [])
    assert found["cosines"][0][0] == 1.0
    (row,) = (r for r in found["rows"] if r["name"] == "model.layers.0.self_attn.q_proj.weight")
    assert row["ranks"] == [4, 8]
    assert row["pairs"][0].keys() >= {"cosine", "difference", "relative", "columns", "rows"}


def test_a_quiet_one_prints_nothing(run):
    ran = run("compare", "style", "detail", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_a_tolerance_that_is_exceeded_ends_with_code_8_and_the_table(run):
    ran = run("compare", "style", "detail", "--tolerance", "0.1")
    assert ran.code == 8
    assert "1 is style, 2 is detail" in ran.out
    assert ran.err.startswith("Error: detail: 14 of 14 modules differ by more than 0.1 of their ")
    assert ran.err.count("\n") == 1
    ran = run("compare", "style", "detail", "--tolerance", "0.1", "--json")
    assert ran.code == 8
    error = ran.json["error"]
    assert (error["code"], error["compared"]["common"]) == ("difference", 4)
    assert run("compare", "style", "detail", "--tolerance", "0.1", "--quiet").out == ""


def test_tensors_that_are_no_updates_have_a_table_of_their_own(run, folder):
    put(folder / "style/adapter_model.safetensors", {HEAD: tensor((512, 64))})
    ran = run("compare", "style", "detail")
    lines = ran.out.splitlines()
    assert lines[lines.index("no updates") + 3].split() == ["lm_head.weight", "1", "–", "0", "–"]


def test_dora_without_its_base_is_told(run):
    put(CONFIG.with_name("adapter_model.safetensors"), {MAGNITUDE: tensor((64,))})
    edit(CONFIG, use_dora=True)
    ran = run("compare", "style", "detail")
    assert ran.code == 0
    assert ran.err.startswith("Note: style: has DoRA magnitudes; ")
    ran = run("compare", "style", "detail", "--base", "base")
    assert "not low-rank" in ran.err


@pytest.mark.parametrize("spoil", [no_common_module, other_model, other_layers])
def test_adapters_that_are_not_of_one_model_end_with_code_4(run, spoil):
    command = spoil()
    ran = run("compare", *command[1:3])
    assert (ran.code, ran.err.count("Error:"), ran.out) == (4, 1, "")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("style",), 2, "needs two adapters"),
        (("style", "nowhere"), 3, "nowhere"),
        (("style", "base"), 3, "no adapter is in it"),
        (("style", "detail", "--tolerance", "-1"), 2, "--tolerance"),
    ],
)
def test_what_cannot_be_compared_is_one_line(run, options, code, said):
    ran = run("compare", *options)
    assert (ran.code, ran.err.count("Error:"), ran.out) == (code, 1, "")
    assert said in ran.err
