"""What is installed: bounds from below, pins that cover all of it, the README's two commands."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lorakit
from tests.pages import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(r) for r in sum(EXTRAS.values(), PROJECT["dependencies"])]
ASKED = [r for r in DIRECT if r.name != "lorakit"]
# torch asks for its own CUDA libraries by exact version, on some platforms only.
PINNED_BY_TORCH = re.compile(r"nvidia-|triton|cuda-")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def asked_by(name: str, tested: str) -> list[str]:
    """What a distribution asks for on this machine, if it is installed in the version tested."""
    try:
        installed = metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        return []
    asked = [Requirement(r) for r in metadata.requires(name) or []]
    here = [r for r in asked if not r.marker or r.marker.evaluate({"extra": ""})]
    return [canonicalize_name(r.name) for r in here if installed == tested]


def test_dependencies_are_bound_from_below_only():
    specifiers = {r.name: [s.operator for s in r.specifier] for r in ASKED}
    assert {name: ops for name, ops in specifiers.items() if ops != [">="]} == {}


def test_every_pin_is_a_public_version_within_the_bounds():
    tested = pins()
    assert [name for name, version in tested.items() if "+" in version] == []
    outside = [r for r in ASKED if not r.specifier.contains(tested[canonicalize_name(r.name)])]
    assert outside == []


def test_every_distribution_that_the_tests_bring_in_is_pinned():
    tested, found = pins(), set()
    todo = {canonicalize_name(r.name) for r in ASKED}
    while todo:
        found |= todo
        todo = {n for name in todo for n in asked_by(name, tested.get(name, ""))} - found
    assert {name for name in found - tested.keys() if not PINNED_BY_TORCH.match(name)} == set()


def test_the_extra_all_is_every_extra_that_users_need():
    (everything,) = EXTRAS["all"]
    assert Requirement(everything).extras == EXTRAS.keys() - {"all", "dev", "test"}


def test_the_readme_opens_with_the_command_that_shows_it_and_the_one_that_tests_it():
    """Each on one line, needing only Python and pip; .ci/run runs these very lines."""
    start = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt "
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line.removeprefix(start) for line in lines if line.startswith(start)]
    assert commands == [". && .venv/bin/lorakit demo", "-e '.[test]' && .venv/bin/pytest"]


def test_the_version_is_the_one_of_the_project_and_the_types_are_shipped():
    try:
        installed = metadata.version("lorakit")
    except metadata.PackageNotFoundError:
        pytest.skip("lorakit runs from its folder, not installed")
    assert lorakit.__version__ == installed
    assert (ROOT / "lorakit/py.typed").exists()


SCRIPT = """
import lorakit

reveal_type(lorakit.open_adapter("style").sha256)
report = lorakit.verify("merged", full=True)
reveal_type(report.differences)
lorakit.verify("merged", fulll=True)
"""


def test_every_name_is_known_to_tools_that_read_types():
    source = (ROOT / "lorakit/__init__.py").read_text()
    typed = dict(re.findall(r"    from \S+ import (\w+) as (\w+)\n", source))
    assert set(typed) == {*lorakit._HOMES, "runtime"}
    assert all(name == other for name, other in typed.items())
    for name, home in lorakit._HOMES.items():
        assert f"    from {home} import {name} as {name}\n" in source


def test_a_wrong_keyword_in_a_script_is_found_by_mypy(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    settings = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path / "cache"]
    paths = {**os.environ, "MYPYPATH": str(ROOT)}
    ran = subprocess.run(
        [*command, *settings, "script.py"],
        cwd=tmp_path,
        env=paths,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 'Revealed type is "str"' in ran.stdout.replace("builtins.", "")
    assert 'Unexpected keyword argument "fulll"' in ran.stdout
    assert "Any" not in ran.stdout.split("differences")[0]
    assert ran.returncode == 1


def test_without_torch_the_runtime_says_what_to_install():
    for script in ("import lorakit.runtime", "import lorakit; lorakit.runtime"):
        blocked = f"import sys; sys.modules['torch'] = None; {script}"
        ran = subprocess.run(
            [sys.executable, "-c", blocked], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert "needs torch: pip install 'lorakit[runtime]'" in ran.stderr.splitlines()[-1]


def test_the_runtime_is_there_as_an_attribute():
    pytest.importorskip("torch")
    ran = subprocess.run(
        [sys.executable, "-c", "import lorakit; print(lorakit.runtime.attach.__name__)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "attach\n"
