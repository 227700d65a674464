"""What can be in the way of an adapter that is loaded somewhere, each with what to type.

A new obstacle: a function here, a row in `OBSTACLES`, and its name with a consumer in
`lorakit.formats.consumers`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lorakit.adapter.config import NAME, AdapterConfig
from lorakit.adapter.delta import Opened
from lorakit.adapter.files.parts import PEFT_NORMS, by_inputs
from lorakit.adapter.files.reading import METADATA
from lorakit.adapter.weight_file import PEFT, PEFT_FILES, weight_file
from lorakit.errors import MisfitError
from lorakit.formats.components import component_of, kind_of, prefix_of
from lorakit.formats.consumers import PREFIXED, VLLM_RANKS
from lorakit.formats.families import COMFYUI, FAMILIES
from lorakit.formats.peft import parse
from lorakit.formats.recognise import LANGUAGE
from lorakit.formats.roles import parse_key
from lorakit.formats.spelling import place_of
from lorakit.formats.templates import denoiser
from lorakit.verbs.reformat import told_in_config
from lorakit.verbs.reformat.agreeing import disagreements, layers_of, wrong_ranks
from lorakit.verbs.reformat.formats import FOLDERS
from lorakit.verbs.reformat.job import Reformatting
from lorakit.verbs.reformat.options import ReformatOptions
from lorakit.verbs.reformat.respelling import shapes_of, unlike, unloaded


@dataclass(frozen=True)
class Obstacle:
    """What keeps an adapter from loading, or from loading completely, and what to type."""

    what: str
    then: str


Found = Iterator[Obstacle]


def _dora(opened: Opened, config: AdapterConfig, path: str) -> Found:
    if any("magnitude" in d.tensors for d in opened.deltas):
        then = f"lorakit extract BASE --adapter {path} -o OUT --rank R, or merge it"
        yield Obstacle("it is a DoRA", then)


def _patterns(opened: Opened, config: AdapterConfig, path: str) -> Found:
    ranks = {d.rank for d in layers_of(opened.deltas, config).values()}
    if config.raw.get("rank_pattern") or config.raw.get("alpha_pattern") or len(ranks) > 1:
        what = "modules have ranks or alphas of their own, and it takes one of each"
        yield Obstacle(what, f"lorakit edit {path} -o OUT --flatten")


def _bias(opened: Opened, config: AdapterConfig, path: str) -> Found:
    trained = config.raw.get("bias", "none") not in (None, "none")
    if trained or any("bias" in d.tensors for d in opened.deltas):
        yield Obstacle("it has biases", f"lorakit merge BASE {path} -o OUT")


def _saved(opened: Opened, config: AdapterConfig, path: str) -> Found:
    if names := config.raw.get("modules_to_save"):
        what = f"it replaces whole modules ({', '.join(map(str, names))})"
        yield Obstacle(what, f"lorakit merge BASE {path} -o OUT")


def _whole(opened: Opened, config: AdapterConfig, path: str) -> Found:
    known = set(config.raw.get("modules_to_save") or ())
    left = [n for n in opened.extras if not any(m in n for m in known)]
    if left and opened.format != "mlx":  # whose experts it loads
        what = f"it has tensors that are no factors, such as {left[0]!r}"
        yield Obstacle(what, f"lorakit merge BASE {path} -o OUT")


def _embeddings(opened: Opened, config: AdapterConfig, path: str) -> Found:
    if found := next((d.module for d in opened.deltas if d.embedding), None):
        yield Obstacle(f"it adapts the embedding {found!r}", f"lorakit merge BASE {path} -o OUT")


def _rows(opened: Opened, config: AdapterConfig, path: str) -> Found:
    """Of token rows, which the config says the tokens of."""
    adapted = {d.module for d in opened.deltas}
    for name, values in opened.extras.items():
        key = parse(name)
        if key.role != "rows":
            continue
        indices = config.token_rows(key.module)
        if key.module in adapted:
            what = f"it has token rows beside the update of {key.module!r}"
            yield Obstacle(what, f"lorakit merge BASE {path} -o OUT")
        elif indices is None or len(indices) != values.shape[0]:
            what = f"it has {values.shape[0]} token rows, its config {len(indices or ())} indices"
            yield Obstacle(what, "Add the trainable_token_indices of the training to the config.")


def _as_peft(opened: Opened, path: str) -> str:
    keep = " --keep-unknown" if opened.extras else ""
    return f"lorakit convert {path} -o OUT --to peft{keep}"


def _unlike_config(
    said: Callable[..., Iterator[str]], opened: Opened, config: AdapterConfig, path: str
) -> Found:
    if opened.format == "peft" and config.raw:
        for what in said(opened.deltas, config):
            yield Obstacle(what, _as_peft(opened, path))


def _tuner(opened: Opened, config: AdapterConfig, path: str) -> Found:
    if opened.tuner:
        yield Obstacle(f"it is of PEFT's type {opened.tuner}", _as_peft(opened, path))


def _training(opened: Opened, config: AdapterConfig, path: str) -> Found:
    yield from (Obstacle(f"it {what}", then) for what, then in told_in_config(config, path))


def _rank(opened: Opened, config: AdapterConfig, path: str) -> Found:
    rank = max((d.rank for d in opened.deltas if d.algo == "lora"), default=0)
    if rank > VLLM_RANKS[-1]:
        what = f"its rank is {rank}, and {VLLM_RANKS[-1]} is the most"
        yield Obstacle(what, f"lorakit resize {path} -o OUT --rank {VLLM_RANKS[-1]}")


def _algorithm(opened: Opened, config: AdapterConfig, path: str) -> Found:
    other = sorted({d.algo for d in opened.deltas} - {"lora"})
    if exact := [a for a in other if a in ("loha", "lokr")]:
        yield Obstacle(
            f"modules are of {' and '.join(exact)}",
            f"lorakit convert {path} -o OUT --to diffusers",
        )
    if rest := [a for a in other if a not in ("loha", "lokr")]:
        yield Obstacle(
            f"modules are of {' and '.join(rest)}",
            f"lorakit convert {path} -o OUT --to diffusers --drop REGEX",
        )


def _norms(opened: Opened, config: AdapterConfig, path: str) -> Found:
    if any(map(by_inputs, opened.deltas)):
        then = f"lorakit merge PIPELINE {path} -o OUT, or use it in ComfyUI"
        yield Obstacle("its DoRA norms are those of inputs", then)


def _norms_of_peft(opened: Opened, config: AdapterConfig, path: str) -> Found:
    norms = [d.tensors["magnitude"] for d in opened.deltas if "magnitude" in d.tensors]
    if strange := [v for v in norms if PEFT_NORMS in v.key or len(v.shape) < 2]:
        what = f"its DoRA norms are not as kohya has them, such as {strange[0].key or 'those cut'}"
        yield Obstacle(what, f"lorakit convert {path} -o OUT --to comfyui")


def _spelling(
    to: str, opened: Opened, config: AdapterConfig, path: str, *, dumps: bool = False
) -> Found:
    """Of what is in the format at all, and plain: the other obstacles are said by others. `dumps`:
    the name that PEFT gives an adapter may stand in them.
    """
    plain = all(d.algo in ("lora", "set") and not by_inputs(d) for d in opened.deltas)
    known = opened.format == to and (opened.family == LANGUAGE or to != "peft")
    if not known or not plain or any("mid" in d.tensors for d in opened.deltas):
        return
    try:
        made = Reformatting(Path(path), opened, ReformatOptions(to=to)).made()
    except MisfitError as error:
        yield Obstacle(error.message.rstrip("."), error.hint)
        return
    given = shapes_of(opened.deltas)
    if dumps:
        given = {n.replace(".default.", "."): shape for n, shape in given.items()}
    if name := unlike(given, made, to):
        what = f"{name!r} is not what it reads" if name in given else f"it lacks {name!r}"
        then = f"lorakit convert {path} -o OUT --to {to}"
        yield Obstacle(what, _as_peft(opened, path) if to == "peft" else then)


def _names_of_comfyui(opened: Opened, config: AdapterConfig, path: str) -> Found:
    names = _known_to_comfyui(opened)
    for name in shapes_of(opened.deltas) if opened.family in FAMILIES else ():
        if (key := parse_key(name)) and not _is_known(key.module, opened.family, names):
            what = f"{name!r} is not what it reads"
            yield Obstacle(what, f"lorakit convert {path} -o OUT --to comfyui")
            return


def _is_known(module: str, family: str, names: set[str]) -> bool:
    """Whether ComfyUI reads a module by the name that it has in a file; `names` are those of the
    denoiser, none where its own code's will do.
    """
    prefix, _ = prefix_of(module)
    component = component_of(prefix.slot, family)
    if component != FAMILIES[family].component:
        flat = kind_of(component, family) == "clip" and "text_model" not in module
        return not flat or module.endswith("text_projection")
    if prefix.format in PREFIXED:
        return family in PREFIXED[prefix.format]
    return not names or prefix.format not in ("comfyui", "kohya") or module in names


def _known_to_comfyui(opened: Opened) -> set[str]:
    """The names of modules that ComfyUI has under others than their own code. It knows those of
    blocks as HunyuanVideo has them too, but not flattened.
    """
    known = FAMILIES.get(opened.family)
    if known is None or not known.renamed:
        return set()
    places = [place_of("comfyui", opened.family, d.component, d.module) for d in opened.deltas]
    names = {p.name for p in places if p}
    names |= {f"lora_unet_{n.removeprefix(COMFYUI).replace('.', '_')}" for n in names}
    own = denoiser(opened.family, "comfy")
    there = [own.fill(p.found, "original") for p in places if p and p.found]
    return names | {COMFYUI + n for n in there if known.comfy and "blocks." in n}


def _encoders(opened: Opened, config: AdapterConfig, path: str) -> Found:
    if left := unloaded(opened, opened.deltas):
        what = f"it loads no adapters of {' and '.join(left)}"
        yield Obstacle(what, f"lorakit merge PIPELINE {path} -o OUT")


def _metadata(opened: Opened, config: AdapterConfig, path: str) -> Found:
    if METADATA in opened.metadata:
        what = "its scalings are in the metadata, which it does not read"
        yield Obstacle(what, f"lorakit convert {path} -o OUT --to comfyui")


def _config_beside(to: str, opened: Opened, config: AdapterConfig, path: str) -> Found:
    """For what reads files of the format `to`, and no config."""
    if not config.raw or opened.format in FOLDERS:
        return
    if any(isinstance(d.alpha, int | float) and d.scaling != 1 for d in opened.deltas):
        what = f"its scalings are in {NAME} beside it, which is not read"
        yield Obstacle(what, f"lorakit convert {path} -o OUT --to {to}")


def _config(opened: Opened, config: AdapterConfig, path: str) -> Found:
    if opened.format == "peft" and not config.raw:
        yield Obstacle(f"no {NAME} is beside it", "Add the one that the training wrote.")


def _name(opened: Opened, config: AdapterConfig, path: str) -> Found:
    name = weight_file(Path(path)).name
    if opened.format == "peft" and name not in PEFT_FILES:
        yield Obstacle(f"its weight file is called {name!r}", f"Call it {PEFT}.")


OBSTACLES: dict[str, Callable[[Opened, AdapterConfig, str], Found]] = {
    "dora": _dora,
    "patterns": _patterns,
    "bias": _bias,
    "modules_to_save": _saved,
    "embeddings": _embeddings,
    "tuner": _tuner,
    "training": _training,
    "rank": _rank,
    "algorithm": _algorithm,
    "norms of inputs": _norms,
    "norms of PEFT": _norms_of_peft,
    "spelling": partial(_spelling, "diffusers"),
    "spelling of PEFT": partial(_spelling, "peft"),
    "spelling of PEFT, or of its dumps": partial(_spelling, "peft", dumps=True),
    "config and tensors": partial(_unlike_config, disagreements),
    "rank in the config": partial(_unlike_config, wrong_ranks),
    "token rows": _rows,
    "whole tensors": _whole,
    "names of ComfyUI": _names_of_comfyui,
    "text encoders": _encoders,
    "config": _config,
    "scaling in metadata": _metadata,
    "scaling in a config, for diffusers": partial(_config_beside, "diffusers"),
    "scaling in a config, for comfyui": partial(_config_beside, "comfyui"),
    "name of the file": _name,
}
