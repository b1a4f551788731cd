"""A job of a Ray cluster that is there: one training command, sent through Ray's job client, followed to its end.

No secret goes along: whoever may list jobs reads their command lines and runtime environments. The cluster's own
environment has HF_TOKEN and WANDB_API_KEY. The token of the cluster is found as Ray finds it: RAY_AUTH_TOKEN,
RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.
"""

import asyncio
import secrets
import shlex
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from core.faults import ProcessFault, UserError
from launch.submit.job import Job

ANSWER_S = 10.0
ENDED = ("STOPPED", "FAILED", "SUCCEEDED")


def entrypoint(job: Job, working_dir: Path | None) -> str:
    """What the cluster runs, for a shell. Raises UserError where it would not find what it names."""
    config = job.config
    if config is not None and working_dir is not None:
        if not config.is_relative_to(working_dir):
            raise UserError(f"--config {config}: is not in --working-dir {working_dir}, which alone goes along")
        config = config.relative_to(working_dir)
    # Absolute, as it is here: what a job writes into its working folder is deleted with it.
    words = ["tokenppo", "train", *job.train(config), "--run.dir", job.cfg.run.dir, "--resources.ray_address", "auto"]
    if job.ranks > 1:
        words += ["--accelerate", job.accelerate, "--num-processes", str(job.ranks)]
    return shlex.join([*words, *(["--resources.nodes", str(job.nodes)] if job.nodes > 1 else [])])


def description(job: Job, working_dir: Path | None) -> dict[str, Any]:
    """What is sent to the cluster, but for the files."""
    runtime_env = {"working_dir": str(working_dir), "excludes": [".git", ".venv", "runs"]} if working_dir else {}
    return {"entrypoint": entrypoint(job, working_dir), "runtime_env": runtime_env, "metadata": {"run": job.name}}


def submit(job: Job, address: str, working_dir: Path | None, *, follow: bool) -> int:
    """Send it; with `follow` show its log and give its exit code, else 0.

    Raises UserError for an address that is none or asks for another token, ProcessFault where nobody answers.
    """
    described = description(job, working_dir)
    refuse_unanswered(address)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        name = client.submit_job(submission_id=f"{job.name}-{secrets.token_hex(4)}", **described)
    except AuthenticationError:
        raise UserError(
            f"--address {address}: the cluster refuses; is RAY_AUTH_TOKEN, or the file RAY_AUTH_TOKEN_PATH, the token"
            " of that cluster?"
        ) from None
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise UserError(f"--address {address}: the cluster refuses: {_first(error)}") from None
    print(f"{name}: sent to {address}; its run is in {job.cfg.run.folder} there", file=sys.stderr, flush=True)
    if not follow:
        print(name)
        return 0
    try:
        asyncio.run(_show(client, name))
    except KeyboardInterrupt:
        print(f"{name}: goes on; ray job logs --follow {name} shows it again", file=sys.stderr)
        raise
    except (RuntimeError, ConnectionError, OSError) as error:
        raise ProcessFault(
            f"{name}: lost sight of it ({_first(error)}); ray job status {name} says how it is"
        ) from None
    info = client.get_job_info(name)
    if info.status not in ENDED:
        raise ProcessFault(f"{name}: its log has ended and it has not ({info.status}); ray job status {name}")
    if info.driver_exit_code is not None:
        return info.driver_exit_code
    return 0 if info.status == "SUCCEEDED" else ProcessFault.exit_code


async def _show(client: Any, name: str) -> None:
    async for text in client.tail_job_logs(name):
        print(text, end="", flush=True)


def refuse_unanswered(address: str) -> None:
    """Raise UserError for what is no address, or for a cluster without authentication: whoever reaches such a one runs
    code on it; ProcessFault where nobody answers."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--address {address}: wants the address of the dashboard, such as http://127.0.0.1:8265")
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"{address.rstrip('/')}/api/jobs/", timeout=ANSWER_S
        ).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return
        raise ProcessFault(f"--address {address}: answers {error.code} where a Ray dashboard lists its jobs") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ProcessFault(
            f"--address {address}: no answer ({reason}); is the cluster up, and its dashboard on?"
        ) from None
    raise UserError(
        f"--address {address}: this cluster asks for no token, so whoever reaches it runs code on it; start it with"
        " RAY_AUTH_MODE=token (docs/cluster.md)"
    )


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
