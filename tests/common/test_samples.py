"""Samples that share a reference of Ray. `pytest tests/common/test_samples.py`"""

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
    [("hidden", 4096, 1), ("hidden", 64, 7), ("topk", 64, 30), ("logits", 8, 1)],
)
def test_samples_share_a_reference_up_to_a_megabyte(targets, max_new_tokens, shared) -> None:
    """Bytes of a sample with hidden targets: (2 x 1024 + 12) x 64 tokens + 400 of its prompt, so 7 fit into 1 MiB.

    A token with top-64 targets has 524 bytes.
    """
    assert samples_per_reference(_config(targets, max_new_tokens), MODEL, 100) == shared


def test_many_given_responses_share_a_reference() -> None:
    assert samples_per_reference(_config("hidden", 4096, "cft"), MODEL, 0) == (1 << 20) // (20 * 4096)


def test_the_longest_prompt_is_counted() -> None:
    assert samples_per_reference(_config("hidden", 8, "cft"), MODEL, 20_000) == (1 << 20) // (18 * 8 + 80_000)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_each_record_finds_its_sample(size) -> None:
    samples = list("abcde")
    groups = in_groups(samples, size)
    refs = sample_refs([str(i) for i in range(len(groups))], size, [(i, 2 * i) for i in range(5)])
    assert [groups[int(ref.group)][ref.place] for ref in refs] == samples
    assert [(ref.prompt_tokens, ref.response_tokens) for ref in refs] == [(i, 2 * i) for i in range(5)]


def test_each_reference_is_returned_once() -> None:
    refs = [SampleRef(group, place, 1, 1) for group, place in (("b", 0), ("a", 0), ("b", 1))]
    assert distinct_groups(refs) == ["b", "a"]
