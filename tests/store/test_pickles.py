"""A pickle is data or it is refused: nothing in it runs, and whatever is wrong is one line."""

import os
import pickle
import random
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from lorakit.errors import InputError
from lorakit.store.pickles import open_pickle

torch = pytest.importorskip("torch")
both_kinds = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Runs:
    """Unpickled the usual way, it leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def save(value, path: Path, *, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_pickle(path, allow=True)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line or path.name in line
    return line


def weights():
    torch.manual_seed(0)
    return {"w": torch.randn(3, 4, dtype=torch.bfloat16), "b": torch.randn(5), "s": torch.tensor(2)}


@both_kinds
def test_the_tensors_are_those_that_were_saved(tmp_path, zipped):
    expected = weights()
    source = open_pickle(save(expected, tmp_path / "m.bin", zipped=zipped), allow=True)
    assert source.name == "m.bin"
    assert [*source.infos] == ["w", "b", "s"]
    assert [i.dtype for i in source.infos.values()] == ["BF16", "F32", "I64"]
    assert np.array_equal(source.array("w").view(np.int16), expected["w"].view(torch.int16).numpy())
    assert np.array_equal(source.array("b"), expected["b"].numpy())
    assert source.array("s") == 2


def test_without_permission_it_is_refused_with_the_way_out(tmp_path):
    path = save(weights(), tmp_path / "m.bin")
    with pytest.raises(InputError, match=r"run code.*--allow-pickle.*safetensors"):
        open_pickle(path, allow=False)


@both_kinds
def test_a_pickle_that_would_run_code_does_not(tmp_path, zipped):
    canary = tmp_path / "canary"
    path = save({**weights(), "x": Runs(canary)}, tmp_path / "m.bin", zipped=zipped)
    assert f"{os.mkdir.__module__}.mkdir" in refusal(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()  # it would have


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_that_would_run_code_does_not(tmp_path, protocol):
    canary = tmp_path / "canary"
    path = tmp_path / "m.pt"
    path.write_bytes(pickle.dumps({"x": Runs(canary)}, protocol))
    refusal(path)
    assert not canary.exists()


def test_no_setting_of_the_environment_makes_it_run(tmp_path):
    canary = tmp_path / "canary"
    path = save({"x": Runs(canary)}, tmp_path / "m.bin")
    code = (
        "import sys, pathlib; from lorakit.store.pickles import open_pickle\n"
        "from lorakit.errors import InputError\n"
        "try: open_pickle(pathlib.Path(sys.argv[1]), allow=True)\n"
        "except InputError: sys.exit(3)"
    )
    env = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    assert subprocess.run([sys.executable, "-c", code, path], env=env).returncode == 3
    assert not canary.exists()


def test_a_class_that_is_not_allowed_is_named(tmp_path):
    path = save({"w": torch.zeros(2), "module": torch.nn.Linear(2, 2)}, tmp_path / "m.pt")
    assert "torch.nn.modules.linear.Linear" in refusal(path)


@both_kinds
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, zipped):
    path = save(weights(), tmp_path / "m.bin", zipped=zipped)
    whole = path.read_bytes()
    for size in {0, 1, 3, 4, 8, *range(16, len(whole), len(whole) // 40), len(whole) - 1}:
        path.write_bytes(whole[:size])
        refusal(path)


@both_kinds
def test_a_damaged_file_is_read_or_refused_but_never_a_crash(tmp_path, zipped):
    path = save(weights(), tmp_path / "m.bin", zipped=zipped)
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        with suppress(InputError):
            source = open_pickle(path, allow=True)
            assert all(source.array(n).nbytes <= len(whole) for n in source.infos)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    plain, bomb = save(weights(), tmp_path / "m.bin"), tmp_path / "bomb.bin"
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    assert "compressed" in refusal(bomb)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "truncated"),
        (b"<html>not found</html>", "no pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\x08\0\0\0\0\0\0\0{}      ", "no pickle"),
    ],
)
def test_other_files_are_refused(tmp_path, content, said):
    path = tmp_path / "m.bin"
    path.write_bytes(content)
    assert said in refusal(path)


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "missing.bin")
    assert "cannot be read" in refusal(tmp_path)


def test_a_state_dict_inside_is_taken_for_the_whole(tmp_path):
    checkpoint = {"epoch": 3, "state_dict": {**weights(), "step": 7}, "lr": 0.1}
    source = open_pickle(save(checkpoint, tmp_path / "m.ckpt"), allow=True)
    assert [*source.infos] == ["w", "b", "s"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(2), "holds a Tensor"),
        ({"epoch": 3}, "Found: 'epoch'"),
        ({}, "Found: nothing"),
        ({0: torch.zeros(2)}, "Found: 0"),
        ({"w": torch.zeros(2), "deep": {"x": torch.zeros(2)}}, "under 'deep'"),
        ({"w": torch.zeros(2), "list": [torch.zeros(2)]}, "under 'list'"),
        ({"w": torch.zeros(2, 2).to_sparse()}, "sparse_coo"),
    ],
)
def test_anything_but_tensors_by_name_is_refused(tmp_path, value, said):
    assert said in refusal(save(value, tmp_path / "m.pt"))


@both_kinds
def test_tied_and_strided_tensors_share_one_storage_and_read_right(tmp_path, zipped):
    whole = torch.arange(12.0).reshape(3, 4)
    tied = {"embed": whole, "head": whole, "turned": whole.T, "row": whole[1]}
    source = open_pickle(save(tied, tmp_path / "m.bin", zipped=zipped), allow=True)
    assert np.shares_memory(source.array("embed"), source.array("head"))
    for name, tensor in tied.items():
        assert np.array_equal(source.array(name), tensor.numpy())


class Claims:
    """Unpickled, it is a tensor of a million numbers that nobody wrote."""

    def __reduce__(self):
        return torch.Tensor, (1000, 1000)


@both_kinds
def test_a_tensor_that_the_file_does_not_hold_is_refused(tmp_path, zipped):
    path = save({"w": torch.zeros(2), "made": Claims()}, tmp_path / "m.bin", zipped=zipped)
    assert "claims more bytes for 'made'" in refusal(path)


def test_parameters_are_read_like_tensors(tmp_path):
    path = save(torch.nn.Linear(3, 2).state_dict(keep_vars=True), tmp_path / "m.bin")
    assert [*open_pickle(path, allow=True).infos] == ["weight", "bias"]


def test_without_torch_the_way_to_get_it_is_named(tmp_path):
    path = save(weights(), tmp_path / "m.bin")
    code = (
        "import sys, pathlib; from lorakit.store.pickles import open_pickle\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "sys.modules['torch'] = None\n"
        "open_pickle(pathlib.Path(sys.argv[1]), allow=True)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert "needs torch. pip install 'lorakit[torch]'" in done.stderr
