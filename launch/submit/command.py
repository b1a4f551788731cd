"""`tokenppo submit slurm|ray|k8s`: the job of a training run, printed or sent."""

import argparse
import json
import sys
from pathlib import Path

from core.faults import UserError
from launch.submit.job import Job

LAUNCHERS = ("slurm", "ray", "k8s")
# Option -> the launchers that it is for.
ONLY = {
    "time": ("slurm",),
    "save_before": ("slurm", "k8s"),
    "sbatch": ("slurm",),
    "rollout_nodes": ("slurm",),
    "rollout_sbatch": ("slurm",),
    "container": ("slurm",),
    "container_runtime": ("slurm",),
    "mount": ("slurm",),
    "learner_nodes": ("slurm",),
    "python": ("slurm",),
    "address": ("ray",),
    "working_dir": ("ray",),
    "no_wait": ("ray",),
    "image": ("k8s",),
    "namespace": ("k8s",),
    "volume_claim": ("k8s",),
    "secret": ("k8s",),
    "memory": ("k8s",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("launcher", choices=LAUNCHERS, help="slurm: sbatch; ray: a cluster that is there; k8s: kubectl")
    parser.add_argument("--config", metavar="F", help="as for train; the job reads it again when it starts")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines of the job, default 1")
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="default 0: everything on CPUs")
    parser.add_argument("--cpus-per-node", type=int, default=8, metavar="N", help="cores, default 8")
    parser.add_argument(
        "--accelerate", metavar="F", help="as for train; default: ddp where there is more than one learner process"
    )
    parser.add_argument(
        "--save-before",
        type=int,
        metavar="S",
        help="slurm, k8s: seconds for a save before the limit or the end of a pod, default 300: more than a step",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent, and nothing else")
    slurm = parser.add_argument_group("of slurm")
    slurm.add_argument("--learner-nodes", type=int, metavar="N", help="nodes with learners; default: as the plan needs")
    slurm.add_argument("--time", metavar="T", help="time limit, default 24:00:00; the run saves and queues again")
    slurm.add_argument("--sbatch", action="append", metavar="K=V", help="more for sbatch: partition=gpu; repeatable")
    slurm.add_argument(
        "--rollout-nodes", type=int, metavar="N", help="so many of the nodes as a component of their own"
    )
    slurm.add_argument("--rollout-sbatch", action="append", metavar="K=V", help="--sbatch of that component")
    slurm.add_argument("--container", metavar="IMAGE", help="run in this image")
    slurm.add_argument("--container-runtime", choices=("pyxis", "apptainer"), help="default pyxis")
    slurm.add_argument("--mount", action="append", metavar="SRC:DST", help="a folder for the container; repeatable")
    slurm.add_argument("--python", metavar="P", help="interpreter on the nodes, default this one")
    ray = parser.add_argument_group("of ray")
    ray.add_argument("--address", metavar="URL", help="of the dashboard, e.g. http://127.0.0.1:8265")
    ray.add_argument("--working-dir", metavar="D", help="folder that goes along, default none")
    ray.add_argument("--no-wait", action="store_true", default=None, help="do not follow the log until the end")
    k8s = parser.add_argument_group("of k8s")
    k8s.add_argument("--image", metavar="I", help="of docker/Dockerfile, in a registry that the cluster reaches")
    k8s.add_argument("--namespace", metavar="NS", help="default that of kubectl")
    k8s.add_argument("--volume-claim", metavar="C", help="PersistentVolumeClaim of the runs, default tokenppo-runs")
    k8s.add_argument("--secret", metavar="S", help="Secret whose keys become environment variables (HF_TOKEN, ...)")
    k8s.add_argument("--memory", metavar="M", help="of each node, default 32Gi")


def main(args: argparse.Namespace) -> int:
    """Exit code 0 once it is printed or sent; of a Ray job that is waited for, that of the run."""
    for name, launchers in ONLY.items():
        if getattr(args, name) is not None and args.launcher not in launchers:
            raise UserError(f"--{name.replace('_', '-')}: is for tokenppo submit {' and '.join(launchers)}")
    if args.rollout_nodes is not None and not 0 < args.rollout_nodes < args.nodes:
        raise UserError(f"--rollout-nodes {args.rollout_nodes}: are some of the {args.nodes} --nodes; give fewer")
    job = Job.of(
        args.config,
        args.overrides,
        args.words,
        nodes=args.nodes,
        gpus=args.gpus_per_node,
        cpus=args.cpus_per_node,
        learner_nodes=1  # the driver of a Ray job starts them beside it
        if args.launcher != "slurm"
        else args.learner_nodes
        if args.learner_nodes or not args.rollout_nodes
        else args.nodes - args.rollout_nodes,
        accelerate=args.accelerate,
        **({"python": args.python} if args.python else {}),
    )
    return {"slurm": _slurm, "ray": _ray, "k8s": _k8s}[args.launcher](args, job)


def _slurm(args: argparse.Namespace, job: Job) -> int:
    from launch.submit import slurm

    given = {
        "time": args.time,
        "save_before": args.save_before,
        "options": args.sbatch and tuple(args.sbatch),
        "rollout_nodes": args.rollout_nodes,
        "rollout_options": args.rollout_sbatch and tuple(args.rollout_sbatch),
        "container": args.container,
        "runtime": args.container_runtime,
        "mounts": args.mount and tuple(args.mount),
    }
    text = slurm.script(job, slurm.Slurm(**{key: value for key, value in given.items() if value is not None}))
    if args.dry_run:
        print(text, end="")
        return 0
    _say(job)
    print(slurm.submit(text))
    return 0


def _ray(args: argparse.Namespace, job: Job) -> int:
    from launch.submit import ray_job

    folder = Path(args.working_dir).absolute() if args.working_dir else None
    if folder is not None and not folder.is_dir():
        raise UserError(f"--working-dir {args.working_dir}: there is no such folder")
    if args.dry_run:
        print(json.dumps(ray_job.description(job, folder), indent=2))
        return 0
    if args.address is None:
        raise UserError("--address: wants the address of the cluster's dashboard, such as http://127.0.0.1:8265")
    return ray_job.submit(job, args.address, folder, follow=not args.no_wait)


def _k8s(args: argparse.Namespace, job: Job) -> int:
    from launch.submit import kubernetes

    if args.image is None:
        raise UserError("--image: wants the image that the pods run, e.g. --image registry.example/tokenppo:cuda")
    given = {name: getattr(args, name) for name in ("namespace", "volume_claim", "secret", "memory", "save_before")}
    given = {name: value for name, value in given.items() if value is not None}
    text = kubernetes.manifest(job, kubernetes.Kubernetes(image=args.image, **given))
    if args.dry_run:
        print(text, end="")
        return 0
    _say(job)
    print(kubernetes.submit(text))
    return 0


def _say(job: Job) -> None:
    """The plan, on standard error: standard output is what the scheduler answers."""
    for line in job.plan:
        print(f"{job.name}: {line}", file=sys.stderr)
