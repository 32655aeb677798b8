"""Stop strings end decoding. `pytest tests/actors/rollout/test_stopping.py`"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.rollout.stopping import StopStrings
from opdlm.common.form import PAPER_FORM, StudentForm
from opdlm.common.model.char_tokenizer import build_char_tokenizer
from tests.tiny import request, tiny_model

TOKENIZER = build_char_tokenizer("0123456789+-=;")
MASK, VOCABULARY, LIMIT = 17, 18, 40
BOTH = StudentForm(logit_shift=True, context="causal")


@pytest.mark.parametrize(
    ("how", "form"),
    [
        (DecodeSettings(4, "absolute", "low_confidence_dynamic", 0.5), PAPER_FORM),
        (DecodeSettings(4, "response", "low_confidence_static"), BOTH),
        (DecodeSettings(4, "response", "verified"), BOTH),
    ],
)
def test_a_sequence_ends_with_the_block_of_its_stop_string(how: DecodeSettings, form: StudentForm) -> None:
    """The tokens are those of a decoder without stop strings, to where that knows the string; others go on."""
    model = tiny_model(5, vocab_size=VOCABULARY)
    requests = [request(5 + i, i, LIMIT, 3, 16) for i in range(6)]
    whole = _decode(model, how, form, requests)
    stops = [_text(t)[3 + i : 5 + i] for i, t in enumerate(whole)]
    assert all(len(stop) == 2 for stop in stops)
    asked = [
        replace(r, stop=("never", stop) if i % 3 else ())
        for i, (r, stop) in enumerate(zip(requests, stops, strict=True))
    ]
    ended = _decode(model, how, form, asked)
    for i, (long, short) in enumerate(zip(whole, ended, strict=True)):
        if i % 3 == 0:
            assert short.response.tolist() == long.response.tolist()
            continue
        assert short.finish_reason == "stop"
        assert short.response.tolist() == long.response[: short.response_length].tolist()
        assert stops[i] in _text(short)
        before = short.reveal_step < short.reveal_step.max()
        last = short.response_length - (4 if how.strategy != "verified" else int((~before).sum()))
        assert stops[i] not in str(TOKENIZER.decode(short.response[: max(last, 0)]))
        assert short.response_length < long.response_length
        assert short.denoising_steps < long.denoising_steps


def test_without_a_tokenizer_stop_strings_end_nothing() -> None:
    model, how = tiny_model(5, vocab_size=VOCABULARY), DecodeSettings()
    asked = [replace(request(5, 0, LIMIT, 3, 16), stop=("",))]
    with_strings = [replace(asked[0], stop=("1", "2", "="))]
    decoder = BlockDecoder(model, how, MASK, [0], 2)
    (found,), (same,) = decoder.decode(asked)[0], decoder.decode(with_strings)[0]
    assert found.response.tolist() == same.response.tolist()


def test_strings_and_special_tokens() -> None:
    stops, pad = StopStrings(TOKENIZER), TOKENIZER.pad_token_id
    ids = np.array([*TOKENIZER("1+2=3;")["input_ids"], pad, *TOKENIZER("4")["input_ids"]])
    assert stops.reached(["x", "=3;4"], ids, 1), "special tokens leave no text"
    assert stops.reached([TOKENIZER.pad_token], ids, 1)
    assert not stops.reached(["=4", ""], ids, 1)
    assert TOKENIZER.decode(stops.cut([TOKENIZER.pad_token, "1"], ids)) == "1+2=3;"
    long = np.array(TOKENIZER("12" + "3" * 100)["input_ids"])
    assert not stops.reached(["12"], long, 4), "an earlier call has seen it"


def _decode(model: Any, how: DecodeSettings, form: StudentForm, requests: list) -> list:
    decoder = BlockDecoder(model, replace(how, ignore_eos=True), MASK, [0], 3, form=form)
    decoder.stops = StopStrings(TOKENIZER)
    return decoder.decode(requests)[0]


def _text(trajectory: Any) -> str:
    return str(TOKENIZER.decode(trajectory.response, skip_special_tokens=True))
