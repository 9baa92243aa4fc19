"""What the user did wrong ends in one line on stderr and exit code 2, and leaves nothing behind."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from prefmesh.policies import builtin
from tests.runs import FILE, ROWS, TINY, TOWN, contents, prefmesh, write_jsonl, write_yaml

OUT = ("--out", "out")
pytestmark = pytest.mark.usefixtures("undrawn")


def row(**changes: Any) -> str:
    """A row of data, some of its columns changed, or (None) taken away."""
    return json.dumps({key: value for key, value in (ROWS[0] | changes).items() if value is not None})


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A directory of configs and data, and the working directory; paths in messages are relative to it."""
    for name, raw in {"town": TOWN, "file": FILE, "tiny": TINY}.items():
        write_yaml(tmp_path / f"{name}.yaml", raw)
    write_jsonl(tmp_path / "answers.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(here: Path, *argv: str | Path, said: tuple[str, ...]) -> str:
    """Call a command, which must be refused in one line that says all of `said`; that line."""
    before = contents(here)
    found = prefmesh(*argv)
    assert found.code == 2, found
    assert found.out == ""
    assert found.err.startswith("prefmesh: ")
    assert found.err.endswith("\n")
    assert found.err.count("\n") == 1, found.err
    assert "Traceback" not in found.err
    for part in said:
        assert part in found.err, found.err
    assert contents(here) == before, "something was written"
    assert not (here / "out").exists()
    return found.err


# ---- data

DATA: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "empty": (b"", ("answers.jsonl: empty", "allowed: at least one row")),
    "blank rows only": (b"\n\n  \n", ("answers.jsonl: empty",)),
    "not JSON": (f"{row()}\nnot json\n", ("answers.jsonl:2:", "not JSON")),
    "half a row": (row()[:-9], ("answers.jsonl:1:", "not JSON")),
    "a list": ("[1, 2]", ("answers.jsonl:1:", "a list", "allowed: a JSON object per line")),
    "no chosen": (f"{row()}\n{row(chosen=None)}\n", ("answers.jsonl:2:", "no 'chosen'", "prompt, rejected, user")),
    "no rejected": (row(rejected=None), ("answers.jsonl:1:", "no 'rejected'")),
    "null chosen": (row().replace('" yes, number 0"', "null"), ("answers.jsonl:1:", "'chosen' is null", "allowed: a text")),
    "empty chosen": (row(chosen=""), ("answers.jsonl:1:", "the chosen completion is empty")),
    "blank rejected": (row(rejected=" \n"), ("answers.jsonl:1:", "the rejected completion is empty")),
    "empty prompt": (row(prompt=""), ("answers.jsonl:1:", "the prompt is empty")),
    "identical completions": (f"{row()}\n\n{row(rejected=ROWS[0]['chosen'])}", ("answers.jsonl:3:", "identical")),
    "chosen is a number": (row(chosen=3), ("answers.jsonl:1:", "3 (a number)", "allowed: a text")),
    "chosen is an object": (row(chosen={"a": 1}), ("answers.jsonl:1:", "an object", "allowed: a text")),
    "text and messages": (row(chosen=[{"role": "assistant", "content": "yes"}]), ("answers.jsonl:1:", "mix texts and messages")),
    "a message without content": (
        row(prompt=[{"role": "user"}], chosen=[{"role": "assistant", "content": "y"}], rejected=[{"role": "assistant", "content": "n"}]),
        ("answers.jsonl:1:", "prompt[0].content is missing", "allowed: a text"),
    ),
    "user is a list": (row(user=["ann"]), ("answers.jsonl:1:", "'user' is a list", "allowed: a text or a whole number")),
    "empty user": (row(user=""), ("answers.jsonl:1:", "'user' is empty")),
    "no user anywhere": (row(user=None), ("answers.jsonl: no column 'user'", "preferences.columns.user")),
    "not UTF-8": (row().encode() + b"\n" + row(prompt="caf").encode().replace(b"caf", b"caf\xe9"), ("answers.jsonl:2:", "not UTF-8: byte 0xe9")),
    "half a character": (row(prompt="X").replace("X", "\\ud83d"), ("answers.jsonl:1:", "half a character")),
    "binary": (bytes(range(256)), ("answers.jsonl:1:", "not JSON")),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_data(here, name):
    text, said = DATA[name]
    (here / "answers.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(here, "run", "file.yaml", *OUT, said=said)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("answers.jsonl.gz", b"no gzip", ("answers.jsonl.gz: damaged or no gzip file",)),
        ("cut.jsonl.gz", gzip.compress(row().encode() * 50, mtime=0)[:-12], ("cut.jsonl.gz: damaged or no gzip file",)),
        ("answers.csv", b"prompt,chosen,chosen\na,b,c\n", ("answers.csv:1: the header names a column twice",)),
        ("short.csv", b"prompt,chosen,rejected,user\na,b\n", ("short.csv:2:", "2 fields, but the header has 4")),
        ("answers.parquet", b"PAR1 no", ("answers.parquet: damaged or no Parquet file",)),
        ("answers.txt", b"x", ("answers.txt: unknown kind of file; allowed: .jsonl",)),
    ],
)  # fmt: skip
def test_kinds_of_files(here, file, content, said):
    (here / file).write_bytes(content)
    refused(here, "run", "file.yaml", *OUT, "-o", f"preferences.source={file}", said=said)


def test_bad_rows_are_dropped_and_counted_where_asked(here):
    bad = ["not json", row(chosen=None), row(chosen=""), row(rejected=ROWS[0]["chosen"]), row(chosen=3)]
    good = (here / "answers.jsonl").read_text()
    (here / "answers.jsonl").write_bytes(f"{good}{chr(10).join(bad)}\n".encode() + b'{"prompt": "\xe9"}\n')
    found = prefmesh("run", "file.yaml", *OUT, "-o", "preferences.on_bad_row=skip")
    assert found.code == 0, found.err
    read = json.loads((here / "out" / "summary.json").read_text())["read"]
    assert (read["rows"], read["pairs"]) == (len(ROWS) + 6, len(ROWS))
    assert read["dropped"] == {
        "not JSON": 1, "no 'chosen'": 1, "empty completion": 1, "identical completions": 1, "wrong type": 1, "not UTF-8": 1,
    }  # fmt: skip
    assert [bad["row"] for bad in read["bad_rows"]] == [13, 14, 15, 16, 17, 18]
    # The same pairs without the bad rows train the same policy.
    (here / "answers.jsonl").write_text(good)
    assert prefmesh("run", "file.yaml", "--out", "clean").code == 0
    assert contents(here / "clean" / "policy") == contents(here / "out" / "policy")


def test_nothing_but_bad_rows_is_refused_even_where_they_are_skipped(here):
    (here / "answers.jsonl").write_text(row(chosen=""))
    skip = "preferences.on_bad_row=skip"
    refused(
        here, "run", "file.yaml", *OUT, "-o", skip,
        said=("answers.jsonl: none of its 1 rows is a pair", "1 empty completion"),
    )  # fmt: skip


# ---- the config

DEC = "method={name: dec_dpo, graph: %s}"
OVERRIDES: dict[str, tuple[str, tuple[str, ...]]] = {
    "no such key": ("optimizer.rl=0.1", ("town.yaml: optimizer.rl", "unknown key 'rl'", "did you mean 'lr'?", "batch_size")),
    "a key at the wrong place": ("lr=abc", ("lr: unknown key 'lr'", "Allowed:", "optimizer")),
    "no such section": ("optimiser.lr=0.1", ("optimiser: unknown key", "did you mean 'optimizer'?")),
    "no such deep key": ("preferences.town.usres=3", ("preferences.town.usres", "did you mean 'users'?")),
    "a word for a number": ("optimizer.lr=abc", ("optimizer.lr: found 'abc'", "allowed: a valid number")),
    "a truth for a number": ("method.rounds=true", ("method.rounds: found True", "allowed: a valid integer")),
    "a number for a word": ("optimizer.name=3", ("optimizer.name: found 3", "allowed: 'sgd' or 'adamw'")),
    "half a round": ("method.rounds=2.5", ("method.rounds: found 2.5", "allowed: a valid integer")),
    "not a number": ("optimizer.lr=.nan", ("optimizer.lr: found nan", "allowed: a finite number")),
    "infinite": ("optimizer.lr=1e999", ("optimizer.lr: found inf", "allowed: a finite number")),
    "a section that is none": ("optimizer=3", ("optimizer: found int 3", "allowed: a mapping")),
    "a key below a value": ("seed.x=3", ("-o seed.x", "seed holds int 3")),
    "a key that is no word": ("optimizer={1: 2}", ("optimizer.1: unknown key '1'", "Allowed: batch_size")),
    "negative seed": ("seed=-1", ("seed: found -1", "allowed: greater than or equal to 0")),
    "E = 0": ("method.local_steps=0", ("method.local_steps: found 0", "allowed: greater than or equal to 1")),
    "no rounds": ("method.rounds=0", ("method.rounds: found 0", "allowed: greater than or equal to 1")),
    "S > N": ("method={name: fed_dpo, participation: 5}", ("method.participation: found 5", "allowed: 1 to 4")),
    "S = 0": ("method={name: fed_dpo, participation: 0}", ("method.participation: found 0", "allowed: greater than or equal to 1")),
    "stale by -1": ("method={name: fed_dpo, staleness: -1}", ("method.staleness: found -1", "allowed: greater than or equal to 0")),
    "another method's key": ("method={name: fed_dpo, graph: ring}", ("method.graph: unknown key", "participation")),
    "beta = 0": ("objective.beta=0", ("objective.beta: found 0", "allowed: greater than 0")),
    "beta < 0": ("objective.beta=-0.1", ("objective.beta: found -0.1", "allowed: greater than 0")),
    "unknown loss": ("objective.loss_type=sigmoit", ("objective.loss_type: unknown name 'sigmoit'", "did you mean 'sigmoid'?")),
    "smoothing that is not used": ("objective={loss_type: hinge, label_smoothing: 0.1}", ("objective", "label_smoothing 0.1", "allowed: 0, or one of the losses")),
    "unknown method": ("method={name: dec_dop}", ("method.name: unknown name 'dec_dop'", "did you mean 'dec_dpo'?")),
    "a method that is a list": ("method.name=[dec_dpo]", ("method.name: unknown name", "Allowed: apfl, async_gossip, centralized")),
    "no method": ("method={rounds: 3}", ("method.name: missing", "allowed: apfl, async_gossip, centralized")),
    "unknown graph": (DEC % "rign", ("method.graph: unknown name 'rign'", "did you mean 'ring'?")),
    "a graph without name": (DEC % "{p: 0.3}", ("method.graph.name: found nothing",)),
    "a graph's unknown option": (DEC % "{name: erdos_renyi, q: 0.3}", ("method.graph.q: unknown name 'q'", "Allowed: ")),
    "a graph that these agents have not": (DEC % "{name: torus, rows: 3}", ("method.graph",)),
    "weights for another graph": ("method={name: dec_dpo, graph: ring, weights: uniform}", ("method.weights: ",)),
    "unknown weights": ("method={name: dec_dpo, weights: metropolsi}", ("method.weights: unknown name", "did you mean 'metropolis'?")),
    "unknown sampling": ("optimizer.sampling=shuffel", ("optimizer.sampling: found 'shuffel'", "allowed: 'shuffle' or 'with_replacement'")),
    "lr = 0": ("optimizer.lr=0", ("optimizer.lr: found 0", "allowed: greater than 0")),
    "momentum with adamw": ("optimizer={name: adamw, momentum: 0.9}", ("optimizer", "momentum belongs to sgd")),
    "no batch": ("optimizer.batch_size=0", ("optimizer", "batch_size is 0", "allowed: at least 1, or full")),
    "all held out": ("evaluation.held_out=1", ("evaluation.held_out: found 1", "allowed: less than or equal to 0.5")),
    "no such fold": ("evaluation.fold=5", ("evaluation.fold: 5", "allowed: 0 to 4")),
    "no such device": ("runtime.device=abacus", ("runtime.device: 'abacus' is not here", "allowed: auto, cpu")),
    "no processes": ("runtime.processes=0", ("runtime.processes: found 0", "allowed: greater than or equal to 1")),
    "half precision on no wire": ("runtime.wire=float16", ("runtime.wire: float16", "one process", "allowed: same")),
    "unknown built-in": ("preferences={source: 'builtin:village'}", ("preferences.source", "unknown 'builtin:village'", "builtin:town")),
    "no agents": ("preferences.agents=0", ("preferences.agents: found 0", "allowed: greater than or equal to 1")),
    "more agents than residents": ("preferences.agents=9", ("preferences.agents: 9, but there are 4 users", "allowed: 1 to 4")),
    "nobody answered so often": ("preferences.min_pairs=21", ("preferences.min_pairs: 21", "no user")),
    "no row has the value": ("preferences.where={user: nobody}", ("preferences.where.user", "'nobody'")),
    "alpha without dirichlet": ("preferences.alpha=0.5", ("preferences.alpha: ", "partition is by_user")),
    "dirichlet without alpha": ("preferences.partition=dirichlet", ("preferences.alpha: ", "needed by partition: dirichlet")),
}  # fmt: skip


@pytest.mark.parametrize("name", OVERRIDES)
def test_config(here, name):
    override, said = OVERRIDES[name]
    refused(here, "run", "town.yaml", *OUT, "-o", override, said=said)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.rounds", "-o method.rounds: found no key=value; an example: -o method.local_steps=8"),
        ("=3", "-o =3: found no key=value"),
        ("seed=[1", "-o seed=[1: the value is not YAML (row 1"),
        (".=1", "unknown key"),
        ("a..b=1", "a: unknown key 'a'"),
    ],
)
def test_overrides_that_are_none(here, override, said):
    refused(here, "run", "town.yaml", *OUT, "-o", override, said=(said,))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", ("x.yaml: found nothing", "allowed: a mapping with keys seed, preferences")),
        (b"- 1\n", ("x.yaml: found list [1]", "allowed: a mapping")),
        (b"seed: [1\n", ("x.yaml: not YAML (row 2",)),
        (b"seed: 1\nmethod: {name: local_only}\nseed: 2\n", ("x.yaml: not YAML (row 3: key 'seed' is given twice)",)),
        (b"method: {name: local_only, rounds: 2, rounds: 3}\n", ("x.yaml: not YAML (row 1: key 'rounds' is given twice)",)),
        (b"seed: !!python/object/apply:os.getcwd []\n", ("x.yaml: not YAML (row 1: could not determine a constructor",)),
        (b"seed: \xe9\n", ("x.yaml: not UTF-8 at byte 6",)),
        (b"seed: \x00\n", ("x.yaml: not YAML",)),
        (b"sede: 1\nmethod: {name: local_only}\n", ("x.yaml: sede: unknown key 'sede'; did you mean 'seed'?",)),
        (b"1: 2\nmethod: {name: local_only}\n", ("x.yaml: 1: unknown key '1'",)),
        (b"seed: 1\n", ("x.yaml: method.name: missing",)),
    ],
)  # fmt: skip
def test_config_files(here, text, said):
    (here / "x.yaml").write_bytes(text)
    refused(here, "run", "x.yaml", *OUT, said=said)


def test_no_file(here):
    refused(
        here,
        "run",
        "nosuch.yaml",
        *OUT,
        said=("nosuch.yaml: no such file", "allowed: an experiment's YAML file"),
    )
    refused(here, "run", ".", *OUT, said=(".: no such file",))
    refused(
        here, "run", "file.yaml", *OUT, "-o", "preferences.source=nosuch.jsonl",
        said=("preferences.source: no such file: nosuch.jsonl",),
    )  # fmt: skip


def test_more_agents_than_users(here):
    refused(
        here, "run", "file.yaml", *OUT, "-o", "preferences.agents=4",
        said=("preferences.agents: 4, but there are 3 users", "allowed: 1 to 3"),
    )  # fmt: skip


def test_more_participants_than_the_file_has_users(here):
    """How many agents there are is known only once the data is read."""
    refused(
        here, "run", "file.yaml", *OUT, "-o", "method={name: fed_dpo, participation: 4}",
        said=("method.participation: found 4", "allowed: 1 to 3"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("edges", "said"),
    [
        ("0 1\n2 3\n", ("method.graph: disconnected: 2 components of 2, 2 agents", "allowed: one component")),
        ("0 1\n1 2\n2 9\n", ("method.graph: edges.txt: row 3: agent 9 found", "allowed: 0 to 3")),
        ("0 1\n1\n", ("method.graph: edges.txt: row 2: '1' found", "allowed: two agents' numbers")),
        ("0 0\n", ("method.graph: edges.txt: row 1: agent 0 is linked to itself",)),
        ("", ("method.graph: edges.txt: no rows found",)),
    ],
)
def test_edge_lists(here, edges, said):
    (here / "edges.txt").write_text(edges)
    graph = "method={name: dec_dpo, graph: {name: edges, file: edges.txt}}"
    refused(here, "run", "town.yaml", *OUT, "-o", graph, said=said)


# ---- the model

MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "a target that matches nothing": (
        "policy.lora.target_modules=[nosuch]",
        ("policy.lora.target_modules: ['nosuch'] matches no module", "linear layers of this model", "all-linear"),
    ),
    "a target that is no linear layer": (
        "policy.lora.target_modules=[wte]",
        ("policy.lora.target_modules: ['wte'] matches 'transformer.wte', which is no linear layer",),
    ),
    "no such directory": ("policy.model=./nosuch", ("policy.model: ./nosuch: no such directory", "allowed: builtin:tiny")),
    "a file": ("policy.model=answers.jsonl", ("policy.model: answers.jsonl: no such directory",)),
    "no such built-in": ("policy.model=builtin:tyni", ("policy.model", "did you mean 'builtin:tiny'?")),
    "not on this machine": ("policy.model=nobody/nothing", ("policy.model: nobody/nothing: could not be loaded",)),
    "no tokenizer": ("policy.model=model", ("policy.model: model: found a model directory without tokenizer", "allowed: one of tokenizer.json")),
    "no config": ("policy.model=empty", ("policy.model: empty: found a directory without config.json",)),
    "no weights": ("policy.model=weightless", ("policy.model: weightless: could not be loaded",)),
    "damaged weights": ("policy.model=damaged", ("policy.model: damaged: could not be loaded",)),
    "damaged config": ("policy.model=unreadable", ("policy.model: unreadable: could not be loaded",)),
    "damaged tokenizer": ("policy.model=tokenless", ("policy.model: tokenless: could not be loaded",)),
    "r = 0": ("policy.lora.r=0", ("policy.lora.r: found 0", "allowed: greater than or equal to 1")),
    "lora without lora": ("policy.train=full", ("policy", "lora has no meaning with train full")),
    "no room for a prompt": ("evaluation.max_new_tokens=96", ("evaluation.max_new_tokens: 96 leaves no room", "less than policy.max_length, 96")),
}  # fmt: skip


def test_a_model_that_lacks_a_weight(here):
    """transformers would draw it at random and go on."""
    shutil.copytree(builtin.path("tiny"), here / "model")
    weights = load_file(here / "model" / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.bias"]
    save_file(weights, here / "model" / "model.safetensors", metadata={"format": "pt"})
    refused(
        here, "run", "tiny.yaml", *OUT, "-o", "policy.model=model",
        said=("policy.model: model: 1 of its weights are not there (transformer.h.0.mlp.c_fc.bias)",),
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models(here, name):
    override, said = MODELS[name]
    folder = override.partition("policy.model=")[2]
    if folder in ("model", "empty", "weightless", "damaged", "unreadable", "tokenless"):
        shutil.copytree(builtin.path("tiny"), here / folder)
        gone = {"model": "tokenizer.json", "empty": "config.json", "weightless": "model.safetensors"}
        cut = {"damaged": "model.safetensors", "unreadable": "config.json", "tokenless": "tokenizer.json"}
        if folder in gone:
            (here / folder / gone[folder]).unlink()
        else:
            whole = (here / folder / cut[folder]).read_bytes()
            (here / folder / cut[folder]).write_bytes(whole[: len(whole) // 2])
    refused(here, "run", "tiny.yaml", *OUT, "-o", override, said=said)


# ---- directories, and other commands


@pytest.mark.parametrize("command", [["run"], ["compare"], ["study", "local-steps"]])
def test_a_directory_is_never_overwritten(here, command):
    (here / "taken").mkdir()
    refused(
        here,
        *command,
        "town.yaml",
        "--out",
        "taken",
        said=("taken: exists already", "a new directory, or --resume"),
    )
    refused(here, *command, "town.yaml", "--out", "answers.jsonl", said=("answers.jsonl: exists already",))
    refused(
        here,
        *command,
        "town.yaml",
        "--out",
        "answers.jsonl/x",
        said=("answers.jsonl is a file", "allowed: a new directory"),
    )


@pytest.mark.parametrize("command", [["compare"], ["study", "local-steps"], ["study", "participation"]])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("preferences.source=nosuch.jsonl", ("preferences.source: no such file: nosuch.jsonl",)),
        (
            "policy={model: log_linear, features: attributes}",
            ("policy.features: attributes are read off the built-in town's texts",),
        ),
        ("preferences.agents=4", ("preferences.agents: 4, but there are 3 users",)),
    ],
)
def test_sweeps_leave_nothing_where_they_are_refused(here, command, override, said):
    """With `agents` given, a sweep does not read the data before its first run does."""
    more = ("-o", "preferences.agents=3") if "agents" not in override else ()
    refused(here, *command, "file.yaml", *OUT, *more, "-o", override, said=said)


COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unknown command": (["rnu"], ("No such command 'rnu'", "prefmesh --help")),
    "unknown option": (["run", "town.yaml", "--uot", "x"], ("No such option: --uot", "--out")),
    "option without value": (["run", "town.yaml", "--out"], ("--out", "requires an argument")),
    "one argument too many": (["run", "town.yaml", "town.yaml"], ("unexpected extra argument", "town.yaml")),
    "missing argument": (["eval", "out"], ("Missing option '--data'",)),
    "nothing to run": (["run"], ("no config was given", "allowed: prefmesh run CONFIG")),
    "nothing to resume": (["run", "--resume", "nosuch"], ("nosuch: no run to resume", "allowed: a run directory")),
    "resume into another": (["run", "--resume", "nosuch", "--out", "x"], ("--out", "--resume", "one of the two")),
    "resume with changes": (["run", "--resume", "nosuch", "-o", "seed=1"], ("-o changes a config",)),
    "nothing to compare": (["compare"], ("no config was given", "prefmesh compare")),
    "no sweep": (["compare", "town.yaml", "--resume", "."], (".: no sweep to resume", "allowed: a directory of compare or study")),
    "a sweep resumed into another": (["compare", "town.yaml", "--resume", ".", "--out", "x"], ("--out", "--resume", "one of the two")),
    "several processes for several runs": (["compare", "town.yaml", "-o", "runtime.processes=2"], ("runtime.processes: 2", "allowed: 1")),
    "restarts of one process": (["run", "town.yaml", "--restarts", "2"], ("--restarts", "allowed: --processes K")),
    "more processes than agents": (["run", "town.yaml", "--processes", "5"], ("runtime.processes: 5", "allowed: 1 to 4")),
    "seeds that are none": (["compare", "town.yaml", "--seeds", "a"], ("--seeds: found 'a'", "allowed: whole numbers")),
    "a seed twice": (["compare", "town.yaml", "--seeds", "1,1"], ("--seeds: found '1,1'", "each once")),
    "no seeds": (["compare", "town.yaml", "--seeds", ","], ("--seeds: found ','", "at least one seed")),
    "unknown study": (["study", "toplogy", "town.yaml"], ("study: unknown name 'toplogy'", "did you mean 'topology'?")),
    "a study's unknown graph": (["study", "topology", "town.yaml", "--values", "ring,strar"], ("method.graph: unknown name 'strar'", "did you mean 'star'?")),
    "a study's words": (["study", "local-steps", "town.yaml", "--values", "1,two"], ("--values: found 1, two", "allowed for local-steps: whole numbers")),
    "a study's E = 0": (["study", "local-steps", "town.yaml", "--values", "0"], ("method.local_steps: found 0",)),
    "a study's S > N": (["study", "participation", "town.yaml", "--values", "5"], ("method.participation: found 5", "allowed: 1 to 4")),
    "heterogeneity that is no number": (["study", "heterogeneity", "town.yaml", "--values", "lots"], ("--values: found lots", "numbers")),
    "no folds": (["study", "folds", "town.yaml", "-o", "evaluation.held_out=0"], ("evaluation.held_out: found 0", "0.2 for five folds")),
    "no such fold": (["study", "folds", "town.yaml", "--values", "7"], ("evaluation.fold: 7", "allowed: 0 to 4")),
    "topology: unknown": (["topology", "rign"], ("graph: unknown name 'rign'", "did you mean 'ring'?")),
    "topology: a number": (["topology", "3"], ("graph: found '3'", "allowed: a name, or YAML")),
    "topology: no name": (["topology", "{p: 0.3}"], ("graph: found", "allowed: a name, or YAML")),
    "topology: not YAML": (["topology", "{p: "], ("graph: found", "allowed: a name, or YAML")),
    "topology: nobody": (["topology", "ring", "-n", "0"], ("agents: 0 found", "allowed: at least 1")),
    "topology: unknown weights": (["topology", "ring", "-w", "metro"], ("weights: unknown name 'metro'", "did you mean 'metropolis'?")),
    "topology: n is no number": (["topology", "ring", "-n", "x"], ("Invalid value for '--agents'", "valid integer")),
    "data: no file": (["data", "nosuch.jsonl"], ("no such file: nosuch.jsonl",)),
    "data: no tokenizer": (["data", "answers.jsonl", "--tokenizer", "./nosuch"], ("nosuch", "no such directory")),
    "eval: no run": (["eval", "nosuch", "--data", "answers.jsonl"], ("nosuch: no finished run", "allowed: a run directory")),
    "report: no run": (["report", "nosuch"], ("nosuch: no such directory",)),
    "report: not a run": (["report", "empty"], ("empty",)),
    "warmstart: no file": (["warmstart", "--data", "nosuch.jsonl", "--out", "out"], ("no such file: nosuch.jsonl",)),
    "warmstart: taken": (["warmstart", "--data", "answers.jsonl", "--out", "empty"], ("empty",)),
    "warmstart: heads": (["warmstart", "--data", "answers.jsonl", "--out", "out", "--heads", "3"], ("heads", "3", "160")),
    "warmstart: no layers": (["warmstart", "--data", "answers.jsonl", "--out", "out", "--layers", "0"], ("layers", "0")),
    "plugin: no file": (["run", "town.yaml", "--plugin", "nosuch.py", "--out", "out"], ("--plugin nosuch.py: no such file",)),
    "plugin: no Python": (["run", "town.yaml", "--plugin", "answers.jsonl", "--out", "out"], ("--plugin answers.jsonl: not a Python file",)),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(here, name):
    (here / "empty").mkdir()
    (here / "empty" / "notes.txt").write_text("mine")
    argv, said = COMMANDS[name]
    refused(here, *argv, said=said)


def test_a_drawing_is_refused_before_anything_is_printed(here):
    refused(
        here, "topology", "ring", "--out", "ring.txt", said=("ring.txt: ending '.txt' found", "allowed: .svg")
    )
    refused(here, "topology", "ring", "--out", "no/ring.svg", said=("no/ring.svg: there is no directory no",))
    refused(here, "topology", "ring", "--json", "--out", "ring.txt", said=("ring.txt: ending '.txt'",))


# ---- runs


def test_an_existing_run_and_a_checkpoint_of_another_config(here):
    argv = ("run", "town.yaml", "--out", "first")
    assert prefmesh(*argv).code == 0
    refused(here, *argv, said=("first: exists already", "--resume"))
    # Finished or not, a run is resumed with its own config only.
    refused(
        here, "run", "town.yaml", "-o", "optimizer.lr=2.0", "--resume", "first",
        said=("first: found a run of another config", "allowed: the config in first/config.yaml"),
    )  # fmt: skip
    (here / "first" / "summary.json").unlink()
    own = here / "first" / "config.yaml"
    own.write_text(own.read_text().replace("lr: 1.0", "lr: 2.0"))
    refused(
        here, "run", "--resume", "first",
        said=("first/checkpoints/round_000005.safetensors: found a checkpoint of another config", "allowed: the config that"),
    )  # fmt: skip
    own.write_text("seed: [")
    refused(here, "run", "--resume", "first", said=("first/config.yaml: not YAML",))


def test_a_log_that_lost_what_its_checkpoint_knows(here):
    assert prefmesh("run", "town.yaml", "--out", "first").code == 0
    (here / "first" / "summary.json").unlink()
    log = here / "first" / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-1])
    refused(
        here, "run", "--resume", "first", said=("first/metrics.jsonl: found", "fewer than the", "allowed: ")
    )
    log.unlink()
    refused(here, "run", "--resume", "first", said=("first/metrics.jsonl: found 0 bytes",))


def test_a_policy_that_is_not_the_runs(here):
    assert prefmesh("run", "file.yaml", "--out", "first").code == 0
    evaluate = ("eval", "first", "--data", "answers.jsonl")
    own = here / "first" / "config.yaml"
    own.write_text(own.read_text().replace("dim: 16", "dim: 8"))
    refused(here, *evaluate, said=("first/policy: theta: found (16,)", "allowed: a tensor of shape (8,)"))
    (here / "first" / "policy" / "policy.safetensors").unlink()
    refused(here, *evaluate, said=("first/policy/policy.safetensors: no such file",))
