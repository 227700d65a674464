"""The zoo, built once a session: `case` runs a test on every case, `built` gives one by name.

`merged` is what lorakit makes of a case, also once a session.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, below and in tests

from tests.oracles.case import Built
from tests.oracles.merging import merge
from tests.oracles.zoo import CASES
from tests.oracles.zoo_tied import INSEPARABLE, TIED

Build = Callable[[str], Built]
Merge = Callable[[Built], Path]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The files of the case of a name. Tests must leave them as they are."""
    pytest.importorskip("peft", minversion="0.21")
    from tests.oracles.training import build

    done: dict[str, Built] = {}
    by_name = {case.name: case for case in (*CASES, *TIED, *INSEPARABLE)}

    def once(name: str) -> Built:
        if name not in done:
            done[name] = build(by_name[name], tmp_path_factory.mktemp(name))
        return done[name]

    return once


@pytest.fixture(params=[case.name for case in CASES])
def case(request: pytest.FixtureRequest, built: Build) -> Built:
    """Every case of the zoo in turn."""
    return built(request.param)


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Merge:
    """The folder that lorakit merges a case to. Tests must leave it as it is."""
    done: dict[str, Path] = {}

    def once(case: Built) -> Path:
        name = case.case.name
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name) / "merged"
            merge(case, done[name], untie=bool(case.case.untied_head))
        return done[name]

    return once
