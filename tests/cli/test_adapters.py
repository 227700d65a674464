"""`lorakit combine`, `resize` and `extract` parse, compute and tell; so does `loftq`."""

import re

import pytest

from lorakit.cli import combine, init, loftq
from lorakit.math.combining.methods import METHODS
from lorakit.math.initial import METHODS as INITIAL
from lorakit.quant.table import CODECS

COMBINE = ("combine", "style", "detail", "-o", "made")
RESIZE = ("resize", "detail", "-o", "made", "--rank", "3")
EXTRACT = ("extract", "base", "-o", "made", "--adapter", "detail", "--rank", "3")
each = pytest.mark.parametrize("args", [COMBINE, RESIZE, EXTRACT], ids=lambda args: args[0])


def help_of(command, name):
    (option,) = (p for p in command.params if p.name == name)
    return option.help


@each
def test_a_table_by_kind_of_module_and_a_closing_line(run, folder, args):
    ran = run(*args)
    assert (ran.code, ran.err) == (0, "")
    assert "model.layers.*.self_attn.q_proj.weight" in ran.out
    assert ran.out.splitlines()[-1].startswith("14 weights, each keeps ")
    assert ran.out.endswith(" -> made\n")
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in (folder / "made").iterdir()) == names


@each
def test_a_dry_run_tells_the_same_and_writes_nothing(run, folder, args):
    ran, real = run(*args, "--dry-run"), run(*args)
    assert ran.out.splitlines()[:-1] == real.out.splitlines()[:-1]
    assert ran.out.endswith("nothing was written\n")


@each
def test_a_verbose_one_prints_each_module(run, args):
    assert "model.layers.1.self_attn.q_proj" in run(*args, "--verbose").out


@each
def test_the_report_as_json(run, args):
    found = run(*args, "--json").json
    assert (found["output"], len(found["rows"]), found["tensors"]) == ("made", 14, 28)
    assert 0 < found["retained"] <= 1
    dry = run(*args, "--json", "--dry-run").json
    assert (dry["dry_run"], dry["rows"]) == (True, found["rows"])


@each
def test_a_quiet_one_prints_nothing(run, args):
    ran = run(*args, "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


@each
def test_an_output_that_exists_is_replaced_on_request_only(run, args):
    run(*args)
    assert run(*args).code == 7
    assert run(*args, "--overwrite", "--no-fsync").code == 0


def test_the_help_names_every_method():
    plain = {m for m in METHODS if not m.endswith("_svd")}
    assert plain - set(re.findall(r"\w+", help_of(combine.command, "method"))) == set()
    initial = re.findall(r"[\w-]+", help_of(init.command, "method"))
    assert {"loftq", *INITIAL} - set(initial) == set()


def test_the_help_of_loftq_names_every_codec_and_its_bits():
    names = help_of(loftq.command, "quant").removesuffix(".").split(", which bitsandbytes loads; ")
    tables = ([n for n, row in CODECS.items() if row.packed is loads] for loads in (True, False))
    assert [part.split(", ") for part in names] == list(tables)
    bits = tuple(map(int, re.findall(r"\d", help_of(loftq.command, "bits"))))
    assert {row.bits for row in CODECS.values() if not row.packed} == {bits}


def test_init_with_loftq_is_loftq(run, folder):
    for name, *options in (["init", "--method", "loftq"], ["loftq"]):
        ran = run(name, "base", "-o", f"out-{name}", "--rank", "4", *options)
        assert ran.code == 0
        assert "of what plain quantisation is" in ran.out
    one, other = (folder / f"out-{n}/adapter/adapter_model.safetensors" for n in ("init", "loftq"))
    assert one.read_bytes() == other.read_bytes()
    assert run("init", "base", "-o", "x", "--rank", "4", "--method", "loftq", "--dora").code == 2


LOFTQ = ("loftq", "base", "-o", "out", "--rank", "4")


def test_loftq_tells_what_is_left_and_what_would_be_done(run, folder):
    dry = run(*LOFTQ, "--dry-run")
    assert dry.out.endswith("nothing was written\n")
    assert not (folder / "out").exists()
    plan = run(*LOFTQ, "--dry-run", "--json").json
    assert plan["plan"]["verb"] == "loftq"
    found = run(*LOFTQ, "--json").json
    assert len(found["rows"]) == 14
    assert 0 < found["ratio"] < 1
    assert run(*LOFTQ).code == 7
    assert run("loftq", "out/base", "-o", "again", "--rank", "4").code == 3
    assert run(*LOFTQ[:-2], "--rank", "4000", "--overwrite").code == 4
    quiet = run(*LOFTQ, "--overwrite", "--quiet")
    assert (quiet.out, quiet.err) == ("", "")


def test_check_says_what_is_in_the_way(run):
    assert "as it is" in run("check", "style", "--for", "peft").out
    ran = run("check", "style", "--for", "mlx")
    assert ran.code == 8
    assert "lorakit convert style -o OUT --to mlx" in ran.out
    assert run("check", "style", "--for", "vllm", "--json").json["loads"] is True
    ran = run("check", "style", "--for", "nothing")
    assert ran.code == 2


def test_convert_to_another_format_tells_what_became_of_modules(run, folder):
    ran = run("convert", "style", "-o", "mlx", "--to", "mlx")
    assert ran.code == 0
    assert "4 modules became 4: 4 renamed" in ran.out
    found = run("convert", "mlx", "-o", "peft", "--to", "peft", "--json").json
    assert found["counts"] == {"renamed": 4}
    assert run("convert", "mlx", "-o", "dry", "--dry-run").out.endswith("nothing was written\n")
    assert not (folder / "dry").exists()
    assert run("convert", "style", "-o", "x", "--to", "kohya").code == 4
    assert run("convert", "style", "-o", "x", "--names", "disk").code == 2
