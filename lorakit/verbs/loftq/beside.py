"""What lies beside the weights of a quantised base: the files of the old one, an index, a card, and
a config that says how it is quantised.

Source: huggingface/transformers v5.23, src/transformers/utils/quantization_config.py
(BitsAndBytesConfig) and src/transformers/quantizers/quantizers_utils.py (should_convert_module).
"""

from collections.abc import Iterator
from typing import Any

from lorakit import __version__
from lorakit.engine.plan import Plan
from lorakit.folder.card import format_card
from lorakit.folder.companions import companions
from lorakit.folder.facts import edited
from lorakit.folder.index import format_index
from lorakit.store.reading import read_file
from lorakit.verbs.base.skipping import unquantised
from lorakit.verbs.beside import index_name
from lorakit.verbs.loftq.weight import MODEL, Splitter

DEFAULTS = {"llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False}


def quantised_files(splitter: Splitter, plan: Plan) -> Iterator[tuple[str, bytes]]:
    """Every small file of the base by its place in the output, its config last."""
    base = splitter.base
    if base.folder is None:
        return
    copies = companions(base.folder)
    config = copies.pop("config.json", None)
    yield from ((f"base/{n}", read_file(p)) for n, p in copies.items())
    yield "base/README.md", _card(splitter)
    weights = [f for f in plan.files if f.name.startswith("base/")]
    if index := index_name(base, len(weights)):
        placed = {t: f.name.removeprefix("base/") for f in weights for t in f.tensors}
        old = base.index if base.index and base.index.name == index else None
        total = sum(f.size - len(f.header) for f in weights)
        yield f"base/{index}", format_index(placed, total, old)
    if config is not None:
        yield "base/config.json", edited(config, _facts(splitter))


def _facts(splitter: Splitter) -> dict[str, Any]:
    """What is new in config.json."""
    if splitter.quant.save != "quantized":
        return {}
    bytewise = splitter.quant.quant == "int8"
    four = {
        "bnb_4bit_compute_dtype": _dtype(splitter),
        "bnb_4bit_quant_type": "fp4" if bytewise else splitter.quant.quant,
        "bnb_4bit_use_double_quant": splitter.quant.double_quant,
        "bnb_4bit_quant_storage": "uint8",
    }
    return {
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_8bit": bytewise,
            "load_in_4bit": not bytewise,
            "_load_in_8bit": bytewise,
            "_load_in_4bit": not bytewise,
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": _skipped(splitter),
            **DEFAULTS,
            **four,
        }
    }


def _skipped(splitter: Splitter) -> list[str]:
    """The modules that are not quantised."""
    taken = {w.tensor for w in splitter.weights.values()}
    return unquantised(splitter.base.infos, taken, splitter.base.config)


def _dtype(splitter: Splitter) -> str:
    """The dtype that most quantised weights had."""
    codes = [splitter.base.infos[w.tensor].dtype for w in splitter.weights.values()]
    return MODEL.get(max(set(codes), key=codes.count), "float32")


def _card(splitter: Splitter) -> bytes:
    base = splitter.base
    name = base.located.repo or base.located.path.name
    readme = base.folder / "README.md" if base.folder else None
    quant = splitter.quant
    text = (
        f"Made by lorakit {__version__}: {len(splitter.weights)} weights quantised with LoftQ "
        f"({quant.quant}, {quant.iterations} iterations). The adapter beside this folder belongs "
        "to it."
    )
    old = readme if readme and readme.is_file() else None
    return format_card(name, base=name, adapters=(), old=old, text=text, relation="quantized")
