"""The table of layouts. A new one is a file here, and a row below."""

from collections.abc import Iterator, Mapping
from typing import Any

from lorakit.quant.stored import awq, eight_bit, four_bit, gptq, mxfp4, packed_ints, scaled
from lorakit.quant.stored.weight import Find, Written
from lorakit.tensors import Source

LAYOUTS: Mapping[str, Find] = {
    "four_bit": four_bit.find,
    "eight_bit": eight_bit.find,
    "scaled": scaled.find,
    "mxfp4": mxfp4.find,
    "gptq": gptq.find,
    "awq": awq.find,
    "packed_ints": packed_ints.find,
}


def stored_weights(source: Source, config: Mapping[str, Any]) -> Iterator[Written]:
    """Every weight of a checkpoint that is in a quantised layout which can be read.

    `config` is its `quantization_config`, empty where there is none.

    Raises:
        InputError: the tensors of one are missing, or contradict each other.
    """
    for find in LAYOUTS.values():
        yield from find(source, config)
