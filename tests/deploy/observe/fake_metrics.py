"""Ray's Gauge and Counter without Ray: values by the name that Prometheus gets, and by tags."""

from __future__ import annotations

import pytest

from opdlm.deploy.observe import writers

Values = dict[str, dict[tuple, float]]


class _FakeMetric:
    values: Values

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.series = self.values.setdefault(self.exported(name), {})
        self.tag_keys = tag_keys

    def _key(self, tags: dict[str, str]) -> tuple:
        assert set(tags) == set(self.tag_keys)
        return tuple(tags[key] for key in self.tag_keys)


class FakeGauge(_FakeMetric):
    @staticmethod
    def exported(name: str) -> str:
        return f"ray_{name}"

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.series[self._key(tags)] = value


class FakeCounter(_FakeMetric):
    @staticmethod
    def exported(name: str) -> str:
        return f"ray_{name}_total"

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0, "Ray refuses it"
        self.series[self._key(tags)] = self.series.get(self._key(tags), 0) + value


def replace_ray_metrics(monkeypatch: pytest.MonkeyPatch) -> Values:
    """Has `PrometheusWriter` write to the returned values."""
    monkeypatch.setattr(_FakeMetric, "values", {}, raising=False)
    monkeypatch.setattr(writers, "Gauge", FakeGauge)
    monkeypatch.setattr(writers, "Counter", FakeCounter)
    monkeypatch.setattr(writers.ray, "is_initialized", lambda: True)
    return _FakeMetric.values
