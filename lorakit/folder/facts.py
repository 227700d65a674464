"""Facts in `config.json` that a merge may have changed; everything else stays as it was, to the
byte.

A fact may stand at the top of the config, in the `text_config` of a multimodal model, or in both;
it is changed wherever it stands, since not every reader looks in the same place.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit.configs import NESTED, SIDES, configs
from lorakit.store.reading import read_file

DTYPES = ("dtype", "torch_dtype")
# Endings of transformers' classes: of models of language, and of those with the head of a task.
HEADS = ("ForCausalLM", "ForMaskedLM", "ForPreTraining", "LMHeadModel")
TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


def fact(config: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A fact, wherever in the config it stands; where it does twice, the outer one."""
    return next((c[name] for _, c in configs(config) if name in c), default)


def edited(path: Path, changes: Mapping[str, Any]) -> bytes:
    """The bytes of a config with these facts changed, or taken out where they are None; its very
    bytes where they hold already.
    """
    raw = read_file(path)
    config = json.loads(raw)
    stale = [
        (c, n)
        for n, v in changes.items()
        for c in _places(config, n)
        if c.get(n, None if v is None else _ABSENT) != v
    ]
    for place, name in stale:
        place[name] = changes[name]
        if changes[name] is None:
            del place[name]
    if not stale:
        return raw
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"


def _places(config: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Where a fact stands, or belongs if it stands nowhere: of dtypes, in every model's config."""
    within = [*_models(config)] if name in DTYPES else NESTED
    return [c for _, c in configs(config, within) if name in c] or [config]


def _models(config: Mapping[str, Any]) -> Iterator[str]:
    """What the configs of the models are called that a model is made of."""
    for name, inner in config.items():
        model = name in SIDES or (name.endswith("_config") and name != "quantization_config")
        if model and isinstance(inner, dict):
            yield name
            yield from _models(inner)


_ABSENT = object()


def classifying(config: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The fact of which class a model is that got the head of a task, as PEFT calls it; nothing
    where it is not known.
    """
    names = config.get("architectures") or []
    stems = [n.removesuffix(e) for n in names for e in HEADS if n.endswith(e)]
    return {"architectures": [s + TASKS[task] for s in stems]} if stems and task in TASKS else {}


def labels(count: int) -> dict[str, Any]:
    """The facts of a classification head with `count` outputs, as transformers writes them."""
    names = {str(i): f"LABEL_{i}" for i in range(count)}
    return {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}}
