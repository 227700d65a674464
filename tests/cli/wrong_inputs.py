"""Wrong inputs, made out of the demo's files, under the words of docs/reference/exit-codes.md."""

from collections.abc import Callable

from tests.cli import wrong_adapters as adapters
from tests.cli import wrong_files as files
from tests.cli import wrong_loras as loras
from tests.cli import wrong_results as results
from tests.cli.spoil import (
    MERGE,
    configured,
    plain,
)

# The commands that go with the words of docs/reference/exit-codes.md.
WRONG: dict[str, Callable[[], list[str]]] = {
    # 2
    "a command that is not there": plain("merg", "base", "style", "-o", "merged"),
    "an option that is not there": plain(*MERGE, "--overwrit"),
    "no output": plain("merge", "base", "style"),
    "more weights than adapters": plain(*MERGE, "--weight", "1", "--weight", "0.5"),
    "a weight that is not finite": plain(*MERGE, "--weight", "inf"),
    "a size that is none": plain(*MERGE, "--max-memory", "much"),
    "a dtype that is none": plain(*MERGE, "--dtype", "int4"),
    "a key map without `=`": plain(*MERGE, "--key-map", "model"),
    "a pattern that is no regular expression": plain(*MERGE, "--allow-unmatched", "("),
    "a method of combining that is none": plain(*adapters.COMBINE, "--method", "tise"),
    "pruning without a density": plain(*adapters.COMBINE, "--method", "ties"),
    "a density above 1": plain(*adapters.COMBINE, "--method", "ties", "--density", "1.5"),
    "an option that the method has no use for": plain(*adapters.COMBINE, "--density", "0.5"),
    "resize without saying how far": plain(*adapters.RESIZE),
    "two rules of how far to resize": plain(*adapters.RESIZE, "--energy", "0.9", "--sv-fro", "0.9"),
    "extract from a model and an adapter at once": plain(
        "extract", "base", "base", "--adapter", "style", "-o", "lora", "--rank", "4"
    ),
    "a method of initialising that is none": plain(*adapters.INIT, "--method", "kaimin"),
    "init from statistics without any": plain(*adapters.INIT, "--method", "eva"),
    "init of DoRA with a method that changes the base": plain(
        *adapters.INIT, "--method", "pissa", "--dora"
    ),
    "an adapter alone of a method that nobody can undo": plain(
        *adapters.INIT, "--method", "pissa-fast", "--adapter-only"
    ),
    "layers that are no numbers": plain(*adapters.INIT, "--layers", "first"),
    "an adapter as a file": plain("combine", "style", "detail", "-o", "both.safetensors"),
    "a pipeline into one file": loras.one_file,
    "a model into a file of another format": plain(*MERGE[:-1], "merged.gguf"),
    # 3
    "a path that is not there": plain("merge", "bass", "style", "-o", "merged"),
    "a shard is cut short": files.cut_shard,
    "a shard is cut within its header": files.cut_header,
    "a shard is empty": files.empty_shard,
    "a file that goes along cannot be read": files.unreadable_companion,
    "a shard is missing": files.missing_shard,
    "a shard is missing, and so is the index": files.missing_shard_no_index,
    "a shard is stale: it has other tensors than the index says": files.stale_shard,
    "the index leads out of its folder (`../`)": files.index_leads_out,
    "the index is no JSON": files.index_is_no_json,
    "the index has no weight map": files.no_weight_map,
    "a header bomb: a length of 1 GiB": files.header_bomb,
    "a header bomb: a million open brackets": files.deep_header,
    "a name stands twice in a header": files.twice_in_header,
    "two tensors overlap": files.overlapping,
    "a tensor has other bytes than its shape needs": files.wrong_size_of_tensor,
    "a tensor lies beyond the end of the file": files.outside,
    "the base is quantised: int8": files.quantised,
    "the base is quantised: float8 with scales": files.float8_with_scale,
    "the base is quantised: packed (GPTQ, AWQ)": files.packed,
    "an adapter without its config": files.lone_adapter,
    "a folder with several adapters": files.two_adapters,
    "an unknown alpha": configured(lora_alpha=None),
    "an infinite alpha": configured(lora_alpha=float("inf")),
    "modules_to_save that is no list of names": configured(modules_to_save=[1]),
    "a fact in the base's config.json that is none": files.odd_fact,
    "a field that this version does not know": configured(use_superlora=True),
    "a pattern in the config that is no regular expression": files.odd_pattern,
    "a pattern in the config of two thousand characters": files.long_pattern,
    "a pickle without --allow-pickle": files.pickled,
    "a pickle that runs code": files.running_pickle,
    "an activated LoRA (aLoRA)": configured(alora_invocation_tokens=[1, 2]),
    "Arrow": configured(arrow_config={"top_k": 2}),
    "QA-LoRA": configured(use_qalora=True),
    "AdaLoRA": files.adalora,
    "IA3, LoHa, OFT, prompts … (any type but LoRA)": configured(peft_type="IA3"),
    "layers replicated that the base does not have": configured(layer_replication=[[0, 9]]),
    "layers of Megatron": configured(megatron_config={"tensor_parallel": 2}),
    "CorDA, LoRA-GA or pissa_niter without --init-adapter or --base-is-residual": configured(
        init_lora_weights="pissa_niter_16"
    ),
    "LoftQ without --base-is-residual": configured(init_lora_weights="loftq"),
    "unmerge of DoRA": results.dora,
    "unmerge of PiSSA": results.pissa,
    "unmerge of a layer that was replaced": results.replaced_layers,
    "verify of something else": plain("verify", "base"),
    "verify by a manifest that is not of this form": results.strange_manifest,
    "verify after the base was moved": results.base_gone,
    "verify with another adapter": results.other_adapter,
    "combine of DoRA without --base": adapters.dora,
    "combine of PiSSA without --base": lambda: adapters.changed_base(*adapters.COMBINE),
    "resize of PiSSA without --base-is-residual": adapters.begun,
    "init: NaN in a weight that the method looks at": adapters.weight_not_finite,
    "extract of an adapter that the first one alone explains": adapters.unknown_start,
    "unmerge of IA3": loras.multiplied,
    "convert of torchtune's file without its alpha": loras.torchtune,
    # 4
    "half a pair: A without B": files.half_pair,
    "KaSA without its diagonals": configured(kasa_config={"beta": 1e-4}),
    "fused experts that target_parameters does not name": files.fused_experts,
    "a key that the base does not have": files.unknown_key,
    "the adapter of another model, by its names": files.other_names,
    "the adapter of another model, by its shapes": files.other_shape,
    "NaN in the adapter": files.not_finite,
    "one side of tied embeddings without --untie": files.tied,
    "two adapters that replace the same layer": files.both_replace,
    "more token rows than indices": files.tokens,
    "extract: nothing differs": adapters.same_model,
    "extract: tensors differ that get no factors": adapters.other_head,
    "init: a name that means no module": plain(*adapters.INIT, "--target-modules", "q_porj"),
    "init: a pattern of ranks that means no module": plain(
        *adapters.INIT, "--rank-pattern", "q_porj=2"
    ),
    "init: a rank above the sides of a weight": plain(*adapters.INIT[:-1], "65"),
    "init: statistics of another model": adapters.other_statistics,
    "init: an embedding, with a method for linear layers": plain(
        *adapters.INIT, "--target-modules", "embed_tokens", "--method", "pissa"
    ),
    "combine: adapters without a module in common": adapters.no_common_module,
    "combine: adapters of other models": adapters.other_model,
    "combine: adapters of other stacks of layers": adapters.other_layers,
    "combine: numbers that float16 does not have": adapters.too_large,
    "combine: tensors held whole that differ": adapters.whole_differ,
    "convert: a name that no family has": loras.unknown,
    "convert: a LoRA file with half a pair": loras.half,
    "convert: factors without a product": loras.no_product,
    "convert: a module that the format has not": loras.no_place,
    "convert: DoRA norms of one part of a fused projection": loras.norms_of_a_part,
    "convert: --fix-split-qkv-alpha of a file that was not trained so": loras.split_qkv,
    "convert to GGUF for a base that does not say its heads": loras.gguf_heads,
    "an adapter of several models of a pipeline, into one": loras.several,
    "--component of a model that the adapter has nothing for": loras.no_such_part,
    "an adapter of a model that the pipeline has not": loras.no_such_model,
    "an adapter that fits two models of a pipeline": loras.fits_two,
    "merge of BOFT": loras.boft,
    "compare of a difference of a whole weight": loras.differences,
    # 5
    "not enough disk": results.no_disk,
    "not enough memory (`--max-memory 1MB`)": plain(*MERGE, "--max-memory", "1MB"),
    # 6
    "a hub id that is not in the cache, offline": plain("merge", "org/m", "style", "-o", "merged"),
    "verify of a base from the hub that is in the cache no more, offline": results.hub_base_gone,
    # 7
    "the output exists": results.exists,
    "two writers": results.two_writers,
    "an unfinished run with other options is there": results.unfinished,
    "the output lies inside an input": plain("merge", "base", "style", "-o", "base/merged"),
    "the output is an input": plain("merge", "base", "style", "-o", "base", "--overwrite"),
    "the output has a file for a folder": results.no_folder,
    "demo into a folder that is not empty": plain("demo", "--keep", "base"),
    # 8
    "a number of a merged tensor was changed": results.changed_number,
    "a byte of an untouched tensor was changed": results.changed_copy,
    "a file of the result is gone": results.lost_file,
    "a weight file that is not of the result lies in it": results.stray_file,
    "the index of the result was changed": results.other_index,
    "a fact in its config was changed that the merge had set": results.other_fact,
}
