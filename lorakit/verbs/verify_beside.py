"""Of the result of a merge: whether what lies beside the weights is what a loader should go by."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from lorakit.errors import InputError
from lorakit.folder.facts import fact
from lorakit.store.checkpoint import weight_map
from lorakit.store.hashing import sha256_of
from lorakit.store.json_file import read_json
from lorakit.verbs.job import Job

# Files that transformers and diffusers load wherever they lie.
LOADED = ("*.safetensors", "pytorch_model*.bin", "*.index.json", "adapter_config.json")


def check_beside(output: Path, job: Job, written: Mapping[str, str]) -> list[str]:
    """What differs: the index, the facts of the config, files from elsewhere that would be loaded
    too, and small files that are not as they were `written` (their sha256 by name).
    """
    found = [*_foreign(output, job), *_index(output, job), *_facts(output, job)]
    for name, sha256 in written.items():
        if any(name in line for line in found):
            continue
        if not (output / name).is_file():
            found.append(f"{name} is missing.")
        elif sha256_of(output / name) != sha256:
            found.append(f"{name} is not as it was written.")
    return found


def _foreign(output: Path, job: Job) -> Iterator[str]:
    ours = {*(f.name for f in job.plan.files), *job.beside.copies, job.beside.index}
    for path in sorted(p for pattern in LOADED for p in output.glob(pattern)):
        if path.name not in ours:
            yield f"{path.name} is no file of this result."


def _index(output: Path, job: Job) -> Iterator[str]:
    if index := job.beside.index:
        try:
            placed = weight_map(output / index)
        except InputError as error:
            yield str(error)
        else:
            if placed != {t: f.name for f in job.plan.files for t in f.tensors}:
                yield f"{index} does not place the tensors where they are."


def _facts(output: Path, job: Job) -> Iterator[str]:
    path = output / "config.json"
    if job.beside.facts and path.exists():
        config = read_json(path)
        for name, value in job.beside.facts.items():
            if fact(config, name) != value:
                yield f"config.json has {name} {fact(config, name)!r}, the tensors have {value!r}."
