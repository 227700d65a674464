"""One adapted module: its tensors by role, and whether they go together."""

from collections.abc import Mapping
from dataclasses import dataclass

from lorakit.adapter.config import AdapterConfig
from lorakit.errors import MisfitError
from lorakit.tensors import TensorInfo

WITHOUT_FACTORS = {
    *("rows", "difference", "bias_difference"),
    *("ia3_rows", "ia3_inputs", "oft", "oft_rescale"),
}


@dataclass(frozen=True, slots=True)
class Module:
    """The tensors of one adapted module, by role."""

    name: str
    roles: Mapping[str, TensorInfo]
    inner: bool = False  # the out_proj inside a wrapped MultiheadAttention
    level: int = 0  # how many wrappers of other parameters of the same module lie around it
    cut: tuple[int, int] | None = None  # the rows of a Kronecker product that are meant, None: all

    @property
    def embedding(self) -> bool:
        """Whether it is the update of an embedding, whose weight is (vocabulary, dim)."""
        return "embedding_a" in self.roles

    @property
    def a(self) -> TensorInfo:
        """The down factor; of a Kronecker product the right one."""
        return self.roles["embedding_a" if self.embedding else "a"]

    @property
    def b(self) -> TensorInfo:
        """The up factor; of a Kronecker product the left one."""
        if self.embedding:
            return self.roles["embedding_b"]
        return self.roles["kron" if "kron" in self.roles else "b"]

    @property
    def out(self) -> int:
        """The outputs of its update."""
        if self.cut:
            return self.cut[1] - self.cut[0]
        kron = self.roles.get("kron")
        return kron.shape[0] * self.a.shape[0] if kron else self.b.shape[0]

    @property
    def span(self) -> tuple[int, ...]:
        """The shape of what its update adds to one output: (in,), with a kernel (in, k, ...)."""
        kron, (inner, *kernel) = self.roles.get("kron"), self.a.shape[1:]
        return (kron.shape[1] * inner if kron else inner, *kernel)

    @property
    def wrapped(self) -> str:
        """The module that PEFT wrapped, whose name patterns are held against."""
        return self.name.rpartition(".")[0] if self.inner else self.name

    @property
    def low_rank(self) -> bool:
        """Whether it has factors, and not only replaced token rows."""
        return self.embedding or "a" in self.roles


def check_module(module: Module, config: AdapterConfig, file: object) -> None:
    """Refuse a module that lacks one of its factors, or whose factors do not go together.

    Raises:
        MisfitError: naming the module.
    """
    have = module.roles.keys()
    if have <= WITHOUT_FACTORS:
        return
    if "kron" in have:
        _check_beside(module, file)
        return
    kind = {"embedding_a", "embedding_b"}
    if missing := sorted((kind if have & kind else {"a", "b"}) - have):
        raise MisfitError(
            f"the module {module.name!r} has {', '.join(sorted(have))} but no {missing[0]}: "
            "half a pair.",
            hint="Save the adapter again; this file is incomplete.",
            file=file,
            tensor=module.roles[min(have)].name,
        )
    if spare := sorted(have & {"a", "b"}) if have & kind else []:
        raise MisfitError(
            f"the module {module.name!r} has factors of an embedding and of a layer.",
            hint="It can be only one of them.",
            file=file,
            tensor=module.roles[spare[0]].name,
        )
    _check_diagonal(module, config, file)
    _check_shapes(module, config, file)
    _check_beside(module, file)


def _check_shapes(module: Module, config: AdapterConfig, file: object) -> None:
    groups = sum(map(bool, config.enable_lora)) or 1
    down, up = module.a.shape, module.b.shape
    if config.raw.get("use_bdlora") and len(up) == 2 and up[1]:
        groups = down[0] // up[1]  # B in blocks
    if len(down) < 2 or len(up) < 2 or down[0] != up[1] * groups or 0 in (*down, *up):
        what = "of a grouped convolution, which has no plain delta" if len(down) > 2 else "no pair"
        raise MisfitError(
            f"the factors of {module.name!r} are {what}: A is {list(down)}, B is {list(up)}.",
            hint="Use the adapter unmerged.",
            file=file,
            tensor=module.a.name,
        )


def _check_beside(module: Module, file: object) -> None:
    out, (inner, *_) = module.out, module.span
    beside = (("magnitude", out), ("magnitude_inputs", inner), ("bias", out))
    for role, units in beside:
        found = module.roles.get(role)
        if found and found.numel != units:
            what = role.partition("_")[0]
            raise MisfitError(
                f"the {what} of {module.name!r} has {found.numel} elements for {units} units.",
                hint="Save the adapter again; this file is inconsistent.",
                file=file,
                tensor=found.name,
            )


def _check_diagonal(module: Module, config: AdapterConfig, file: object) -> None:
    """Refuse a module whose diagonal and config do not agree on whether it is KaSA."""
    diag, kasa = module.roles.get("diag"), config.residual == "kasa"
    if (diag is not None) != kasa or (diag and diag.shape != module.a.shape[:1]):
        raise MisfitError(
            f"the module {module.name!r} has "
            + (f"a lora_diag of {list(diag.shape)}" if diag else "no lora_diag")
            + (", its config is KaSA's." if kasa else ", its config is not KaSA's."),
            hint="The file and its config are not of one adapter.",
            file=file,
            tensor=(diag or module.a).name,
        )
