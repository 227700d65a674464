"""The same input gives the same bytes in every process: letter l of specs/formats.md, 2.9."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from tests.oracles.faulty import pair, saved

ROOT = Path(__file__).parent.parent.parent
WIDTH = 12

CONVERT = """
import sys, lorakit
source, out = sys.argv[1:]
for to in ("diffusers", "kohya", "comfyui"):
    lorakit.convert(source, f"{out}-{to}.safetensors", to=to, run=lorakit.RunOptions(sync=False))
"""


def test_three_processes_write_the_same_bytes(tmp_path):
    """l. safetensors writes its metadata in the random order of a hash map."""
    tensors = pair("lora_unet_double_blocks_0_img_attn_qkv", 36, WIDTH) | pair(
        "lora_unet_double_blocks_3_img_mlp_0", 48, WIDTH, alpha=1.0
    )
    facts = {f"ss_{n}": str(n) for n in range(40)}
    path = saved(tmp_path / "a.safetensors", tensors, sshs_model_hash="old", **facts)
    seen = set()
    for seed in ("0", "1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", CONVERT, str(path), str(tmp_path / seed)]
        subprocess.run(command, check=True, env=environment)
        files = sorted(tmp_path.glob(f"{seed}-*.safetensors"))
        assert len(files) == 3
        seen.add(tuple(hashlib.sha256(f.read_bytes()).hexdigest() for f in files))
    assert len(seen) == 1
