"""What a server is set to."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from opdlm.common.config.base import Grid
from opdlm.common.config.schema import Strategy
from opdlm.common.errors import OpdlmError
from opdlm.common.model.facts import ModelFacts, read_facts, require_mask
from opdlm.deploy.run.saved_student import open_saved_run


class ServeOptions(BaseModel):
    """Options of a server: those of `opdlm serve`, and the `args` of an application in deploy/serve.yaml."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str = ""
    """Folder of the student or of an autoregressive model, or a hub id; every node of the cluster must be able to read
    it. Empty with `follow`."""
    follow: str | None = None
    """Run directory whose newest student is served, in place of `checkpoint`; every node must be able to read it."""
    follow_seconds: float = Field(default=10, gt=0)
    """Time between two looks for newer weights of the run."""
    name: str | None = None
    """Name of the model in the API. None: the name of the folder."""
    replicas: int = Field(default=1, ge=1)
    """Engines, each with a copy of the model."""
    autoscale_to: int | None = Field(default=None, ge=1)
    """Most engines; between `replicas` and this number Ray Serve starts and stops them with the load. None: fixed."""
    gpus_per_replica: float = Field(default=0, ge=0)
    """GPUs of each engine; 0 decodes on the CPU."""
    cpus_per_replica: float = Field(default=1, gt=0)
    """CPUs of each engine, and the threads that it decodes with."""
    slots: int = Field(default=32, ge=1)
    """Sequences that an engine decodes at a time; the batch size of an autoregressive model."""
    max_requests: int = Field(default=1024, ge=1)
    """Responses that are made or wait at a time, over all engines; beyond it, requests are refused with 429."""
    max_body_bytes: int = Field(default=4 * 2**20, ge=1)
    """Largest body of a request in bytes."""
    request_seconds: float = Field(default=600, gt=0)
    """Longest time that a request may take, with its wait."""
    max_new_tokens: int = Field(default=256, ge=1)
    """`max_tokens` of requests that name none; less where the context ends."""
    dtype: str = "auto"
    """Number format of the weights: float32, bfloat16; `auto` keeps the stored one."""
    block_size: int | None = Field(default=None, ge=1)
    """Block size. None: the model's own. Tokens of an autoregressive model are sent so many at a time (None: 4)."""
    block_grid: Grid | None = None
    """Block grid. None: the model's own."""
    strategy: Strategy = "low_confidence_dynamic"
    """Remasking strategy of all requests. Where none is given, `resolved` takes the checkpoint's (`ModelFacts`)."""
    threshold: float = Field(default=0.9, ge=0, le=1)
    """Threshold of requests that name none."""
    temperature: float = Field(default=0.0, ge=0)
    """Temperature of requests that name none; of all requests with `verified`."""
    top_p: float = Field(default=1.0, ge=0, le=1)
    """Top-p of requests that name none; of all requests with `verified`."""
    cache_tokens: int | None = Field(default=None, ge=1)
    """Positions of an engine's cache. None: it grows as needed. An autoregressive model has none of ours."""
    api_key_file: str | None = None
    """File with one key a line, of which requests must bring one (`Authorization: Bearer KEY`). None: no key."""

    def resolved(self) -> ServeOptions:
        """The options with what the model decides: its strategy, and what `follow` stands for.

        That is the run's start student, its name, number format and blocks.

        Raises:
            OpdlmError: neither or both of `checkpoint` and `follow` are given, the directory holds no run, or the
                folder no model.
        """
        if bool(self.checkpoint) == (self.follow is not None):
            raise OpdlmError("serve: give either a checkpoint or --follow RUN (`follow` in a Serve config file)")
        found = self._followed() if self.follow is not None else self
        if "strategy" in self.model_fields_set:
            return found
        return found.model_copy(update={"strategy": read_facts(found.checkpoint).usual_strategies[-1]})

    def _followed(self) -> ServeOptions:
        assert self.follow is not None, "`resolved` asks only then"
        run = open_saved_run(Path(self.follow))
        rollout = run.config.rollout
        return self.model_copy(
            update={
                "checkpoint": str(run.start),
                "follow": str(run.folder),
                "name": self.name or run.folder.name,
                "dtype": run.config.model.dtype if self.dtype == "auto" else self.dtype,
                "block_size": self.block_size or rollout.block_size,
                "block_grid": self.block_grid or rollout.block_grid,
            }
        )


def check_model(facts: ModelFacts, options: ServeOptions) -> None:
    """Checks that the model can be served with these options.

    Raises:
        OpdlmError: it is no usable student, or an autoregressive model and an option belongs to students alone.
    """
    if facts.is_student:
        require_mask(facts)
        return
    kind = f"{facts.folder} is an autoregressive model, which transformers' `generate` decodes token by token"
    if options.strategy == "verified":
        raise OpdlmError(f"--strategy: found 'verified'; {kind}")
    if options.cache_tokens is not None:
        raise OpdlmError(f"--cache-tokens: found {options.cache_tokens}; {kind}, with a cache of its own")
