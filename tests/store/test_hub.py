"""A path or a hub id is found, pinned to a commit; whatever the hub answers is one line.

The hub is a server in this process. huggingface_hub reads its settings when it is imported, so what
is tested runs in a child: one while the hub is up, one offline, one while nobody answers.
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.errors import HubError, InputError, ResourceError
from lorakit.store.hub import expected_sha256, locate
from lorakit.store.hub_id import parse_hub_id
from tests.store.hub_server import Hub

CHILD = """
import json, sys
from lorakit.errors import LorakitError
from lorakit.store.hub import locate

def answer(reference, **options):
    try:
        found = locate(reference, **options)
    except LorakitError as e:
        return {"error": type(e).__name__, "said": str(e)}
    files = sorted(p.relative_to(found.path).as_posix() for p in found.path.rglob("*"))
    return {"path": str(found.path), "repo": found.repo, "revision": found.revision, "files": files}

print(json.dumps([answer(r, **o) for r, o in json.load(sys.stdin)]))
"""
ROOT = Path(__file__).parent.parent.parent
QUIET = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK")
CONFIG = {"config.json": b"{}", "README.md": b"# model"}
FIRST, SECOND = b"the first weights", b"the second weights"


def run(
    url: str, home: Path, steps: list, *, offline: bool = False, loud: bool = False
) -> list[dict]:
    """What `locate` answers in a child of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= dict.fromkeys(QUIET, "1")
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(steps),
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode == 0, child.stderr
    assert loud or child.stderr == ""  # no progress bars but on a terminal
    return json.loads(child.stdout)


class Sessions:
    """What was asked of `locate` while the hub was up, and again offline and without a hub."""

    def __init__(self, home: Path):
        self.home = home
        with Hub() as hub:
            self.url = hub.url
            self.commits = fill(hub)
            self.steps = steps(self.commits)
            self.up = self.ask()
            self.asked = list(hub.asked)
            hub.push("org/model", {**CONFIG, "model.safetensors": b"the third weights"})
            hub.asked.clear()
            self.moved = self.ask("org/model", f"org/model@{self.commits['second']}")
            self.asked_later = list(hub.asked)
        self.down = self.ask("org/plain", "org/unknown", "org/plain/lora")
        self.offline = self.ask(offline=True)

    def ask(self, *only: str, offline: bool = False) -> dict[str, dict]:
        some = {k: v for k, v in self.steps.items() if k in only or not only}
        some |= {k: (k, {}) for k in only if k not in some}
        return dict(
            zip(some, run(self.url, self.home, [*some.values()], offline=offline), strict=True)
        )


def fill(hub: Hub) -> dict[str, str]:
    """The repositories; the commits of the first."""
    first = hub.push("org/model", {**CONFIG, "model.safetensors": FIRST})
    hub.push("org/model", {**CONFIG, "model.safetensors": b"proposed"}, ref="refs/pr/3")
    second = hub.push(
        "org/model",
        {
            **CONFIG,
            "model.safetensors": SECOND,
            "model.fp16.safetensors": b"again",
            "consolidated.safetensors": b"again",
            "pytorch_model.bin": b"again",
            "model.gguf": b"again",
            "checkpoint-10/model.safetensors": b"older",
            "checkpoint-10/trainer_state.json": b"{}",
            "chart.png": b"",
        },
    )
    lora = {"adapter_config.json": b"{}", "adapter_model.safetensors": FIRST}
    hub.push("org/plain", {**CONFIG, **{f"lora/{n}": d for n, d in lora.items()}})
    hub.push("org/pickled", {**CONFIG, "pytorch_model.bin": FIRST, "training_args.bin": b"code"})
    hub.push("org/empty", CONFIG)
    hub.push("org/gated", {**CONFIG, "model.safetensors": FIRST}, gated=True)
    hub.push("org/broken", CONFIG)
    hub.fail["org/broken"] = 500
    hub.push("org/forbidden", CONFIG)
    hub.fail["org/forbidden"] = 403
    return {"first": first, "second": second}


def steps(commits: dict[str, str]) -> dict[str, tuple[str, dict]]:
    plain = (
        *("org/model", "org/model@refs/pr/3", "org/model@nowhere", "org/model/checkpoint-10"),
        *("org/plain", "org/plain/lora/", "org/plain/lora/adapter_model.safetensors"),
        *("org/plain/lore", "org/plain@main/lora/nothing.safetensors"),
        *("org/pickled", "org/empty", "org/gated", "org/broken", "org/forbidden", "org/unknown"),
    )
    return {
        **{reference: (reference, {}) for reference in plain},
        "first": (f"org/model@{commits['first']}", {}),
        "pickles": ("org/pickled", {"allow_pickle": True}),
        "config": ("org/gated@main", {"patterns": ["config.json"]}),
    }


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return Sessions(tmp_path_factory.mktemp("hub"))


def test_a_hub_id_is_downloaded_and_pinned(hub):
    found = hub.up["org/model"]
    assert (found["repo"], found["revision"]) == ("org/model", hub.commits["second"])
    assert Path(found["path"]).name == found["revision"]
    assert (Path(found["path"]) / "model.safetensors").read_bytes() == SECOND


def test_each_set_of_weights_is_downloaded_once(hub):
    found = hub.up["org/model"]
    assert found["files"] == ["README.md", "config.json", "model.safetensors"]


def test_weights_are_asked_for_by_commit_never_by_branch(hub):
    files = [line for line in hub.asked if "/resolve/" in line]
    assert files
    assert [line for line in files if "/resolve/main/" in line or "/resolve/refs" in line] == []


def test_a_revision_is_a_commit_or_a_ref(hub):
    first, proposed = hub.up["first"], hub.up["org/model@refs/pr/3"]
    assert first["revision"] == hub.commits["first"]
    assert (Path(first["path"]) / "model.safetensors").read_bytes() == FIRST
    assert (Path(proposed["path"]) / "model.safetensors").read_bytes() == b"proposed"


def test_a_branch_that_moved_is_a_new_commit_and_a_pinned_one_is_not_asked_for(hub):
    moved, pinned = hub.moved.values()
    assert moved["revision"] not in hub.commits.values()
    assert (Path(moved["path"]) / "model.safetensors").read_bytes() == b"the third weights"
    assert pinned["path"] == hub.up["org/model"]["path"]
    assert [line for line in hub.asked_later if hub.commits["second"] in line] == []


def test_a_subfolder_is_returned_and_only_that_is_downloaded(hub):
    found = hub.up["org/plain/lora/"]
    assert Path(found["path"]).name == "lora"
    assert found["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert hub.up["org/model/checkpoint-10"]["files"] == ["model.safetensors", "trainer_state.json"]


def test_a_weight_file_in_a_repository_can_be_named(hub):
    found = Path(hub.up["org/plain/lora/adapter_model.safetensors"]["path"])
    assert found.read_bytes() == FIRST
    assert (found.parent / "adapter_config.json").exists()


def test_pickles_are_downloaded_only_on_request(hub):
    refused = hub.up["org/pickled"]
    assert refused["error"] == "InputError"
    assert "pytorch_model.bin" in refused["said"]
    assert "--allow-pickle" in refused["said"]
    assert hub.up["pickles"]["files"] == ["README.md", "config.json", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ("org/unknown", "HubError", ["no path here", "no model 'org/unknown'", "hf auth login"]),
        ("org/gated", "HubError", ["gated", "/org/gated, then: hf auth login"]),
        ("config", "HubError", ["gated"]),
        ("org/model@nowhere", "HubError", ["no revision 'nowhere'", "/commits/main"]),
        ("org/broken", "HubError", ["answered 500", "Try again"]),
        ("org/forbidden", "HubError", ["answered 403", "hf auth login"]),
        ("org/plain/lore", "HubError", ["no 'lore'", "Close to it: 'lora'"]),
        ("org/plain@main/lora/nothing.safetensors", "HubError", ["no 'lora/nothing.safetensors'"]),
        ("org/empty", "InputError", ["no weights"]),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_the_next_step(hub, asked, error, said):
    answer = hub.up[asked]
    assert answer.get("error") == error
    assert "\n" not in answer["said"]
    assert [text for text in said if text not in answer["said"]] == []


def test_offline_the_cache_gives_the_same_paths(hub):
    moved = ("org/model", "org/model/checkpoint-10")  # main did, since
    found = {k: v for k, v in hub.up.items() if "path" in v and k not in moved}
    assert len(found) >= 6
    assert {k: hub.offline[k] for k in found} == found
    assert hub.offline["org/model"] == hub.moved["org/model"]


def test_offline_what_is_not_cached_says_how_to_get_it(hub):
    for asked in ("org/unknown", "org/gated", "org/broken"):
        answer = hub.offline[asked]
        assert answer["error"] == "HubError"
        assert "HF_HUB_OFFLINE is set" in answer["said"]
        assert f"hf download {asked}" in answer["said"]
    assert "--revision nowhere" in hub.offline["org/model@nowhere"]["said"]


def test_when_nobody_answers_the_cache_serves_and_the_rest_is_refused(hub):
    assert hub.down["org/plain"] == hub.up["org/plain"]
    assert hub.down["org/unknown"]["error"] == "HubError"
    assert f"{hub.url} cannot be reached" in hub.down["org/unknown"]["said"]


def test_half_a_snapshot_is_not_taken_for_a_whole(hub, tmp_path):
    shutil.copytree(hub.home, tmp_path / "home", symlinks=True)
    snapshot = tmp_path / "home" / Path(hub.up["first"]["path"]).relative_to(hub.home)
    (snapshot / "model.safetensors").unlink()
    (answer,) = run(hub.url, tmp_path / "home", [hub.steps["first"]], offline=True)
    assert answer["error"] == "HubError"
    assert "cache has not all of it" in answer["said"]


def test_a_repository_without_anything_that_was_asked_for_is_refused(tmp_path):
    with Hub() as hub:
        hub.push("org/picture", {"chart.png": b""})
        asked = [("org/picture", {"patterns": ["config.json"]})]
        (answer,) = run(hub.url, tmp_path, asked, loud=True)
    assert answer["said"] == "org/picture has no file of the kind that is asked for."


def test_a_cache_without_listings_still_serves_offline(hub, tmp_path):
    shutil.copytree(hub.home, tmp_path / "home", symlinks=True)
    for listing in tmp_path.glob("home/hub/*/trees/*.json"):
        listing.unlink()
    asked = [hub.steps["first"], hub.steps["pickles"]]
    first, pickles = run(hub.url, tmp_path / "home", asked, offline=True)
    assert first["files"] == hub.up["first"]["files"]
    assert pickles["files"] == hub.up["pickles"]["files"]


def test_the_promised_sha256_is_known_offline(hub, tmp_path):
    shutil.copytree(hub.home, tmp_path / "home", symlinks=True)
    folder = tmp_path / "home" / Path(hub.up["first"]["path"]).relative_to(hub.home)
    weights = folder / "model.safetensors"
    expected = hashlib.sha256(FIRST).hexdigest()
    assert expected_sha256(weights) == expected
    assert expected_sha256(folder / "config.json") is None  # git knows small files by another hash
    listing = folder.parent.parent / "trees" / f"{folder.name}.json"
    for damaged in ("{", "[]", '{"files": []}', '{"files": {"model.safetensors": 3}}'):
        listing.write_text(damaged)
        assert expected_sha256(weights) == expected  # by the name of the blob
    assert expected_sha256(weights.resolve()) == expected
    listing.unlink()
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data)  # a file system without links
    assert expected_sha256(weights) is None


def test_a_file_outside_the_cache_has_no_promised_sha256(tmp_path):
    name = hashlib.sha256(b"x").hexdigest()
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "link").symlink_to(name)
    assert expected_sha256(tmp_path / name) is None
    assert expected_sha256(tmp_path / "link") is None
    assert expected_sha256(tmp_path / "missing") is None


def test_a_path_that_exists_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    found = locate("org/name")
    assert (found.path, found.repo, found.revision) == (Path("org/name"), None, None)


def test_the_home_folder_may_be_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate("~/model").path == tmp_path / "model"


@pytest.mark.parametrize(
    "reference",
    [
        *("", "name", "./org/name", "../org/name", "/org/name", "~/name", "a\0b"),
        *("model.safetensors", "loras/style.safetensors", "org/na--me", "org/na..me"),
        *("org/name/..", "org/name/../other", "org/name@main/../x", "org/name//x", "org/name@"),
        "C:\\models\\llama",
    ],
)
def test_what_can_only_be_a_path_is_never_looked_up(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        locate(reference)


def test_a_mistyped_path_is_answered_with_the_names_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loras/styles").mkdir(parents=True)
    Path("loras/styles/watercolour.safetensors").touch()
    for reference in ("loras/styles/watercolor.safetensors", "loras/style", "lora/styles/x"):
        with pytest.raises(InputError) as caught:
            locate(str(tmp_path / reference))
        assert "Close to it: " in caught.value.hint


def test_looking_at_a_path_loads_neither_huggingface_hub_nor_numpy(tmp_path):
    code = "import sys; from lorakit.store.hub import locate; locate('.')"
    code += "\nassert not {'huggingface_hub', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError, "HF_HOME"),
        (OSError("Consistency check failed"), HubError, "Consistency check failed"),
        (ValueError("odd\nand long"), HubError, "ValueError: odd."),
    ],
)
def test_other_failures_of_a_download_are_one_line_too(error, kind, said):
    from lorakit.store.hub_errors import explained

    told = explained(error, parse_hub_id("org/name"))
    assert type(told) is kind
    assert said in str(told)
    assert "\n" not in str(told)
