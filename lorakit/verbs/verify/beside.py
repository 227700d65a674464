"""Of the result of a merge: whether what lies beside the weights is what a loader should go by."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from lorakit.adapter.config import NAME
from lorakit.errors import InputError
from lorakit.folder.facts import fact
from lorakit.store.checkpoint import weight_map
from lorakit.store.hashing import sha256_of
from lorakit.store.json_file import read_json
from lorakit.verbs.job import Job

CONFIG = "config.json"
Difference = tuple[str, str]  # the name of a file, and what is the matter with it
# Files that transformers and diffusers load wherever they lie.
LOADED = ("*.safetensors", "pytorch_model*.bin", "*.index.json", NAME)


def check_beside(output: Path, job: Job, written: Mapping[str, str]) -> list[str]:
    """What differs: the index, the facts of the config, files from elsewhere that would be loaded
    too, and small files that are not as they were `written` (their sha256 by name).
    """
    found = [*_foreign(output, job), *_index(output, job), *_facts(output, job)]
    told = {name for name, _ in found}
    for name, sha256 in written.items():
        if name in told:
            continue
        if not (output / name).is_file():
            found.append((name, f"{name} is missing."))
        elif sha256_of(output / name) != sha256:
            found.append((name, f"{name} is not as it was written."))
    return [line for _, line in found]


def _foreign(output: Path, job: Job) -> Iterator[Difference]:
    ours = {*(f.name for f in job.plan.files), *job.beside.copies, job.beside.index}
    for path in sorted(p for pattern in LOADED for p in output.glob(pattern)):
        if path.name not in ours:
            yield path.name, f"{path.name} is no file of this result."


def _index(output: Path, job: Job) -> Iterator[Difference]:
    if index := job.beside.index:
        try:
            placed = weight_map(output / index)
        except InputError as error:
            yield index, str(error)
        else:
            if placed != {t: f.name for f in job.plan.files for t in f.tensors}:
                yield index, f"{index} does not place the tensors where they are."


def _facts(output: Path, job: Job) -> Iterator[Difference]:
    if not job.beside.facts:
        return
    if not (path := output / CONFIG).exists():
        yield CONFIG, f"{CONFIG} is missing."
        return
    config = read_json(path)
    for name, value in job.beside.facts.items():
        if fact(config, name) != value:
            has = fact(config, name)
            yield CONFIG, f"{CONFIG} has {name} {has!r}, the tensors have {value!r}."
