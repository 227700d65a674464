"""KnOTS: updates are aligned by a common SVD, and TIES is done in the aligned space.

Law: with `[D_1 ... D_n] = U S [V_1 ... V_n]`, the weighted updates side by side, the result is
`U S ties(V_1, ..., V_n)`. It is found from the factors: the large matrices are multiplied by
orthogonal ones only, so its rank is at most the sum of the ranks and nothing dense is formed.

Source: Stoica et al. 2024 (KnOTS, arXiv 2410.19735), with TIES as the merging function.
"""

from collections.abc import Sequence

from lorakit.math.combining.elementwise import TIES, joined
from lorakit.math.combining.factors import concatenated, cut
from lorakit.math.combining.setting import Combined, Setting
from lorakit.math.combining.tasks import Task, tasks
from lorakit.math.lowrank import LowRank
from lorakit.math.namespace import Array, array_namespace
from lorakit.math.orthonormal import basis

# Directions of less than this share of the norm are rounding; trimming would count them in full.
_NOTHING = 1e-7


def knots(parts: Sequence[LowRank], weights: Sequence[float], setting: Setting) -> Combined:
    """The elected mean of the aligned updates, exact unless a rank is asked for.

    An update that is zero takes no part: its rounding would count among those that agree.
    """
    line = [task for task in tasks(parts, weights) if _is_any(task.a) and _is_any(task.b)]
    left, aligned = _aligned(line) if line else (None, [])
    if left is None or not left.shape[1]:  # all of them are zero
        return cut(concatenated(parts, weights), setting.rank)
    return cut(LowRank(joined(aligned, setting, TIES), left), setting.rank)


def _is_any(x: Array) -> bool:
    return bool(array_namespace(x).any(x != 0))


def _aligned(line: Sequence[Task]) -> tuple[Array, list[Task]]:
    """`U S`, (out, k), and each V as an update of its own, (k, in), all in float64."""
    xp = array_namespace(line[0].a)
    left = basis(xp.concat([xp.astype(t.b, xp.float64) for t in line], axis=1))
    rights, cores, start = [], [], 0
    for task in line:
        right = basis(xp.astype(task.a, xp.float64).T)
        stop = start + task.a.shape[0]
        rights.append(right.q.T)
        cores.append(left.r[:, start:stop] @ right.r.T)
        start = stop
    u, s, v = xp.linalg.svd(xp.concat(cores, axis=1), full_matrices=False)
    on = int(xp.sum(xp.astype(s > _NOTHING * s[0], xp.int64)))
    aligned, start = [], 0
    for task, right in zip(line, rights, strict=True):
        stop = start + right.shape[0]
        aligned.append(Task(right, v[:on, start:stop], task.key))
        start = stop
    return left.times(u[:, :on] * s[:on]), aligned
