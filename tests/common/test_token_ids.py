"""Sets of token ids. `pytest tests/common/test_token_ids.py`"""

from __future__ import annotations

import numpy as np

from opdlm.common.token_ids import TokenIds


def test_a_set_behaves_as_the_plain_set_of_its_ids() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        ours, theirs = (set(rng.integers(0, 12, rng.integers(0, 14)).tolist()) for _ in range(2))
        a, b = TokenIds.of(ours), TokenIds.of(theirs)
        assert set(a) == ours
        assert len(a) == len(ours)
        assert [i for i in range(-2, 15) if i in a] == sorted(ours)
        assert set(a & b) == ours & theirs
        assert set(a.without(3, 5)) == ours - {3, 5}
        assert a.others(10) == [i for i in range(10) if i not in ours]
        assert (a == b) == (ours == theirs)
        assert not a.holes or max(a.holes) < a.end - 1


def test_all_rows_of_a_matrix() -> None:
    rows = TokenIds(5)
    assert list(rows) == [0, 1, 2, 3, 4]
    assert rows.without(4) == TokenIds(4)
    assert rows.without(7) is rows
    assert rows & TokenIds(3) == TokenIds(3)
