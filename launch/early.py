"""What can be found wrong before torch is imported: files, folders, the header of weights, addresses.

Both `tokenppo train` and `--dry-run` ask here first, so that most mistakes are answered in half a second. Only what is
certain is refused: the library that loads a file later has the last word.
"""

import ast
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.faults import UserError
from core.reward_name import RewardName
from core.schema import DATA_FILES, Config
from launch import cluster, environment, interpreter, ray_auth, room, run_folder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# Their output layer is no language model's: AutoModelForCausalLM would put a random one in its place without a word.
OTHER_HEADS = (
    "ForMaskedLM",
    "Classification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
)
LARGE = 64 * 2**20  # a larger prompt file is read once, by the run


def refuse(cfg: Config) -> set[str] | None:
    """Raise Fault, one line, for what the configuration names and what cannot be used as it is.

    Gives the columns of the prompts that reach the rewards; None where the file was not read.
    """
    refuse_missing(cfg)
    if cfg.resources.device == "cuda" and (torch := importlib.metadata.version("torch")).endswith("+cpu"):
        raise UserError(
            f"resources.device = cuda: torch {torch} is built without it; install another, or use cpu or auto"
        )
    if cfg.resources.device == "cpu" or importlib.metadata.version("torch").endswith("+cpu"):
        cluster.refuse_what_gpus_need(cfg)
        cluster.refuse_transport(cfg, "cpu", 1)
    run_folder.examine(cfg)
    room.refuse_too_little_shared_memory(cfg)
    folder = Path(cfg.model.path)
    config = refuse_model_folder(cfg) if folder.is_dir() else None
    interpreter.refuse(cfg, config)
    if config is not None and (folder / WEIGHT_FILES[0]).is_file():
        # Eight bytes a parameter is more than any dtype takes: certainly no fewer parameters than this.
        room.refuse_too_little_disk(cfg, (folder / WEIGHT_FILES[0]).stat().st_size // 8)
    columns = refuse_prompts(cfg, config)
    if cfg.resources.ray_address:
        cluster.refuse_unreachable(cfg)
    ray_auth.refuse_unset(cfg)
    return columns


def refuse_missing(cfg: Config) -> None:
    """Raise UserError for files and folders that the configuration names and that are not there. Imports nothing."""
    for key, path in (*((cfg.data.key, path) for path in cfg.data.sources), ("data.eval_path", cfg.data.eval_path)):
        if path is not None and path.endswith(DATA_FILES) and not Path(path).is_file():
            raise UserError(f"{key} = {path}: there is no such file")
    if cfg.data.augment is not None:
        try:
            name = RewardName.parse(cfg.data.augment)
        except ValueError as error:
            raise UserError(f"data.augment = {cfg.data.augment}: {error}") from None
        if name.is_url or name.adapter:
            raise UserError(f"data.augment = {cfg.data.augment}: must be `path/file.py:fn` or `pkg.mod:fn`")
        if name.file is not None and not name.file.is_file():
            raise UserError(f"data.augment = {cfg.data.augment}: there is no file {name.file}")
    environment.refuse_missing(cfg)
    if Path(cfg.model.path).is_absolute() and not Path(cfg.model.path).is_dir():
        raise UserError(f"model.path = {cfg.model.path}: there is no such folder; give one, or a hub id (owner/name)")
    for name, spec in cfg.rewards.items():
        try:
            file = RewardName.parse(spec.fn).file
        except ValueError as error:
            raise UserError(f"rewards.{name}.fn = {spec.fn}: {error}") from None
        if file is not None and not file.is_file():
            raise UserError(f"rewards.{name}.fn = {spec.fn}: there is no file {file}")


def refuse_model_folder(cfg: Config) -> dict[str, Any]:
    """Raise UserError for a folder that no causal language model and tokenizer load from; gives its config.json."""
    folder, here = Path(cfg.model.path), f"model.path = {cfg.model.path}"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{here}: the folder has no config.json; give the folder that save_pretrained wrote, or a hub id"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{here}: config.json cannot be read ({_first(error)}); copy the model again") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise UserError(
            f"{here}: config.json names no model_type; give a folder that transformers' save_pretrained wrote"
        )
    known = causal_types()
    if known and kind not in known:
        raise UserError(
            f"{here}: a model of type {kind} is no causal language model that this transformers knows; give one that"
            " AutoModelForCausalLM loads"
        )
    heads = [str(name) for name in config.get("architectures") or []]
    wrong = [name for name in heads if any(word in name for word in OTHER_HEADS)]
    if config.get("is_encoder_decoder") and not any("CausalLM" in name for name in heads):
        wrong = wrong or [*heads, "an encoder-decoder"][:1]
    if wrong and len(wrong) == max(1, len(heads)):
        raise UserError(
            f"{here}: {wrong[0]} is no causal language model, its output layer would be a random one; give the model"
            " that it was made from"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{here}: the folder has no tokenizer; save it there too (tokenizer.save_pretrained)")
    refuse_weights(folder, here)
    return config


def causal_types() -> set[str]:
    """Model types that transformers loads as causal LMs; empty where its source cannot be read as it was laid out.

    Read, not imported: the import takes seconds.
    """
    spec = importlib.util.find_spec("transformers")
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        try:
            tree = ast.parse((Path(place) / "models" / "auto" / "modeling_auto.py").read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue
        for node in tree.body:
            names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
            if "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES" in names:
                pairs = [pair for pair in ast.walk(node.value) if isinstance(pair, ast.Tuple) and len(pair.elts) == 2]
                return {p.elts[0].value for p in pairs if isinstance(p.elts[0], ast.Constant)}
    return set()


def refuse_weights(folder: Path, here: str) -> None:
    """Raise UserError where weights are missing or a safetensors file is shorter than its header says."""
    files = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    for index in (folder / f"{name}.index.json" for name in WEIGHT_FILES):
        if not index.is_file() or files:
            continue
        try:
            parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{here}: {index.name} cannot be read ({_first(error)}); copy the model again") from None
        missing = [part for part in parts if not (folder / part).is_file()]
        if missing:
            raise UserError(f"{here}: {missing[0]}, which {index.name} names, is not there; copy the model again")
        files = [folder / part for part in parts]
    if not files:
        raise UserError(f"{here}: the folder has no weights ({' or '.join(WEIGHT_FILES)}); copy the model again")
    for file in files:
        if file.suffix == ".safetensors" and (damage := damage_of(file)):
            raise UserError(f"{here}: {file.name} {damage}; copy the model again")


def damage_of(file: Path) -> str | None:
    """What is wrong with a safetensors file by its header and size; no tensor is read."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                return f"is cut off: {size} bytes, its header alone would be {8 + length}"
            header = json.loads(stream.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        return f"is no safetensors file ({_first(error)})"
    return None if size == 8 + length + end else f"is cut off or damaged: {size} bytes, {8 + length + end} are wanted"


def refuse_prompts(cfg: Config, config: dict[str, Any] | None) -> set[str] | None:
    """Raise UserError for prompts that no run takes: files of another kind, broken lines, rows without a prompt, and
    prompts that are certainly too long. `config` is the model's config.json where that is at hand.

    Gives the columns that rewards get in training; None where not all was read, or `data.augment` may make others.
    """
    from rollout.prompts import Place, columns_of, load_rows, load_training_rows

    data, limit = cfg.data, cfg.data.max_prompt_tokens
    window = (config or {}).get("max_position_embeddings") or (config or {}).get("n_positions")
    if isinstance(window, int):
        refuse_response(cfg, window)
        limit = min(limit, window - cfg.rollout.max_new_tokens)
    tokenizer = _quick_tokenizer(Path(cfg.model.path) / "tokenizer.json")
    columns = None
    if all(map(_is_quickly_read, data.sources)):
        rows, places = load_training_rows(data)
        refuse_reserved(rows, data.prompt_column)
        _refuse_rows(cfg, config, rows, places, tokenizer, limit)
        rows, _ = _trained_on(cfg, rows, places)
        columns = columns_of(rows, data.prompt_column) if data.augment is None else None
    if data.eval_path is not None and _is_quickly_read(data.eval_path):
        rows = load_rows(data.eval_path, data.eval_split, "data.eval_path")
        if not rows:
            raise UserError(
                f"data.eval_path = {data.eval_path}: has no rows; each line must be an object with"
                f" `{data.prompt_column}`"
            )
        refuse_reserved(rows, data.prompt_column)
        _refuse_rows(cfg, config, rows, [Place("data.eval_path", i) for i in range(len(rows))], tokenizer, limit)
    return columns


def _trained_on(cfg: Config, rows: list[dict], places: list) -> tuple[list[dict], Any]:
    """The rows that are not held out, and their order. Raises UserError where there is none."""
    from rollout.prompts import split_off, training_order

    if cfg.data.eval_frac:
        kept, _ = split_off(rows, places, cfg.data)
        rows, places = [rows[i] for i in kept], [places[i] for i in kept]
    return rows, training_order(rows, places, cfg.data, cfg.run.seed)


def _is_quickly_read(path: str) -> bool:
    return Path(path).suffix in DATA_FILES and Path(path).is_file() and Path(path).stat().st_size <= LARGE


def _refuse_rows(
    cfg: Config, config: dict[str, Any] | None, rows: list[dict], places: list, tokenizer: Any, limit: int
) -> None:
    from rollout.prompts import not_fitting, prompt_of

    for row, place in zip(rows, places, strict=True):
        prompt = prompt_of(row, cfg.data.prompt_column, place)
        # A token is at least a byte of most texts: the short ones need no counting.
        if tokenizer is not None and isinstance(prompt, str) and len(prompt.encode()) > limit:
            n = len(tokenizer.encode(prompt, add_special_tokens=False).ids)
            if n > limit:
                raise UserError(not_fitting(place, n, limit))
        if isinstance(prompt, list) and config is not None and not _has_chat_template(Path(cfg.model.path)):
            raise UserError(
                f"{place}: its prompt is a list of messages, and the tokenizer in {cfg.model.path} has no chat"
                " template; give it one, or plain text"
            )


def refuse_response(cfg: Config, window: int) -> None:
    """Raise UserError where a response alone fills the window of the model."""
    if cfg.rollout.max_new_tokens >= window:
        raise UserError(
            f"rollout.max_new_tokens = {cfg.rollout.max_new_tokens}: the model's window is {window} tokens, prompt and"
            f" response together; give at most {window} less the longest prompt"
        )


def refuse_reserved(rows: list[dict], prompt_column: str) -> None:
    """Raise UserError for columns that would take the place of what every reward function is given."""
    from reward_server.components import PASSED

    taken = ({*PASSED, "prompt"} - {prompt_column}) & {column for row in rows for column in row}
    if taken:
        names = ", ".join(sorted(taken))
        raise UserError(f"data.path: columns named {names} are what reward functions get from us; rename them")


def _has_chat_template(folder: Path) -> bool:
    """Whether a tokenizer folder has one, in any of the places that transformers has kept it in."""
    if any(
        (folder / name).exists() for name in ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    ):
        return True
    try:
        return "chat_template" in json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return True  # not known: transformers says what is wrong later


def _quick_tokenizer(file: Path) -> Any:
    """The tokenizer without transformers; None where it is of another kind."""
    if not file.is_file():
        return None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # the library has no class of its own for that; transformers says what is wrong later
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _first(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def load_augment(fn: str) -> Callable:
    """The function of data.augment. Raises UserError."""
    from reward_server.components import load_component

    try:
        return load_component(fn)
    except UserError as error:
        raise UserError(f"data.augment: {str(error).removeprefix('component ')}") from None


def check_rewards(cfg: Config, functions: dict[str, Callable] | None = None, columns: set[str] | None = None) -> None:
    """Load each component once here, so that what is missing is found before anything is started.

    `columns` are those of the data that reach the rewards; None where that is not known yet.
    """
    from reward_server.components import check_options, load_component, missing_arguments

    for name, spec in cfg.rewards.items():
        try:
            fn = functions[name] if functions is not None and name in functions else load_component(spec.fn)
        except UserError as error:
            raise UserError(f"rewards.{name}.fn: {error}") from None
        check_options(name, fn, spec.options)
        if columns is not None and (missing := missing_arguments(fn, [*columns, *spec.options])):
            raise UserError(
                f"rewards.{name}.fn = {spec.fn}: it wants {', '.join(missing)}, and neither the columns of"
                f" {cfg.data.key} ({', '.join(sorted(columns))}) nor rewards.{name}.options have that"
            )


def check_augment(cfg: Config) -> None:
    """Raise UserError where `data.augment` cannot be loaded, or makes no row of the first prompt; where the prompts are
    not quickly read, only the first is looked for."""
    from rollout.prompts import augmented, load_training_rows

    data = cfg.data
    if data.augment is None:
        return
    augment = load_augment(data.augment)
    if all(map(_is_quickly_read, data.sources)):
        rows, places = load_training_rows(data)
        rows, order = _trained_on(cfg, rows, places)
        augmented(augment, data.augment, rows[order.row_at(0)], 0, cfg.run.seed)
