"""What a message is reduced to before it is sent: a chain of transforms of stacked parameters, and its bytes.

A stage works on what the stage before *sends*: the values that top-k kept, the factors of a low-rank matrix.
`settings.ChainSettings` is what a config says, `message.compress` what a receiver reads, `message.message_bytes` the cost.
"""

from prefmesh.compression.base import COMPRESSORS, Compressor, compressor
from prefmesh.compression.coding import decode, encode
from prefmesh.compression.follow import follow
from prefmesh.compression.layout import Layout, Params, layout_of
from prefmesh.compression.low_rank import LowRank
from prefmesh.compression.message import compress, contraction, message_bytes
from prefmesh.compression.quantised import Int4, Int8
from prefmesh.compression.seeds import Seeds, message_seeds
from prefmesh.compression.settings import Chain, ChainSettings, parse_chain
from prefmesh.compression.signs import Sign
from prefmesh.compression.sparse import RandomK, TopK

__all__ = [
    "COMPRESSORS",
    "Chain",
    "ChainSettings",
    "Compressor",
    "Int4",
    "Int8",
    "Layout",
    "LowRank",
    "Params",
    "RandomK",
    "Seeds",
    "Sign",
    "TopK",
    "compress",
    "compressor",
    "contraction",
    "decode",
    "encode",
    "follow",
    "layout_of",
    "message_bytes",
    "message_seeds",
    "parse_chain",
]
