"""The plan of a result, made again from its manifest, so that the result can be held against it.

A manifest may come from anybody: what in it is not of the expected form is refused by name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lorakit.errors import InputError, UsageError
from lorakit.folder.manifest import manifest_path, read_manifest
from lorakit.verbs.job import Job
from lorakit.verbs.merge.planned import plan_for

# Options of a plan that a manifest may have, with the types of their values.
OPTIONS: dict[str, tuple[type, ...]] = {
    "dtype": (str,),
    "max_shard_size": (int, type(None)),
    "link": (bool,),
    "alone": (str,),
    "quant": (str,),
    "key_map": (list,),
    "allow_unmatched": (str,),
    "untie": (bool,),
    "base_is_residual": (bool,),
    "mha_factor": (int, type(None)),
    "expert_packing": (str,),
    "expert_orientation": (str,),
    "init_given": (bool,),
    "component": (str,),
}


def replanned(
    output: Path, *, base: str = "", adapters: Sequence[str] = (), allow_pickle: bool = False
) -> tuple[Job, dict[str, Any]]:
    """The job that made `output`, planned anew, and the manifest.

    `base` and `adapters` say where the inputs are now, if not where the manifest has them.

    Raises:
        InputError: there is no manifest, or an input is gone or not the one that it names.
        UsageError: some of several adapters are named.
    """
    if not output.exists():
        raise InputError("no such file or folder.", file=output)
    manifest = read_manifest(output)
    _check_form(manifest, manifest_path(output))
    said = manifest["inputs"]
    if adapters and len(adapters) != len(said) - 1:
        raise UsageError(
            f"{len(adapters)} adapters are named, {output.name} was made from {len(said) - 1}.",
            hint="Name every one with --adapter, in their order.",
        )
    now = [base, *(adapters or [""] * (len(said) - 1))]
    places = [named or place_of(s) for named, s in zip(now, said, strict=True)]
    sign = -1.0 if manifest["verb"] == "unmerge" else 1.0
    options = {n: v for n, v in manifest["options"].items() if n != "alone"}
    options |= {"weights": [sign * s["weight"] for s in said[1:]], "allow_pickle": allow_pickle}
    job = plan_for(manifest["verb"], places[0], tuple(places[1:]), str(output), **options)
    for place, new, old in zip(places, job.plan.inputs, said, strict=True):
        check_same(place, new, old, output)
    return job, manifest


def made_by(output: Path) -> str:
    """The verb that made a result, by its manifest; "" where there is none."""
    if not manifest_path(output).exists():
        return ""
    return str(read_manifest(output).get("verb"))


def _check_form(manifest: Mapping[str, Any], file: Path) -> None:
    verb, inputs, options = (manifest.get(k) for k in ("verb", "inputs", "options"))
    sound = (
        verb in ("merge", "unmerge")
        and isinstance(inputs, list)
        and len(inputs) > 1
        and all(isinstance(i, dict) and isinstance(i.get("path"), str) for i in inputs)
        and all(isinstance(i.get("weight"), int | float) for i in inputs[1:])
        and isinstance(manifest["files"], dict)
        and all(isinstance(f, dict) for f in manifest["files"].values())
        and isinstance(manifest.get("beside", {}), dict)
        and all(_is_inside(n) and isinstance(h, str) for n, h in manifest.get("beside", {}).items())
        and isinstance(options, dict)
        and all(isinstance(v, OPTIONS.get(n, ())) for n, v in options.items())
        and all(isinstance(pair, str) for pair in options.get("key_map", ()))
    )
    if not sound:
        raise InputError(
            "is not a manifest that this version reads.", hint="Upgrade lorakit.", file=file
        )


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def place_of(said: Mapping[str, Any]) -> str:
    """Where an input is: its old path, else its commit on the hub."""
    path, repo, revision = said["path"], said.get("repo"), said.get("revision")
    if Path(path).exists():
        return str(path)
    if not repo:
        option = "--base" if "base" in said else "--adapter"
        raise InputError(
            "the result was made from this, and it is gone.",
            hint=f"Say where it is now with {option}.",
            file=path,
        )
    inside = path.replace("\\", "/").partition(f"/snapshots/{revision}")[2]
    return f"{repo}@{revision}{inside}"


def check_same(place: str, now: Mapping[str, Any], then: Mapping[str, Any], output: Path) -> None:
    """Refuse an input that is not the one that the result was made from.

    Raises:
        InputError: naming what is another.
    """
    for key, value in now.items():
        if value != then.get(key):
            option = "--base" if key == "base" else "--adapter"
            raise InputError(
                f"is not the one that {output.name} was made from: another {key}.",
                hint=f"Say where that {key} is with {option}.",
                file=place,
            )
