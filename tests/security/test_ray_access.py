"""Who may reach the Ray of a run: the dashboard, token authentication, Ray's version.

`pytest tests/security/test_ray_access.py`
"""

from __future__ import annotations

import logging

import pytest

from opdlm.common.config import config_from_dict
from opdlm.common.config.schema import ResourcesConfig
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.deploy.cluster import connection

LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")


@pytest.mark.parametrize("mode", [None, "token", "disabled"])
@pytest.mark.parametrize("host", [*LOCAL_HOSTS, "0.0.0.0", "10.1.2.3", "head.example"])
def test_a_dashboard_that_others_can_reach_needs_authentication(monkeypatch, mode, host) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    resources = ResourcesConfig(dashboard_host=host)
    if mode == "disabled" and host not in LOCAL_HOSTS:
        with pytest.raises(ConfigError, match=rf"resources.dashboard_host: found '{host}' with RAY_AUTH_MODE=disabled"):
            connection.check_security(resources, "2.60.0")
    else:
        connection.check_security(resources, "2.60.0")


@pytest.mark.parametrize("version", ["2.9.3", "2.51.1", "2.59.0"])
def test_an_old_ray_is_refused(version) -> None:
    with pytest.raises(OpdlmError, match=rf"ray: found {version}, .* at least 2.60 is needed"):
        connection.check_security(ResourcesConfig(), version)


@pytest.mark.parametrize("version", ["2.60.0", "2.101.0", "3.0.0.dev0"])
def test_a_new_ray_is_accepted(version) -> None:
    connection.check_security(ResourcesConfig(), version)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local_dashboard": False}, "with resources.local_dashboard false"),
        ({"ray_address": "10.0.0.1:6379"}, "with resources.ray_address, but it is for a local Ray only"),
    ],
)
def test_a_dashboard_host_without_effect_is_refused(settings, message) -> None:
    raw = {"model": {"teacher": "t"}, "data": {"path": "p"}, "resources": {"dashboard_host": "0.0.0.0", **settings}}
    with pytest.raises(ConfigError, match=f"resources.dashboard_host: found '0.0.0.0' {message}"):
        config_from_dict(raw)


@pytest.mark.parametrize(("mode", "warnings"), [("disabled", 1), ("token", 0)])
@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_local_dashboard_is_for_this_machine_and_missing_authentication_is_a_warning(
    monkeypatch, caplog, mode, warnings, address
) -> None:
    calls: list[dict] = []
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connection.ray, "init", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(connection, "check_reachable", lambda address, where: address)
    with caplog.at_level(logging.WARNING):
        connection.join_or_start(ResourcesConfig(ray_address=address), {"CPU": [], "GPU": []})
    (arguments,) = calls
    assert arguments.get("dashboard_host") == (None if address else "127.0.0.1")
    assert sum("token authentication is off" in record.message for record in caplog.records) == warnings


def test_the_address_of_a_dashboard_is_refused_as_that_of_a_cluster(monkeypatch) -> None:
    """`ray job submit` takes a dashboard's address in RAY_ADDRESS; `opdlm train` cannot join a cluster by it."""
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS: found http://127\.0\.0\.1:8265, a dashboard's address"):
        connection.join_or_start(ResourcesConfig(), {"CPU": [], "GPU": []})
