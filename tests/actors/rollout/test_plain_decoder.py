"""The benchmarks' baseline decoder decodes the same tokens. `pytest tests/actors/rollout/test_plain_decoder.py`"""

from __future__ import annotations

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from tests.benchmarks.plain_decoder import plain_decode
from tests.tiny import MASK, request, tiny_model


def test_plain_decoder_decodes_the_same_tokens() -> None:
    model, asked = tiny_model(1), [request(8, i, limit) for i, limit in enumerate([3, 17, 9, 12, 5])]
    decode_settings = DecodeSettings(block_size=4, threshold=0.4, ignore_eos=True)
    ours, _ = BlockDecoder(model, decode_settings, MASK, [], 2).decode(asked)
    assert plain_decode(model, asked, 4, 0.4, MASK, 2) == [t.response.tolist() for t in ours]
