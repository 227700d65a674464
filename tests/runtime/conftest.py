"""Tiny bases with adapters that PEFT trained (as it were) on them, each built once a session."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

from tests.oracles.case import Built, Case

# What these tests are about is optional.
NEEDED = {
    "test_*.py": ("torch", "transformers", "peft"),
    "test_runtime_quantised.py": ("bitsandbytes",),
}
collect_ignore_glob = [files for files, names in NEEDED.items() if not all(map(find_spec, names))]

Make = Callable[[Case], "Live"]


@dataclass(frozen=True)
class Live:
    """A base and an adapter for it, in folders. Tests must leave them as they are."""

    case: Case
    base: Path
    adapter: Path
    plain: Path  # the same adapter in PEFT's own spelling

    def model(self, dtype: str = "float32") -> Any:
        """The base in memory, without an adapter."""
        from tests.oracles.training import load

        return load(replace(self.case, dtype=dtype), self.base).eval()


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The files of a case; every base is float32."""
    from tests.oracles.training import build

    done: dict[str, Built] = {}

    def once(case: Case) -> Live:
        if case.name not in done:
            plain = replace(case, dtype="float32", shard_size="")
            done[case.name] = build(plain, tmp_path_factory.mktemp(case.name))
        one = done[case.name]
        return Live(case, one.base, one.adapter, one.plain)

    return once


@pytest.fixture(scope="session")
def zoo(make: Make) -> Callable[[str], Live]:
    """The files of a case of the zoo by its name."""
    from tests.oracles.zoo import CASES
    from tests.oracles.zoo_tied import INSEPARABLE, TIED

    by_name = {case.name: case for case in (*CASES, *TIED, *INSEPARABLE)}
    return lambda name: make(by_name[name])
