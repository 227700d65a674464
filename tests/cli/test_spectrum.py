"""`lorakit inspect --spectrum` and `--plot`."""

import json
import sys

import pytest


def test_a_table_of_singular_values_by_kind_of_module(run):
    ran = run("inspect", "detail", "--spectrum")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    start = lines.index("singular values")
    assert lines[start + 1].split()[:4] == ["module", "count", "rank", "norm"]
    row = next(line for line in lines[start:] if "model.layers.*.self_attn.q_proj " in line)
    assert row.split()[1:3] == ["2", "8"]
    assert sum("model.layers" in line for line in lines[start:]) == 7


def test_a_verbose_one_has_each_module(run):
    ran = run("inspect", "detail", "--spectrum", "--verbose")
    assert "model.layers.1.self_attn.q_proj " in ran.out


def test_the_spectra_as_json(run):
    (found,) = json.loads(run("inspect", "style", "--spectrum", "--json").out)["inspected"]
    assert [len(s["values"][0]) for s in found["spectra"]] == [4, 4, 4, 4]
    assert sum(s["share"] for s in found["spectra"]) == pytest.approx(1)
    (plain,) = json.loads(run("inspect", "style", "--json").out)["inspected"]
    assert "spectra" not in plain


def test_a_picture_is_drawn_and_said_to_be(run, folder):
    pytest.importorskip("matplotlib")
    ran = run("inspect", "style", "--plot", "style.png")
    assert ran.out.endswith("drawn -> style.png\n")
    assert (folder / "style.png").stat().st_size > 10_000
    ran = run("inspect", "style", "--plot", "style.png")
    assert (ran.code, ran.out) == (7, "")
    assert run("inspect", "style", "--plot", "style.png", "--overwrite", "--json").code == 0


def test_without_matplotlib_a_picture_is_refused_with_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = run("inspect", "style", "--plot", "style.png")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "Error: --plot needs matplotlib, which is not installed. "
        "Install it: pip install 'lorakit[plot]'\n"
    )


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("base", "--spectrum"), 3, "it has no spectrum"),
        (("style", "--plot", "style.jpg"), 2, "a picture ends in .png, .svg, .pdf"),
        (("style", "detail", "--plot", "style.png"), 2, "2 paths are given"),
        (("nowhere", "--spectrum"), 3, "nowhere"),
    ],
)
def test_what_has_no_spectrum_is_one_line(run, options, code, said):
    ran = run("inspect", *options)
    assert (ran.code, ran.err.count("Error:")) == (code, 1)
    assert said in ran.err
