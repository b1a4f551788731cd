"""Reads what W&B's client wrote: `run-<id>.wandb`, by the protobuf definitions in its package (which has no reader).

The file is a log in the manner of LevelDB: 7 bytes that name it, then blocks of 32 KiB. A record is cut into pieces,
none of which crosses a block: crc32 (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last), then the
data. Less than 7 bytes at the end of a block are padding. Numbers are little endian; the crc is over kind and data.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

BLOCK, HEAD = 32768, struct.Struct("<IHB")
IDENT = struct.Struct("<4sHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class Recorded:
    """What one process told W&B."""

    run_id: str = ""
    project: str = ""
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)  # name or glob -> MetricRecord
    summary: dict[str, Any] = field(default_factory=dict)
    alerts: list[tuple[str, str]] = field(default_factory=list)  # title and text
    artifacts: list[Any] = field(default_factory=list)  # ArtifactRecord, each version that was logged by itself
    exit_code: int | None = None  # None: the process ended without a word


def records(path: Path) -> Iterator[pb.Record]:
    yield from records_of(path.read_bytes())


def records_of(data: bytes) -> Iterator[pb.Record]:
    assert IDENT.unpack_from(data) == (b":W&B", 0xBEE1, 0), "no file of W&B's"
    at, parts = IDENT.size, []
    while at + HEAD.size <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEAD.size:
            at += left
            continue
        crc, length, kind = HEAD.unpack_from(data, at)
        if kind == 0:  # the file was made larger than what was written
            return
        piece = data[at + HEAD.size : at + HEAD.size + length]
        if len(piece) < length:  # the process died in the middle of it
            return
        assert zlib.crc32(bytes([kind]) + piece) == crc, f"broken record at byte {at}"
        at += HEAD.size + length
        parts = [piece] if kind in (WHOLE, FIRST) else [*parts, piece]
        if kind in (WHOLE, LAST):
            record = pb.Record()
            record.ParseFromString(b"".join(parts))
            yield record


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _merge(tree: dict[str, Any], item: Any) -> None:
    *parents, leaf = item.nested_key or [item.key]
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = json.loads(item.value_json)


def read(path: Path) -> Recorded:
    found = Recorded()
    for record in records(path):
        match record.WhichOneof("record_type"):
            case "run":
                found.run_id, found.project = record.run.run_id, record.run.project
                found.name = record.run.display_name
                found.config |= _items(record.run.config.update)
            case "config":
                found.config |= _items(record.config.update)
            case "history":
                found.rows.append(_items(record.history.item))
            case "metric":
                found.metrics[record.metric.name or record.metric.glob_name] = record.metric
            case "summary":
                for item in record.summary.update:
                    _merge(found.summary, item)
            case "alert":
                found.alerts.append((record.alert.title, record.alert.text))
            case "artifact":
                found.artifacts.append(record.artifact)
            case "request" if record.request.WhichOneof("request_type") == "log_artifact":
                found.artifacts.append(record.request.log_artifact.artifact)
            case "exit":
                found.exit_code = record.exit.exit_code
    return found


def files(folder: Path) -> list[Path]:
    """The files of a run folder, oldest first."""
    return sorted((folder / "wandb").glob("*run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
