"""Who may use the Ray of a run: its token, and whether a cluster asks for one. Whoever reaches a Ray without a token
runs code as the user who started it. Imports no ray, which reads RAY_AUTH_MODE when it is imported."""

import os
import secrets
import stat
import sys
from pathlib import Path

from core.faults import ProcessFault, UserError
from core.schema import Config

MODE = "RAY_AUTH_MODE"
# The smallest question that Ray's control store answers; it changes nothing. Asked with another token.
QUESTION = "/ray.rpc.NodeInfoGcsService/CheckAlive"
ASK_S = 10.0
OPEN = "whoever reaches it runs code as its user"


def token_file() -> Path:
    """Where Ray reads its token, as long as RAY_AUTH_TOKEN does not hold it."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def private_token(*, make: bool) -> None:
    """See that no other user of this host reads Ray's token; `make` one where there is none, before Ray would.

    Ray writes it readable for everybody under the usual umask. Such a file, and its folder ~/.ray, are tightened to
    0600 and 0700, with a word on it. Raises UserError where they belong to somebody else, who may read or write it.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    file = token_file()
    if make and not file.exists():
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:  # another run of ours was faster
            pass
        else:
            with os.fdopen(descriptor, "w") as stream:
                stream.write(secrets.token_hex(32))
    if not file.exists():
        return
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:  # a folder of the user's own choice is left as it is
        _tighten(file.parent, stat.S_IWGRP | stat.S_IRWXO, 0o700)
    # What root mounts for a group, as Kubernetes does, is that group's to read.
    _tighten(file, stat.S_IWGRP | stat.S_IRWXO, 0o600)


def _tighten(path: Path, others: int, mode: int) -> None:
    found = path.stat()
    mine = found.st_uid == os.geteuid()
    if not mine and found.st_uid != 0:
        raise UserError(f"{path}: holds the token of Ray and belongs to another user; {_REMEDY}")
    if not found.st_mode & (others | (stat.S_IRWXG if mine else 0)):
        return
    try:
        path.chmod(mode)
    except OSError as error:
        raise UserError(
            f"{path}: others may read the token of Ray there (mode {stat.S_IMODE(found.st_mode):04o}), and it cannot be"
            f" changed ({error.strerror}); chmod {mode:o} it, or {_REMEDY}"
        ) from None
    if stat.S_ISREG(found.st_mode):
        print(
            f"{path}: others could read the token of Ray there; its mode is {mode:04o} now. If others log in here,"
            " delete the file: a new one is made",
            file=sys.stderr,
        )


_REMEDY = "name another file in RAY_AUTH_TOKEN_PATH"


def lets_strangers_in(address: str) -> bool:
    """Whether the Ray at host:port answers a caller with a wrong token. Raises ProcessFault where no Ray answers.

    With Ray's TLS on both sides show certificates: nobody comes in by a wrong token.
    """
    if os.environ.get("RAY_USE_TLS") == "1":
        return False
    import grpc

    wrong = (("authorization", f"Bearer {secrets.token_hex(32)}"),)
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(QUESTION)(b"", timeout=ASK_S, metadata=wrong)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise ProcessFault(
                f"resources.ray_address = {address}: what answers there is no Ray ({error.code().name}); give the"
                " address that ray start --head names"
            ) from None
    return True


def refuse_open(cfg: Config, address: str) -> None:
    """Raise UserError for a cluster at host:port that asks nobody for a token, unless the user says so, twice: actors
    of a process in Ray's token mode are never born there."""
    if lets_strangers_in(address) and not (cfg.resources.insecure and os.environ.get(MODE) == "disabled"):
        raise UserError(
            f"resources.ray_address = {cfg.resources.ray_address or address}: that Ray asks nobody for a token, so"
            f" {OPEN}; start its nodes with {MODE}=token, or give up that protection with --resources.insecure true and"
            f" {MODE}=disabled in the environment"
        )


def refuse_unset(cfg: Config) -> None:
    """Raise UserError where the Ray that this run would start was told to ask nobody for a token."""
    mode = os.environ.get(MODE, "token")
    if cfg.resources.ray_address is None and mode.lower() != "token" and not cfg.resources.insecure:
        raise UserError(
            f"{MODE} = {mode}: the Ray of this run would ask nobody for a token, so {OPEN}; unset it, or give up that"
            " protection with --resources.insecure true"
        )
