"""The folder of a training run: what it was started with, its checkpoints, its records, its result. All data, no code.

run.json                    the configuration
metrics.jsonl               one record per logging step
checkpoints/checkpoint-N/   student, optimiser, schedule, random state; complete once its qkv.json is there
student/                    the result, for from_pretrained (converted: qkv.load), with qkv.json; appears at once or not at all
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import qkv
from qkv.core.errors import SavedDataError, StorageError, TrainingError
from qkv.core.files import sha256_of, whole_folder, write_whole

FORMAT = 1
MANIFEST = "qkv.json"


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file at once: it holds the whole of `data`, or what it held before."""
    write_whole(path, json.dumps(data, indent=1, sort_keys=True))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that this version wrote, or `SavedDataError`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SavedDataError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("format"), int):
        raise SavedDataError(f"{path} was not written by qkv's trainer")
    if data["format"] > FORMAT:
        raise SavedDataError(f"{path} was written by qkv {data.get('qkv')}, in a newer format; update qkv")
    return data


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as dotted keys: ``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    if not isinstance(data, Mapping):
        return {prefix: data}
    out: dict[str, Any] = {}
    for key, value in data.items():
        out |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``key: before -> now`` for every setting that differs."""
    a, b = (flatten(json.loads(json.dumps(x))) for x in (before, now))
    return [
        f"{key}: {_short(a.get(key))} -> {_short(b.get(key))}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:16] + "..." + text[-4:]


def contents(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file of a folder but its manifest."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files}


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Mark a written folder as complete: its manifest comes last."""
    write_json(folder / MANIFEST, {"format": FORMAT, "qkv": qkv.__version__, "contents": contents(folder), **facts})


def publish(target: Path, write: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
    """Let `write` fill a folder beside `target`, seal it and move it there: all of it appears, or nothing changes."""
    try:
        with whole_folder(target) as temporary:
            write(temporary)
            seal(temporary, facts)
    except (OSError, RuntimeError) as error:  # torch and safetensors report a full disk as RuntimeError or OSError
        raise StorageError(f"{target} could not be written ({error}); what was there is untouched") from error


def verified(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a complete, undamaged checkpoint; `SavedDataError` names what is wrong with another."""
    if not (checkpoint / MANIFEST).is_file():
        raise SavedDataError(
            f"{checkpoint} is not a complete checkpoint of qkv's trainer (no {MANIFEST}): a foreign folder, or a write that "
            "was cut off"
        )
    manifest = read_json(checkpoint / MANIFEST)
    files = manifest.get("contents")
    if (
        not isinstance(manifest.get("step"), int)
        or not isinstance(manifest.get("run"), dict)
        or not isinstance(files, dict)
    ):
        raise SavedDataError(f"{checkpoint} holds no checkpoint of a training run")
    for name, facts in files.items():
        path = checkpoint / name
        if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
            raise SavedDataError(f"{checkpoint / MANIFEST} names {name!r}, outside its folder: refused")
        if not path.is_file() or path.stat().st_size != facts.get("bytes") or sha256_of(path) != facts.get("sha256"):
            raise SavedDataError(f"{path} is missing or damaged; delete {checkpoint} to resume from an earlier one")
    missing = {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} - set(files)
    if missing:
        raise SavedDataError(f"{checkpoint} lacks {', '.join(sorted(missing))}")
    return manifest


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p.parent for p in folder.glob(f"checkpoint-*/{MANIFEST}")]
    return sorted((p for p in found if p.name[11:].isdigit()), key=lambda p: int(p.name[11:]))


def rotate(folder: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` complete checkpoints, and what cut-off writes left before the newest."""
    done = checkpoints(folder)
    newest = int(done[-1].name[11:]) if done else 0
    found = [p for p in folder.glob("checkpoint-*") if p not in done and p.name[11:].isdigit()]
    rest = [p for p in found if int(p.name[11:]) < newest]
    for old in [*rest, *(done[:-keep] if keep else [])]:
        shutil.rmtree(old, ignore_errors=True)


class Records:
    """The run's JSON-lines file: one record per logging step, flushed as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Forget the records after `step`, which a resumed run will write again; a half-written last line goes too."""
        kept = [json.dumps(r) + "\n" for r in self.read() if r["step"] <= step]
        write_whole(self.path, "".join(kept))

    def read(self) -> list[dict[str, Any]]:
        """Every whole record."""
        out = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []:
            try:
                out.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return out

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as error:
            raise StorageError(
                f"{self.path} could not be written ({error}); free some space and resume the run"
            ) from error


def same_run(where: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `TrainingError` naming every setting in which a saved run differs from the one to resume."""
    changed = differences(before, now)
    if changed:
        raise TrainingError(
            f"{where} belongs to a run with other settings: {'; '.join(changed)}. Resume with the settings it was started "
            "with, or start anew in another folder"
        )
