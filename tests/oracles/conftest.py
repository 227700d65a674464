"""The zoo, built once a session: `case` runs a test on every case, `built` gives one by name."""

import os
from collections.abc import Callable

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, below and in tests

from tests.oracles.case import Built
from tests.oracles.zoo import CASES

Build = Callable[[str], Built]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The files of the case of a name. Tests must leave them as they are."""
    pytest.importorskip("peft", minversion="0.21")
    from tests.oracles.training import build

    done: dict[str, Built] = {}
    by_name = {case.name: case for case in CASES}

    def once(name: str) -> Built:
        if name not in done:
            done[name] = build(by_name[name], tmp_path_factory.mktemp(name))
        return done[name]

    return once


@pytest.fixture(params=[case.name for case in CASES])
def case(request: pytest.FixtureRequest, built: Build) -> Built:
    """Every case of the zoo in turn."""
    return built(request.param)
