"""The demo's base and adapters, made once, and a merge of both."""

import pytest

import lorakit
from lorakit import RunOptions
from lorakit.verbs.demo import demo

SCRATCH = RunOptions(sync=False)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with base, style and detail; nobody writes to it."""
    return demo(tmp_path_factory.mktemp("demo") / "demo")


@pytest.fixture
def merged(made, tmp_path):
    """A fresh merge of both adapters, the second at half strength."""
    out = tmp_path / "merged"
    lorakit.merge(
        made / "base", [made / "style", made / "detail"], out, weights=[1, 0.5], run=SCRATCH
    )
    return out
