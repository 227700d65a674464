"""`lorakit edit` parses, edits and tells."""

import json

import pytest

EDIT = ("edit", "style", "-o", "other")


def config(folder):
    return json.loads((folder / "other/adapter_config.json").read_text())


def test_an_edit_tells_what_became_of_the_modules(run, folder):
    ran = run(*EDIT, "--drop", "q_proj", "--rename", "^model=transformer")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("8 tensors became 4, modules: 2 renamed, 2 dropped; ")
    assert ran.out.endswith(" -> other\n")
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in (folder / "other").iterdir()) == names
    modules = [f"transformer.layers.{n}.self_attn.v_proj" for n in (0, 1)]
    assert config(folder)["target_modules"] == modules


def test_numbers_that_are_rounded_are_counted(run):
    ran = run(*EDIT, "--alpha", "3")
    assert "4 kept; 710 numbers rounded; " in ran.out
    assert "rounded" not in run(*EDIT, "--alpha", "4", "--overwrite").out


def test_a_dry_run_prints_the_kinds_of_modules_and_writes_nothing(run, folder):
    ran = run(*EDIT, "--drop", "q_proj", "--bake", "--dry-run")
    row = next(line for line in ran.out.splitlines() if line.startswith("kept"))
    name = "model.layers.*.self_attn.v_proj"
    assert row.split() == ["kept", "2", name, name, "4", "2", "->", "1"]
    assert ran.out.endswith("nothing was written\n")
    assert not (folder / "other").exists()


def test_a_verbose_one_prints_each_module(run):
    assert "model.layers.1.self_attn.q_proj" in run(*EDIT, "--bake", "-v").out


def test_the_report_as_json(run):
    found = run(*EDIT, "--drop", "q_proj", "--json").json
    assert (found["output"], found["kept"], found["dropped"]) == ("other", 2, 2)
    assert found["changes"][0]["name"] == "model.layers.0.self_attn.v_proj"
    again = run(*EDIT, "--drop", "q_proj", "--json", "--dry-run").json
    assert (again["dry_run"], again["changes"]) == (True, found["changes"])


def test_a_quiet_one_prints_nothing(run):
    ran = run(*EDIT, "--alpha", "3", "--keep-factors", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_a_strength_that_changes_is_told(run, folder):
    ran = run(*EDIT, "--alpha", "3", "--keep-factors")
    assert ran.err == "Note: 4 updates change their strength, as asked.\n"
    assert config(folder)["lora_alpha"] == 3


def test_a_strength_of_zero_is_told_too(run, folder):
    assert run(*EDIT, "--scale", "0").code == 0
    compared = run("compare", "style", "other", "--json").json
    assert compared["norms"][1] == 0.0


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ((), 2, "nothing is asked for"),
        (("--drop", "nowhere"), 2, "--drop 'nowhere' is found in no name of the adapter"),
        (("--keep", "nowhere"), 2, "--keep 'nowhere' is found in no name of the adapter"),
        (("--rename", "nowhere=x"), 2, "--rename 'nowhere' is found in no name of the adapter"),
        (("--drop", "proj"), 2, "nothing of the adapter would be left"),
        (("--rename", "q_proj"), 2, "is not REGEX=REPLACEMENT"),
        (("--drop", "("), 2, "is no regular expression"),
        (("--bake", "--alpha", "2"), 2, "leave out --alpha"),
        (("--dtype", "int4"), 2, "int4"),
        (("--scale", "inf"), 2, "no finite number"),
        (("--bake", "--alpha", "0"), 2, "a finite number other than 0"),
        (("--bake", "-o", "other.safetensors"), 2, "a folder"),
        (("--bake", "-o", "style", "--overwrite"), 7, "an input"),
    ],
)
def test_what_cannot_be_done_has_its_code_and_one_line(run, folder, options, code, said):
    ran = run(*EDIT, *options)
    assert (ran.code, ran.err.count("Error:")) == (code, 1)
    assert said in ran.err
    assert not (folder / "other").exists()


def test_what_is_no_adapter_is_refused(run):
    ran = run("edit", "base", "-o", "other", "--bake")
    assert (ran.code, ran.err.count("Error:")) == (3, 1)
    assert "no adapter is in it" in ran.err


def test_an_output_that_exists_is_replaced_on_request_only(run):
    run(*EDIT, "--bake")
    assert run(*EDIT, "--bake").code == 7
    assert run(*EDIT, "--bake", "--overwrite", "--no-fsync").code == 0
