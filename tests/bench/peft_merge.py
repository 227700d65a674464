"""What a user of PEFT runs to merge: load, merge_and_unload, save_pretrained.

Run by tests.bench.merge_vs_peft: python -m tests.bench.peft_merge BASE ADAPTER OUT DTYPE. Prints
the seconds of each part as JSON.
"""

import json
import sys
import time


def main(base: str, adapter: str, out: str, dtype: str) -> None:
    """Merge, and say what took how long."""
    times = [time.perf_counter()]
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    times.append(time.perf_counter())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    model = PeftModel.from_pretrained(model, adapter)
    times.append(time.perf_counter())
    model = model.merge_and_unload()
    times.append(time.perf_counter())
    model.save_pretrained(out)
    times.append(time.perf_counter())
    names = ("import", "load", "merge", "save")
    parts = {n: b - a for n, a, b in zip(names, times, times[1:], strict=False)}
    sys.stdout.write(json.dumps(parts) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
