"""`lorakit compare`."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli import making, options, printable, show

if TYPE_CHECKING:
    from lorakit.verbs.compare import Compared
    from lorakit.verbs.compare.beyond import Whole
    from lorakit.verbs.compare.weight import Row

wanted = options.together(
    click.option(
        "--tolerance",
        type=click.FloatRange(min=0),
        metavar="X",
        help="End with code 8 if anything differs by more than this share of its norm.",
    ),
    options.bases,
    options.jobs,
    options.expert_packing,
    options.pickles,
    options.as_json,
    options.quiet,
    options.verbose,
)


@click.command()
@click.argument("adapters", type=options.place, nargs=-1, required=True, metavar="ADAPTER...")
@wanted
def command(
    adapters: tuple[str, ...], *, as_json: bool, quiet: bool, verbose: bool, **values: Any
) -> None:
    """Say how alike two or more adapters of one model are. No delta is formed.

    \b
    lorakit compare a/ b/
    lorakit compare before/ after/ --tolerance 1e-5
    """
    from lorakit.verbs.compare import DifferentError, compare

    try:
        done = compare(*adapters, **values)
    except DifferentError as error:
        if not (quiet or as_json):
            _show(error.compared, verbose=verbose)
        raise
    if as_json:
        return show.result(done.to_dict())
    if not quiet:
        _show(done, verbose=verbose)
    return None


def _show(done: "Compared", *, verbose: bool) -> None:
    show.notes(done.notes)
    if len(done.adapters) == 2:
        _show_two(done, verbose=verbose)
    else:
        _show_many(done, verbose=verbose)


def _show_two(done: "Compared", *, verbose: bool) -> None:
    title = "1 is {}, 2 is {}".format(*map(printable, done.adapters))
    if verbose:
        columns = ("module", "cosine", "difference", "norm", "eff. rank", "outputs / inputs")
        show.table(title, columns, [_each_of_two(row) for row in done.rows])
    else:
        columns = ("module", "count", "cosine", "range", "difference", "outputs / inputs")
        show.table(title, columns, [_kind_of_two(*group) for group in _groups(done.rows)])
    _show_whole(done.whole, verbose=verbose)
    alone = [sum(r.ranks[1 - n] is None for r in done.rows) for n in (0, 1)]
    only = "".join(f", {count} only in {n}" for n, count in enumerate(alone, 1) if count)
    click.echo(
        f"cosine {done.cosines[0][1]:.4f}, norms {_number(done.norms[0])} and "
        f"{_number(done.norms[1])}, difference {_number(done.differences[0][1])}; "
        f"{done.common} modules in both{only}"
    )


def _kind_of_two(name: str, rows: Sequence["Row"]) -> tuple[Any, ...]:
    """A row for modules of a kind: means, the range of the cosines, the largest difference."""
    pairs = [p for row in rows for p in row.pairs]
    if not pairs:
        only = 2 if rows[0].ranks[0] is None else 1
        return name, len(rows), "–", f"only in {only}", "–", "–"
    cosines = [p.cosine for p in pairs]
    shared = [_mean([p.columns for p in pairs]), _mean([p.rows for p in pairs])]
    return (
        name,
        len(rows),
        f"{_mean(cosines):.4f}",
        f"{min(cosines):.4f} … {max(cosines):.4f}",
        _number(max(p.relative for p in pairs)),
        f"{shared[0]:.3f} / {shared[1]:.3f}",
    )


def _each_of_two(row: "Row") -> tuple[str, ...]:
    there = [rank is not None for rank in row.ranks]
    norms = [_number(x) if t else "–" for x, t in zip(row.norms, there, strict=True)]
    ranks = [f"{x:.1f}" if t else "–" for x, t in zip(row.effective, there, strict=True)]
    sizes = (" / ".join(norms), " / ".join(ranks))
    if not row.pairs:
        return _short(row.name), "–", "–", *sizes, "–"
    (pair,) = row.pairs
    shared = f"{pair.columns:.3f} / {pair.rows:.3f}"
    return _short(row.name), f"{pair.cosine:.4f}", _number(pair.relative), *sizes, shared


def _show_many(done: "Compared", *, verbose: bool) -> None:
    count = len(done.adapters)
    rows = [
        (
            n + 1,
            name,
            sum(r.ranks[n] is not None for r in done.rows),
            _number(done.norms[n]),
            *(f"{c:.4f}" for c in done.cosines[n]),
        )
        for n, name in enumerate(done.adapters)
    ]
    numbers = [str(n + 1) for n in range(count)]
    show.table("cosines", ("", "adapter", "modules", "norm", *numbers), rows)
    if verbose:
        pairs = list(combinations(range(1, count + 1), 2))
        title, columns = "cosines of modules", [f"{i} · {j}" for i, j in pairs]
        show.table(
            title, ("module", *columns), [(_short(r.name), *_each(r, pairs)) for r in done.rows]
        )
    _show_whole(done.whole, verbose=verbose)
    click.echo(f"{done.common} of {len(done.rows)} modules in all {count} adapters")


def _each(row: "Row", pairs: Sequence[tuple[int, int]]) -> Iterator[str]:
    there = {(p.first, p.second): f"{p.cosine:.4f}" for p in row.pairs}
    return (there.get(pair, "–") for pair in pairs)


def _show_whole(whole: Sequence["Whole"], *, verbose: bool) -> None:
    if not whole:
        return
    rows = []
    for name, group in making.grouped(whole, verbose=verbose):
        pairs = [p for one in group for p in one.pairs]
        sizes = [p.relative for p in pairs if p.relative is not None]
        norms = [
            _number(_mean(there))
            if (there := [x for w in group if (x := w.norms[n]) is not None])
            else "–"
            for n in range(len(group[0].norms))
        ]
        other = any(p.relative is None for p in pairs)
        difference = "other shapes" if other else _number(max(sizes)) if sizes else "–"
        rows.append((name, len(group), difference, *norms))
    numbers = [f"norm {n + 1}" for n in range(len(whole[0].norms))]
    show.table("no updates", ("tensor", "count", "difference", *numbers), rows)


def _groups(rows: Sequence["Row"]) -> list[tuple[str, Sequence["Row"]]]:
    """Rows by the kind of module, those that one adapter lacks apart."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        lacking = (str(r is None) for r in row.ranks)
        found.setdefault((_short(making.kind(row.name)), *lacking), []).append(row)
    return [(name, group) for (name, *_), group in found.items()]


def _short(name: str) -> str:
    """The name of a weight without what almost all end in."""
    return name.removesuffix(".weight")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _number(value: float) -> str:
    return f"{value:.3g}"
