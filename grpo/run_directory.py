"""The folder of a run: config.yaml, metrics.jsonl, completions.jsonl, evaluations.jsonl, judge_audit.jsonl, eval.json,
checkpoints/, journal/.

Knows files; knows nothing of models. Every line is on the disk when its step ends. One process at a time writes here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grpo.config import RunConfig
from grpo.durable_files import append_lines, cut_last_lines, fsync_folder, storage_errors, write_atomically
from grpo.errors import ConfigError, StorageError
from grpo.metrics import append_metrics, is_json_object, iter_json_lines, read_metrics
from grpo.phases import Phase
from grpo.recipe_loader import dump_config, load_run_config
from grpo.run_lock import RunLock

MAY_CHANGE_ON_RESUME = {"steps", "checkpoint", "eval", "output_dir", "base_dir", "trackers", "alarms"}
"""Keys that a resumed run may change without becoming another run."""


class RunDirectory:
    """Owns the files of one run."""

    def __init__(self, path: Path) -> None:
        """Args: path: absolute; nothing is touched yet."""
        self.path = path
        self._lock = RunLock(path)

    @property
    def journal_path(self) -> Path:
        """Folder of what was sampled and judged since the last checkpoints."""
        return self.path / "journal"

    @property
    def audit_path(self) -> Path:
        """Where judges write what they were asked and answered."""
        return self.path / "judge_audit.jsonl"

    def check_new(self) -> None:
        """Refuse a folder that exists or cannot be made; touches nothing. Raises ConfigError."""
        if os.path.lexists(self.path):  # pathlib's exists() raises where a parent may not be entered
            raise ConfigError(
                f"output_dir {self.path} exists already. Continue that run with --resume, or give another name "
                f"with output_dir={self.path}-2."
            )
        parent = self.path.parent
        while not os.path.exists(parent):
            parent = parent.parent
        if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
            raise ConfigError(f"output_dir {self.path} cannot be made: {parent} is no folder that can be written to.")

    def create(self, config: RunConfig) -> None:
        """Make the folder with the resolved config in it. Raises ConfigError.

        It gets its name when the config is there: one without could neither be resumed nor be begun anew.
        """
        temporary = self.path.with_name(f".{self.path.name}-{uuid.uuid4().hex}")
        content = dump_config(config).encode()
        try:
            with storage_errors(self.path, needed_bytes=len(content)):
                temporary.mkdir(parents=True)
                write_atomically(temporary / "config.yaml", content)
                os.rename(temporary, self.path)
                fsync_folder(self.path.parent)
        except StorageError as exc:
            shutil.rmtree(temporary, ignore_errors=True)
            raise ConfigError(f"output_dir {self.path} cannot be written: {exc}") from exc

    def lock(self) -> None:
        """Keep other processes out until `unlock`, or until this process ends, however it ends. Raises ConfigError."""
        self._lock.take()

    def unlock(self) -> None:
        """Let others in; does nothing where there is no lock."""
        self._lock.release()

    def check_resumable(self, config: RunConfig) -> RunConfig:
        """Refuse to continue a run under another recipe.

        Returns:
            The config that the run has had so far; it may differ in `MAY_CHANGE_ON_RESUME`.
        Raises:
            ConfigError: there is no run, or a key that decides what is learned differs; it is named.
        """
        so_far = load_run_config(self.path)
        saved, now = so_far.model_dump(mode="json"), config.model_dump(mode="json")
        changed = [
            line for key in saved if key not in MAY_CHANGE_ON_RESUME for line in _differences(key, saved[key], now[key])
        ]
        if changed:
            raise ConfigError(
                f"{self.path} was started with another recipe: {'; '.join(changed)}. "
                "Resume with the same values, or start a new run under another output_dir."
            )
        return so_far

    def go_on(self, config: RunConfig, *, done: int) -> None:
        """Make the files those of a run that has done so many of config.steps steps."""
        self.forget_after(done)
        if done < config.steps:
            self._forget_results()
        write_atomically(self.path / "config.yaml", dump_config(config).encode())

    def forget_after(self, step: int) -> None:
        """Cut off the lines of steps that the checkpoint does not hold; they will be run, and written, again.

        judge_audit.jsonl keeps its lines: it says what was asked.

        Raises:
            InputError: a line of theirs is no JSON, and it is not a last one that a kill has torn.
        """
        for name in ("metrics.jsonl", "completions.jsonl", "evaluations.jsonl"):
            path = self.path / name
            cut_last_lines(path, is_json_object, only_half_line=True)
            cut_last_lines(path, lambda line, path=path: _belongs_to(line, step, path))

    def last_step(self) -> int:
        """The last step that metrics.jsonl holds; 0 where there is none."""
        path = self.path / "metrics.jsonl"
        return max((int(row["step"]) for row in iter_json_lines(path)), default=0) if path.exists() else 0

    def rows(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far."""
        path = self.path / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def append(
        self,
        row: Mapping[str, float | int | None],
        completions: Iterable[Mapping[str, Any]],
        answers: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Write a finished step, and the answers of an evaluation that followed it; all is on the disk on return.

        Raises:
            StorageError: it cannot be written.
        """
        append_lines(self.path / "completions.jsonl", _as_lines(completions))
        if evaluated := _as_lines(answers):
            append_lines(self.path / "evaluations.jsonl", evaluated)
        append_metrics(self.path / "metrics.jsonl", row)

    def last_answers(self) -> list[dict[str, Any]]:
        """The lines of the last evaluation during the run; empty where there was none."""
        path = self.path / "evaluations.jsonl"
        last: list[dict[str, Any]] = []
        for line in iter_json_lines(path) if path.exists() else ():
            if last and line["step"] != last[0]["step"]:
                last = []
            last.append(line)
        return last

    def note_phase(self, phase: Phase) -> None:
        """Leave what the run is doing where another process can see it (`grpo doctor --watch`); not durable."""
        with contextlib.suppress(OSError):  # a full disk ends the run where something of it would be lost, not here
            (self.path / ".phase").write_text(phase, encoding="ascii")

    def phase(self) -> str:
        """What the run was doing when it last said so; "" where it never did."""
        path = self.path / ".phase"
        return path.read_text(encoding="ascii") if path.exists() else ""

    def write_eval(self, evaluation: Mapping[str, Any]) -> None:
        """Write eval.json. Raises StorageError."""
        write_atomically(self.path / "eval.json", json.dumps(evaluation, indent=1, allow_nan=False).encode())

    def read_eval(self) -> dict[str, Any]:
        """eval.json, empty where there is none."""
        path = self.path / "eval.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _forget_results(self) -> None:
        """Drop from eval.json what a shorter run came to; the answers before training stay."""
        evaluation = self.read_eval()
        results = {"after", "difference", "examples"} & set(evaluation)
        if results:
            kept = {key: value for key, value in evaluation.items() if key not in results}
            for part in ("answers", "bbq"):
                if part in kept:
                    kept[part] = {when: value for when, value in kept[part].items() if when != "after"}
            self.write_eval(kept)


def _as_lines(records: Iterable[Mapping[str, Any]]) -> list[bytes]:
    return [json.dumps(record, allow_nan=False).encode() for record in records]


def _belongs_to(line: bytes, step: int, path: Path) -> bool:
    """Whether a whole line is of this step or an earlier one. Raises InputError for one that nobody has torn."""
    if not line.strip():
        return False
    if not is_json_object(line):
        for _ in iter_json_lines(path):  # which says what is wrong with which line
            pass
    return json.loads(line)["step"] <= step


def _differences(key: str, saved: Any, now: Any) -> list[str]:
    """Dotted keys whose values differ, with both values."""
    if isinstance(saved, dict) and isinstance(now, dict):
        inner = dict.fromkeys([*saved, *now])
        return [line for name in inner for line in _differences(f"{key}.{name}", saved.get(name), now.get(name))]
    return [] if saved == now else [f"{key} was {saved!r}, now {now!r}"]
