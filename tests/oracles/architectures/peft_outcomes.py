"""What PEFT makes of every case: `python -m tests.oracles.architectures.peft_outcomes`.

The base is loaded in float32, the adapter as a user would, merged and saved; what changed on disk
is held against the algebra. Prints the table of docs/reference/architectures.md.
"""

import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from tests.oracles.architectures.algebra import expected, on_disk, with_head
from tests.oracles.architectures.case import Built, Case
from tests.oracles.architectures.cases import CASES
from tests.oracles.architectures.models import MODELS
from tests.oracles.architectures.workshop import Workshop
from tests.oracles.reading import Array, read_tensors

# What a tensor is for, by the first pattern that its name on disk matches.
KINDS = (
    (r"(vision_tower|visual)\.", "vision"),
    (r"multi_modal_projector", "projector"),
    (r"experts\.\d+\.(gate_proj|up_proj|w1|w3)|experts\.gate_up_proj$|input_linear", "experts in"),
    (r"experts\.\d+\.(down_proj|w2)|experts\.down_proj$|output_linear", "experts out"),
    (r"experts\..*_bias", "expert biases"),
    (r"shared_expert", "shared expert"),
    (r"(gate|router|router\.layer)\.weight$", "router"),
    (r"embed_tokens", "embedding"),
    (r"lm_head", "head"),
    (r"(mlp|feed_forward)\.", "dense MLP"),
    (r"", "attention"),
)
RIGHT = 1e-3
UNTOUCHED = "untouched"


def outcome(workshop: Workshop, case: Case) -> str:
    """What PEFT does with a case, in words."""
    built = workshop.built(case.name)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            _merge(built, Path(folder))
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            return f"refuses: {_first_line(error)}"
        theirs = read_tensors(Path(folder))
    told = any("missing" in str(one.message).lower() for one in heard)
    faults = list(_faults(built, theirs))
    if not faults:
        return "right"
    return "; ".join(faults) + (": warns of missing keys" if told else ": silent")


def _merge(built: Built, folder: Path) -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(built.kind.load(built.base), built.adapter)
    model.merge_and_unload().save_pretrained(folder)


def _first_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}, {error}".split())
    for end in (". ", " for base_model", " for Peft"):
        text = text.partition(end)[0]
    return text.replace("|", "\\|").removesuffix(".")


def _faults(built: Built, theirs: dict[str, Array]) -> Iterator[str]:
    """One phrase for each kind of tensor of which PEFT's are not the reference's."""
    base, exact, changes = with_head(built), expected(built), on_disk(built)
    names = sorted(_missing_tied(exact, theirs), key=_kind)
    for kind, group in groupby(names, key=_kind):
        found = [_verdict(name, base, exact, changes, theirs) for name in group]
        words = sorted({word for word, _ in found} - {UNTOUCHED})
        errors = {f"{error:.1f}" for word, error in found if word == "wrong"}
        if words and words != ["right"]:
            largest = f" (off by up to {max(errors)} of the change)" if errors else ""
            yield f"{kind} {' and '.join(words)}{largest}"


def _missing_tied(exact: dict[str, Array], theirs: dict[str, Array]) -> Iterator[str]:
    """Every tensor, where a head that PEFT's model shares with its embedding is the embedding."""
    for name in exact:
        if name not in theirs and name.endswith("lm_head.weight"):
            (embedding,) = [n for n in theirs if n.endswith("embed_tokens.weight")]
            theirs[name] = theirs[embedding]
        if name in theirs:
            yield name


def _verdict(
    name: str,
    base: dict[str, Array],
    exact: dict[str, Array],
    changes: dict[str, Array],
    theirs: dict[str, Array],
) -> tuple[str, float]:
    """A word for a tensor, and how far it is from the reference, of the length of the change."""
    change, got = changes.get(name), theirs[name] - base[name]
    if change is None:
        return UNTOUCHED if abs(got).max() < RIGHT else "changed although not targeted", 0.0
    size = np.linalg.norm(change)
    error = float(np.linalg.norm(theirs[name] - exact[name]) / size)
    if error < RIGHT:
        return "right", error
    ratio = float((got * change).sum() / size**2)
    if np.linalg.norm(got - ratio * change) < RIGHT * size:
        return f"×{ratio:.3g}" if abs(ratio) > RIGHT else "dropped", error
    return "wrong", error


def _kind(name: str) -> str:
    return next(kind for pattern, kind in KINDS if re.search(pattern, name))


def rows(workshop: Workshop) -> Iterator[tuple[str, str, str, str]]:
    """Model, names, variants and outcome; variants of one outcome share a row."""
    order = [model.name for model in MODELS]
    ordered = sorted(CASES, key=lambda c: (order.index(c.model), c.names))
    for (model, names), cases in groupby(ordered, key=lambda c: (c.model, c.names)):
        found: dict[str, list[str]] = {}
        for case in cases:
            found.setdefault(outcome(workshop, case), []).append(case.variant)
        for what, variants in found.items():
            yield model, names, ", ".join(variants), what


def main() -> None:
    """Print the table."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(
            "| model | names | adapter | PEFT 0.21.2 | lorakit |\n|---|---|---|---|---|\n"
        )
        for row in rows(Workshop(Path(folder))):
            sys.stdout.write(f"| {' | '.join(row)} | ? |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
