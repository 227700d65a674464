"""`lorakit convert` parses, converts and tells."""

import pytest

CONVERT = ("convert", "style", "-o", "other", "--names", "disk", "--base", "base")


def test_a_conversion_tells_what_became_of_the_modules(run, folder):
    ran = run(*CONVERT)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("8 tensors became 8, modules: 4 kept; ")
    assert ran.out.endswith(" -> other\n")
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in (folder / "other").iterdir()) == names


def test_a_dry_run_prints_the_kinds_of_modules_and_writes_nothing(run, folder):
    ran = run(*CONVERT, "--dry-run")
    assert "model.layers.*.self_attn.q_proj" in ran.out
    assert "nothing was written" in ran.out
    assert not (folder / "other").exists()


def test_a_verbose_one_prints_each_module(run):
    ran = run(*CONVERT, "--verbose")
    assert "model.layers.1.self_attn.q_proj" in ran.out


def test_the_report_as_json(run):
    found = run(*CONVERT, "--json").json
    assert (found["output"], found["kept"], found["renamed"]) == ("other", 4, 0)
    assert found["changes"][0]["sources"] == ["model.layers.0.self_attn.q_proj"]
    assert (found["tensors_before"], found["tensors"], found["rounded"]) == (8, 8, 0)
    again = run(*CONVERT, "--json", "--dry-run").json
    assert (again["dry_run"], again["changes"]) == (True, found["changes"])


def test_a_quiet_one_prints_nothing(run):
    ran = run(*CONVERT, "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--to", "kohya"), 2, "peft"),
        (("--names", "v3"), 2, "runtime-v5"),
        (("--experts", "some"), 2, "split"),
        (("-o", "other.safetensors"), 2, "a folder"),
        (("-o", "base/other"), 7, "input"),
        (("--base", "nowhere"), 3, "nowhere"),
        (("--key-map", "q_proj=r_proj"), 4, "r_proj"),
    ],
)
def test_what_cannot_be_done_has_its_code_and_says_why(run, folder, options, code, said):
    ran = run(*CONVERT, *options)
    assert ran.code == code
    assert said in ran.err
    assert not (folder / "other").exists()


def test_an_output_that_exists_is_replaced_on_request_only(run):
    run(*CONVERT)
    assert run(*CONVERT).code == 7
    assert run(*CONVERT, "--overwrite", "--no-fsync").code == 0
