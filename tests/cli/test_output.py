"""The result on stdout, all else on stderr, and one JSON object where it is asked for."""

import json
import os
import pty
import subprocess
import sys

import click
import pytest

from lorakit.cli import COMMANDS, printable
from lorakit.cli.parsing import Size
from tests.cli.spoil import CONFIG, MERGE, WEIGHTS, edit, put, read, tensor, write
from tests.pages import ROOT

FIGURES = {"retained", "max_change", "max_value", "overflowed"}


def test_a_merge_prints_its_report_as_json(run):
    found = run(*MERGE, "--json").json
    assert (found["output"], found["tensors"], found["folded"]) == ("merged", 21, 4)
    assert found["written"] == 334_624
    assert found["notes"] == []
    assert list(found["figures"]) == [
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qv"
    ]
    assert all(f.keys() == FIGURES for f in found["figures"].values())
    assert 0.99 < found["retained"] < 1.01
    assert found["overflowed"] == 0
    assert found["sha256"] is None


def test_a_checksum_of_every_weight_file_is_in_the_report(run):
    found = run(*MERGE, "--json", "--checksum").json
    assert [len(digest) for digest in found["sha256"].values()] == [64, 64, 64]


def test_a_dry_run_prints_its_plan_as_json_and_writes_nothing(run, folder):
    found = run(*MERGE, "--dry-run", "--json", "--jobs", "1").json
    assert found["dry_run"] is True
    assert (found["disk"], found["jobs"]) == (334_624, 1)
    assert found["free"] > 0
    assert found["memory"] > 0
    assert found["plan"]["verb"] == "merge"
    steps = [step for file in found["plan"]["files"] for step in file["steps"]]
    assert sum("fold" in step for step in steps) == 4
    assert sorted(p.name for p in folder.iterdir()) == ["base", "detail", "style"]


def test_the_hash_of_a_dry_run_is_that_of_the_merge(run):
    planned = run(*MERGE, "--dry-run", "--json").json["hash"]
    assert run(*MERGE, "--json").json["plan"] == planned


def test_a_dry_run_tells_that_the_output_exists(run):
    run(*MERGE)
    ran = run(*MERGE, "--dry-run")
    assert ran.code == 0
    assert ran.err == "Note: merged exists; --overwrite replaces it.\n"
    assert run(*MERGE, "--dry-run", "--overwrite").err == ""


def test_a_dry_run_refuses_an_output_within_an_input(run):
    assert run("merge", "base", "style", "-o", "base/x", "--dry-run").code == 7


def test_verify_prints_what_it_checked_as_json(run):
    run(*MERGE)
    found = run("verify", "merged", "--full", "--json").json
    assert found == {
        "version": 1,
        "output": "merged",
        "copied_bytes": 299_648,
        "folded_tensors": 4,
        "checked_numbers": 16_384,
        "wrong_rounded": found["wrong_rounded"],
        "differences": [],
    }


def spoilt(run):
    """A result in which every number is one bit off."""
    run(*MERGE)
    for path in sorted((CONFIG.parent.parent / "merged").glob("*.safetensors")):
        tensors = read(path)
        start = path.stat().st_size - sum(len(data) for _, data in tensors.values())
        raw = bytearray(path.read_bytes())
        raw[start:] = bytes(byte ^ 1 for byte in raw[start:])
        path.write_bytes(raw)


def test_verify_prints_every_difference(run):
    spoilt(run)
    ran = run("verify", "merged")
    assert ran.code == 8
    assert len(ran.out.splitlines()) > 4
    assert all(" in model-0000" in line for line in ran.out.splitlines())
    assert ran.err.count("Error:") == 1
    found = run("verify", "merged", "--json").json["error"]
    assert found["differences"] == ran.out.splitlines()
    assert run("verify", "merged", "--quiet").out == ""


def test_inspect_prints_everything_as_json(run):
    found = run("inspect", "base", "style", "--json").json["inspected"]
    assert [one["kind"] for one in found] == ["base", "adapter"]
    assert found[0].keys() == {"path", "kind", "facts", "dtypes", "groups", "notes"}
    assert found[1]["facts"]["modules"] == 4


def test_a_usage_error_is_json_too(run):
    ran = run("merge", "base", "style", "--json")
    error = ran.json["error"]
    assert error["code"] == "usage"
    assert error["message"] == "Missing option '-o' / '--output'."
    assert ran.code == 2


def test_the_result_goes_to_stdout_and_notes_go_to_stderr(run, folder):
    put(WEIGHTS, {"base_model.model.lora_velora_embed": tensor((4,))})
    (folder / "base/model.safetensors").write_bytes(b"stale")
    ran = run(*MERGE)
    assert ran.out.startswith("4 of 21 tensors changed, largest change ")
    assert ran.out.count("\n") == 1
    first, second = ran.err.splitlines()
    assert first == "Note: style: 1 tensors are of use in training only."
    assert second.startswith("Note: weight files that no index names are left out (1): ")


def test_names_in_another_spelling_are_told(run):
    bare = {n.replace("model.model.model.", "model.model."): t for n, t in read(WEIGHTS).items()}
    write(WEIGHTS, bare)
    ran = run(*MERGE)
    assert ran.code == 0
    assert "of its names are others on disk, first 'layers.0." in ran.err
    assert "which is 'model.layers.0." in ran.err


def test_a_rewrite_of_names_is_told(run):
    other = {n.replace(".model.model.", ".backbone.of.mine."): t for n, t in read(WEIGHTS).items()}
    write(WEIGHTS, other)
    ran = run(*MERGE)
    assert ran.code == 0
    assert "module names are rewritten" in ran.err


def test_an_alpha_in_doubt_and_a_rank_that_is_not_the_tensors_are_told(run):
    edit(CONFIG, alpha_pattern={"q_proj": 3, ".*_proj": 4}, r=5)
    ran = run(*MERGE)
    assert "the alpha patterns ['q_proj', '.*_proj'] disagree" in ran.err
    assert "has rank 4, its config says 5; the tensors count (and 3 more like it)." in ran.err
    assert ran.err.count("its config says 5") == 1


def test_quiet_prints_nothing(run):
    for command in (MERGE, ["verify", "merged"], ["unmerge", "merged", "style", "-o", "back"]):
        ran = run(*command, "--quiet")
        assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_numbers_that_are_lost_are_told_even_quietly(run):
    ran = run(*MERGE, "--weight", "1e9", "--dtype", "float16", "--quiet")
    assert ran.err.startswith("Warning: ")
    assert "do not fit the dtype of the result" in ran.err


def test_a_grid_too_coarse_for_the_delta_is_told(run):
    ran = run(*MERGE, "--weight", "0.001")
    assert "% of the delta; --dtype float32 or float16 keeps more" in ran.err


def test_verbose_shows_every_tensor(run):
    plan = run(*MERGE, "--dry-run", "-v").out
    assert (
        "model.layers.1.self_attn.v_proj.weight   BF16   BF16   [64, 64]   +2 × adapter 1" in plan
    )
    ran = run(*MERGE, "-v").out
    assert [line.split()[0] for line in ran.splitlines() if line.startswith("model.")] == [
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qv"
    ]


def test_unmerge_tells_how_far_off_its_result_may_be(run):
    run(*MERGE)
    ran = run("unmerge", "merged", "style", "-o", "back")
    assert "no number is off the original base by more than" in ran.err


def test_tables_have_one_row_a_line_where_there_is_no_terminal(run):
    long = "a." * 200 + "weight"
    write(WEIGHTS.with_name("long.safetensors"), {long: tensor((1,))})
    assert long in run("inspect", "style/long.safetensors").out


@pytest.mark.parametrize("kind", ["text", "json"])
def test_control_characters_of_a_stranger_never_reach_the_terminal(run, kind):
    edit(CONFIG, base_model_name_or_path="\x1b[31mred\x07\u202e\x9b")
    ran = run("inspect", "style", *(["--json"] if kind == "json" else []))
    assert ran.code == 0
    assert "red" in ran.out
    assert set(ran.out) & set("\x1b\x07\u202e\x9b") == set()


def test_a_tensor_name_with_control_characters_is_refused_and_shown_escaped(run):
    header = json.dumps({"\x1b[2J": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
    WEIGHTS.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0")
    ran = run("inspect", "style")
    assert ran.code == 3
    assert r"\x1b[2J" in ran.err
    assert "\x1b" not in ran.err


def test_printable_keeps_one_line_one_line():
    assert printable("naïve – 层\n\x1b\udcff") == "naïve – 层\\n\\x1b\\udcff"


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("100000", 100_000),
        ("500MB", 500_000_000),
        ("500 mb", 500_000_000),
        ("2g", 2_000_000_000),
        ("2GB", 2_000_000_000),
        ("1.5GiB", 3 << 29),
        ("64k", 64_000),
        ("64KiB", 1 << 16),
        ("1TB", 10**12),
    ],
)
def test_a_size_is_a_number_of_bytes(text, nbytes):
    assert Size().convert(text, None, None) == nbytes


@pytest.mark.parametrize("text", ["", "much", "0", "-1GB", "1.5.2GB", "GB", "1 XB", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(click.BadParameter, match="is no size"):
        Size().convert(text, None, None)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=str)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_there_in_short_and_in_long(run, command, option):
    ran = run(*command, option)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"Usage: {' '.join(['lorakit', *command])} ")


def test_without_a_command_the_help_is_shown(run):
    ran = run()
    assert ran.code == 2
    assert "Commands:" in ran.out + ran.err


def test_a_near_miss_of_a_command_is_named_and_all_are_where_there_is_none(run):
    assert "Did you mean 'unmerge'?" in run("unmerg").err
    assert f"There are: {', '.join(COMMANDS)}." in run("xyz").err


def test_the_demo_shows_itself_and_leaves_nothing(run, folder):
    ran = run("demo")
    assert ran.code == 0
    assert "$ lorakit verify merged --full" in ran.out
    assert "stored, the nearest BF16" in ran.out
    assert sorted(p.name for p in folder.iterdir()) == ["base", "detail", "style"]


def on_a_terminal(*args: str, **environment: str) -> str:
    """What a command shows where stdout and stderr are a terminal."""
    ours, theirs = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")}
    env |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "100", **environment}
    command = [sys.executable, "-m", "lorakit", *args]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 1 << 16):
            shown += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert child.wait(timeout=60) == 0
    return shown.decode()


def test_a_terminal_gets_colours_unless_no_color_is_set(folder):
    assert "\x1b[32m" in on_a_terminal("demo")
    plain = on_a_terminal("demo", NO_COLOR="1")
    assert "\x1b[3" not in plain
    assert "\x1b[1m" not in plain


def test_a_bar_is_drawn_on_a_terminal_and_goes_when_it_is_done(folder):
    shown = on_a_terminal(*MERGE)
    assert "━" in shown
    assert shown.rstrip().splitlines()[-1].endswith("-> merged")
