"""loftq: a quantised base and an adapter that together stay close to the base, from its files.

Law: every weight that is quantised has an update, `scaling * b @ a`, that is the best for what its
own codes leave; every other tensor of the base has the bytes that it had.

Source: Li et al. 2023 (LoftQ, arXiv 2310.08659); see `lorakit.math.loftq`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lorakit.adapter.config import NAME as CONFIG
from lorakit.adapter.new_config import Saved, format_config
from lorakit.engine.machine import available_cores
from lorakit.engine.plan import Plan
from lorakit.engine.preflight import check_room
from lorakit.engine.sending import sender
from lorakit.engine.working import jobs_within
from lorakit.errors import MisfitError, UsageError
from lorakit.folder.manifest import NAME as MANIFEST
from lorakit.folder.manifest import format_manifest
from lorakit.math.loftq import STARTS
from lorakit.store.checkpoint import Checkpoint, open_checkpoint
from lorakit.store.writing import make_folder, write_file
from lorakit.tensors import CODES
from lorakit.verbs.base.planning import identity
from lorakit.verbs.base.skipping import left_alone
from lorakit.verbs.base.sources import sources_of
from lorakit.verbs.base.weights import Weight, called_otherwise
from lorakit.verbs.beside import left_out
from lorakit.verbs.choices import check_choices, plain
from lorakit.verbs.init.checks import check_ranks
from lorakit.verbs.init.config import fresh_config
from lorakit.verbs.init.statistics import statistics_of
from lorakit.verbs.init.targeting import Targets, targeted
from lorakit.verbs.init.weight import Wanted
from lorakit.verbs.job import RunOptions, check_folder
from lorakit.verbs.loftq.beside import quantised_files
from lorakit.verbs.loftq.filling import Filling
from lorakit.verbs.loftq.weight import ABSMAX, SAVES, Quant, Row, Splitter, files_of

CHOICES = {"save": SAVES, "start": STARTS, "absmax": ABSMAX, "dtype": tuple(CODES)}


@dataclass(frozen=True)
class Report:
    """What LoftQ did: a row for every weight, and the bytes of all weight files."""

    rows: Sequence[Row]
    written: int
    notes: Sequence[str] = ()

    @property
    def ratio(self) -> float:
        """What is left of all weights, as a share of what plain quantisation leaves."""
        plain = sum(r.plain**2 for r in self.rows)
        return (sum(r.norm**2 for r in self.rows) / plain) ** 0.5 if plain else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        rows = [{**asdict(r), "ratio": r.ratio} for r in self.rows]
        return {**asdict(self), "rows": rows, "ratio": self.ratio}


@dataclass(frozen=True)
class Quantisation:
    """What `plan_loftq` returns: the plan, and what computes the tensors that it names."""

    plan: Plan
    splitter: Splitter
    notes: Sequence[str] = ()

    @property
    def weights(self) -> Sequence[Weight]:
        """The weights that are quantised."""
        return tuple(self.splitter.weights.values())

    def check(self, output: str | Path) -> Path:
        """The place of the output, which is a folder and has nothing to do with an input.

        Raises:
            UsageError, OutputError: saying why it is none.
        """
        return check_folder(output, [*self.splitter.base.places, *self.splitter.stats])

    def run(self, output: str | Path, options: RunOptions | None = None) -> Report:
        """Write the base and the adapter to two folders in `output`, or the adapter alone to it.

        Raises:
            OutputError: the output exists, lies inside an input, or is being written by another.
            ResourceError: the disk is full, or there is too little memory.
            InputError: a weight, or its statistics, hold NaN or Inf.
            UsageError: there is no such device.
        """
        options, output = options or RunOptions(), self.check(output)
        memory = max(self.splitter.memory(w) for w in self.weights)
        jobs = jobs_within(memory, options.jobs or available_cores(), options.max_memory)
        files = [*self.splitter.base.files, *self.splitter.stats]
        stamps = [p.stat().st_mtime_ns for p in files]
        identity = {"plan": self.plan.hash, "inputs": stamps}
        with sender(options.device) as send:
            rows = self._write(output, identity, jobs, replace(self.splitter, send=send), options)
        return Report(rows, self.plan.nbytes, self.notes)

    def _write(
        self,
        output: Path,
        identity: Mapping[str, Any],
        jobs: int,
        splitter: Splitter,
        options: RunOptions,
    ) -> list[Row]:
        """Fill the files; the rows of all weights."""
        with options.building(output, identity, keep=True) as workspace:
            check_room(self.plan, workspace)
            sources = dict(sources_of(splitter.base, ()))
            filling = Filling(self.plan, sources, splitter.make, workspace, options)
            rows = [_row(r) for r in filling.run(jobs).values()]
            for name, data in self._beside(output, rows):
                path = workspace.folder / name
                make_folder(path.parent, sync=options.sync)
                write_file(path, data, sync=options.sync)
        return rows

    def _beside(self, output: Path, rows: Sequence[Row]) -> Iterator[tuple[str, bytes]]:
        """Every small file by its place in the output, the configs last."""
        splitter, paired = self.splitter, self.splitter.quant.save != "adapter-only"
        yield MANIFEST, format_manifest(self._manifest(rows))
        if paired:
            yield from quantised_files(splitter, self.plan)
        name = str(output.absolute() / "base") if paired else ""
        config = _config(splitter, name)
        yield f"{'adapter/' if paired else ''}{CONFIG}", format_config(config)

    def _manifest(self, rows: Sequence[Row]) -> dict[str, Any]:
        located = self.splitter.base.located
        return {
            "version": 1,
            "lorakit": self.plan.to_dict()["version"],
            "verb": "loftq",
            "plan": self.plan.hash,
            "inputs": [{**i, **located.to_dict()} for i in self.plan.inputs],
            "options": dict(self.plan.options),
            "notes": list(self.notes),
            "files": {f.name: {"size": f.size} for f in self.plan.files},
            "tensors": {r.name: {"plain": r.plain, "norm": r.norm, "kept": r.kept} for r in rows},
        }


def loftq(
    base: str | Path, output: str | Path, *, run: RunOptions | None = None, **options: Any
) -> Report:
    """Quantise `base` and give every quantised weight an update; what was done.

    `output/base` and `output/adapter` are written; with `save="adapter-only"` the adapter alone,
    to `output`. `options` are those of `plan_loftq`.

    Raises:
        UsageError, MisfitError, InputError: as `plan_loftq`.
        OutputError, ResourceError: see `lorakit.errors`.
    """
    return plan_loftq(base, **options).run(output, run)


def options_of_init(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `plan_loftq` that mean what these mean to `lorakit.init`.

    Raises:
        UsageError: loftq has no such option.
    """
    for name in ("dora", "experts"):
        if options.get(name):
            raise UsageError(f"--{name} does not go with loftq.")
    gone = ("method", "dora", "experts", "exclude_modules", "adapter_only")
    alone = {"save": "adapter-only"} if options.get("adapter_only") else {}
    skip = {"skip": options.get("exclude_modules", "")}
    return {k: v for k, v in options.items() if k not in gone} | alone | skip


def plan_loftq(
    base: str | Path,
    *,
    target_modules: str = "all-linear",
    skip: str = "",
    layers: str = "",
    stats: str | Path = "",
    allow_pickle: bool = False,
    **options: Any,
) -> Quantisation:
    """The quantisation that `loftq` runs, from headers alone.

    target_modules, layers: as `lorakit.init`; what is not among them, or in `skip`, stays as it is.
    stats: second moments of inputs, or their roots; then remainders are weighted with them.
    `options` are `rank`, `alpha`, `rslora`, `rank_pattern`, `alpha_pattern`, `seed` and `dtype` as
    `lorakit.init` has them, and the fields of `lorakit.verbs.loftq.weight.Quant`.

    Raises:
        UsageError: an option makes no sense.
        MisfitError: nothing is targeted, a target is no linear layer, a rank is larger than a
            weight, or statistics are of another model.
        InputError: a target is quantised already.
    """
    known, options = {f.name for f in fields(Quant)}, plain(options)
    wanted = Wanted(**{n: v for n, v in options.items() if n not in known})
    check_choices({"dtype": wanted.dtype, **options}, CHOICES)
    wanted.check()
    quant = Quant(**{n: v for n, v in options.items() if n in known})
    checkpoint = open_checkpoint(str(base), allow_pickle=allow_pickle)
    asked = Targets(target_modules, skip, layers)
    weights = targeted(checkpoint, asked)
    _check_linear(checkpoint, weights)
    weights, notes = _loaded(checkpoint, weights) if quant.save != "dequantized" else (weights, [])
    check_ranks(checkpoint, weights, wanted)
    statistics = statistics_of(weights, stats) if str(stats) else None
    by_key = {w.form.key: w for w in weights}
    splitter = Splitter(checkpoint, wanted, quant, by_key, statistics)
    targets = {"target_modules": asked.modules, "skip": asked.exclude, "layers": asked.layers}
    plan = Plan(
        "loftq",
        inputs=[{"base": [identity(p) for p in checkpoint.parts]}],
        options={**asdict(wanted), **asdict(quant), **targets, "stats": str(stats)},
        files=list(files_of(splitter)),
    )
    return Quantisation(plan, splitter, [*_notes(splitter), *notes])


def _check_linear(base: Checkpoint, weights: Sequence[Weight]) -> None:
    for weight in weights:
        if weight.form.embedding or len(base.infos[weight.tensor].shape) != 2:
            raise MisfitError(
                f"{weight.tensor!r} is no linear layer, and no others are quantised.",
                hint="Leave it out with --skip, or name others with --target-modules.",
                file=base.located.path,
                tensor=weight.tensor,
            )


def _loaded(base: Checkpoint, weights: Sequence[Weight]) -> tuple[list[Weight], list[str]]:
    """The weights that are quantised where a model is loaded, and what to say of the rest.

    Raises:
        MisfitError: there are none.
    """
    alone = left_alone(base.infos, [w.tensor for w in weights], base.config)
    if not alone:
        return [*weights], []
    first = min(alone)
    if len(alone) == len(weights):
        raise MisfitError(
            f"transformers quantises none of the {len(alone)} weights in this model; the first is "
            f"{first!r}.",
            hint="Name others with --target-modules, or pass --save dequantized.",
            file=base.located.path,
            tensor=first,
        )
    note = f"{len(alone)} weights stay plain, which transformers does not quantise in this model"
    return [w for w in weights if w.tensor not in alone], [f"{note}; the first is {first!r}."]


def _notes(splitter: Splitter) -> list[str]:
    base, quant, notes = splitter.base, splitter.quant, left_out(splitter.base)
    if quant.save == "quantized" and not (base.folder and base.config):
        notes.append("the base has no config.json, so nothing will say how to load the result.")
    if quant.quant == "int8" and quant.save != "dequantized":
        notes.append("int8 layers round their inputs as well when they run, which no update mends.")
    return [*notes, *called_otherwise(base, [*splitter.weights.values()])]


def _config(splitter: Splitter, name: str) -> dict[str, Any]:
    """The config of the adapter; `name` is that of the base written beside it, or ""."""
    wanted, weights = splitter.wanted, splitter.weights.values()
    saved = [
        Saved(w.form.name, wanted.rank_of(*w.form.names), wanted.alpha_of(*w.form.names))
        for w in weights
    ]
    config = fresh_config(splitter.base, saved, wanted, list(weights), init=True)
    return config | ({"base_model_name_or_path": name} if name else {})


def _row(plain: Mapping[str, Any]) -> Row:
    return Row(**{**plain, "shape": tuple(plain["shape"])})
