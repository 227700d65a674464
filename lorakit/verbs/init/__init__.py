"""init: a fresh adapter for a base, from its headers, or from its weights where the method looks at
them.

Law: with `kaiming`, `gaussian`, `orthogonal` (in float32), `mica` and `eva` the adapter changes
nothing yet; with methods that change the base, the residual base and the adapter together are the
base, up to the rounding of the residual.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import UsageError
from lorakit.math.initial import METHODS
from lorakit.store.checkpoint import Checkpoint, open_checkpoint
from lorakit.tensors import CODES
from lorakit.verbs.base.planning import identity
from lorakit.verbs.base.weights import Weight, called_otherwise
from lorakit.verbs.choices import check_choices, plain
from lorakit.verbs.init.checks import check_kinds, check_ranks
from lorakit.verbs.init.config import fresh_config
from lorakit.verbs.init.pairing import ADAPTER, BASE, run_pair
from lorakit.verbs.init.statistics import Statistics, statistics_of
from lorakit.verbs.init.targeting import Targets, targeted
from lorakit.verbs.init.weight import Row, Wanted, memory_of, row_of, task_of
from lorakit.verbs.job import RunOptions
from lorakit.verbs.making import Draft, Making, Report

if TYPE_CHECKING:
    from lorakit.verbs.loftq import Report as Quantised

CHOICES = {"method": (*METHODS, "loftq"), "dtype": tuple(CODES)}
PARTS = (ADAPTER, BASE)


@dataclass(frozen=True)
class Initialisation:
    """What `plan_init` returns: an adapter to be made and, with `pair`, a base that loses what the
    adapter gets, to be written beside it.
    """

    making: Making[Row]
    rows: Sequence[Row]
    base: Checkpoint
    pair: bool = False
    allow_pickle: bool = False

    @property
    def draft(self) -> Draft[Row]:
        """The draft of the adapter."""
        return self.making.draft

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know."""
        return self.making.notes

    def preview(self, options: RunOptions | None = None) -> Report[Row]:
        """What a run would do; nothing is computed or written."""
        return Report(self.rows, 0, 0, 0, self.notes)

    def run(self, output: str | Path, options: RunOptions | None = None) -> Report[Row]:
        """Write the adapter to the folder `output`; or it and the residual base to two folders in
        there, `adapter` and `base`, which appear together.

        Raises:
            OutputError, ResourceError: as `Draft.run`.
            InputError: a weight, or its statistics, hold NaN or Inf.
        """
        options = options or RunOptions()
        if not self.pair:
            return self.making.run(output, options)
        return run_pair(self.making, self.base, output, options, allow_pickle=self.allow_pickle)


def init(
    base: str | Path, output: str | Path, *, run: RunOptions | None = None, **options: Any
) -> "Report[Row] | Quantised":
    """Write a fresh adapter for `base` to the folder `output`, as PEFT has it; what was done.

    `options` are those of `plan_init`. With a method that changes the base, `output/adapter` and
    `output/base` are written, unless `adapter_only`. method="loftq" is `lorakit.loftq`, with the
    report of that.

    Raises:
        UsageError, MisfitError, InputError: as `plan_init`.
        OutputError, ResourceError: see `lorakit.errors`.
    """
    if options.get("method") == "loftq":
        from lorakit.verbs.loftq import loftq, options_of_init

        return loftq(base, output, run=run, **options_of_init(options))
    return plan_init(base, **options).run(output, run)


def plan_init(
    base: str | Path,
    *,
    target_modules: str = "all-linear",
    exclude_modules: str = "",
    layers: str = "",
    experts: bool = False,
    stats: str | Path = "",
    adapter_only: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> Initialisation:
    """The initialisation that `init` runs, from headers alone.

    target_modules: "all-linear" (every linear layer but the output head), names or ends of names
    with commas between them, or a pattern. layers: numbers of layers, such as "0-7,12". experts:
    those of mixtures as well, one by one or in stacks. stats: a file with second moments of each
    module's inputs, for the methods that need them. adapter_only: no residual base. `options` are
    the fields of `lorakit.verbs.init.weight.Wanted`.

    Raises:
        UsageError: an option makes no sense.
        MisfitError: nothing is targeted, a target or its rank does not suit the method, or
            statistics are missing.
        InputError: a target is quantised.
    """
    wanted = Wanted(**plain(options))
    _check(wanted, adapter_only)
    pair = METHODS[wanted.method].changes_base and not adapter_only
    checkpoint = open_checkpoint(str(base), allow_pickle=allow_pickle)
    weights = targeted(checkpoint, Targets(target_modules, exclude_modules, layers, experts))
    check_ranks(checkpoint, weights, wanted)
    check_kinds(checkpoint, weights, wanted, alone=adapter_only)
    statistics = _statistics(weights, wanted, stats)
    draft = Draft(
        [task_of(checkpoint, w, wanted, statistics) for w in weights],
        (),
        lambda saved: fresh_config(
            checkpoint, saved, wanted, weights, init=True if pair else METHODS[wanted.method].config
        ),
        [*checkpoint.places, *([statistics.path] if statistics else [])],
        _identity(checkpoint, weights, wanted, statistics) | {"pair": pair},
        memory=max(memory_of(w, wanted) for w in weights),
    )
    making = Making(draft, [*_notes(wanted, adapter_only), *called_otherwise(checkpoint, weights)])
    return Initialisation(
        making, [row_of(w, wanted) for w in weights], checkpoint, pair, allow_pickle
    )


def _identity(
    base: Checkpoint, weights: Sequence[Weight], wanted: Wanted, statistics: Statistics | None
) -> dict[str, Any]:
    """What an unfinished run is known by."""
    files = [*base.files, *([statistics.path] if statistics else [])]
    return {
        "init": asdict(wanted),
        "weights": [w.form.key for w in weights],
        "base": [identity(p) for p in base.parts],
        "stamps": [f.stat().st_mtime_ns for f in files],
    }


def _notes(wanted: Wanted, adapter_only: bool) -> list[str]:
    if wanted.method == "orthogonal" and wanted.dtype != "float32":
        return [
            f"factors rounded to {wanted.dtype} are not quite at right angles: the adapter changes "
            "the base a little from the start."
        ]
    if METHODS[wanted.method].changes_base and adapter_only and wanted.dtype != "float32":
        return [
            f"the factors are rounded to {wanted.dtype}, what readers take out of the base for "
            "them is not: the adapter begins a little off the base."
        ]
    return []


def _check(wanted: Wanted, adapter_only: bool) -> None:
    """Refuse what makes no sense, and an adapter alone where nobody could tell what its base lost.

    Raises:
        UsageError: naming the option.
    """
    if wanted.method == "loftq":
        raise UsageError(
            "loftq has a plan of its own.",
            hint="Take lorakit.plan_loftq, or lorakit.init, which does either.",
        )
    check_choices({"method": wanted.method, "dtype": wanted.dtype}, CHOICES)
    wanted.check()
    method = METHODS[wanted.method]
    if adapter_only and method.changes_base and not method.recomputed:
        instead = ", or take pissa." if "pissa" in wanted.method else "."
        raise UsageError(
            f"what {wanted.method} takes out of the base cannot be computed again by a reader.",
            hint=f"Leave --adapter-only out{instead}",
        )


def _statistics(weights: Sequence[Weight], wanted: Wanted, stats: str | Path) -> Statistics | None:
    needed = "moments" in METHODS[wanted.method].needs
    if not needed and not str(stats):
        return None
    if not needed:
        raise UsageError(f"{wanted.method} does not look at statistics.")
    if not str(stats):
        raise UsageError(f"{wanted.method} needs statistics of the inputs: pass --stats FILE.")
    return statistics_of(weights, stats)
