"""What a run would do, in words and numbers, without doing any of it: `tokenppo train --dry-run`."""

from core.schema import Config, RewardConfig
from launch import cluster, early, memory, placement, room, under_way, users_code
from launch.memory import Sharding, gib
from rollout.prompts import leak


def plan(cfg: Config, learners: int = 1, sharding: Sharding | None = None) -> str:
    """The plan as text, for so many learner processes that share their states as `sharding` says. Writes nothing.

    Raises UserError for all that a run would check before it starts processes, the quick checks first.
    """
    columns = early.refuse(cfg)
    cluster.prepare_hub(cfg)
    users_code.check(cfg, columns)
    device = cluster.device(cfg)
    cluster.refuse_transport(cfg, device, learners)
    seats = placement.of_machine(cfg, device, learners)
    from launch import build  # seconds of imports: what needs none of them was asked before

    tokenizer = build.load_tokenizer(cfg.model.path)
    build.shares(cfg, n_ranks=learners)
    prompts, held_out = build.prompt_streams(cfg, tokenizer)
    under_way.refuse_columns(cfg, prompts)
    if columns is None:  # rows that were not read before: of a dataset id, or a large file
        early.check_rewards(cfg, columns=prompts.columns)
    shape = build.model_shape(cfg.model.path)
    room.refuse_too_little(cfg, shape.parameters)
    learner_threads, worker_threads = cluster.thread_plan(cfg, learners)
    batch, mini, micro = cfg.rollout.batch_size, cfg.ppo.mini_batch_size, cfg.ppo.micro_batch_size
    n_mini = batch // mini
    learner = memory.learner(cfg, shape, sharding or Sharding.of({}, learners), device)
    worker = memory.worker(cfg, shape, device)
    servers = learners * cfg.resources.reward_servers
    rewards = ", ".join(f"{name} x {_weight(spec)}" for name, spec in cfg.rewards.items())
    least, most = (f"{n:.1f}" for n in prompts.visits(cfg.run.steps * cfg.prompts_per_step))
    seen = f"each {least}" if least == most else f"each between {least} and {most}"
    store = f"{cfg.resources.object_store_mb} MiB" if cfg.resources.ray_address is None else cfg.resources.ray_address
    vllm = cfg.rollout.engine == "vllm"
    synced = shape.parameters * (4 if cfg.model.dtype == "float32" else 2)
    lines = [
        f"model      {cfg.model.path}: {shape.parameters / 1e6:.2f} M parameters, {shape.layers} layers,"
        f" {cfg.model.dtype}",
        f"prompts    {len(prompts.rows)} rows of {cfg.data.label}; the run sees {seen} times",
        f"held out   {min(cfg.data.eval_prompts, len(held_out.rows))} of {len(held_out.rows)} rows of"
        f" {cfg.data.eval_path or cfg.data.label}, before, every {cfg.run.eval_every} steps, after"
        if held_out
        else "held out   none: no evaluation (data.eval_path)",
        *filter(None, [leak(prompts, held_out)]),
        f"rewards    {rewards}; less {cfg.ppo.kl_coef:g} x KL",
        "           loaded and compared with the columns, not called: a wrong answer ends the run with exit 4",
        f"processes  {learners} learner{'s' * (learners > 1)} ({learner_threads} threads),"
        f" {cfg.rollout.workers} rollout workers ({'vLLM, ' * vllm}{worker_threads} threads each),"
        f" {servers} reward server{'s' * (servers > 1)}",
        *_seats_in_words(seats, cfg),
        f"one step   {cfg.prompts_per_step} prompts x {cfg.rollout.n_samples_per_prompt} samples = {batch} responses"
        f" in {-(-batch // cfg.rollout.chunk_size)} chunks of {cfg.rollout.chunk_size}, up to"
        f" {cfg.rollout.max_new_tokens} tokens each",
        f"           {cfg.ppo.ppo_epochs} epochs x {n_mini} mini-batches of {mini} = {cfg.ppo.ppo_epochs * n_mini}"
        f" optimizer steps; forward passes of {micro}",
        f"run        {cfg.run.steps} steps, {cfg.optimizer_steps} optimizer steps,"
        f" lr {cfg.optim.lr:g} {cfg.optim.schedule}",
        f"memory     each learner about {gib(learner.states)} for weights, gradients, AdamW and reference, and at most"
        f" {gib(learner.activations + learner.logits)} for activations and logits;",
        f"           each worker about {gib(worker.weights)} for weights, at most {gib(worker.cache)} for keys, values"
        + (f", and {gib(worker.host)} on the host" if vllm and worker.host else ""),
        f"shared     {store} for Ray's objects; a weight sync passes {gib(synced)} through it,"
        " and what does not fit goes over the disk",
        f"files      {cfg.run.folder}/: config.yaml, metrics.jsonl, summary.json, checkpoints/, best/, final/"
        + (f"; {', '.join(cfg.log.trackers)}" if cfg.log.trackers else ""),
    ]
    return "\n".join(lines)


def _seats_in_words(seats: placement.Plan | None, cfg: Config) -> list[str]:
    if seats is None:
        lines = [f"decided when the Ray at {cfg.resources.ray_address} is joined, by its nodes and what is free there"]
    else:
        lines = seats.lines or ["no GPUs"]
    return [f"{'placement' if not i else '':10} {line}" for i, line in enumerate(lines)]


def _weight(spec: RewardConfig) -> str:
    if isinstance(spec.weight, dict):
        return " then ".join(f"{weight:g} at step {step}" for step, weight in sorted(spec.weight.items()))
    held = f" or more, so that its mean is at least {spec.at_least:g}" if spec.at_least is not None else ""
    return f"{spec.weight:g}{held}"
