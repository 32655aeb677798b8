"""`opdlm serve` and `opdlm chat`: a student behind an HTTP API, and a conversation with one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from opdlm.common.errors import OpdlmError
from opdlm.deploy.cli.app import app, clear_errors, model_folder_of, out
from opdlm.deploy.evaluate.options import UsualStrategy


@app.command()
def serve(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CKPT", help="Checkpoint folder in Hugging Face layout, or a hub id.")
    ] = None,
    follow: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Serve the newest student of a run directory instead, as it is trained."),
    ] = None,
    follow_seconds: Annotated[float, typer.Option(min=0.1, help="With --follow: time between two looks.")] = 10,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any but loopback needs --api-key-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name of the model in the API. Default: the folder's.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Engines, each with a copy of the model.")] = 1,
    gpus_per_replica: Annotated[float, typer.Option(min=0, help="GPUs of each engine; 0 decodes on the CPU.")] = 0,
    cpus_per_replica: Annotated[float, typer.Option(min=1, help="CPUs, and threads, of each engine.")] = 1,
    slots: Annotated[int, typer.Option(min=1, help="Sequences that an engine decodes at a time.")] = 32,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Responses that are made or wait at a time; beyond it: 429.")
    ] = 1024,
    request_seconds: Annotated[float, typer.Option(min=0.1, help="Longest time of a request, with its wait.")] = 600,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="`max_tokens` of requests that name none.")] = 256,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: as stored.")] = "auto",
    block_size: Annotated[int | None, typer.Option(min=1, help="Block size. Default: the model's own.")] = None,
    strategy: UsualStrategy = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Threshold of requests that name none.")] = 0.9,
    temperature: Annotated[float, typer.Option(min=0, help="Temperature of requests that name none.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Top-p of requests that name none.")] = 1.0,
    cache_tokens: Annotated[int | None, typer.Option(min=1, help="Positions of an engine's cache.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with keys, one a line, that requests need.")] = None,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Longest wait at SIGTERM for running requests.")] = 60,
) -> None:
    """Serve a student behind an OpenAI-compatible HTTP API, on Ray Serve (pip install 'opdlm-ray[serve]').

    An autoregressive model is served by transformers' `generate` in static batches of --slots.

    Examples:

        opdlm serve runs/demo/student

        opdlm serve --follow runs/mine

        opdlm serve models/chain-teacher

        opdlm serve runs/demo/student --replicas 4 --gpus-per-replica 1 --host 0.0.0.0 --api-key-file keys.txt
    """
    with clear_errors():
        if find_spec("starlette") is None or find_spec("uvicorn") is None:
            raise OpdlmError("serve: Ray Serve is not installed; install it: pip install 'opdlm-ray[serve]'")
        from opdlm.deploy.serve.command import run_server
        from opdlm.deploy.serve.options import ServeOptions

        folder = None if checkpoint is None else model_folder_of(checkpoint, "CKPT")
        own: dict[str, Any] = {} if strategy is None else {"strategy": strategy}
        options = ServeOptions(
            checkpoint="" if folder is None else str(folder.resolve()),
            follow=None if follow is None else str(follow.resolve()),
            follow_seconds=follow_seconds,
            name=name or (folder.name if folder is not None else None),
            replicas=replicas,
            gpus_per_replica=gpus_per_replica,
            cpus_per_replica=cpus_per_replica,
            slots=slots,
            max_requests=max_requests,
            request_seconds=request_seconds,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            block_size=block_size,
            threshold=threshold,
            temperature=temperature,
            top_p=top_p,
            cache_tokens=cache_tokens,
            api_key_file=None if api_key_file is None else str(api_key_file.resolve()),
            **own,
        )
        run_server(options, host, port, drain_seconds, out)


@app.command()
def chat(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CKPT", help="Checkpoint folder or hub id, decoded in this process.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Address of a server instead, such as http://127.0.0.1:8000.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="With --url: file whose first line is the key.")] = None,
    strategy: UsualStrategy = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Confidence threshold. Default: 0.9, or the server's.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest tokens.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
) -> None:
    """Talk with a student in the terminal, and watch its blocks being unmasked.

    Examples:

        opdlm chat runs/mine/student

        opdlm chat --url http://127.0.0.1:8000
    """
    with clear_errors():
        if (checkpoint is None) == (url is None):
            raise OpdlmError("chat: give either a checkpoint or --url")
        if url is None and api_key_file is not None:
            raise OpdlmError(f"--api-key-file: found {api_key_file} without --url; only a server needs a key")
        if url is not None and strategy is not None:
            raise OpdlmError(
                f"--strategy: found {strategy!r} with --url; a server decodes with its own (opdlm serve --strategy)"
            )
        import readline  # noqa: F401  lines can be edited, and earlier ones called back

        from opdlm.deploy.chat.answering import Here, How, There
        from opdlm.deploy.chat.command import Conversation, run_chat

        answering: Here | There
        if url is not None:
            answering = There(url, max_new_tokens, api_key_file)
        else:
            assert checkpoint is not None
            answering = Here(model_folder_of(checkpoint, "CKPT"), max_new_tokens, out, strategy)
        how = How(threshold=threshold, temperature=temperature, seed=seed)
        run_chat(Conversation(answering, how, out), input, out)
