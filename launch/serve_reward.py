"""`tokenppo serve-reward`: the components of a configuration over HTTP, until a signal ends it."""

import importlib.metadata
import importlib.util
import ipaddress
import os
import signal
import socket
from pathlib import Path
from typing import Any

from core.config import load_rewards
from core.faults import UserError
from launch.last_words import raise_terminated

TOKEN_VARIABLE = "TOKENPPO_REWARD_TOKEN"
SHORTEST_TOKEN = 16  # characters
GRACE_S = 5
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")


def main(args: Any) -> int:
    """The verb, from its parsed arguments. Raises UserError before anything listens."""
    rewards = load_rewards(Path(args.config))
    token = read_token(args.token_file)
    loopback = is_loopback(args.host)
    if token is None and not loopback:
        raise UserError(
            f"--host {args.host}: others can reach this address, so a token is wanted: --token-file F with a secret of"
            f" at least {SHORTEST_TOKEN} characters, or {TOKEN_VARIABLE} in the environment"
        )
    for library in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"serve-reward wants {library}, which is not installed: pip install 'tokenppo[server]'")
    listener = listen(args.host, args.port)
    signal.signal(signal.SIGTERM, raise_terminated)
    import uvicorn

    from reward_server.http_server import create_app
    from reward_server.scorer import Scorer

    scorer = Scorer(rewards)
    scorer.setup(args.device)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"scoring {', '.join(scorer.names)} at http://{shown}:{port}", flush=True)

    app = create_app(
        scorer,
        rewards,
        version=importlib.metadata.version("tokenppo"),
        token=token,
        hosts=(*LOOPBACK_NAMES, shown) if loopback else (),
    )
    # h11 reads headers within a bound; access logs would hold addresses and paths of those who ask.
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
        limit_concurrency=512,
        h11_max_incomplete_event_size=64 * 1024,
    )
    try:
        Server(config).run(sockets=[listener])
    finally:
        scorer.close()
    return 0


def read_token(file: str | None) -> str | None:
    """The secret from a file or the environment; None where there is neither. Raises UserError."""
    if file is not None:
        try:
            token = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--token-file {file}: cannot be read ({error})") from None
        where = f"--token-file {file}"
    elif TOKEN_VARIABLE in os.environ:
        token, where = os.environ[TOKEN_VARIABLE].strip(), TOKEN_VARIABLE
    else:
        return None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{where}: a token has at least {SHORTEST_TOKEN} printable ASCII characters and no spaces")
    return token


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises UserError for an address that cannot be used."""
    if not 0 <= port < 65536:
        raise UserError(f"--port {port}: ports are from 1 to 65535, 0 is any free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error.strerror}); give another") from None
    return listener
