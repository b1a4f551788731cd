"""Ports, the cluster that a run joins, and the services of others: W&B and the hub. No secret is ever shown."""

import os
import socket
import stat
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from core.faults import Fault, ProcessFault
from launch import cluster, wandb_login
from launch.doctor.finding import Finding, Situation, fail, fail_of_config, ok, warn

ASK_S = 5.0
RAY_PORTS, PORTS_OF_ACTOR = 40, 4  # of Ray's own processes, and of each worker and reward server
CURRENT = "ray_current_cluster"  # in Ray's temporary folder: what `auto` means


@dataclass(frozen=True, kw_only=True)
class Ports:
    low: int  # of the range from which the system gives ports out
    high: int
    taken: int  # of all, by sockets that are there
    loopback: str | None = None  # why 127.0.0.1 cannot be listened at
    host_name: str | None = None  # why the name of this machine has no address


def judge_ports(ports: Ports, wanted: int, several_machines: bool) -> list[Finding]:
    if ports.loopback is not None:
        return [
            fail(f"127.0.0.1 cannot be listened at ({ports.loopback})", "ip link set lo up; a sandbox may forbid it")
        ]
    free = ports.high - ports.low + 1 - ports.taken
    said = f"about {free:,} of ports {ports.low}-{ports.high} free, this run takes about {wanted}"
    more = "sysctl net.ipv4.ip_local_port_range='15000 64000', or wait until old connections are gone"
    found = []
    if free < wanted:
        found.append(fail(said, more))
    elif free < 10 * wanted:
        found.append(warn(said, more))
    if ports.host_name is not None and several_machines:
        remedy = "a line for it in /etc/hosts, or GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME with the interface to use"
        found.append(warn(f"{ports.host_name}: other machines are told that name", remedy))
    return found or [ok(said)]


def look_at_ports(situation: Situation) -> list[Finding]:
    cfg = situation.cfg
    actors = cfg.rollout.workers + situation.sharding.ranks * (1 + cfg.resources.reward_servers)
    local = cfg.resources.ray_address is None
    return judge_ports(read_ports(), RAY_PORTS + PORTS_OF_ACTOR * actors, several_machines=not local)


def read_ports(proc: Path = Path("/proc")) -> Ports:
    try:
        low, high = map(int, (proc / "sys/net/ipv4/ip_local_port_range").read_text().split())
        tables = [proc / "net" / name for name in ("tcp", "tcp6")]
        rows = [row.split() for t in tables if t.is_file() for row in t.read_text().splitlines()[1:]]
        taken = len({int(row[1].rpartition(":")[2], 16) for row in rows} & set(range(low, high + 1)))
    except (OSError, ValueError):  # no Linux: what IANA reserves for it
        low, high, taken = 49152, 65535, 0
    loopback = host_name = None
    try:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            one.listen()
            other.settimeout(ASK_S)
            other.connect(one.getsockname())
    except OSError as error:
        loopback = error.strerror or str(error)
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError as error:
        host_name = f"the name of this machine, {socket.gethostname()}, has no address ({error.strerror or error})"
    return Ports(low=low, high=high, taken=taken, loopback=loopback, host_name=host_name)


@dataclass(frozen=True, kw_only=True)
class Token:
    """What Ray would send, and where from: RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""

    value: str = ""  # never shown
    file: Path | None = None
    mode: int | None = None  # of the file
    missing: bool = False  # RAY_AUTH_TOKEN_PATH names a file that is not there, or is empty

    def __repr__(self) -> str:
        return f"Token(file={self.file}, mode={self.mode})"


def find_token(environment: Mapping[str, str], home: Path) -> Token:
    if value := environment.get("RAY_AUTH_TOKEN", "").strip():
        return Token(value=value)
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else home / ".ray" / "auth_token"
    try:
        value = file.read_text(encoding="utf-8").strip()
        mode = stat.S_IMODE(file.stat().st_mode)
    except (OSError, UnicodeDecodeError):
        return Token(file=file, missing=bool(named))
    return Token(value=value, file=file, mode=mode, missing=bool(named) and not value)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How the Ray at an address answers."""

    address: str
    unreachable: Fault | None = None
    with_token: str = ""  # "ok", "denied", or in words what else
    without_token: str = ""


def judge_ray(token: Token, found: Cluster | None, mode: str | None) -> list[Finding]:
    """`found`: None where the run has a Ray of its own. `mode`: RAY_AUTH_MODE."""
    problems: list[Finding] = []
    if token.mode is not None and token.mode & 0o077:
        problems.append(
            warn(
                f"{token.file} has mode {token.mode:04o}: other users of this machine can read Ray's token",
                f"chmod 600 {token.file}; then a new token where they are not trusted",
            )
        )
    if mode == "disabled":
        open_to_all = "RAY_AUTH_MODE is disabled: whoever reaches Ray's ports can run code as you"
        problems.append(warn(open_to_all, "unset RAY_AUTH_MODE: runs of ours then use a token"))
    if found is None:
        return problems or [ok("a run starts its own, with a token" + (" that is private" if token.mode else ""))]
    if found.unreachable is not None:
        seen, _, remedy = str(found.unreachable).partition("; ")
        wrong = fail if isinstance(found.unreachable, ProcessFault) else fail_of_config
        return [*problems, wrong(seen, remedy)]
    where = f"resources.ray_address = {found.address}"
    if token.missing:
        problems.append(
            fail(f"RAY_AUTH_TOKEN_PATH = {token.file}: is not there, or empty", "the token of that cluster")
        )
    elif found.without_token == "ok":
        problems.append(
            warn(
                f"{where}: takes orders without a token, and a run refuses that",
                "restart it with RAY_AUTH_MODE=token, or --resources.insecure true",
            )
        )
    elif found.with_token == "denied":
        seen = "the token here is not its own" if token.value else "it wants a token, and there is none here"
        remedy = "RAY_AUTH_TOKEN, or a file of mode 0600 named by RAY_AUTH_TOKEN_PATH, with the token of that cluster"
        problems.append(fail(f"{where}: {seen}", remedy))
    elif found.with_token != "ok":
        problems.append(
            warn(f"{where}: answers, but not as Ray does ({found.with_token})", "is it the port of the GCS?")
        )
    return problems or [ok(f"{where}: answers, and takes this token")]


def look_at_ray(situation: Situation) -> list[Finding]:
    address, token = situation.cfg.resources.ray_address, find_token(os.environ, Path.home())
    found = None if address in (None, "local") else ask_ray(address, token)
    return judge_ray(token, found, os.environ.get("RAY_AUTH_MODE"))


def ask_ray(address: str, token: Token) -> Cluster:
    resolved = current_address() if address == "auto" else address
    try:
        if resolved is None:
            raise ProcessFault(
                "resources.ray_address = auto: no Ray was started on this machine; start one (ray start --head), give"
                " host:port, or leave the key out"
            )
        if "://" in resolved:
            return Cluster(address=address, with_token="it is a client's address, which is not asked")
        cluster.refuse_unanswered(resolved)
    except Fault as error:
        return Cluster(address=address, unreachable=error)
    return Cluster(
        address=address,
        with_token=answer_of_gcs(resolved, token.value) if token.value else "denied",
        without_token=answer_of_gcs(resolved, ""),
    )


def current_address() -> str | None:
    """What `auto` means: RAY_ADDRESS, or what `ray start` wrote down."""
    if named := os.environ.get("RAY_ADDRESS"):
        return named
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / CURRENT
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def answer_of_gcs(address: str, token: str) -> str:
    """Ask for the cluster's id, the first thing that every client of Ray asks: "ok", "denied", or in words what else.

    By gRPC itself: importing Ray takes seconds, and it ends the process where it finds no token.
    """
    import grpc

    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary(
            "/ray.rpc.NodeInfoGcsService/GetClusterId",
            request_serializer=bytes,
            response_deserializer=bytes,
        )
        try:
            ask(b"", metadata=metadata, timeout=ASK_S)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return "denied"
            return error.code().name.lower().replace("_", " ")
    return "ok"


def judge_wandb(wanted: bool, mode: str, logged_in: bool, reachable: bool) -> list[Finding]:
    """`wanted`: log.trackers has it. `mode`: WANDB_MODE. `reachable`: its server takes connections."""
    unused = "" if wanted else " (log.trackers has no wandb)"
    if mode in ("offline", "dryrun", "disabled"):
        return [ok(f"{mode} by WANDB_MODE{unused}")]
    if not wanted:
        return [ok(f"{'logged in' if logged_in else 'no login'}{unused}")]
    if not logged_in:
        return [warn("no login: runs are recorded in their folders", "wandb login, or wandb sync FOLDER afterwards")]
    if not reachable:
        return [warn("logged in, but the server does not answer", "WANDB_MODE=offline, and wandb sync FOLDER later")]
    return [ok("logged in, the server answers")]


def look_at_wandb(situation: Situation) -> list[Finding]:
    wanted = "wandb" in situation.cfg.log.trackers
    server = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    logged_in = wandb_login.logged_in(Path.cwd())
    reachable = wanted and logged_in and answers(server)
    return judge_wandb(wanted, os.environ.get("WANDB_MODE", "").lower(), logged_in, reachable)


def judge_hub(host: str, offline: bool, proxy: bool, reachable: bool, token: bool, cached: int) -> list[Finding]:
    said = f"{host}: "
    login = "with a login" if token else "without a login"
    cache = f"{cached} models and datasets in the cache"
    if offline:
        return [ok(f"offline by HF_HUB_OFFLINE, {cache}")]
    if proxy:
        return [ok(f"{said}through a proxy, not asked; {login}")]
    if reachable:
        return [ok(f"{said}answers, {login}")]
    return [
        warn(f"{said}does not answer, {cache}", "folders as model.path and data.path, or HF_ENDPOINT with a mirror")
    ]


def look_at_hub(situation: Situation) -> list[Finding]:
    endpoint = os.environ.get("HF_ENDPOINT") or cluster.HUB
    proxy = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    token = bool(os.environ.get("HF_TOKEN")) or (home / "token").is_file()
    cached = len([*cache.glob("models--*"), *cache.glob("datasets--*")])
    host = urllib.parse.urlsplit(endpoint).hostname or endpoint
    return judge_hub(host, offline, proxy, not (offline or proxy) and answers(endpoint), token, cached)


def answers(url: str) -> bool:
    """Whether somebody listens at the host of a URL."""
    parts = urllib.parse.urlsplit(url)
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        socket.create_connection((parts.hostname or "", port), timeout=ASK_S).close()
    except (OSError, ValueError):
        return False
    return True
