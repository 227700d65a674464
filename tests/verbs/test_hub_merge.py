"""A merge takes hub ids: fetched and pinned while the hub is up, from the cache when it is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit import convert
from lorakit.verbs.demo import demo
from tests.faults.pipeline import LAYERS, make_pipeline
from tests.store.hub_server import Hub

ROOT = Path(__file__).parent.parent.parent


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lorakit(home, url, *args, offline=False):
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    env |= dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"), "1")
    return subprocess.run(
        [sys.executable, "-m", "lorakit", *args],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The same merge from the hub, offline from its cache, and from plain folders."""
    tmp = tmp_path_factory.mktemp("hub")
    made = demo(tmp / "demo")
    card = b"---\nlicense: apache-2.0\n---\n# Base\n"
    (made / "base" / "README.md").write_bytes(card)
    with Hub() as hub:
        commit = hub.push("org/base", files(made / "base"))
        hub.push("org/style", {f"v2/{n}": b for n, b in files(made / "style").items()})
        args = ("merge", "org/base@main", "org/style/v2", "-q", "-o")
        online = lorakit(tmp / "home", hub.url, *args, str(tmp / "online"))
    offline = lorakit(tmp / "home", hub.url, *args, str(tmp / "offline"), offline=True)
    local = lorakit(
        tmp, "", "merge", str(made / "base"), str(made / "style"), "-q", "-o", str(tmp / "local")
    )
    assert (online.stderr, offline.stderr, local.stderr) == ("", "", "")
    return tmp, commit


def test_the_same_bytes_come_from_the_hub_its_cache_and_a_folder(merged):
    tmp, _ = merged
    assert files(tmp / "online") == files(tmp / "offline")
    local = files(tmp / "local")
    weights = [n for n in local if n.endswith(".safetensors")]
    assert len(weights) == 3
    assert all(files(tmp / "online")[n] == local[n] for n in weights)


def test_the_manifest_and_the_card_name_repository_commit_and_licence(merged):
    tmp, commit = merged
    base, adapter = json.loads((tmp / "online" / "lorakit.json").read_text())["inputs"]
    assert (base["repo"], base["revision"]) == ("org/base", commit)
    assert adapter["repo"] == "org/style"
    card = (tmp / "online" / "README.md").read_text()
    assert "base_model:\n- org/base\n" in card
    assert "base_model_relation: finetune" in card
    assert "license: apache-2.0" in card


@pytest.mark.parametrize(
    "command",
    [
        ("merge", "org/base@main", "org/style/v2"),
        ("edit", "org/style/v2", "--scale", "2"),
        ("resize", "org/style/v2", "--rank", "1"),
        ("combine", "org/style/v2", "org/style/v2"),
        ("convert", "org/style/v2", "--names", "disk", "--base", "org/base@main"),
        ("extract", "org/base@main", "--adapter", "org/style/v2", "--rank", "1"),
        ("compare", "org/style/v2", "org/style/v2"),
    ],
    ids=lambda command: command[0],
)
def test_a_cached_file_that_is_not_the_hubs_any_more_is_refused(merged, command):
    tmp, _ = merged
    cached = tmp / "home/hub/models--org--style"
    (blob,) = (p for p in cached.glob("snapshots/*/v2/adapter_model.safetensors"))
    target, whole = blob.resolve(), blob.read_bytes()
    target.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        out = () if command[0] == "compare" else ("-q", "-o", str(tmp / "bad"))
        refused = lorakit(tmp / "home", "", *command, *out, offline=True)
    finally:
        target.write_bytes(whole)
    assert refused.returncode == 3
    assert "sha256 differs" in refused.stderr
    assert not list(tmp.glob("bad*"))


def test_the_result_verifies_against_the_cache(merged):
    tmp, _ = merged
    assert lorakit(tmp / "home", "", "verify", str(tmp / "online"), offline=True).returncode == 0


def test_an_adapter_of_mlx_comes_from_the_hub_too(made, tmp_path):
    convert(made / "style", tmp_path / "mlx", to="mlx")
    args = ("merge", made / "base", "-q", "-o")
    with Hub() as hub:
        hub.push("org/mlx", files(tmp_path / "mlx"))
        online = lorakit(tmp_path / "home", hub.url, *args, tmp_path / "a", "org/mlx")
    local = lorakit(tmp_path, "", *args, tmp_path / "b", tmp_path / "mlx")
    assert (local.stderr, online.returncode) == ("", 0)
    for part in (tmp_path / "b").glob("*.safetensors"):
        assert (tmp_path / "a" / part.name).read_bytes() == part.read_bytes()


def test_a_lora_that_diffusers_has_saved_comes_from_the_hub_too(tmp_path):
    make_pipeline(tmp_path)
    args = ("merge", str(tmp_path / "pipe"))
    with Hub() as hub:
        hub.push("org/image", files(tmp_path / "image") | {"README.md": b"# A style"})
        online = lorakit(tmp_path / "home", hub.url, *args, "org/image", "-q", "-o", tmp_path / "a")
    local = lorakit(tmp_path, "", *args, tmp_path / "image", "-q", "-o", tmp_path / "b")
    assert (online.stderr, local.stderr) == ("", "")
    for component in LAYERS:
        path = f"{component}/model.safetensors"
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_convert_and_check_take_hub_ids_of_adapters_and_bases(tmp_path):
    made = demo(tmp_path / "demo")
    with Hub() as hub:
        hub.push("org/base", files(made / "base"))
        hub.push("org/style", files(made / "style"))
        home = (tmp_path / "home", hub.url)
        checked = lorakit(*home, "check", "org/style", "--for", "peft")
        converted = lorakit(*home, "convert", "org/style", "--to", "mlx", "-o", tmp_path / "a")
        based = ("--names", "disk", "--base", "org/base")
        renamed = lorakit(*home, "convert", "org/style", *based, "-o", tmp_path / "b")
    assert (checked.stderr, converted.stderr, renamed.stderr) == ("", "", "")
    convert(made / "style", tmp_path / "c", to="mlx")
    assert files(tmp_path / "a") == files(tmp_path / "c")


def test_a_mistyped_path_is_told_with_what_is_close_to_it(tmp_path):
    made = demo(tmp_path / "demo")
    for args in (("check", "--for", "peft"), ("convert", "--to", "mlx", "-o", tmp_path / "a")):
        ran = lorakit(tmp_path, "", args[0], made / "stile", *args[1:], offline=True)
        assert ran.returncode == 3
        assert "Close to it: 'style'" in ran.stderr
