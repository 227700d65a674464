"""The cases: every model with adapters in the names of transformers 4 and 5, in three scalings."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.oracles.architectures.adapters import ABSENT
from tests.oracles.architectures.architecture import Renames
from tests.oracles.architectures.case import Case
from tests.oracles.architectures.models import LLAVA_OLD, QWEN_OLD

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BOTH_SIDES = ["embed_tokens", "lm_head"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
# PEFT takes `gate_proj` among the modules for one of an expert, whatever it is; so as parameters.
DENSE = ["shared_experts", "layers.0.mlp"]
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
EVERY_LEAF = ["experts.gate_up_proj_bias", "experts.down_proj_bias"]


@dataclass(frozen=True)
class Targets:
    """What adapters of a model change: modules, parameters, and the same in older names."""

    modules: list[str]
    parameters: list[str] = field(default_factory=list)
    older: list[str] = field(default_factory=list)  # target_modules in transformers 4
    split: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


MOE = {
    "mixtral": Targets(
        [*ATTENTION, "embed_tokens", "lm_head"],
        [*STACKS, "mlp.gate.weight"],
        [*ATTENTION, "gate", "w1", "w2", "w3", "embed_tokens", "lm_head"],
        ("w1", "w3", "w2"),
    ),
    "qwen2-moe": Targets(
        [*ATTENTION, *MLP, "shared_expert_gate"],
        [*STACKS, "mlp.gate.weight"],
        [*ATTENTION, *MLP, "gate", "shared_expert_gate"],
    ),
    "qwen3-moe": Targets(ATTENTION, [*STACKS, "mlp.gate.weight"], [*ATTENTION, *MLP, "gate"]),
    "olmoe": Targets(ATTENTION, [*STACKS, "mlp.gate.weight"], [*ATTENTION, *MLP, "gate"]),
    "phimoe": Targets(
        ATTENTION,
        [*STACKS, "mlp.router.weight"],
        [*ATTENTION, "gate", "w1", "w2", "w3"],
        ("w1", "w3", "w2"),
    ),
    "jamba": Targets(
        [*ATTENTION, *MLP, "in_proj", "x_proj"],
        [*STACKS, "feed_forward.router.weight"],
        [*ATTENTION, *MLP, "in_proj", "x_proj", "router"],
    ),
    "lfm2-moe": Targets(
        ["q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"],
        [*STACKS, "feed_forward.gate.weight"],
        ["q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3", "gate"],
        ("w1", "w3", "w2"),
    ),
    "deepseek-v3": Targets(
        LATENT,
        [*STACKS, "mlp.gate.weight", *(f"{m}.{leaf}.weight" for m in DENSE for leaf in MLP)],
        [*LATENT, *MLP, "gate"],
    ),
}
# On disk as in the model, in transformers 4 as in 5.
STACKED = {
    "gpt-oss": Targets(ATTENTION, [*STACKS, "mlp.router.weight"]),
    "gpt-oss-square-gate": Targets(ATTENTION, [*STACKS, "mlp.router.weight"]),
    "llama4": Targets([*ATTENTION, *MLP], [*STACKS, "feed_forward.router.weight"]),
}
GRANITE = Targets(ATTENTION, [*STACKS, "block_sparse_moe.router.weight"])
GRANITE_OLDER = (
    (r"\.experts\.base_layer\.", ".input_linear."),
    (r"\.experts\.", ".output_linear."),
    (r"\.router\.", ".router.layer."),
)
SEEING = {
    "gemma3": Targets([*ATTENTION, "out_proj", *MLP, "fc1", "fc2"]),
    "qwen2.5-vl": Targets([*ATTENTION, *MLP, "qkv", "attn.proj", "mlp.0", "mlp.2"]),
    "llava": Targets(
        [*ATTENTION, *MLP, "out_proj", "fc1", "fc2", "linear_1", "linear_2", *BOTH_SIDES],
    ),
}
# Between 4.52 and 5.0 the model's names were those of today, but for one in the tower.
MIDDLE = ((r"^model\.vision_tower\.", "model.vision_tower.vision_model."),)
OLDER_PEFT = {"peft_version": ABSENT}  # written since 0.18
# By version of PEFT, and by what the class of the experts says of itself.
IN_FIRST: Mapping[str, Callable[[bool], bool]] = {
    "0.18.0": lambda _transposed: True,
    "0.19.0": lambda transposed: not transposed,
    "0.21.2": lambda transposed: transposed,
}
UNTIED = {"untied_head": "lm_head.weight", "options": {"untie": True}}


def _variants(targets: Targets, gates: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Plain; rsLoRA; and ranks and alphas of their own, the same for both halves of a gate."""
    down = targets.split[2]
    yield "plain", {}
    yield "rsLoRA", {"use_rslora": True}
    yield (
        "patterns",
        {
            "alpha_pattern": {**dict.fromkeys(gates, 10), r"layers\.0\..*o_proj": 3},
            "rank_pattern": {down: 2, "v_proj": 6},
        },
    )


def _trained(model: str, names: str, targets: Targets, **options: Any) -> Iterator[Case]:
    """PEFT's own files."""
    lora = {"target_modules": targets.modules}
    if targets.parameters:
        lora["target_parameters"] = targets.parameters
    gates = ["gate_up_proj"] if targets.parameters else ["up_proj"]
    for variant, more in _variants(Targets([]), gates):
        yield Case(model, names, variant, lora | more, **options)


def _by_hand(model: str, targets: Targets) -> Iterator[Case]:
    """Modules as transformers 4 had them, which is as they are on disk."""
    gate, up, _ = targets.split
    pattern = rf"(.*\.)?({'|'.join(targets.older)})"
    for variant, more in _variants(targets, [gate, up]):
        lora = {"target_modules": targets.older} | more
        yield Case(model, "v4", variant, lora, by_hand=pattern, config=OLDER_PEFT)


def _moe() -> Iterator[Case]:
    for model, targets in MOE.items():
        yield from _by_hand(model, targets)
        yield from _trained(model, "v5", targets)


def _stacked() -> Iterator[Case]:
    for model, targets in STACKED.items():
        yield from _trained(model, "v5", targets)
        older = {"config": {"peft_version": "0.18.0"}, "in_first": True}
        yield from _trained(model, "PEFT 0.18.0", targets, **older)
    yield from _trained("granitemoe", "v5", GRANITE)
    config = {
        "peft_version": "0.18.0",
        "target_modules": [*ATTENTION, "layer"],
        "target_parameters": ["input_linear.weight", "output_linear.weight"],
        "alpha_pattern": {"input_linear.weight": 10, r"layers\.0\..*o_proj": 3},
        "rank_pattern": {"output_linear.weight": 2, "v_proj": 6},
    }
    plain = {"alpha_pattern": {}, "rank_pattern": {}}
    for case in _trained("granitemoe", "v4", GRANITE):
        yield Case(
            **vars(case)
            | {
                "spelling": GRANITE_OLDER,
                "config": config if case.variant == "patterns" else config | plain,
                "in_first": True,
            }
        )


def _square() -> Iterator[Case]:
    """Experts whose matrices are square: their orientation is in no shape."""
    targets = MOE["qwen3-moe"]
    yield from _trained("qwen3-moe-square", "v5", targets)
    older = {"config": {"peft_version": "0.18.0"}, "in_first": True}
    yield from _trained("qwen3-moe-square", "PEFT 0.18.0", targets, **older)


def _seeing() -> Iterator[Case]:
    """Adapters in every spelling on files in every spelling."""
    for model, targets in SEEING.items():
        old = QWEN_OLD if model == "qwen2.5-vl" else LLAVA_OLD
        spellings: dict[str, Renames] = {"v4": old, "v5": ()}
        if model != "qwen2.5-vl":
            spellings["v4.52"] = MIDDLE
        for names, spelling in spellings.items():
            yield from _trained(model, names, targets, spelling=spelling)
            other = _trained(f"{model}-new", names, targets, spelling=spelling)
            yield from (case for case in other if case.variant == "plain")


def _text() -> Iterator[Case]:
    yield from _trained("llama", "any", Targets([*ATTENTION, *MLP, *BOTH_SIDES]))
    yield from _trained("llama-tied", "any", Targets([*ATTENTION, *MLP]))
    for target in BOTH_SIDES:
        targets = Targets([*ATTENTION, target])
        yield from _trained("llama-tied", f"any, {target}", targets, **UNTIED)
    yield from _trained("llama-tied", "any, both sides", Targets(["q_proj", *BOTH_SIDES]), **UNTIED)
    yield from _trained("gemma3-text", "any", Targets([*ATTENTION, *MLP]))
    embedding = Targets(["q_proj", "embed_tokens"])
    yield from _trained("gemma3-text", "any, embed_tokens", embedding, **UNTIED)
    scaled: Mapping[str, Any] = UNTIED | {"embedding_times": 0.25, "config": OLDER_PEFT}
    yield from _trained("gemma3-text", "any, embed_tokens of PEFT 0.17", embedding, **scaled)


def _odd() -> Iterator[Case]:
    """Adapters that target less, or more unevenly, than most."""
    experts = r".*\.experts\.\d\.({})"
    for model, (gate, up, down) in {
        "mixtral": ("w1", "w3", "w2"),
        "qwen3-moe": ("gate_proj", "up_proj", "down_proj"),
    }.items():
        lora: dict[str, Any] = {"target_modules": [gate, up, down]}
        uneven = {"alpha_pattern": {gate: 10, up: 3}, "rank_pattern": {gate: 2, up: 6}}
        hand = experts.format(f"{gate}|{up}|{down}")
        yield Case(model, "v4", "uneven patterns", lora | uneven, by_hand=hand, config=OLDER_PEFT)
        alone = experts.format(gate)
        lora = {"target_modules": [gate]}
        yield Case(model, "v4", f"{gate} alone", lora, by_hand=alone, config=OLDER_PEFT)
        some = experts.format(f"{gate}|{up}|{down}").replace(r"\d", "[12]")
        lora = {"target_modules": some}
        yield Case(model, "v4", "two experts by a regex", lora, by_hand=some, config=OLDER_PEFT)
    for model in ("qwen3-moe", "gpt-oss", "llama4"):
        for alone in ("gate_up_proj", "down_proj"):
            yield Case(model, "v5", f"{alone} alone", _alone(alone))
    # PEFT rewrites this on the way in: experts alone are trained, and with `down_proj` for a target
    # of which most modules have none.
    taken = {"target_modules": [*LATENT, *MLP], "target_parameters": STACKS}
    yield Case("deepseek-v3", "v5", "modules that PEFT renamed", taken)
    every = {"target_modules": ["q_proj"], "target_parameters": [*STACKS, *EVERY_LEAF]}
    yield Case("gpt-oss", "v5", "with expert biases", every)


def _alone(parameter: str) -> dict[str, Any]:
    return {"target_modules": ["q_proj"], "target_parameters": [f"experts.{parameter}"]}


def _without_router() -> Iterator[Case]:
    for model in ("qwen2-moe", "jamba", "lfm2-moe"):
        older = [leaf for leaf in MOE[model].older if leaf not in {"gate", "router"}]
        lora, hand = {"target_modules": older}, rf"(.*\.)?({'|'.join(older)})"
        yield Case(model, "v4", "no router", lora, by_hand=hand, config=OLDER_PEFT)


def _orientations() -> Iterator[Case]:
    """Square experts alone, where only the version of PEFT tells which factor is on which side.

    To 0.18 A spans the first dimension, always; 0.19.0 had it the wrong way round; since 0.19.1 it
    is the first where the class of the experts says `is_transposed`, and else the second.
    """
    for model in ("llama4", "qwen3-moe-square", "gpt-oss"):
        for version in ("0.18.0", "0.19.0", "0.21.2"):
            yield Case(
                model,
                f"PEFT {version}",
                "square down_proj alone",
                _alone("down_proj"),
                config={"peft_version": version},
                in_first=IN_FIRST[version](model.startswith("gpt-oss")),
            )


def _unsloth() -> Iterator[Case]:
    """B with experts slowest, as one trainer wrote it; nothing in the file tells."""
    for model in ("qwen3-moe", "mixtral", "gpt-oss"):
        targets = {**MOE, **STACKED}[model]
        options = {"packing": "unsloth", "options": {"expert_packing": "unsloth"}}
        yield from _trained(model, "Unsloth", targets, **options)


CASES = [
    *(*_text(), *_moe(), *_without_router(), *_stacked(), *_square()),
    *(*_orientations(), *_odd(), *_unsloth(), *_seeing()),
]
BY_NAME = {case.name: case for case in CASES}
