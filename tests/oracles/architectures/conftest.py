"""The workshop of the session."""

import pytest

from tests.oracles.architectures.workshop import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """The files of every case, made when they are first asked for."""
    pytest.importorskip("peft", minversion="0.21")
    pytest.importorskip("transformers", minversion="5")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Workshop(tmp_path_factory.mktemp("architectures"))
