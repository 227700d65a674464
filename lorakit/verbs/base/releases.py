"""Which release of PEFT the config of a result names: readers go by it where releases differ.

Law: of a result, a reader takes every square stack of experts, and every embedding, for what it
takes those of the adapters for that the result was made of.
"""

from collections.abc import Iterable

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.config import numbers_of
from lorakit.adapter.new_config import WRITTEN
from lorakit.adapter.weights import Adapted
from lorakit.errors import MisfitError
from lorakit.naming.scaled import before_0_18
from lorakit.verbs.base.landing import FLAGGED, spans_rows

SCALED = "0.18.0"  # reads embeddings as later ones, and stacks as earlier ones


def release_of(found: Iterable[Adapted], model_type: str = "") -> tuple[str | None, list[str]]:
    """The release to name for updates that are taken as they lie, None for one that names none; and
    a note where no release reads all embeddings as they were trained.

    `model_type` is that of the base, where it is known.

    Raises:
        MisfitError: as `check_stacks`.
    """
    found = list(found)
    check_stacks(found, model_type)
    stacks = {_named(o.adapter) for o in found if _is_square(o)}
    tables = {_named(o.adapter) for o in found if o.form.embedding}
    ways = {_lies(s, model_type) for s in stacks}
    known = dict.fromkeys([WRITTEN, *sorted(stacks | tables), SCALED])
    fitting = [v for v in known if ways <= {_lies(v, model_type)}]
    for version in fitting:
        if all(before_0_18(version) == before_0_18(t) for t in tables):
            return version or None, []
    return fitting[0] or None, [
        "some adapters have embeddings that PEFT trained before 0.18, others since: for a base "
        "that scales its embeddings (Gemma 3, BART …) convert the older first: lorakit convert "
        "ADAPTER -o OUT --names disk --base BASE."
    ]


def check_stacks(found: Iterable[Adapted], model_type: str = "") -> None:
    """Refuse square stacks of experts that lie one way round in one adapter, the other in another.

    Raises:
        MisfitError: naming an adapter.
    """
    stacks = [o for o in found if _is_square(o)]
    for one in stacks[1:]:
        first, version = _named(stacks[0].adapter), _named(one.adapter)
        if _lies(version, model_type) != _lies(first, model_type):
            raise MisfitError(
                f"the experts of {one.form.key!r} are square, and lie otherwise in an adapter of "
                f"PEFT {version or 'before 0.18'} than in one of {first or 'before 0.18'}.",
                hint="Convert the older first: lorakit convert ADAPTER -o OUT --names disk --base "
                "BASE; or pass --base, for models of which both lie alike (gpt-oss).",
                file=one.adapter.path,
                tensor=one.piece.tensors[0].name,
            )


def _is_square(one: Adapted) -> bool:
    return bool(one.form.experts) and one.form.shape[0] == one.form.shape[1]


def _named(adapter: Adapter) -> str:
    return str(adapter.config.raw.get("peft_version") or "")


def _lies(version: str, model_type: str) -> object:
    """What tells how a stack lies that this release wrote."""
    ways = spans_rows(numbers_of(version))
    return ways[model_type in FLAGGED] if ways and model_type else ways
