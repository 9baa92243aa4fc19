"""YAML to settings and back; what is refused is in test_bad_input.py."""

from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmesh.algorithms.methods.dec_dpo import DecDPOSettings
from prefmesh.algorithms.methods.fed_dpo import FedDPOSettings
from prefmesh.config import ExperimentConfig, load_config, parse_with_overrides
from prefmesh.errors import InputError
from prefmesh.policies.settings import CausalLMSettings, LogLinearSettings
from tests.runs import TOWN, config, write_yaml

DESIGN = """
seed: 0
preferences: {source: builtin:town, agents: 8, partition: by_user}
policy:      {model: builtin:tiny, train: lora, lora: {r: 8, lora_alpha: 16}}
objective:   {loss_type: sigmoid, beta: 0.1}
method:      {name: dec_dpo, rounds: 40, local_steps: 3, graph: ring, weights: metropolis}
optimizer:   {name: adamw, lr: 2.0e-4, batch_size: 4, sampling: shuffle, state: keep}
evaluation:  {every: 5, held_out: 0.1}
runtime:     {device: auto, dtype: float32, processes: 1}
"""
METHODS = st.one_of(
    st.builds(lambda s, q: {"name": "fed_dpo", "participation": s, "staleness": q}, st.none() | st.integers(1, 4), st.integers(0, 9)),
    st.sampled_from([{"name": "centralized"}, {"name": "local_only", "rounds": 3}]),
    st.builds(lambda g: {"name": "dec_dpo", "graph": g}, st.sampled_from(["ring", "star", {"name": "erdos_renyi", "p": 0.5}])),
)  # fmt: skip
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 10**9),
        "method": METHODS,
        "optimizer.lr": st.floats(1e-9, 1e3),
        "objective.beta": st.floats(1e-6, 10.0) | st.integers(1, 5),
        "evaluation.held_out": st.sampled_from([0, 0.1, 0.25, 0.5]),
        "runtime.threads": st.none() | st.integers(1, 4),
    },
)


def test_the_plan_s_example_is_a_config():
    made = ExperimentConfig.parse(yaml.safe_load(DESIGN))
    assert made.known_agents == 8
    assert isinstance(made.policy, CausalLMSettings)
    assert isinstance(made.method, DecDPOSettings)
    assert (made.method.rounds, str(made.method.graph), made.policy.lora.scaling) == (40, "ring", 2.0)


@settings(max_examples=50)
@given(changes=CHANGES)
def test_what_is_written_is_read_back(tmp_path_factory, changes):
    made = config().replace(changes)
    path = tmp_path_factory.mktemp("config") / "x.yaml"
    path.write_text(made.to_yaml())
    again = load_config(path)
    assert again == made
    assert again.hash() == made.hash()
    assert again.to_yaml() == made.to_yaml()


@settings(max_examples=50)
@given(a=CHANGES, b=CHANGES)
def test_equal_hashes_are_equal_configs(a, b):
    one, other = config().replace(a), config().replace(b)
    assert (one.hash() == other.hash()) == (one == other)


def test_the_order_of_keys_is_nothing(tmp_path):
    turned = {key: dict(reversed(value.items())) if isinstance(value, dict) else value for key, value in reversed(TOWN.items())}  # fmt: skip
    assert load_config(write_yaml(tmp_path / "x.yaml", turned)).hash() == config().hash()


def test_left_out_sections_are_defaults():
    made = ExperimentConfig.parse({"method": {"name": "local_only"}})
    assert made.preferences.simulated
    assert isinstance(made.policy, CausalLMSettings)
    assert made == ExperimentConfig.parse({"method": {"name": "local_only"}, "optimizer": None, "seed": 0})


def test_the_policy_s_kind_follows_its_model():
    assert isinstance(config().policy, LogLinearSettings)
    raw = {**TOWN, "policy": {"model": "some/dir"}}
    assert isinstance(ExperimentConfig.parse(raw).policy, CausalLMSettings)
    with pytest.raises(InputError, match=r"policy\.features: unknown key"):
        ExperimentConfig.parse({**TOWN, "policy": {"model": "some/dir", "features": "hashed"}})


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("2e-4", 2e-4),
        ("2E-4", 2e-4),
        ("1e3", 1e3),
        (".5e1", 5.0),
        ("-1.5e+2", -150.0),
        ("3", 3),
        ("0.1", 0.1),
    ],
)
def test_yaml_1_2_s_numbers(written, value):
    """YAML 1.1, and so PyYAML, takes `2e-4` for a word."""
    if value > 0:
        assert parse_with_overrides(TOWN, [f"optimizer.lr={written}"]).optimizer.lr == value
    else:
        with pytest.raises(InputError, match=r"found -150\.0"):
            parse_with_overrides(TOWN, [f"optimizer.lr={written}"])


def test_overrides_win_in_their_order(tmp_path):
    path = write_yaml(tmp_path / "x.yaml", TOWN)
    made = load_config(path, ["seed=7", "method.rounds=3", "method.rounds=4", "evaluation.samples = 0", "runtime.threads=null"])  # fmt: skip
    assert (made.seed, made.method.rounds, made.evaluation.samples, made.runtime.threads) == (7, 4, 0, None)
    assert made.optimizer == config().optimizer


def test_what_is_overridden_stays_as_it_is():
    raw = deepcopy(TOWN)
    parse_with_overrides(raw, ["optimizer.lr=0.5", "method.name=fed_dpo"])
    assert raw == TOWN


def test_another_method_s_settings_go_with_it(tmp_path):
    raw = {**TOWN, "method": {"name": "dec_dpo", "rounds": 7, "local_steps": 3, "graph": "star"}}
    path = write_yaml(tmp_path / "x.yaml", raw)
    made = load_config(path, ["method.name=fed_dpo", "method.participation=2"])
    assert isinstance(made.method, FedDPOSettings)
    assert (made.method.rounds, made.method.local_steps, made.method.participation) == (7, 3, 2)
    with pytest.raises(InputError, match=r"method\.graph: unknown key"):  # but nobody's typo passes
        load_config(path, ["method.name=fed_dpo", "method.graph=ring"])


def test_replace_changes_by_path_and_checks():
    made = config()
    changed = made.replace({"optimizer.lr": 0.5, "method": {"name": "fed_dpo", "participation": 3}})
    assert (changed.optimizer.lr, changed.method.name) == (0.5, "fed_dpo")
    assert made == config()
    with pytest.raises(InputError, match=r"method\.participation: found 5"):
        made.replace({"method": {"name": "fed_dpo", "participation": 5}})


def test_how_many_agents_are_known_before_the_data_is():
    assert config().known_agents == 4
    assert config(preferences={"agents": None}).known_agents == 4
    assert (
        ExperimentConfig.parse(
            {"method": {"name": "local_only"}, "preferences": {"source": "x.jsonl"}}
        ).known_agents
        is None
    )


def test_combinations_that_mean_nothing():
    with pytest.raises(InputError, match=r"objective\.loss_type: ipo divides by completion lengths"):
        ExperimentConfig.parse({**TOWN, "objective": {"loss_type": "ipo"}})
    with pytest.raises(InputError, match=r"objective\.loss_type: sft divides by completion lengths"):
        ExperimentConfig.parse({**TOWN, "objective": {"loss_type": ["sigmoid", "sft"]}})
    with pytest.raises(InputError, match=r"objective\.loss_type: nca_pair takes each answer's log-prob"):
        ExperimentConfig.parse({**TOWN, "objective": {"loss_type": "nca_pair"}})
    with pytest.raises(InputError, match=r"objective\.f_divergence_type: forward_kl takes each answer's"):
        ExperimentConfig.parse({**TOWN, "objective": {"f_divergence_type": "forward_kl"}})
    with pytest.raises(InputError, match="attributes are read off the built-in town's texts"):
        ExperimentConfig.parse({**TOWN, "preferences": {"source": "x.jsonl"}})


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        config().seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_the_device_is_what_torch_has():
    assert config(runtime={"device": "cpu"}).runtime.torch_device() == "cpu"
    assert config().runtime.torch_device() in ("cpu", "cuda")


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_examples_are_configs(path):
    assert load_config(path).hash()
