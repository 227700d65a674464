"""Where the config of a model has those of the models it is made of. Plain Python, for every room
that looks for a fact.

Source: huggingface/transformers v5.23, models/*/configuration_*.py; `llm_config` and
`language_config` are of models whose code is not in it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Of what reads the text.
NESTED = ("text_config", "llm_config", "language_config", "vlm_config", "thinker_config")
SIDES = ("encoder", "decoder")  # of models that are made of two


def configs(
    config: Mapping[str, Any], within: Sequence[str] = NESTED, place: str = ""
) -> Iterator[tuple[str, Any]]:
    """A config and those within it, an outer one before its inner ones, with the names that lead
    there.
    """
    yield place, config
    for name in within:
        if isinstance(inner := config.get(name), dict):
            yield from configs(inner, within, f"{place}{name}.")


def model_type(config: Mapping[str, Any]) -> str:
    """What transformers calls models of this kind; "" where the config does not say."""
    return str(config.get("model_type") or "")
