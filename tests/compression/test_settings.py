"""What a config says about messages, and what is refused."""

import pytest
import torch
import yaml

from prefmesh.compression import (
    COMPRESSORS,
    Chain,
    ChainSettings,
    Compressor,
    Int8,
    Layout,
    LowRank,
    Params,
    RandomK,
    Seeds,
    Sign,
    TopK,
    compress,
    compressor,
    decode,
    encode,
    layout_of,
    message_bytes,
    parse_chain,
)
from prefmesh.compression.base import Form, Sent
from prefmesh.config import validated
from prefmesh.errors import InputError
from prefmesh.settings import Settings


class Example(Settings):
    """A section that holds a chain."""

    compression: ChainSettings = ()


@pytest.mark.parametrize(
    ("text", "chain"),
    [
        ("[]", ()),
        ("[{name: top_k, share: 0.01}, int8]", (TopK(share=0.01), Int8())),
        ("[{name: sign}]", (Sign(),)),
        ("[{name: low_rank, rank: 2}, {name: random_k, share: 1}]", (LowRank(rank=2), RandomK(share=1))),
    ],
)
def test_there_and_back(text: str, chain: Chain):
    section = validated(Example, {"compression": yaml.safe_load(text)}, "method")
    assert section.compression == chain
    plain = section.model_dump(mode="json")
    assert validated(Example, plain, "method") == section
    assert validated(Example, {"compression": chain}, "method") == section


def test_written_with_all_its_settings():
    section = Example(compression=(RandomK(share=0.5), Int8()))
    assert section.model_dump(mode="json") == {
        "compression": [{"name": "random_k", "share": 0.5, "unbiased": False}, "int8"]
    }
    assert Example().compression == ()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ([{"name": "top_k", "share": 0}], "method.compression.0.share: found 0; allowed: greater than 0"),
        (
            ["int8", {"name": "top_k", "share": 1.5}],
            "method.compression.1.share: found 1.5; allowed: less than or equal to 1",
        ),
        ([{"name": "random_k", "share": "0.1"}], "method.compression.0.share: found '0.1'; allowed: a valid"),
        (
            [{"name": "low_rank", "rank": 0}],
            "method.compression.0.rank: found 0; allowed: greater than or equal to 1",
        ),
        (["top_k"], "method.compression.0.share: missing; top_k has no usual one"),
        (["itn8"], "method.compression.0.name: unknown name 'itn8'; did you mean 'int8'?"),
        ([{"name": ["int8"]}], "method.compression.0.name: unknown name"),
        (
            [{"name": "top_k", "shaer": 0.1}],
            "method.compression.0.shaer: unknown key 'shaer'; did you mean 'share'?",
        ),
        ([{"name": "int8", 3: 0.1}], "method.compression.0.3: unknown key '3'"),
        ([{"share": 0.1}], "method.compression.0: found {'share': 0.1}; allowed: a name, or a mapping"),
        ([None], "method.compression.0: found None; allowed: a name"),
        ("int8", "method.compression: found 'int8'; allowed: a list of stages"),
        ({"name": "int8"}, "method.compression: found {'name': 'int8'}; allowed: a list of stages"),
        (None, "method.compression: found None"),
        (
            ["sign", "int8"],
            "method.compression.1: int8 follows sign, which leaves codes; allowed: sign as the last stage",
        ),
        (
            [{"name": "top_k", "share": 0.1}, {"name": "low_rank", "rank": 1}],
            "method.compression.1: low_rank follows top_k, which leaves no matrices; allowed: low_rank before it",
        ),
    ],
)
def test_refused_in_one_line(raw, said):
    with pytest.raises(InputError) as refused:
        validated(Example, {"compression": raw}, "method")
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


def test_another_place_in_the_config():
    with pytest.raises(InputError, match=r"^up\.0\.name: unknown name"):
        parse_chain(["x"], where="up")


def test_own_stage(monkeypatch):
    """A plugin's: entries in half of their precision, which a built-in stage may come before and after."""
    registry = dict(COMPRESSORS)
    monkeypatch.setattr("prefmesh.compression.base.COMPRESSORS", registry)
    monkeypatch.setattr("prefmesh.compression.settings.COMPRESSORS", registry)

    @compressor("half")
    class Half(Compressor):
        sends = Form.TENSORS

        def sent(self, layout: Layout) -> Sent:
            return Sent({name: type(spec)(spec.shape, torch.float16) for name, spec in layout.items()}, {})

        def reduce(self, values: Params, seeds: Seeds) -> tuple[Params, Params]:
            return {name: tensor.to(torch.float16) for name, tensor in values.items()}, {}

        def restore(self, values: Params, aside: Params, layout: Layout) -> Params:
            return {name: values[name].to(spec.dtype) for name, spec in layout.items()}

    x = {"x": torch.tensor([[1.0, 1 / 3, -8.0, 0.1]])}
    half = parse_chain(["half"])
    assert torch.equal(compress(x, half, [0])["x"], x["x"].half().float())
    chain = parse_chain([{"name": "top_k", "share": 0.5}, "half"])
    assert message_bytes(layout_of(x), chain) == 2 * 2 + 1
    assert decode(encode(x, chain, [0]), chain, layout_of(x))["x"].tolist() == [[1, 0, -8, 0]]
    with pytest.raises(InputError, match="'half' is taken"):
        compressor("half")(Half)
