"""Several variants over several seeds: which ones, where they land, and what is compared."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prefmesh import run as running
from prefmesh import sweep as sweeping
from prefmesh.algorithms.methods import METHODS, Population
from prefmesh.errors import InputError
from prefmesh.interruption import Interrupted
from prefmesh.studies import Sweep, Variant, comparison, study
from prefmesh.sweep import paired_differences, run_sweep
from tests.runs import FILE, ROWS, TINY, TOWN, config, contents, prefmesh, write_jsonl, write_yaml

SHORT = config(TOWN, method={"name": "dec_dpo", "rounds": 2, "graph": "star"})


def names(sweep: Sweep) -> list[str]:
    return [variant.name for variant in sweep.variants]


def settings_of(sweep: Sweep, name: str) -> dict:
    [variant] = [variant for variant in sweep.variants if variant.name == name]
    return SHORT.replace(variant.changes).method.model_dump(mode="json")


def silent(title: str) -> running.Silent:
    return running.Silent()


# ---- which variants there are


def test_the_paper_s_comparison():
    made = comparison(SHORT, [0])
    assert names(made) == ["centralized", "fed_dpo_full", "fed_dpo_partial", "dec_dpo_star", "local_only"]
    for variant in made.variants:
        method = SHORT.replace(variant.changes).method
        assert (method.rounds, method.local_steps) == (2, 2)
    assert settings_of(made, "dec_dpo_star")["graph"] == "star"  # the config's own graph
    assert settings_of(made, "fed_dpo_partial")["participation"] == 2  # 0.6 of 4, rounded
    fed = SHORT.replace({"method": {"name": "fed_dpo", "participation": 3}})
    assert settings_of(comparison(fed, [0]), "fed_dpo_partial")["participation"] == 3
    assert names(comparison(fed, [0]))[3] == "dec_dpo_ring"


def test_partial_participation_of_everyone_is_left_out():
    alone = config(TOWN, preferences={"agents": 1, "town": {"users": 1}}, method={"name": "local_only"})
    assert "fed_dpo_partial" not in names(comparison(alone, [0]))


@pytest.mark.parametrize(
    ("name", "found", "xs"),
    [
        ("local-steps", ["E1", "E3", "E6"], [1, 3, 6]),
        ("participation", ["S1", "S2", "S4"], [1, 2, 4]),
        ("staleness", ["q0", "q2", "q5"], [0, 2, 5]),
        ("folds", [f"fold_{k}" for k in range(5)], [0, 1, 2, 3, 4]),
    ],
)
def test_studies_have_values_of_their_own(name, found, xs):
    made = study(name, SHORT, [0, 1])
    assert (names(made), [variant.x for variant in made.variants], list(made.seeds)) == (found, xs, [0, 1])


def test_studies_change_what_they_are_named_after():
    assert settings_of(study("local-steps", SHORT, [0], ["7"]), "E7")["local_steps"] == 7
    assert (
        settings_of(study("local-steps", SHORT, [0], ["7"]), "E7")["name"] == "dec_dpo"
    )  # it fits the study
    stale = settings_of(study("staleness", SHORT, [0], ["4"]), "q4")
    assert (stale["name"], stale["staleness"], stale["rounds"]) == ("fed_dpo", 4, 2)
    folds = study("folds", SHORT, [0], ["3"])
    assert SHORT.replace(folds.variants[0].changes).evaluation.fold == 3


def test_graphs_are_ordered_by_their_gap_and_those_that_do_not_exist_are_left_out():
    made = study("topology", SHORT, [0])
    gaps = [variant.x or 0 for variant in made.variants]
    assert gaps == sorted(gaps)
    assert "complete" in names(made)
    assert gaps[names(made).index("complete")] == pytest.approx(1)
    seven = config(TOWN, preferences={"agents": 7, "town": {"users": 7}}, method={"name": "dec_dpo"})
    assert "hypercube" not in names(study("topology", seven, [0]))  # no power of two
    with pytest.raises(InputError, match=r"method\.graph"):  # asked for by name, it is refused
        study("topology", seven, [0], ["hypercube"])


def test_what_of_lora_is_averaged():
    base = config(TINY, method={"name": "dec_dpo", "rounds": 2, "graph": "star"})
    sweep = study("lora-mixing", base, [0])
    found = [
        (base.replace(v.changes).method.name, base.replace(v.changes).policy.lora.mixing)
        for v in sweep.variants
    ]  # type: ignore[union-attr]
    every = ["factors", "freeze_a", "alternate", "product"]
    assert found == [("fed_dpo", x) for x in [*every, "residual"]] + [("dec_dpo", x) for x in every]
    assert base.replace(sweep.variants[-1].changes).method.graph.name == "star"  # type: ignore[attr-defined]
    assert names(study("lora-mixing", base, [0], ["product"])) == ["fed_dpo_product", "dec_dpo_product"]
    # Residuals: of a server, and where the base bears them unless they are asked for by name.
    assert names(study("lora-mixing", base, [0], ["residual"])) == ["fed_dpo_residual"]
    half = base.replace({"runtime.dtype": "bfloat16"})
    assert "fed_dpo_residual" not in names(study("lora-mixing", half, [0]))
    assert names(study("lora-mixing", half, [0], ["residual"])) == ["fed_dpo_residual"]
    with pytest.raises(InputError, match="did you mean"):
        study("lora-mixing", base, [0], ["products"])
    with pytest.raises(InputError, match="allowed for study lora-mixing: a language model"):
        study("lora-mixing", SHORT, [0])


def test_methods_on_one_budget():
    """None sends more models or takes more steps than FedDPO does; each fits the agents."""
    many = {"source": "builtin:town", "agents": 16, "town": {"users": 16, "pairs_per_user": 20}}
    base = config(TOWN | {"preferences": many}, method={"name": "fed_dpo", "rounds": 40, "local_steps": 3})
    sweep = study("methods", base, [0])
    assert sweep.kind == "compare"
    assert {
        "fed_dpo",
        "scaffold",
        "one_peer",
        "clustered",
        "fine_tuning",
        "group_robust",
        "q_fed_avg",
        "ifca",
        "fed_soft",
        "ditto",
        "apfl",
        "dec_ditto",
        "dec_apfl",
        "collaboration_graph",
        "local_only",
    } <= set(names(sweep))
    population = Population(weights=np.full(16, 1 / 16), seed=0)
    for variant in sweep.variants:
        changed = base.replace(dict(variant.changes)).method
        changed.check(16)
        method = METHODS[changed.name](changed, population)
        rounds = range(1, changed.rounds + 1)
        if not method.compression:
            assert (
                sum(method.bytes_sent(r, model_bytes=10**6, data_bytes=0) for r in rounds) <= 1.02 * 40 * 32e6
            )
        assert sum(len(method.participants(r)) for r in rounds) <= 40 * 16
    rounds = {variant.name: variant.changes["method"]["rounds"] for variant in sweep.variants}
    assert (rounds["scaffold"], rounds["fed_buff"], rounds["dec_dpo"]) == (20, 80, 40)
    assert rounds["ditto"] == 40  # the second model of two never leaves
    assert rounds["fed_soft"] == 36  # of 40 rounds one sends a model, 8 send three, 31 two: 40 x 80 / 87
    assert rounds["ifca"] == 27  # two models to fetch, but for the first round
    assert names(study("methods", base, [0], ["scaffold", "push_sum"])) == ["scaffold", "push_sum"]
    adapters = base.replace({"policy": {"model": "builtin:tiny", "train": "lora"}})
    on_adapters = study("methods", adapters, [0])
    assert set(names(on_adapters)) - set(names(sweep)) == {"fed_per"}

    frozen = adapters.replace({"policy.lora": {"mixing": "freeze_a"}})
    assert "fed_per" not in names(study("methods", frozen, [0]))
    below_0 = base.replace({"objective.loss_type": "robust", "objective.label_smoothing": 0.1})
    assert set(names(sweep)) - set(names(study("methods", below_0, [0]))) == {"q_fed_avg"}
    with pytest.raises(InputError, match="unknown name 'scafold'"):
        study("methods", base, [0], ["scafold"])


def test_heterogeneity_of_residents_and_of_files(tmp_path, monkeypatch):
    made = study("heterogeneity", SHORT, [0], ["0", "2"])
    assert names(made) == [f"{method}_{h}" for method in ("fed_dpo", "dec_dpo", "local_only") for h in (0, 2)]
    changed = SHORT.replace(made.variants[1].changes)
    assert changed.preferences.town_settings.heterogeneity == 2
    assert changed.preferences.town_settings.users == 4
    write_jsonl(tmp_path / "answers.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    real = study("heterogeneity", config(FILE), [0], ["0.5"])
    dealt = config(FILE).replace(real.variants[0].changes).preferences
    assert (dealt.partition, dealt.alpha, dealt.agents) == ("dirichlet", 0.5, 3)  # as many agents as users


# ---- running them


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "out"
    run_sweep(SHORT, comparison(SHORT, [0, 5]), out, listener=silent)
    return out


def test_every_variant_with_every_seed(compared):
    for name in names(comparison(SHORT, [0, 5])):
        for seed in (0, 5):
            summary = json.loads((compared / name / f"seed_{seed}" / "summary.json").read_text())
            assert (summary["name"], summary["seed"], summary["status"]) == (name, seed, "done")
    described = json.loads((compared / "sweep.json").read_text())
    assert [variant["name"] for variant in described["variants"]] == names(comparison(SHORT, [0, 5]))


def test_variants_of_a_seed_are_judged_on_the_same_pairs(compared):
    rows = [
        load_file(path)["rows"].tolist() for path in sorted(compared.glob("*/seed_5/held_out.safetensors"))
    ]
    assert len(rows) == 5
    assert all(sorted(some) == sorted(rows[0]) for some in rows)


def test_a_finished_sweep_is_left_as_it_is(compared):
    before = contents(compared)
    run_sweep(SHORT, comparison(SHORT, [0, 5]), compared, listener=silent, again=True)
    assert contents(compared) == before


@pytest.mark.parametrize("other", [comparison(SHORT, [0]), study("folds", SHORT, [0, 5])])
def test_another_sweep_is_refused(compared, other):
    before = contents(compared)
    with pytest.raises(InputError, match="found another sweep"):
        run_sweep(SHORT, other, compared, listener=silent, again=True)
    assert contents(compared) == before


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when", ["config", "round"])
def test_killed_and_resumed_from_the_command_line(when, compared, tmp_path, monkeypatch, undrawn):
    """Without naming the config: the sweep keeps it from its start on."""
    out, town = tmp_path / "out", write_yaml(tmp_path / "town.yaml", SHORT.plain())
    calls = []

    def kill(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise Killed
        return real(*args, **kwargs)

    target = "new_directory" if when == "config" else "Rounds"
    real = getattr(running, target)
    with monkeypatch.context() as patch:
        patch.setattr(running, target, kill)
        with pytest.raises(Killed):
            prefmesh("compare", town, "--seeds", "0,5", "--out", out)
    assert len(list(out.glob("*/seed_*/summary.json"))) == 2
    assert prefmesh("compare", "--resume", out, "--seeds", "0,5").code == 0
    tables = [compared / "comparison.json", compared / "sweep.json", compared / "config.yaml"]
    for path in (*compared.rglob("*.safetensors"), *tables):
        assert (out / path.relative_to(compared)).read_bytes() == path.read_bytes()


def test_interrupted_says_how_to_go_on(tmp_path, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise Interrupted("stopped after round 1 of 2; go on with: prefmesh run --resume inner")

    monkeypatch.setattr(sweeping, "run", stop)
    out = tmp_path / "out"
    with pytest.raises(Interrupted) as stopped:
        run_sweep(SHORT, comparison(SHORT, [0]), out, listener=silent)
    assert str(stopped.value) == f"{out}/centralized/seed_0: stopped after round 1 of 2; go on with the same command and --resume {out}"  # fmt: skip


def test_a_variant_that_diverges_is_a_result(tmp_path):
    wild = {
        "optimizer.lr": 1e6,
        "optimizer.weight_decay": 1.0,
        "method": {"name": "centralized", "rounds": 9},
    }
    made = Sweep(title="two", kind="compare", variants=[
        Variant(name="calm", label="calm", changes={}), Variant(name="wild", label="wild", changes=wild),
        Variant(name="after", label="after", changes={"method": {"name": "local_only", "rounds": 1}}),
    ])  # fmt: skip
    run_sweep(SHORT, made, tmp_path / "out", listener=silent)
    status = {name: json.loads((tmp_path / "out" / name / "seed_0" / "summary.json").read_text())["status"] for name in names(made)}  # fmt: skip
    assert status == {"calm": "done", "wild": "diverged", "after": "done"}
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (found["baseline"], list(found["differences"])) == ("calm", ["after"])


# ---- comparing them


def held_out(
    out: Path, name: str, seed: int, accuracy: list[float], rows: list[int], prompt: list[int]
) -> None:
    directory = out / name / f"seed_{seed}"
    directory.mkdir(parents=True)
    save_file(
        {"accuracy": np.array(accuracy, dtype=float), "rows": np.array(rows), "prompt": np.array(prompt)}, directory / "held_out.safetensors"
    )  # fmt: skip


def two(kind: str = "compare", seeds: tuple[int, ...] = (0,)) -> Sweep:
    variants = [Variant(name=name, label=name, changes={}) for name in ("a", "b")]
    return Sweep(title="t", kind=kind, variants=variants, seeds=seeds)


def test_differences_by_hand(tmp_path):
    """Four pairs of two prompts: b - a is (1, 0, 1/2, 1/2), its mean 1/2, and the prompts' sums of residuals are 0."""
    held_out(tmp_path, "a", 0, [0, 1, 0, 0.5], [4, 5, 6, 7], [1, 1, 2, 2])
    held_out(tmp_path, "b", 0, [1, 1, 0.5, 1], [4, 5, 6, 7], [1, 1, 2, 2])
    found = paired_differences(tmp_path, two())["differences"]["b"]
    assert found == {"difference": 0.5, "low": 0.5, "high": 0.5, "pairs": 4, "seeds": 1}


def test_the_interval_counts_a_prompt_s_pairs_together(tmp_path):
    """Residuals sum to +1/2 and -1/2 in the two prompts: se = sqrt(2 (1/4 + 1/4)) / 4 = 1/4; t(1) at 97.5 % is 12.706."""
    held_out(tmp_path, "a", 0, [0, 0, 0, 0], [0, 1, 2, 3], [1, 1, 2, 2])
    held_out(tmp_path, "b", 0, [1, 0.5, 0.5, 0], [0, 1, 2, 3], [1, 1, 2, 2])
    found = paired_differences(tmp_path, two())["differences"]["b"]
    assert found["difference"] == 0.5
    assert found["high"] - 0.5 == pytest.approx(12.7062 / 4, rel=1e-4)
    assert 0.5 - found["low"] == pytest.approx(12.7062 / 4, rel=1e-4)


def test_other_pairs_are_not_compared(tmp_path):
    held_out(tmp_path, "a", 0, [0, 1], [1, 2], [1, 2])
    held_out(tmp_path, "b", 0, [0, 1], [1, 3], [1, 3])
    assert paired_differences(tmp_path, two())["differences"] == {}


def test_folds_are_pooled(tmp_path):
    held_out(tmp_path, "a", 0, [1, 1], [0, 1], [1, 2])
    held_out(tmp_path, "b", 0, [0, 1], [2, 3], [3, 4])
    found = paired_differences(tmp_path, two("study"))
    assert found["pooled"]["accuracy"] == 0.75
    assert found["pooled"]["pairs"] == 4
    assert paired_differences(tmp_path, two("compare"))["pooled"] is None


def test_a_seed_that_is_missing_is_left_out(tmp_path):
    held_out(tmp_path, "a", 0, [0, 0], [1, 2], [1, 2])
    held_out(tmp_path, "b", 0, [1, 1], [1, 2], [1, 2])
    held_out(tmp_path, "b", 1, [0, 0], [1, 2], [1, 2])
    found = paired_differences(tmp_path, two(seeds=(0, 1)))["differences"]["b"]
    assert (found["difference"], found["seeds"], found["pairs"]) == (1, 1, 2)


def test_seeds_and_values_need_not_be_said_again(tmp_path, undrawn) -> None:
    config = write_yaml(tmp_path / "town.yaml", TOWN)
    out = tmp_path / "out"
    done = prefmesh("study", "local-steps", config, "--values", "1,2", "--seeds", "4", "--out", out)
    assert done.code == 0
    before = contents(out)
    again = prefmesh("study", "local-steps", "--resume", out)
    assert again.code == 0, again.err
    assert contents(out).keys() == before.keys()
    other = prefmesh("study", "local-steps", "--resume", out, "--seeds", "5")
    assert (other.code, "found another sweep" in other.err) == (2, True)
