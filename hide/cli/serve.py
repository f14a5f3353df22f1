"""The command `hide serve`."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from hide.cli.console import errors, left_out, quiet
from hide.cli.loading import LoadOptions, options_of, way_names

INSTALL = "pip install 'hide-kernels[serve]'"


@dataclass(frozen=True)
class ServedModel(LoadOptions):
    """As `LoadOptions`, with the model as the command's argument."""

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A checkpoint: folder or hub name; see `hide models`. Without it, the embedded model.",
        ),
    ] = None


@options_of(ServedModel)
def serve(
    load: ServedModel,
    methods: Annotated[
        str,
        typer.Option(
            help="What a request's model may be, separated by commas, as in `hide eval`: hide, plain, hide@auto,"
            " hide@auto\\[gate=3]; all: every method that runs on the model."
        ),
    ] = "all",
    host: Annotated[str, typer.Option(help="Address to listen on. Others than loopback want --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="HIDE_API_KEY",
            help="Requests must have it as their Bearer token; repeat it for several clients, whose pictures are kept"
            " apart. Better in the environment, separated by blanks: arguments can be seen by others.",
        ),
    ] = None,
    pool_gb: Annotated[
        float, typer.Option(help="Device memory for pictures that are kept encoded for further questions.", min=0)
    ] = 4.0,
    max_images: Annotated[int, typer.Option(help="Pictures that a request may have.", min=1)] = 8,
    max_pixels: Annotated[int, typer.Option(help="Pixels of all pictures of a request.", min=1)] = 64_000_000,
    max_body_mb: Annotated[int, typer.Option(help="Size of a request, in MiB.", min=1)] = 64,
    max_text: Annotated[int, typer.Option(help="Characters of a request's question.", min=1)] = 8192,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait for the model; further ones are refused with 429.", min=1)
    ] = 64,
) -> None:
    """Answer questions about pictures over HTTP, as OpenAI's chat completions: openai, lmms-eval, VLMEvalKit.

    A request's `model` is the way of answering; boxes, entities, notes and seconds are in the reply's `hide`. Pictures
    are data URIs. Questions about one picture follow each other and share its encoding.

    [bold]Examples:[/bold]

    hide serve Qwen/Qwen2.5-VL-7B-Instruct --methods "plain,hide,hide@auto"

    hide ask street.jpg "What color is the umbrella?"   # the same without a server

    python -m lmms_eval --model openai --tasks vstar_bench --model_args model_version=hide,base_url=http://127.0.0.1:8000/v1,api_key=none

    docs/server.md has what clients send and get, docs/security.md what is exposed to whom.
    """
    console = Console(stderr=True)
    with errors(console), console.status("loading transformers") as status:
        try:
            from hide.serve.app import make_app
            from hide.serve.server import bound, make_server
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("fastapi", "uvicorn", "starlette", "pydantic", "h11"):
                raise
            raise ValueError(f"serve: it needs {error.name}, which is not installed: {INSTALL}") from None
        if any(not key.strip() for key in api_key or ()):
            raise ValueError("api-key: got an empty one, which every request has")
        if not api_key and not _loopback(host):
            raise ValueError(f"host: {host} can be reached from other machines, so --api-key or HIDE_API_KEY is needed")
        # Before the model is loaded, which takes minutes.
        listening = bound(host, port)
        quiet()
        from hide.serve.engine import Worker
        from hide.serve.limits import Limits
        from hide.serve.local import LocalModel
        from hide.tiny import CHECKPOINT

        limits = Limits(
            body_bytes=max_body_mb << 20,
            all_body_bytes=max(Limits.all_body_bytes, max_body_mb << 21),
            images=max_images,
            pixels=max_pixels,
            text=max_text,
            waiting=max_waiting,
        )
        names = way_names(methods, load.model or CHECKPOINT, functools.partial(left_out, console))
        status.update(f"loading {load.model or 'the embedded model'}")
        ways = dict(zip(names, load.methods(names), strict=True))
        # Those that want to be told the right boxes are for evaluations.
        ways = {name: method for name, method in ways.items() if method.with_boxes(()) is not None}
        if not ways:
            raise ValueError(f"methods: {methods} wants right boxes, which requests do not have; see `hide methods`")
        engine = Worker(LocalModel(ways, int(pool_gb * 1e9)), limits)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1"
    console.print(
        f"{escape(load.shown)}\n{address} answers as {escape(', '.join(ways))}", highlight=False, soft_wrap=True
    )
    # Ctrl-C ends it; uvicorn, once it has shut down, raises that anew.
    with contextlib.suppress(KeyboardInterrupt):
        make_server(make_app(engine, limits, api_key or ()), limits).run([listening])


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
