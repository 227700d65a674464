"""What does an adapter on a live model cost, beside what PEFT's costs?

Run: python -m tests.bench.runtime [--rounds N]. One unmerged adapter of rank 16 on all linear
layers, in one process with PEFT's model and the bare one, forwards alternating; and how long it
takes to attach one to 224 modules, from the open file on. With --memory: the peak of a process that
loads a bfloat16 model of 1.1 GB, and merges an adapter into it in one of three ways.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True}
SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64},
    "100M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "vocab_size": 32000,
    },
    "224 modules": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 32,
        "vocab_size": 1000,
    },
    "1.1 GB": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 10,
        "vocab_size": 16000,
    },
}
BARE, OURS, THEIRS = "bare", "lorakit", "PEFT"
SHAPES = ((1, 1), (1, 16), (4, 16))  # rows and tokens


def model(size: str, dtype: str) -> Any:
    """A Llama of one of the sizes, its weights always the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**HEADS, **SIZES[size])).eval()
    return made.to(getattr(torch, dtype))


def adapter(size: str, folder: Path, **lora: Any) -> Path:
    """An adapter for a size, as PEFT writes it."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 16, "target_modules": "all-linear", "init_lora_weights": False, **lora}
    get_peft_model(model(size, "float32"), LoraConfig(**options)).save_pretrained(folder)
    return folder


def three(size: str, folder: Path, dtype: str) -> dict[str, Any]:
    """The bare model, and with the adapter put on by either."""
    from peft import PeftModel

    from lorakit.runtime import attach

    ours = model(size, dtype)
    attach(ours, folder)
    theirs = PeftModel.from_pretrained(model(size, dtype), folder).eval().base_model.model
    return {BARE: model(size, dtype), OURS: ours, THEIRS: theirs}


def alternating(acts: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round, after some that are discarded; the first changes."""
    taken: dict[str, list[float]] = {name: [] for name in acts}
    names = list(acts)
    gc.disable()
    for number in range(rounds + 3):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = perf_counter()
            acts[name]()
            if number >= 3:
                taken[name].append(perf_counter() - start)
    gc.enable()
    return taken


def overhead(size: str, folder: Path, dtype: str, rounds: int) -> None:
    """Print what a forward takes, and what is more than the bare one as a share of PEFT's more."""
    import torch

    models = three(size, folder, dtype)
    for rows, tokens in SHAPES:
        ids = torch.arange(rows * tokens).reshape(rows, tokens) % 64
        acts = {name: partial(m, input_ids=ids, use_cache=False) for name, m in models.items()}
        with torch.no_grad():
            taken = alternating(acts, rounds)
        least = {name: min(t) * 1e3 for name, t in taken.items()}  # others use the machine too
        more = {name: least[name] - least[BARE] for name in (OURS, THEIRS)}
        show(
            f"{size} {folder.name} {dtype} {rows}x{tokens}",
            *(f"{name} {value:.2f} ms" for name, value in least.items()),
            f"overhead of lorakit {more[OURS] / more[THEIRS]:.2f} of PEFT's",
        )


def attaching(folder: Path, rounds: int) -> None:
    """Print how long it takes to attach an adapter to 224 modules, and to take it off."""
    from peft import PeftModel

    from lorakit import open_adapter
    from lorakit.runtime import attach, unload

    live, other = model("224 modules", "bfloat16"), model("224 modules", "bfloat16")
    opened = open_adapter(str(folder))
    acts = {
        OURS: lambda: attach(live, opened),
        "unload": lambda: unload(live),
        THEIRS: lambda: PeftModel.from_pretrained(other, folder).unload(),
    }
    taken: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(rounds):
        for name, act in acts.items():
            start = perf_counter()
            act()
            taken[name].append(perf_counter() - start)
    show("224 modules", *(f"{name} {median(t):.3f} s" for name, t in taken.items()))


def merging(folder: Path, rounds: int) -> None:
    """Print how long the weights of the 100M model take to be merged, and to come back."""
    from peft import PeftModel

    from lorakit.runtime import attach, merge_adapter, unmerge_adapter

    ours = model("100M", "bfloat16")
    attach(ours, folder)
    theirs = PeftModel.from_pretrained(model("100M", "bfloat16"), folder).base_model
    acts = {
        f"{OURS} merge": partial(merge_adapter, ours),
        f"{OURS} unmerge": partial(unmerge_adapter, ours),
        f"{THEIRS} merge": theirs.merge_adapter,
        f"{THEIRS} unmerge": theirs.unmerge_adapter,
    }
    taken: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(rounds):
        for name, act in acts.items():
            start = perf_counter()
            act()
            taken[name].append(perf_counter() - start)
    show("100M bfloat16", *(f"{name} {median(t) * 1e3:.0f} ms" for name, t in taken.items()))


WAYS = {
    "load alone": "lorakit.runtime.load_pretrained(base)",
    "load with merge=True": "lorakit.runtime.load_pretrained(base, adapter, merge=True)",
    "load, attach, merge_and_unload": (
        "lorakit.runtime.merge_and_unload(lorakit.runtime.load_pretrained(base, adapter))"
    ),
    "PEFT: load, merge_and_unload": (
        "peft.PeftModel.from_pretrained(lorakit.runtime.load_pretrained(base), adapter)"
        ".merge_and_unload()"
    ),
}
CHILD = """
import sys, time, peft, lorakit.runtime, transformers
base, adapter = sys.argv[1:3]
start = time.perf_counter()
model = {way}
seconds = time.perf_counter() - start
peak = next(int(row.split()[1]) for row in open("/proc/self/status") if row.startswith("VmHWM"))
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(f"{{size / 1e9:.2f}} GB of weights | peak {{peak * 1024 / 1e9:.2f}} GB | {{seconds:.1f}} s")
"""


def memory(folder: Path, rounds: int) -> None:
    """Print the peak memory of processes that load and merge."""
    model("1.1 GB", "bfloat16").save_pretrained(folder / "base", max_shard_size="300MB")
    adapter("1.1 GB", folder / "adapter")
    gc.collect()
    for _ in range(rounds):
        for name, way in WAYS.items():
            command = [sys.executable, "-c", CHILD.format(way=way), folder / "base"]
            said = subprocess.run(
                [*command, folder / "adapter"], stdout=subprocess.PIPE, check=True
            )
            show(name, said.stdout.decode().strip())


def show(*cells: str) -> None:
    """Print a line of the table."""
    sys.stdout.write(" | ".join(cells) + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        if options.memory:
            memory(root, 2)
            return
        attaching(adapter("224 modules", root / "many"), 5)
        merging(adapter("100M", root / "merged"), 9)
        for size in ("tiny", "100M"):
            for kind, lora in (("plain", {}), ("dora", {"use_dora": True})):
                folder = adapter(size, root / size / kind, **lora)
                for dtype in options.dtypes:
                    overhead(size, folder, dtype, options.rounds * (5 if size == "tiny" else 1))


if __name__ == "__main__":
    main(sys.argv[1:])
