"""Methods on the elements of the dense updates: each is made sparse, then they are joined.

Law: the combination is the method of the weighted updates `w_i * s_i * B_i A_i`, so a weight may as
well lie in the scaling, and a lone update keeps its weight. The dense combination is the only whole
matrix that is held, and before it one of magnitudes; the rest is blocks of rows. What is given is
the nearest of low rank to it.

Sources: TIES-Merging (arXiv 2306.01708), DARE (2311.03099), DELLA (2406.11617), Model Breadcrumbs
(2312.06795). As in mergekit, weights count in the vote.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorakit.math.combining import sparse
from lorakit.math.combining.election import elected, summed
from lorakit.math.combining.factors import svd, wanted_rank
from lorakit.math.combining.setting import Combined, Setting
from lorakit.math.combining.sparse import Sparsify
from lorakit.math.combining.tasks import Task, filled, tasks
from lorakit.math.factored import recompose
from lorakit.math.lowrank import LowRank
from lorakit.math.namespace import Array
from lorakit.math.truncated import top


@dataclass(frozen=True)
class Rule:
    """How updates are made sparse, and then joined."""

    sparsify: Sparsify
    join: Callable[[Sequence[Array], str], Array]

    def combined(
        self, parts: Sequence[LowRank], weights: Sequence[float], setting: Setting
    ) -> Combined:
        """The combination; on the factors where nothing is dropped and nothing elected."""
        if setting.density == 1 and (len(parts) == 1 or self.join is summed):
            return svd(parts, weights, setting)
        dense = joined(tasks(parts, weights), setting, self)
        return compressed(dense, wanted_rank(parts, setting), setting)


# The largest elements; the mean over those of the elected sign, or the sum.
TIES = Rule(sparse.largest, elected)
MAGNITUDE_PRUNE = Rule(sparse.largest, summed)
# Elements dropped at random, the rest enlarged.
DARE_LINEAR = Rule(sparse.random, summed)
DARE_TIES = Rule(sparse.random, elected)
# The smaller an element, the likelier it is dropped.
DELLA = Rule(sparse.ranked, elected)
# Neither the largest nor the smallest.
BREADCRUMBS = Rule(sparse.middling, summed)


def joined(line: Sequence[Task], setting: Setting, rule: Rule) -> Array:
    """The dense combination by a rule, (out, in)."""
    sparse_rows = [rule.sparsify(task, setting) for task in line]

    def rows(start: int, stop: int) -> Array:
        return rule.join([kept(start, stop) for kept in sparse_rows], setting.majority)

    return filled(rows, line[0].shape, line[0].a)


def compressed(dense: Array, rank: int, setting: Setting) -> Combined:
    """The nearest to a dense combination of at most `rank`, and no more than it can have."""
    found = top(dense, min(rank, *dense.shape), seed=setting.seed, exact=setting.exact)
    return Combined(recompose(found.spectral), found.captured, rank)
