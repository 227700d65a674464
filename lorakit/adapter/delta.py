"""One adapted module, whatever the file called it: the form that every format is read into and
written from.

Law: what is read from a file and written back in the format it came from has the same bytes; what
is written in another has the same update, up to the rounding that is reported.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from typing import Any

from lorakit.errors import InputError
from lorakit.math.cast import Array
from lorakit.tensors import BITS


@dataclass(frozen=True)
class Values:
    """A tensor that is read, or computed from others that are, when it is asked for.

    `key` is its name in the file that it came from, or "" if it is no longer as it was there;
    `product` the tensor and the number that it was made of, where that is all.
    """

    dtype: str  # a key of lorakit.tensors.BITS
    shape: tuple[int, ...]
    read: Callable[[], Array] = field(repr=False)  # as stored: see lorakit.math.cast
    key: str = ""
    product: "tuple[Values, float] | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        assert self.dtype in BITS


@dataclass(frozen=True)
class Delta:
    """The tensors of one adapted module, by role, in one orientation.

    `component` is "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", or ""
    in a language model. `module` is its dotted path in the canonical names of the family: those of
    Diffusers for images and video, those of the checkpoint on disk for language models.

    algo "lora": a (rank, in[, kh, kw]), b (out, rank[, 1, 1]), and where there are any mid,
    magnitude, bias (which is added as it is, whatever the scaling). Others: the roles of
    lorakit.formats.roles. `alpha` is the tensor where the file has one, a number where a config
    says so, None where there is none (scaling 1). `kernel` is that of a convolution, where LoHa and
    LoKr may have it flattened into the inputs. `embedding`: the weight of the module is (in, out),
    a row for each token. `rows`: of a Kronecker product, those of its output rows that are meant.
    """

    component: str
    module: str
    algo: str
    tensors: Mapping[str, Values]
    alpha: Values | float | None = None
    rslora: bool = False
    how: str = "renamed"  # what reading did to it: "split" of a fused projection, "swapped" halves
    kernel: tuple[int, ...] = ()
    embedding: bool = False
    rows: tuple[int, int] | None = None

    @property
    def rank(self) -> int:
        """The rank of a low-rank update as it is stored."""
        return self.tensors["a"].shape[0]

    @cached_property
    def alpha_value(self) -> float | None:
        """The alpha as a number; None means a scaling of 1.

        Raises:
            InputError: it is none.
        """
        if not isinstance(self.alpha, Values):
            return self.alpha
        value = float(self.alpha.read().astype("float64").reshape(()))
        if not isfinite(value):
            raise InputError(
                f"{self.alpha.key} is {value}, no finite number.", tensor=self.alpha.key
            )
        return value

    @property
    def plain_alpha(self) -> float | None:
        """The alpha that says the same over the plain rank, without rank-stabilising."""
        return None if self.alpha is None else self.scaling * self.rank

    @property
    def scaling(self) -> float:
        """What b @ a is multiplied with."""
        if (alpha := self.alpha_value) is None:
            return 1.0
        return alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class Opened:
    """A LoRA file read into deltas.

    `format`, `family` and `namespace` are keys of the tables in lorakit.formats. `extras` are
    tensors that belong to no module, by their names, and are carried or dropped by request only.
    `metadata` is that of the safetensors header, `config` what adapter_config.json says. `others`
    are families that have its names too, `tuner` is the type of PEFT that its config says, if
    that is not LoRA; its deltas have the scalings of that, and `config` speaks of LoRA.
    """

    format: str
    family: str
    namespace: str
    deltas: tuple[Delta, ...]
    extras: Mapping[str, Values] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    tuner: str = ""
