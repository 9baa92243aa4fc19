"""Every command: help with an example, JSON alone on stdout, exit codes. What is refused is in test_bad_input.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from prefmesh.cli import app
from tests.runs import FILE, ROWS, TOWN, contents, prefmesh, write_jsonl, write_yaml

COMMANDS = [
    "run", "bench", "compare", "study", "topology", "data", "warmstart", "eval", "personalize", "report", "doctor", "landscape", "plan", "theory verify",
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    write_yaml(tmp_path / "town.yaml", TOWN)
    write_yaml(tmp_path / "file.yaml", FILE)
    write_jsonl(tmp_path / "answers.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_no_other_commands():
    assert sorted(typer.main.get_command(app).commands) == sorted(command.split()[0] for command in COMMANDS)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    found = prefmesh(*command.split(), "--help")
    assert (found.code, found.err) == (0, "")
    assert f"Example: prefmesh {command} " in " ".join(found.out.split()) + " "
    if command != "topology":
        assert "--json" in found.out


def test_nothing_given_is_the_help():
    nothing, helped = prefmesh(), prefmesh("--help")
    assert (nothing.code, helped.code) == (2, 0)
    assert nothing.out == ""
    for command in (words.split()[0] for words in COMMANDS):
        assert re.search(rf"^\W*{command}\s", helped.out, re.MULTILINE)
        assert re.search(rf"^\W*{command}\s", nothing.err, re.MULTILINE)  # not squeezed into one line


def test_version():
    from importlib.metadata import version

    assert prefmesh("--version").out == version("prefmesh") + "\n"


def test_help_comes_at_once():
    """Nothing heavy is imported to say what there is."""
    code = (
        "import sys\n"
        "from prefmesh.cli import app\n"
        "from prefmesh.terminal import guarded\n"
        "code = guarded(lambda: app(['run', '--help'], standalone_mode=False))\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'scipy', 'networkx', 'pandas'} & set(sys.modules)\n"
        "sys.exit(code or (str(heavy) if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def only_json(*argv: str) -> dict:
    """A command's JSON, which stands alone."""
    found = prefmesh(*argv, "--json")
    assert found.code == 0, found.err
    assert found.err == ""  # and a pipe gets no progress
    return json.loads(found.out)


def test_json_of_run_report_and_eval(here):
    ran = only_json("run", "town.yaml", "--out", "out")
    assert ran["report"] == "out/report.html"
    assert (here / "out" / "report.html").is_file()
    [variant] = ran["variants"]
    assert variant["variant"] == "local_only" if "variant" in variant else "local_only" in str(variant)
    assert only_json("report", "out") == ran
    summary = json.loads((here / "out" / "summary.json").read_text())
    judged = only_json("eval", "out", "--data", "town.yaml", "-o", "seed=9")
    assert (judged["run"], judged["data"], judged["pairs"]) == ("out", "town.yaml", 16)  # held out
    assert summary["status"] == "done"
    assert sum(user["pairs"] for user in judged["users"]) == 16


def test_json_of_the_others(here):
    star = only_json("topology", "star", "--agents", "8", "--weights", "metropolis")
    assert set(star) == {
        "graph", "agents", "weights", "edges", "rho", "spectral_gap", "one_minus_rho_squared", "eigenvalues", "mixing_matrix",
    }  # fmt: skip
    assert star["rho"] == pytest.approx(7 / 8)  # a leaf keeps 1 - 1/8 of itself
    assert contents(here).keys() == {"town.yaml", "file.yaml", "answers.jsonl"}  # nothing is drawn unasked
    assert only_json("data", "answers.jsonl")["pairs"] == len(ROWS)
    assert only_json("doctor")["packages"]["torch"]
    small = [
        "--width",
        "8",
        "--layers",
        "1",
        "--heads",
        "1",
        "--vocab-size",
        "300",
        "--epochs",
        "1",
        "--sft-epochs",
        "0",
    ]
    made = only_json("warmstart", "--data", "answers.jsonl", "--out", "model", *small)
    assert made["pairs"] == len(ROWS)
    assert (here / "model" / "tokenizer.json").is_file()


@pytest.mark.usefixtures("undrawn")
def test_json_of_sweeps(here):
    short = ["-o", "method.rounds=1"]
    compared = only_json("compare", "town.yaml", *short, "--out", "compared")
    assert compared["kind"] == "compare"
    assert len(compared["variants"]) == 5
    studied = only_json(
        "study", "staleness", "town.yaml", *short, "--values", "0,1", "--seeds", "4", "--out", "studied"
    )
    assert (studied["kind"], len(studied["variants"])) == ("study", 2)


def test_tables_for_people(here):
    """Without --json: a table, and last the path of what was written, on a line of its own."""
    drawn = prefmesh("topology", "ring", "--agents", "6")
    assert drawn.out.splitlines()[-1] == "ring-6.svg"
    assert (here / "ring-6.svg").is_file()
    assert "spectral gap" in drawn.out
    for argv in (["data", "answers.jsonl"], ["doctor"]):
        found = prefmesh(*argv)
        assert (found.code, found.err) == (0, "")
        assert len(found.out.splitlines()) > 5


@pytest.mark.usefixtures("undrawn")
def test_without_out_a_new_directory_below_runs(here):
    found = prefmesh("run", "town.yaml")
    assert found.code == 0
    [made] = (here / "runs").iterdir()
    assert re.fullmatch(r"town-local_only-\d{8}-\d{6}", made.name)
    assert found.out.splitlines()[-1].endswith(f"runs/{made.name}/report.html")


@pytest.mark.usefixtures("undrawn")
def test_resume_goes_on_and_leaves_a_finished_run_alone(here, monkeypatch):
    from prefmesh import checkpoint

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "forget_newer", stop)
        stopped = prefmesh("run", "town.yaml", "--out", "out")
    assert (stopped.code, stopped.out, stopped.err) == (130, "", "prefmesh: interrupted\n")
    assert prefmesh("run", "--resume", "out").code == 0
    before = contents(here / "out")
    again = prefmesh("run", "--resume", "out")
    assert (again.code, again.err) == (0, "")
    assert (
        prefmesh("run", "town.yaml", "--resume", "out").code == 0
    )  # the config may be named: it is the same
    assert contents(here / "out") == before


def test_interrupted_before_there_is_a_run(here, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prefmesh.experiment.divide", stop)
    stopped = prefmesh("run", "town.yaml", "--out", "out")
    assert (stopped.code, stopped.err) == (130, "prefmesh: interrupted\n")
    assert not (here / "out").exists()


BLOW_UP = ["-o", "optimizer.lr=1e6", "-o", "optimizer.weight_decay=1.0"]
"""Decay of more than 1 per step: the parameters grow a million times in each."""


@pytest.mark.parametrize(
    "more", [[], ["-o", "method={name: fed_dpo, rounds: 9}"], ["-o", "method={name: dec_dpo, rounds: 9}"]]
)
def test_a_diverged_run_is_exit_code_3(here, more):
    found = prefmesh("run", "town.yaml", "--out", "out", *BLOW_UP, *more)
    assert (found.code, found.out) == (3, "")
    assert re.fullmatch(
        r"prefmesh: out: (the loss|a parameter) stopped being finite in round \d; the checkpoint of round \d is kept\. "
        r"Try a smaller optimizer\.lr\n",
        found.err,
    )
    summary = json.loads((here / "out" / "summary.json").read_text())
    lines = [json.loads(line) for line in (here / "out" / "metrics.jsonl").read_text().splitlines()]
    assert summary["status"] == "diverged"
    assert summary["rounds"] == len(lines) - 1
    kept = re.search(r"of round (\d) is kept", found.err)
    assert kept is not None
    assert (here / "out" / "checkpoints" / f"round_{int(kept[1]):06d}.json").is_file()
    assert not (here / "out" / "policy").exists()
    # The report shows what there is.
    assert prefmesh("report", "out").code == 0


def test_a_diverged_language_model(here):
    write_yaml(here / "tiny.yaml", {
        **TOWN, "policy": {"model": "builtin:tiny", "max_length": 96}, "evaluation": {"held_out": 0, "samples": 0},
        "preferences": {"source": "builtin:town", "agents": 2, "town": {"users": 2, "pairs_per_user": 4}},
    })  # fmt: skip
    found = prefmesh("run", "tiny.yaml", "--out", "out", *BLOW_UP)
    assert (found.code, found.err.count("\n")) == (3, 1)


def test_a_closed_pipe_is_no_error(here):
    """`prefmesh data FILE | head -1`."""
    line = f"{sys.executable} -m prefmesh topology '{{name: ring}}' -n 300 --json | head -c 10"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("{")
    assert "Traceback" not in done.stderr
