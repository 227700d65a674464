"""What every test can count on: no network, a fixed number of threads, the same examples in CI."""

import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Read when NumPy, torch and huggingface_hub are imported, which nothing above does. The number of
# threads is fixed because the order of a sum, and so its last bit, depends on it.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "2")

# A slow machine is no bug. `pytest --hypothesis-profile=search` looks for new examples.
_patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", _patient, derandomize=True, max_examples=100)
settings.register_profile("dev", _patient, derandomize=True, max_examples=25)
settings.register_profile("search", _patient, max_examples=2000)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture
def outsider() -> Iterator[Path]:
    """A folder of a user whom the modes of files hold; root would read and remove anything."""
    nobody, root = 65534, os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        if root:
            os.chown(folder, nobody, nobody)
            os.seteuid(nobody)
        yield Path(folder)
        if root:
            os.seteuid(0)


@cache
def _cuda_is_here() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not _cuda_is_here():
        pytest.skip("no CUDA device")
