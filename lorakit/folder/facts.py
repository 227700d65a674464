"""Facts in `config.json` that a merge may have changed; everything else stays as it was, to the
byte.

A fact may stand at the top of the config or in the `text_config` of a multimodal model; it is
changed where it stands.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NESTED = ("text_config", "llm_config", "language_config")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def fact(config: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A fact, wherever in the config it stands."""
    for place in (config, *(config.get(n) or {} for n in NESTED)):
        if name in place:
            return place[name]
    return default


def tied(config: Mapping[str, Any]) -> bool:
    """Whether the model shares its input embedding with its output head.

    Only what the config says: where it is silent, the head on disk decides (see `verbs.tying`).
    """
    return bool(fact(config, "tie_word_embeddings", default=False))


def edited(path: Path, changes: Mapping[str, Any]) -> bytes:
    """The bytes of a config with these facts changed; its very bytes where they hold already."""
    raw = path.read_bytes()
    config = json.loads(raw)
    pending = {n: v for n, v in changes.items() if fact(config, n, default=_ABSENT) != v}
    for name, value in pending.items():
        _place(config, name)[name] = value
    if not pending:
        return raw
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"


def _place(config: dict[str, Any], name: str) -> dict[str, Any]:
    if name in config:
        return config
    nested = (config[n] for n in NESTED if isinstance(config.get(n), dict))
    return next((p for p in nested if name in p), config)


_ABSENT = object()


def labels(count: int) -> dict[str, Any]:
    """The facts of a classification head with `count` outputs, as transformers writes them."""
    names = {str(i): f"LABEL_{i}" for i in range(count)}
    return {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}}
