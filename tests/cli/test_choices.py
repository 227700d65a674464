"""The words that a command offers are those that its verb takes: help lists them without loading
the tables that they are from.
"""

from importlib import import_module

import click
import pytest

from lorakit.math.combining.setting import MAJORITIES
from lorakit.verbs.reformat.formats import FORMATS
from lorakit.verbs.reformat.options import CLIP_PREFIXES

ELSEWHERE = {"to": FORMATS, "clip_prefix": CLIP_PREFIXES, "majority": MAJORITIES}
ELSEWHERE |= {"alpha": ("keep", "fold")}


@pytest.mark.parametrize(
    "verb", ["combine", "convert", "edit", "extract", "init", "loftq", "merge", "resize"]
)
def test_a_command_offers_what_its_verb_takes(verb):
    known = {**import_module(f"lorakit.verbs.{verb}").CHOICES, **ELSEWHERE}
    params = import_module(f"lorakit.cli.{verb}").command.params
    offered = {p.name: set(p.type.choices) for p in params if isinstance(p.type, click.Choice)}
    assert offered
    assert offered == {name: set(known[name]) - {""} for name in offered}
