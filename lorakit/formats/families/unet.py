"""The UNets of Stable Diffusion 1, 2 and XL, in the names of LDM (SGM) and of Diffusers."""

import re
from collections.abc import Collection, Iterator

_RESNET = (
    ("{in_layers.2,out_layers.3}", "{conv1,conv2} @conv-3"),
    ("emb_layers.1", "time_emb_proj"),
    ("{in_layers.0,out_layers.0}", "{norm1,norm2}"),
    ("skip_connection", "conv_shortcut @conv-1"),
)
_ATTENTION = (
    "norm",
    "proj_in",
    "proj_out",
    *(f"transformer_blocks.#.attn{n}.to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out.0")),
    "transformer_blocks.#.ff.net.0.proj",
    "transformer_blocks.#.ff.net.2",
    *(f"transformer_blocks.#.norm{n}" for n in (1, 2, 3)),
)
LAYERS = 2  # resnets of a block on the way down; there is one more on the way up


def unet(blocks: int, down: Collection[int], up: Collection[int]) -> str:
    """The rows of a UNet; `down` and `up` are the blocks with attention."""
    return "\n".join(_rows(blocks, down, up))


def _rows(blocks: int, down: Collection[int], up: Collection[int]) -> Iterator[str]:
    yield "input_blocks.0.0 = conv_in @conv-3"
    yield "out.0 = conv_norm_out"
    yield "out.2 = conv_out @conv-3"
    yield "time_embed.{0,2} = time_embedding.linear_{1,2}"
    yield "label_emb.0.{0,2} = add_embedding.linear_{1,2}"
    for block in range(blocks):
        for layer in range(LAYERS):
            there = f"input_blocks.{1 + (LAYERS + 1) * block + layer}"
            yield from _resnet(f"{there}.0", f"down_blocks.{block}.resnets.{layer}")
            if block in down:
                yield from _attention(f"{there}.1", f"down_blocks.{block}.attentions.{layer}")
        if block < blocks - 1:
            there = f"input_blocks.{(LAYERS + 1) * (block + 1)}.0.op"
            yield f"{there} = down_blocks.{block}.downsamplers.0.conv @conv-3"
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0")
    yield from _resnet("middle_block.2", "mid_block.resnets.1")
    for block in range(blocks):
        for layer in range(LAYERS + 1):
            there = f"output_blocks.{(LAYERS + 1) * block + layer}"
            yield from _resnet(f"{there}.0", f"up_blocks.{block}.resnets.{layer}")
            if block in up:
                yield from _attention(f"{there}.1", f"up_blocks.{block}.attentions.{layer}")
            if layer == LAYERS and block < blocks - 1:
                at = 2 if block in up else 1
                yield f"{there}.{at}.conv = up_blocks.{block}.upsamplers.0.conv @conv-3"


def _resnet(there: str, here: str) -> Iterator[str]:
    yield from (f"{there}.{row} = {here}.{other}" for row, other in _RESNET)


def _attention(there: str, here: str) -> Iterator[str]:
    yield from (f"{there}.{row} = {here}.{row}" for row in _ATTENTION)


SD2 = unet(4, down=(0, 1, 2), up=(1, 2, 3))
SD1 = re.sub("(proj_in|proj_out)$", r"\1 @conv-1", SD2, flags=re.MULTILINE)
SDXL = unet(3, down=(1, 2), up=(0, 1))
