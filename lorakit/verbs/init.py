"""init: a fresh adapter for a base, from its headers, or from its weights where the method looks at
them.

Law: with `kaiming`, `gaussian`, `orthogonal`, `mica` and `eva` the adapter changes nothing yet;
with methods that change the base, the residual base and the adapter together are the base, up to
the rounding of the residual.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.adapter.saving import WRITTEN, Saved, config_of
from lorakit.errors import MisfitError, UsageError
from lorakit.math.initial import METHODS
from lorakit.store.checkpoint import Checkpoint, open_checkpoint
from lorakit.store.workspace import Workspace
from lorakit.tensors import CODES
from lorakit.verbs.choices import check_choices
from lorakit.verbs.differing import Weight, task_type
from lorakit.verbs.initialising import Row, Wanted, memory_of, task_of
from lorakit.verbs.job import RunOptions, check_place
from lorakit.verbs.making import Draft, Making, Report
from lorakit.verbs.merge import plan_merge
from lorakit.verbs.planning import identity
from lorakit.verbs.statistics import Statistics
from lorakit.verbs.targeting import Targets, targeted

CHOICES = {"method": tuple(METHODS), "dtype": tuple(CODES)}
PARTS = ("adapter", "base")


@dataclass(frozen=True)
class Initialisation:
    """What `plan_init` returns: an adapter to be made and, where the method changes the base, the
    base to take it out of.
    """

    making: Making[Row]
    base: str = ""  # of which a residual is written beside the adapter

    @property
    def draft(self) -> Draft[Row]:
        """The draft of the adapter."""
        return self.making.draft

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know."""
        return self.making.notes

    def preview(self, options: RunOptions | None = None) -> Report[Row]:
        """What a run would do; nothing is written."""
        return self.making.preview(options)

    def run(self, output: str | Path, options: RunOptions | None = None) -> Report[Row]:
        """Write the adapter to the folder `output`; or it and the residual base to two folders in
        there, which appear together.

        Raises:
            OutputError, ResourceError: as `Draft.run`.
            InputError: a weight holds NaN or Inf.
        """
        if not self.base:
            return self.making.run(output, options)
        options, output = options or RunOptions(), Path(output)
        self.draft.check(output)
        check_place(output, [Path(self.base)])
        workspace = Workspace(output, self.draft.identity, overwrite=options.overwrite)
        adapter, base = (workspace.folder / part for part in PARTS)
        again = replace(options, overwrite=True)
        try:
            report = self.making.run(adapter, again)
            job = plan_merge(self.base, adapter, weights=[-1.0])
            job.run(base, replace(again, report=lambda _: None))
            workspace.commit(sync=options.sync)
        except BaseException:
            workspace.discard()
            raise
        return report


def init(
    base: str | Path, output: str | Path, *, run: RunOptions | None = None, **options: Any
) -> Report[Row]:
    """Write a fresh adapter for `base` to the folder `output`, as PEFT has it; what was done.

    `options` are those of `plan_init`. With a method that changes the base, `output/adapter` and
    `output/base` are written, unless `adapter_only`.

    Raises:
        UsageError, MisfitError, InputError: as `plan_init`.
        OutputError, ResourceError: see `lorakit.errors`.
    """
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
    those of mixtures as well, one by one or in stacks. stats: a safetensors file with second
    moments of each module's inputs, for the methods that need them. `options` are the fields of
    `lorakit.verbs.initialising.Wanted`.

    Raises:
        UsageError: an option makes no sense.
        MisfitError: nothing is targeted, a rank is larger than a weight, or statistics are missing.
        InputError: a target is quantised.
    """
    wanted = Wanted(**options)
    check_choices({"method": wanted.method, "dtype": wanted.dtype}, CHOICES)
    wanted.check()
    method = METHODS[wanted.method]
    checkpoint = open_checkpoint(str(base), allow_pickle=allow_pickle)
    weights = targeted(checkpoint, Targets(target_modules, exclude_modules, layers, experts))
    check_ranks(checkpoint, weights, wanted)
    statistics = _statistics(weights, wanted, stats)
    pair = method.changes_base and not adapter_only
    if adapter_only and wanted.method == "corda":
        raise UsageError(
            "corda without its base cannot be read by anyone: leave --adapter-only out."
        )
    draft = Draft(
        [task_of(checkpoint, w, wanted, statistics) for w in weights],
        (),
        lambda saved: fresh_config(
            checkpoint, saved, wanted, weights, init=True if pair else method.config
        ),
        [checkpoint.located.path],
        {"init": asdict(wanted), "base": [identity(p) for p in checkpoint.parts], "pair": pair},
        memory=max(memory_of(w, wanted) for w in weights),
    )
    return Initialisation(Making(draft), str(checkpoint.located.path) if pair else "")


def check_ranks(base: Checkpoint, weights: Sequence[Weight], wanted: Wanted) -> None:
    """Refuse ranks that are larger than the weights.

    Raises:
        MisfitError: naming the first.
    """
    for weight in weights:
        rank, least = wanted.rank_of(weight.form.module), min(weight.form.shape)
        if rank > least:
            raise MisfitError(
                f"rank {rank} is more than {weight.tensor!r} has: it is "
                f"{list(base.infos[weight.tensor].shape)}.",
                hint=f"Take {least} or less, or give it a rank of its own with --rank-pattern.",
                file=base.located.path,
                tensor=weight.tensor,
            )


def _statistics(weights: Sequence[Weight], wanted: Wanted, stats: str | Path) -> Statistics | None:
    needed = "moments" in METHODS[wanted.method].needs
    if not needed and not str(stats):
        return None
    if not needed:
        raise UsageError(f"{wanted.method} does not look at statistics.")
    if not str(stats):
        raise UsageError(f"{wanted.method} needs statistics of the inputs: pass --stats FILE.")
    found = Statistics(Path(stats))
    found.check({w.form.module: w.form.shape[1] for w in weights})
    return found


def fresh_config(
    base: Checkpoint,
    saved: Sequence[Saved],
    wanted: Wanted,
    weights: Sequence[Weight],
    *,
    init: object,
) -> dict[str, Any]:
    """The config of a fresh adapter: rank and alpha as they were asked for; `init` says what PEFT
    shall take its base for.
    """
    name = base.located.repo or str(base.located.path)
    raw = {
        "peft_type": "LORA",
        "base_model_name_or_path": name,
        "task_type": task_type(base.config),
        "r": wanted.rank,
        "lora_alpha": wanted.alpha_of(""),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": wanted.rslora,
        "use_dora": wanted.dora,
        "fan_in_fan_out": any(w.turned and not w.form.embedding for w in weights),
        "init_lora_weights": init,
        "inference_mode": False,
        "modules_to_save": None,
    }
    return config_of(raw, saved, {}, version=WRITTEN)
