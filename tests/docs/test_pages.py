"""What the pages say: commands parse, configs are accepted, links lead somewhere, lists are complete."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml

from prefmesh.algorithms.methods import METHODS
from prefmesh.cli import app
from prefmesh.config import ExperimentConfig
from prefmesh.objectives import LOSSES
from prefmesh.preferences.reading import read
from prefmesh.preferences.settings import Partition, PreferencesSettings, PresetName
from prefmesh.reports.tables import COLUMNS
from prefmesh.run import run
from prefmesh.studies import STUDIES
from prefmesh.topology.registry import GRAPHS
from prefmesh.topology.weights import WEIGHTS
from tests.docs.conftest import ROOT
from tests.docs.pages import PAGES, blocks, commands

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
GROUP: Any = typer.main.get_command(app)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    """The text under a heading, up to the next heading of any kind."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", text(page), re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no section {title!r}"
    return found[1]


def first_cells(markdown: str) -> list[str]:
    """The names in backticks in the first cells of a table's rows."""
    return re.findall(r"^\| `([^`]+)`", markdown, re.MULTILINE)


def shown_commands() -> list[Any]:
    on_pages = [(f"{block.page}:{block.line}", block.text) for page in PAGES for block in commands(page)]
    in_help = [
        (f"prefmesh {name} --help", line.split("Example: ")[1])
        for name, command in GROUP.commands.items()
        for line in (command.help or "").splitlines()
        if "Example: " in line
    ]
    in_examples = [
        (path.name, re.split(r"\s{2,}(?!-)", line)[0])
        for path in EXAMPLES
        for line in re.findall(r"^#   (prefmesh .*)$", path.read_text().replace("\\\n#", ""), re.MULTILINE)
    ]
    return [pytest.param(command, id=where) for where, command in on_pages + in_help + in_examples]


@pytest.mark.parametrize("command", shown_commands())
def test_every_command_that_is_shown_parses(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "torchrun":  # which has no way to look at its options without running
        words = words[words.index("-m") + 1 :]
    program, name, *arguments = words
    assert program == "prefmesh"
    assert name in GROUP.commands
    GROUP.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("name", sorted(GROUP.commands))
def test_every_command_has_an_example_and_help_that_fits(name: str) -> None:
    command = GROUP.commands[name]
    shown = command.get_help(command.context_class(command, info_name=f"prefmesh {name}", terminal_width=80))
    assert "Example: prefmesh" in shown
    assert max(map(len, shown.splitlines())) <= 88  # an example may stand out a little, but on one line


def test_the_list_of_commands_is_not_cut() -> None:
    shown = GROUP.get_help(GROUP.context_class(GROUP, info_name="prefmesh", terminal_width=80))
    assert "..." not in shown.split("Commands:")[1]


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{block.page}:{block.line}")
        for page in PAGES
        for block in blocks(page, "yaml")
    ],
)
def test_every_config_on_a_page_is_accepted(block: Any) -> None:
    config = ExperimentConfig.parse(yaml.safe_load(block.text))
    assert ExperimentConfig.parse(config.plain()) == config


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_accepted(path: Path) -> None:
    from prefmesh.config import load_config

    load_config(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)|src=\"([^\"]+)\"", page.read_text(encoding="utf-8")):
        target = "".join(target)
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_the_row_of_the_readme_is_a_pair(tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "README.md", "json")
    (tmp_path / "answers.jsonl").write_text(block.text)
    (pair,) = read(PreferencesSettings(source=str(tmp_path / "answers.jsonl"))).pairs
    assert (pair.user, pair.chosen[0]) == ("ana", " ")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's use of transformers
def test_the_policy_loads_as_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefmesh.policies import builtin

    monkeypatch.setenv("PREFMESH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    town = {"users": 2, "pairs_per_user": 12}
    config = ExperimentConfig.parse(
        {
            "preferences": {"source": "builtin:town", "town": town},
            "method": {"name": "fed_dpo", "rounds": 1},
            "evaluation": {"samples": 0, "held_out": 0.25},
        }
    )
    run(config, Path("runs/first"))
    (block,) = blocks(ROOT / "README.md", "python")
    assert "path/or/id/of/the/base/model" in block.text
    names: dict[str, Any] = {}
    exec(block.text.replace("path/or/id/of/the/base/model", str(builtin.path("tiny"))), names)
    words = names["tokenizer"]("Hello", return_tensors="pt")
    assert names["policy"](**words).logits.isfinite().all()


def test_lists_are_complete() -> None:
    """A new method, loss, graph, measure, study or partition is in the docs, or this fails."""
    table = re.findall(r"^\| `prefmesh (\w+)", section("README.md", "Commands"), re.MULTILINE)
    assert sorted(table) == sorted(GROUP.commands)
    assert all(f"`{name}`" in section("README.md", "Commands") for name in STUDIES)
    measured = section("README.md", "What is measured")
    for column in COLUMNS:
        name = column.header.removesuffix(" (%)").removesuffix(" (nats)")
        assert f"| {name} |" in measured or column.key == "seconds", name
    assert all(section("docs/methods.md", name) for name in METHODS)
    _, *partitions = first_cells(section("docs/guide.md", "Which agent holds what"))
    assert set(partitions) == set(get_args(Partition))
    known = re.findall(r"\| `\w[^`]*` \| `(\w+)` \|", section("docs/guide.md", "Known datasets"))
    assert set(known) == set(get_args(PresetName))
    for title, registry in (("Losses", LOSSES), ("Graphs", GRAPHS), ("Weights", WEIGHTS)):
        assert first_cells(section("docs/config.md", title)) == sorted(registry)


def test_the_config_reference_is_current_and_complete() -> None:
    """In a process of its own, where no plugin of another test is registered."""
    script = ROOT / "scripts" / "config_reference.py"
    checked = subprocess.run([sys.executable, str(script), "--check"], check=False)
    assert checked.returncode == 0, "run: python scripts/config_reference.py"
    rows = re.findall(r"^\| `[\w.]+` \|.*$", text("docs/config.md"), re.MULTILINE)
    assert rows
    assert [row for row in rows if re.search(r"\|\s*\|$", row)] == []
