"""A LoRA file of any format to another, planned from its headers."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.adapter.adapter import PATTERNS
from lorakit.adapter.config import NAME, AdapterConfig
from lorakit.adapter.delta import Opened
from lorakit.adapter.files.gguf import read_gguf
from lorakit.adapter.files.mlx import check_embeddings
from lorakit.adapter.files.named import Naming
from lorakit.adapter.files.reading import check_header, open_file
from lorakit.adapter.files.split_qkv import with_split_alphas
from lorakit.adapter.files.torchtune import Recipe
from lorakit.adapter.weight_file import weight_file
from lorakit.errors import InputError, MisfitError, UsageError, about
from lorakit.formats.components import prefix_of
from lorakit.formats.families import FAMILIES
from lorakit.formats.patterns import search
from lorakit.formats.recognise import LANGUAGE
from lorakit.formats.roles import parse_key
from lorakit.formats.torchtune import is_torchtune
from lorakit.store.checkpoint import open_part
from lorakit.store.hashing import sha256_of
from lorakit.store.hub import check_promise, locate
from lorakit.store.model_config import read_model_config
from lorakit.store.reading import reading
from lorakit.verbs.reformat.formats import FORMATS
from lorakit.verbs.reformat.job import Reformatting
from lorakit.verbs.reformat.options import ReformatOptions

OWN_NAMES = ("mlx", "gguf", "torchtune")  # read by tables of their own
INDEX = ".index.json"
KEEP = "take them along with --keep-unknown."


def plan_reformat(path: str | Path, **options: Any) -> Reformatting:
    """The conversion of a LoRA file of any format to another.

    `options` are the fields of `lorakit.verbs.reformat.options.ReformatOptions`.

    Raises:
        UsageError: an option is none of its choices.
        InputError: the file is corrupt, or no adapter.
        MisfitError: tensors of the file belong to no module that is known, or names fit twice.
    """
    wanted = ReformatOptions(**options)
    wanted.check()
    path = located(path, allow_pickle=wanted.allow_pickle)
    place, config, drop = weight_file(path), config_of(wanted.base), wanted.drop
    check_promise(place, partial(sha256_of, place))
    opened = _opened(path, wanted)
    check_header(opened, place)
    if opened.format in OWN_NAMES and (wanted.key_map or str(wanted.key_map_file)):
        raise UsageError(f"a key map is not for {opened.format}, whose names are always known.")
    _check_known(opened, wanted.to, place)
    if wanted.to != "peft":
        _check_training(AdapterConfig(opened.config, place.parent / NAME), place)
    unknown = [n for n in opened.extras if not (drop and search(drop, n))]
    _check_unknown(unknown, opened, wanted, place)
    if wanted.fix_split_qkv_alpha:
        opened = with_split_alphas(opened, place)
    kept = [d for d in opened.deltas if not (drop and search(drop, d.module))]
    if not kept:
        raise UsageError("nothing of the adapter would be left.", hint="Keep some of its modules.")
    if opened.format == "mlx" and wanted.to != "mlx":
        with about(place):
            check_embeddings(kept)
    dropped = [n for n in opened.extras if n not in unknown]
    dropped += [d.module for d in opened.deltas if drop and search(drop, d.module)]
    if drop and not dropped:
        raise UsageError(
            f"--drop {drop!r} is found in no name of the adapter.",
            hint=f"It has {', '.join(map(repr, [d.module for d in kept][:3]))} and others.",
        )
    carried = unknown if wanted.keep_unknown else []
    return Reformatting(place, opened, wanted, dropped, carried, config)


def _check_unknown(
    names: Sequence[str], opened: Opened, wanted: ReformatOptions, place: Path
) -> None:
    """Refuse tensors that belong to no module, unless they are taken along where that means
    something.

    Raises:
        MisfitError: naming the first.
    """
    nowhere = FORMATS[wanted.to].one_scale and wanted.to != opened.format
    if not names or (wanted.keep_unknown and not nowhere):
        return
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise MisfitError(
        f"{len(names)} tensors belong to no module that is known: "
        f"{', '.join(map(repr, names[:3]))}{more}.",
        hint="Leave them out with --drop REGEX, or "
        + (f"merge: lorakit merge BASE {place} -o OUT." if nowhere else KEEP),
        file=place,
        tensor=names[0],
    )


def _opened(path: str | Path, wanted: ReformatOptions) -> Opened:
    return opened_file(
        path,
        family=wanted.family,
        base=wanted.base,
        allow_pickle=wanted.allow_pickle,
        lora_alpha=wanted.lora_alpha,
        naming=wanted.naming,
    )


def located(adapter: str | Path, *, allow_pickle: bool = False) -> Path:
    """Where an adapter lies: a path, or what is fetched for a hub id.

    Raises:
        InputError: there is no such path.
        HubError: the hub does not give it.
    """
    return locate(str(adapter), PATTERNS, allow_pickle=allow_pickle).path


def opened_file(
    path: str | Path,
    *,
    family: str = "",
    base: str | Path = "",
    allow_pickle: bool = False,
    lora_alpha: float | None = None,
    naming: Naming | None = None,
) -> Opened:
    """An adapter of any format, from its headers; in GGUF, in the names of its base.

    Raises:
        InputError, MisfitError: as `lorakit.adapter.files.reading.open_file`.
    """
    place = weight_file(Path(path))
    if place.suffix == ".gguf":
        return read_gguf(place, config_of(base))
    recipe = Recipe(config_of(base), lora_alpha)
    return open_file(path, family=family, allow_pickle=allow_pickle, recipe=recipe, naming=naming)


def needs_base(path: str | Path, *, allow_pickle: bool = False) -> bool:
    """Whether a file is in a format that its base is needed to read: GGUF or torchtune, or one of
    flattened names.

    Raises:
        InputError: it is not there, or corrupt.
    """
    place = weight_file(located(path, allow_pickle=allow_pickle))
    if place.suffix == ".gguf":
        return True
    if not place.is_file():
        return False
    infos = open_part(place, allow_pickle=allow_pickle).infos
    keys = (key for name in infos if (key := parse_key(name)))
    return is_torchtune(infos) or any(prefix_of(key.module)[0].flat for key in keys)


def config_of(base: str | Path) -> dict[str, Any]:
    """The config.json of a base: a folder, that file, or one beside weights, which may have none.

    Raises:
        InputError: it is not there, or no JSON object.
    """
    if not str(base):
        return {}
    path = locate(str(base), ("config.json",)).path
    with reading(path):
        return _config_of(path)


def _config_of(path: Path) -> dict[str, Any]:
    weights = path.name.endswith((".safetensors", INDEX))
    config = (path.parent if weights else path) / "config.json"
    if not weights and not path.is_dir():
        return read_model_config(path)
    if not config.is_file() and (weights or any(path.glob("*.safetensors"))):
        return {}
    return read_model_config(config)


def _check_training(config: AdapterConfig, place: Path) -> None:
    """Refuse an adapter whose config says what factors alone do not, and only PEFT has a place for.

    Raises:
        InputError: naming it, and the way out.
    """
    for what, then in told_in_config(config, place):
        raise InputError(f"{what}, which only PEFT has a place for.", hint=then, file=config.file)


def told_in_config(config: AdapterConfig, place: str | Path) -> Iterator[tuple[str, str]]:
    """What a config says of the training that bears on the update and not on its factors, and the
    way to an adapter of which nothing else need be said.
    """
    plain = f"lorakit extract BASE --adapter {place} -o OUT --rank R"
    whole = f"lorakit merge BASE {place} -o OUT"
    apart = f"lorakit convert {place} -o OUT --names disk --experts split --base BASE"
    raw = config.raw
    for found, what, then in (
        (config.mutation, f"was trained on a base that {config.mutation} changed", plain),
        (raw.get("use_bdlora"), "has factors in blocks (use_bdlora)", plain),
        (raw.get("layer_replication"), "repeats layers of the base (layer_replication)", whole),
        (raw.get("target_parameters"), "has experts in stacks (target_parameters)", apart),
    ):
        if found:
            yield what, then
    try:
        config.check(base_is_residual=True)
    except InputError as error:
        yield error.message.rstrip("."), error.hint


def _check_known(opened: Opened, to: str, place: Path) -> None:
    if not opened.deltas and opened.format == "mlx":
        raise MisfitError(
            f"{next(iter(opened.extras))!r} is no update of a linear layer.",
            hint="Full fine-tunes of MLX, and experts of some models, are not converted.",
            file=place,
        )
    if not opened.deltas:
        name = next(iter(opened.extras))
        raise MisfitError(
            f"has {len(opened.extras)} tensors in names of no family that is known, such as "
            f"{name!r}.",
            hint=f"Known are {', '.join(FAMILIES)} and language models in their own names.",
            file=place,
            tensor=name,
        )
    if opened.format == "bfl-control" and to == "comfyui":
        raise MisfitError(
            "is a control file, which ComfyUI reads as it is: its names tell it to widen img_in.",
            hint="Use it as it is.",
            file=place,
        )
    if opened.family != LANGUAGE and not FORMATS[to].images:
        raise MisfitError(
            f"is an adapter of {FAMILIES[opened.family].title}, and {to} is for language models.",
            hint="Write peft, diffusers, kohya or comfyui.",
            file=place,
        )
    if opened.family == LANGUAGE and not FORMATS[to].language:
        raise MisfitError(
            f"is an adapter of a language model, which {to} has no names for.",
            hint="Pass --family if it is of another.",
            file=place,
        )
