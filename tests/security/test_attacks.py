"""The attacks of the security tests work where code is careless, so the other tests here can fail.

`pytest tests/security/test_attacks.py`
"""

from __future__ import annotations

import io
import pickle

import torch
import yaml

from tests.security.attacks import PYTHON_CODE, PickleAttack, yaml_attack


def test_careless_loaders_execute_every_kind_of_attack(tmp_path) -> None:
    markers = [tmp_path / name for name in ("pickle", "torch", "yaml", "python")]
    pickle.loads(pickle.dumps(PickleAttack(markers[0])))
    stream = io.BytesIO()
    torch.save(PickleAttack(markers[1]), stream)
    torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    yaml.unsafe_load(yaml_attack(markers[2]))
    exec(PYTHON_CODE.format(marker=str(markers[3])))
    assert [marker.name for marker in markers if not marker.exists()] == []
