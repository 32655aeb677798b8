"""Samples that share a reference. `pytest tests/common/test_samples.py`"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from opdlm.common.batches import in_groups
from opdlm.common.config import config_from_dict
from opdlm.common.samples import SampleRef, distinct_groups, sample_refs, samples_per_reference

MODEL = SimpleNamespace(hidden_size=1024, vocab_size=151_936)


def _config(targets: str, max_new_tokens: int, kind: str = "opd"):
    return config_from_dict(
        {
            "model": {"teacher": "t"},
            "data": {"path": "p"},
            "rollout": {"max_new_tokens": max_new_tokens},
            "teacher": {"targets": targets, "dtype": "bfloat16", "top_k": 64},
            "objective": {"kind": kind, "top_k": 64 if targets == "topk" else 0},
        }
    )


@pytest.mark.parametrize(
    ("targets", "max_new_tokens", "shared"),
    [("hidden", 4096, 1), ("hidden", 64, 7), ("topk", 64, 31), ("logits", 8, 1)],
)
def test_samples_share_a_reference_up_to_a_megabyte(targets, max_new_tokens, shared) -> None:
    """(2 x 1024 + 10) x 64 tokens are 131,712 bytes, so seven; top-64 has 522 bytes a token. A prompt has 400."""
    assert samples_per_reference(_config(targets, max_new_tokens), MODEL, 100) == shared


def test_given_tokens_are_small() -> None:
    assert samples_per_reference(_config("hidden", 4096, "cft"), MODEL, 0) == (1 << 20) // (18 * 4096)


def test_long_prompts_count() -> None:
    assert samples_per_reference(_config("hidden", 8, "cft"), MODEL, 20_000) == (1 << 20) // (18 * 8 + 80_000)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_each_sample_is_where_its_record_says(size) -> None:
    samples = list("abcde")
    groups = in_groups(samples, size)
    refs = sample_refs([str(i) for i in range(len(groups))], size, [(i, 2 * i) for i in range(5)])
    assert [groups[int(ref.group)][ref.place] for ref in refs] == samples
    assert [(ref.prompt_tokens, ref.response_tokens) for ref in refs] == [(i, 2 * i) for i in range(5)]


def test_references_are_fetched_once_each() -> None:
    refs = [SampleRef(group, place, 1, 1) for group, place in (("b", 0), ("a", 0), ("b", 1))]
    assert distinct_groups(refs) == ["b", "a"]
