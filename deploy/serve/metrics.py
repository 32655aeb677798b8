"""What a server counts, for Prometheus (`GET /metrics`)."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The figures of one server. Units are in the names."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "opdlm_requests", "Requests by path and HTTP status", ["path", "status"], registry=self._registry
        )
        self.prompt_tokens = Counter("opdlm_prompt_tokens", "Prompt tokens", registry=self._registry)
        self.tokens = Counter("opdlm_response_tokens", "Response tokens", registry=self._registry)
        self.steps = Counter("opdlm_denoising_steps", "Denoising steps, summed over responses", registry=self._registry)
        self.retries = Counter("opdlm_retries", "Responses begun again as their engine died", registry=self._registry)
        self.cancelled = Counter("opdlm_cancelled_requests", "Requests whose client went away", registry=self._registry)
        self.active = Gauge("opdlm_active_responses", "Responses that are made or wait", registry=self._registry)
        self.version = Gauge("opdlm_weight_version", "Weight version that new requests get", registry=self._registry)
        self.reloads = Counter(
            "opdlm_reloads",
            "Reloads by result: done, refused (the old weights stay), incomplete (not all engines have the new ones)",
            ["result"],
            registry=self._registry,
        )
        self.seconds = Histogram(
            "opdlm_request_seconds",
            "Duration of requests that were answered",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return bytes(generate_latest(self._registry))
