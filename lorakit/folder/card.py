"""The model card of a merge: lineage that the Hub understands, and what was done in a few lines.

Source: the model card metadata of the Hub (huggingface.co/docs/hub/model-cards),
`base_model_relation`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")


def format_card(
    title: str,
    *,
    base: str,
    adapters: Sequence[tuple[str, float]],
    old: Path | None,
    text: str,
    relation: str = "",
) -> bytes:
    """README.md of a merged model: front matter with its lineage, then `text`.

    One adapter at full weight is a finetune of the base, anything else a merge, unless `relation`
    says what it is. Licence and language come from the base's own card `old`.
    """
    import yaml

    one = len(adapters) == 1 and adapters[0][1] == 1.0
    inherited = front_matter(old) if old else {}
    front = {
        "base_model": [base, *(name for name, _ in adapters)],
        "base_model_relation": relation or ("finetune" if one else "merge"),
        "tags": ["lorakit", relation or "merge"],
        **{k: inherited[k] for k in INHERITED if inherited.get(k)},
    }
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    rows = "\n".join(f"- `{name}`, weight {weight:g}" for name, weight in adapters)
    card = f"---\n{head}---\n\n# {title}\n\n{text}\n" + (f"\n{rows}\n" if rows else "")
    return card.encode(errors="backslashreplace")  # the name of a folder need not be valid UTF-8


def front_matter(card: Path) -> Mapping[str, Any]:
    """The YAML head of a model card, its values as texts; empty where there is none that parses.

    What is read otherwise is not what is meant: the language `no` would be False.
    """
    import yaml

    text = card.read_text(encoding="utf-8-sig", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        front = yaml.load(text[4 : text.index("\n---", 4)], yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        return {}
    return front if isinstance(front, dict) else {}
