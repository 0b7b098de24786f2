"""switchlm serve: an HTTP API for a model, with a page that shows the expert of each token."""

import gc
import ipaddress
import re
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from switchlm.cli import options
from switchlm.cli.progress import stop_on_signal
from switchlm.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from switchlm.serving.engine import Engine

# What PyTorch's allocators say, on CPUs and on GPUs.
_OUT_OF_MEMORY = re.compile("alloc|out of memory|not enough memory", re.IGNORECASE)
MIN_KEY_LENGTH = 8  # characters; shorter keys can be guessed


def serve(
    model: options.Model,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file whose first line is the key that clients must send.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients; the last part of --model.")
    ] = None,
    slots: Annotated[
        int, typer.Option(min=1, max=4096, help="Outputs that are decoded at the same time.")
    ] = 32,
    queue: Annotated[
        int, typer.Option(min=1, max=2**20, help="Requests that may wait; others get a 429.")
    ] = 256,
    max_input_tokens: Annotated[
        int, typer.Option(min=1, max=2**20, help="Refuse longer texts.")
    ] = 1024,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=2**20, help="Refuse longer outputs.")
    ] = 512,
    request_seconds: Annotated[
        float, typer.Option(min=0.1, help="Cancel a request after this time.")
    ] = 300.0,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name by which clients address this server, such as that of a proxy in front; "
            "repeatable. On a loopback address only its own names are answered."
        ),
    ] = None,
    skip_special: options.SkipSpecial = False,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    expert_memory: options.ExpertMemory = None,
) -> None:
    """Serve a model over HTTP, with a page that shows the expert of each token."""
    try:
        from switchlm.serving.api import create_app
        from switchlm.serving.server import EngineError, Server
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "fastapi", "serve", "Serving") from None
    from switchlm.kernels.cpu.native import native
    from switchlm.serving.engine import Engine
    from switchlm.training.run_folder import RunFolder

    key = None if api_key_file is None else _read_key(api_key_file)
    with _listen(host, port) as listener:
        loaded, tokenizer = options.open_model(model, device, expert_memory, dtype)
        engine = Engine(
            loaded,
            tokenizer,
            num_slots=slots,
            max_source=max_input_tokens + 1,
            max_target=max_new_tokens,
            queue=queue,
            skip_special=skip_special,
        )
        _start_engine(engine)
        served = name or (Path(model).resolve().name if Path(model).exists() else model)
        page = RunFolder(Path(model)).report
        report = page.read_text(encoding="utf-8") if page.is_file() else None
        app = create_app(
            engine,
            name=served,
            key=key,
            report=report,
            seconds=request_seconds,
            default_tokens=options.trained_output_length(model),
            hosts=_hosts(listener, host, allow_host or []),
        )
        server = Server(app, listener, engine, seconds=request_seconds)
        _open(listener)
        address = _address(listener)
        if loaded.embedding.weight.device.type == "cpu" and native().library is None:
            options.note(
                f"Decoding is about half as fast as it could be: {native().reason}. See "
                "docs/guides/kernels.md."
            )
        typer.echo(f"Serving {served} at {address}/ (dropless: no token is dropped). Try:")
        bearer = " -H 'Authorization: Bearer KEY'" if key else ""
        body = f'{{"text": "A <extra_id_0> text.", "model": "{served}"}}'
        typer.echo(
            f"  curl {address}/v1/fill{bearer} -H 'Content-Type: application/json' -d '{body}'"
        )
        if key is None and host not in ("127.0.0.1", "::1", "localhost"):
            options.note(f"All clients of {host} can use this model: there is no --api-key-file.")
        with _frozen_garbage_collector(), stop_on_signal():
            try:
                server.run()
            except EngineError as error:
                traceback.print_exception(error.__cause__)
                raise
            typer.echo("Stopped: all accepted requests are done.", err=True)
            engine.close()


@contextmanager
def _frozen_garbage_collector() -> Iterator[None]:
    """Exclude existing objects from garbage collection, which stops threads for 0.1 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _hosts(listener: socket.socket, host: str, allowed: list[str]) -> list[str] | None:
    """Return the names of the server; None: any name will do."""
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    return [host, *allowed] if allowed or address.is_loopback else None


def _start_engine(engine: "Engine") -> None:
    try:
        engine.start()
    except (RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(reason):
            raise
        raise ConfigError(
            f"There is no memory for {engine.num_slots} slots of {engine.max_source} and "
            f"{engine.max_target} tokens ({reason}): take fewer --slots, or a smaller "
            "--max-input-tokens or --max-new-tokens."
        ) from None


def _read_key(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the key in {str(path)!r}: {error}.") from None
    key = lines[0].strip() if lines else ""
    if len(key) < MIN_KEY_LENGTH or not key.isascii():
        raise ConfigError(
            f"The first line of {str(path)!r} must be the key: at least {MIN_KEY_LENGTH} ASCII "
            "characters. Make one with: openssl rand -hex 32"
        )
    return key


def _listen(host: str, port: int) -> socket.socket:
    """Bind the port before the model is loaded, which may take minutes."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        family, kind, protocol, _, address = found[0]
        # With an explicit protocol asyncio sets TCP_NODELAY; Nagle delays responses by 40 ms.
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"There is no address {host!r}: {error.strerror or error}.") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _port_error(host, port, error) from None
    return listener


def _open(listener: socket.socket) -> None:
    """Accept connections."""
    try:
        listener.listen(2048)
    except OSError as error:  # another server bound the same port at the same time
        host, port = listener.getsockname()[:2]
        raise _port_error(host, port, error) from None


def _port_error(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"Cannot listen on {host} port {port}: {error.strerror}. Choose another --port."
    )


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
