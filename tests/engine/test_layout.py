"""Where every byte goes: headers kept, data aligned, copies joined."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.engine.layout import Old, Output, lay_out, split
from lorakit.engine.plan import Copy, Fold
from lorakit.store.header import PAGE, format_header, parse_header
from lorakit.tensors import TensorInfo


def old_of(tensors, metadata=None) -> Old:
    """A file that has these tensors."""
    header = format_header(tensors, metadata or {})
    infos, found = parse_header(header[8:], len(header) + sum(i.nbytes for i in tensors), "old")
    return Old("base/old", header, infos, found)


def outputs_of(old: Old, **changes) -> list[Output]:
    """Every tensor of the file as it is, but for changes: a dtype, or a recipe."""
    found = []
    for name, info in old.infos.items():
        out = Output(info, old.source, info)
        change = changes.get(name)
        if isinstance(change, str):
            out = replace(out, tensor=replace(info, dtype=change))
        elif change is not None:
            out = replace(out, recipe=change)
        found.append(out)
    return found


SIX = [TensorInfo(n, "F32", (4, 4)) for n in "abcdef"]


def test_a_file_in_which_no_header_changes_keeps_its_very_header_and_offsets():
    raw = b' {"b":{"data_offsets":[4,8],"shape":[1],"dtype":"F32"}, "a":{"dtype":"F32",'
    raw += b'"shape":[1],"data_offsets":[0,4]},"__metadata__":{"format":"mlx"}}  '
    header = len(raw).to_bytes(8, "little") + raw
    infos, metadata = parse_header(raw, len(header) + 8, "old")
    old = Old("base/old", header, infos, metadata)
    file = lay_out("new", outputs_of(old, b={"updates": []}), old, link=False)
    assert file.header == header
    assert file.size == len(header) + 8
    assert file.steps[0] == Copy("base/old", len(header), len(header) + 4, to=len(header))
    assert file.steps[1].tensor.extent == infos["b"].extent


def test_neighbours_that_stay_are_one_copy():
    old = old_of(SIX)
    file = lay_out("new", outputs_of(old, c={"updates": []}), old, link=False)
    start = len(old.header)
    assert [type(s) for s in file.steps] == [Copy, Fold, Copy]
    assert file.steps[0] == Copy("base/old", start, start + 128, to=start)
    assert file.steps[2] == Copy("base/old", start + 192, start + 384, to=start + 192)
    assert sum(s.nbytes for s in file.steps) == file.size - len(file.header)


def test_a_copy_does_not_span_what_lies_apart_in_the_source():
    old = old_of(SIX)
    outs = outputs_of(old)
    file = lay_out("new", [outs[0], outs[2], outs[3]], old, link=False)
    lengths = [(s.start - len(old.header), s.nbytes) for s in file.steps]
    assert lengths == [(0, 64), (128, 128)]


def test_a_copy_does_not_span_two_sources():
    one, two = old_of(SIX[:2]), replace(old_of(SIX[2:]), source="base/two")
    file = lay_out("new", [*outputs_of(one), *outputs_of(two)], None, link=False)
    assert [(s.source, s.nbytes) for s in file.steps] == [("base/old", 128), ("base/two", 256)]


def test_tensors_without_elements_take_no_step_and_break_no_copy():
    old = old_of([SIX[0], TensorInfo("none", "F32", (0, 4)), SIX[1]])
    file = lay_out("new", outputs_of(old), old, link=False)
    assert len(file.steps) == 1
    assert file.tensors == ("a", "none", "b")


@given(st.integers(1, 5000), st.sets(st.sampled_from("abcdef"), min_size=1))
def test_a_new_header_leaves_the_data_where_it_was_in_a_page(length, changed):
    old = old_of(SIX, {"note": "x" * length})
    outs = outputs_of(old, **dict.fromkeys(changed, "BF16"))
    file = lay_out("new", outs, old, link=False)
    assert file.header != old.header
    assert (len(file.header) - len(old.header)) % PAGE == 0
    infos, metadata = parse_header(file.header[8:], file.size, "new")
    assert metadata == old.metadata
    assert [i.dtype for i in infos.values()] == [
        "BF16" if n in changed else "F32" for n in "abcdef"
    ]
    placed = {s.tensor.name: s.tensor.extent for s in file.steps if isinstance(s, Fold)}
    assert placed == {n: infos[n].extent for n in sorted(changed)}


def test_a_file_without_a_model_gets_a_header_of_its_own():
    file = lay_out("new", outputs_of(old_of(SIX)), None, link=False)
    assert parse_header(file.header[8:], file.size, "new")[1] == {"format": "pt"}
    assert len(file.header) % 8 == 0


@pytest.mark.parametrize(
    ("changes", "linked"), [({}, "base/old"), ({"c": "BF16"}, ""), ({"c": {"updates": []}}, "")]
)
def test_only_a_file_that_stays_the_same_is_linked_and_only_on_request(changes, linked):
    old = old_of(SIX)
    assert lay_out("new", outputs_of(old, **changes), old, link=True).link == linked
    assert lay_out("new", outputs_of(old, **changes), old, link=False).link == ""


def test_a_file_that_loses_a_tensor_is_not_linked():
    old = old_of(SIX)
    assert lay_out("new", outputs_of(old)[:-1], old, link=True).link == ""


@pytest.mark.parametrize("origin", [("adapter0", "c"), ("base/old", "d")], ids=str)
def test_a_file_with_a_tensor_that_comes_from_elsewhere_is_not_linked(origin):
    old = old_of(SIX)
    source, name = origin
    outs = [
        replace(o, source=source, origin=old.infos[name]) if o.tensor.name == "c" else o
        for o in outputs_of(old)
    ]
    file = lay_out("new", outs, old, link=True)
    assert file.header == old.header
    assert file.link == ""


def test_what_lies_in_no_file_is_computed_not_copied():
    info = TensorInfo("w", "I64", (3,))  # of a pickle: at no place of a file
    file = lay_out("new", [Output(info, "base/p.bin", info)], None, link=False)
    assert [type(s) for s in file.steps] == [Fold]


@given(st.lists(st.integers(0, 10), max_size=12), st.integers(1, 12))
def test_shards_keep_the_order_and_the_limit(sizes, limit):
    outs = [
        Output(TensorInfo(f"t{i}", "U8", (n,)), "base", TensorInfo(f"t{i}", "U8", (n,)))
        for i, n in enumerate(sizes)
    ]
    shards = split(outs, limit)
    assert [o for shard in shards for o in shard] == outs
    for shard in shards:
        assert (
            sum(o.tensor.nbytes for o in shard) <= limit
            or len([o for o in shard if o.tensor.nbytes]) == 1
        )
    assert all(shards) or sizes == []
    for shard, after in pairwise(shards):
        assert sum(o.tensor.nbytes for o in shard) + after[0].tensor.nbytes > limit
