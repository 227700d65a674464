"""What the pages say is so: every command is documented, every example prints what it shows.

A ```console block is run command by command ("$ lorakit ..."), a ```python block as it stands, all
of a page in one folder that is empty at first. A command that fails must be followed by
`$ echo $?`. Blocks marked bash, text or json are not run.
"""

import re
from collections.abc import Iterator
from pkgutil import resolve_name

import click
import pytest

from tests.pages import ROOT, Example, Shell, blocks, examples, matches

PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))) if p.exists()]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
REFERENCE = ROOT / "docs/reference/cli.md"
RUN = {"console", "python"}
NOT_RUN = {"bash", "json", "text", "toml", "yaml"}
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)[^)]*\)")


@pytest.fixture
def shell(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, tools=tmp_path_factory.mktemp("bin"))


@every_page
def test_every_example_of_a_page_prints_what_it_shows(page, shell):
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "console":
            for example in examples(block.text):
                shell.run(example)
        elif block.language == "python":
            source = "\n" * (block.line - 1) + block.text  # so that a traceback names the line
            exec(compile(source, str(page), "exec"), namespace)


@every_page
def test_every_block_says_what_it_is_so_that_none_escapes_being_run(page):
    assert {block.language for block in blocks(page)} <= RUN | NOT_RUN
    assert page.read_text().count("```") == 2 * len(blocks(page))


@every_page
def test_every_link_to_a_file_leads_to_one(page):
    links = LINK.findall(page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@every_page
def test_every_file_of_ours_that_a_page_names_is_there(page):
    named = re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", page.read_text())
    homes = (ROOT, ROOT / "lorakit")
    ours = [n for n in named if any((home / n.split("/")[0]).is_dir() for home in homes)]
    assert [n for n in ours if not any((home / n).exists() for home in homes)] == []


def test_every_name_of_ours_in_a_page_or_a_docstring_means_something():
    texts = (p.read_text() for p in (*PAGES, *(ROOT / "lorakit").glob("**/*.py")))
    named = {n for text in texts for n in re.findall(r"`(lorakit(?:\.\w+)+)`", text)}
    for name in named - {"lorakit.json"}:
        resolve_name(name)


def commands() -> Iterator[tuple[str, click.Command]]:
    from lorakit.cli import cli

    context = click.Context(cli)
    for name in cli.list_commands(context):
        yield name, cli.get_command(context, name)


def flags(command: click.Command) -> set[str]:
    """The long options of a command, as they are typed."""
    spellings = {s for p in command.params for s in (*p.opts, *p.secondary_opts)}
    return {s for s in spellings if s.startswith("--")}


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def sections() -> dict[str, str]:
    """The parts of the reference, by their headings of level two."""
    _, *parts = re.split(r"^## (.*)\n", REFERENCE.read_text(), flags=re.M)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def anchors(page) -> set[str]:
    """What a link into a page may name: its headings, as GitHub and GitLab spell them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_every_link_to_a_heading_leads_to_one(page):
    links = re.findall(r"\]\((?!\w+:)([^)#\s]*)#([^)\s]+)\)", page.read_text())
    places = [((page.parent / file) if file else page, anchor) for file, anchor in links]
    assert [(p.name, a) for p, a in places if p.exists() and a not in anchors(p)] == []


def test_every_field_of_an_adapter_config_that_is_known_is_in_the_reference():
    from lorakit.adapter.config import KNOWN, REFUSED

    told = set(re.findall(r"`(\w+)`", (ROOT / "docs/reference/adapters.md").read_text()))
    assert KNOWN | REFUSED.keys() <= told


def test_every_name_of_the_package_is_in_the_reference():
    import lorakit

    text = (ROOT / "docs/reference/python.md").read_text()
    names = set(lorakit.__all__) - {"__version__"}
    assert {name for name in names if f"`{name}" not in text} == set()


def test_every_command_and_every_option_has_a_line_of_help():
    silent = [name for name, command in commands() if not command.get_short_help_str()]
    options = [(n, p) for n, c in commands() for p in c.params if isinstance(p, click.Option)]
    silent += [f"{name} {option.opts[-1]}" for name, option in options if not option.help]
    assert silent == []


def test_every_option_of_every_command_is_in_the_reference():
    """Under `## lorakit NAME`, or under `## Shared options`."""
    text = sections()
    shared = flags_in(text.get("Shared options", ""))
    assert {f"lorakit {name}" for name, _ in commands()} - text.keys() == set()
    missing = {
        name: flags(command) - flags_in(text[f"lorakit {name}"]) - shared
        for name, command in commands()
    }
    assert {name: options for name, options in missing.items() if options} == {}


def test_the_reference_tells_of_no_command_or_option_that_is_not_there():
    known = {"--help", "--version"}.union(*(flags(command) for _, command in commands()))
    assert flags_in(REFERENCE.read_text()) - known == set()
    names = {f"lorakit {name}" for name, _ in commands()}
    assert {title for title in sections() if title.startswith("lorakit ")} - names == set()


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\nb\n", "a  \nb\n\n", True),
        ("a\n", "a\nb\n", False),
        ("", "a\n", False),
        ("", "", True),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("a\n...\nd\n", "a\nd\n", True),
        ("a\n…\n", "a\n", True),
        ("...\n", "anything\nat all\n", True),
        ("took ... s (…%)\n", "took 1.25 s (99.9%)\n", True),
        ("took ... s\n", "took 1\n2 s\n", False),
        ("(a|b)\n", "a\n", False),
    ],
)
def test_dots_stand_for_anything_and_all_else_for_itself(shown, printed, expected):
    assert matches(shown, printed) is expected


def test_a_console_block_is_cut_into_commands_and_their_output():
    text = "$ lorakit merge a \\\n    b\nError: no\n$ echo $?\n4\n$ true\n"
    assert examples(text) == [
        Example("lorakit merge a \\\n    b", "Error: no\n", may_fail=True),
        Example("echo $?", "4\n", may_fail=False),
        Example("true", "", may_fail=False),
    ]


def test_an_example_that_prints_something_else_or_fails_unforeseen_is_caught(shell):
    shell.run(Example("python -c 'print(6 * 7)'", "42\n", may_fail=False))
    with pytest.raises(AssertionError, match="is shown as"):
        shell.run(Example("python -c 'print(6 * 7)'", "41\n", may_fail=False))
    with pytest.raises(AssertionError, match="exit code 3"):
        shell.run(Example("python -c 'exit(3)'", "", may_fail=False))
    shell.run(Example("echo $?", "3\n", may_fail=False))
