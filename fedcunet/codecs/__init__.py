"""Codecs: float32 vectors to bytes and back. `CODECS` is the table of all, by name.

A new codec is one file and one line here; tests/properties/test_codecs.py runs over the table.
"""

from fedcunet.codecs.base import Codec, check_codec_bits, make_seed
from fedcunet.codecs.eden import EdenCodec
from fedcunet.codecs.floats import Float16Codec, Float32Codec
from fedcunet.codecs.hadamard_trellis import HadamardTrellisCodec
from fedcunet.codecs.linear import LinearCodec
from fedcunet.codecs.minmax import MinMaxCodec
from fedcunet.codecs.qsgd import QsgdCodec
from fedcunet.codecs.sign import SignCodec
from fedcunet.codecs.topk import TopKCodec
from fedcunet.codecs.trellis import TrellisCodec
from fedcunet.errors import UserError

__all__ = ["CODECS", "Codec", "check_codec_bits", "get_codec", "make_seed"]

CODECS: dict[str, Codec] = {
    "float32": Float32Codec(),
    "float16": Float16Codec(),
    "linear": LinearCodec("linear", stochastic=True),
    "linear-nearest": LinearCodec("linear-nearest", stochastic=False),
    "sign": SignCodec(),
    "eden": EdenCodec(),
    "trellis": TrellisCodec("trellis", "unbiased"),
    "trellis-wiener": TrellisCodec("trellis-wiener", "wiener"),
    "trellis-even": TrellisCodec("trellis-even", "even"),
    "dithered": TrellisCodec("dithered", "unbiased", num_states=1),
    "hadamard-trellis": HadamardTrellisCodec(),
    "qsgd": QsgdCodec(),
    "min-max": MinMaxCodec(),
    "top-k": TopKCodec(),
}


def get_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        UserError: There is none; the names that exist are listed.
    """
    if name not in CODECS:
        raise UserError(f"unknown codec '{name}'; there are: {', '.join(CODECS)}")
    return CODECS[name]
