"""A run on the disk: saved, found again, taken up where it was. Puts checkpoints, journal and lines together.

Knows what must be there before what: lines before the checkpoint that counts on them, a checkpoint before the journal's
files that it makes superfluous are deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from grpo.checkpoint import (
    Checkpoint,
    RunState,
    bytes_of,
    check_room,
    checkpoint_bytes,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_run_state,
    save_checkpoint,
)
from grpo.config import RunConfig
from grpo.errors import CheckpointError, ConfigError, RankLost, StorageError
from grpo.journal import Journal
from grpo.phases import Announce, silent
from grpo.prompts import open_prompts
from grpo.run_directory import RunDirectory
from grpo.run_parts import RunParts
from grpo.runtime.distributed import Ranks
from grpo.runtime.randomness import random_state, restore_random_state

Tell = Callable[[str], None]
"""Something that a person should know."""


class Keeper:
    """Owns the run's journal, and the order in which its files are written and deleted. All ranks call alike."""

    def __init__(
        self, config: RunConfig, directory: RunDirectory, ranks: Ranks, *, announce: Announce = silent
    ) -> None:
        """Touch nothing."""
        self._config, self._directory, self._ranks, self._announce = config, directory, ranks, announce
        self.journal = Journal(directory.journal_path, rank=ranks.index, audit_path=directory.audit_path)

    def find(self, so_far: RunConfig) -> Checkpoint | None:
        """The newest whole checkpoint; None where the run was ended before its first. On the main rank.

        Raises:
            CheckpointError: there were some, but none can be used.
            ConfigError: the run is longer already than it is to become.
        """
        path, steps = self._directory.path, self._config.steps
        if not list_checkpoints(path):
            if self._directory.last_step() > _first_due(so_far):
                raise CheckpointError(
                    f"{path} has done {self._directory.last_step()} steps, but its checkpoints are gone. Put its "
                    "checkpoints folder back, or start a new run under another output_dir."
                )
            return None
        checkpoint = latest_checkpoint(path)
        if checkpoint.step > steps:
            raise ConfigError(f"{path} has {checkpoint.step} steps; give steps=M above {checkpoint.step}, not {steps}.")
        return checkpoint

    def is_due(self, step: int, parts: RunParts) -> bool:
        """Whether the run is saved after this step, counted from 1."""
        prompts = self._config.prompts
        return self._config.checkpoint.is_due(
            step, per_step=prompts.per_step, epoch_prompts=parts.prompts.epoch_prompts()
        )

    def take_up(self, checkpoint: Checkpoint | None, so_far: RunConfig, parts: RunParts, tell: Tell) -> RunState:
        """Make parts and files what they were after the checkpoint's step; gives the rest of its state."""
        config, done, state = self._config, 0, RunState()
        if checkpoint is None:
            tell("there is no checkpoint yet; beginning with the first step")
        else:
            for damage in checkpoint.passed_over:
                tell(f"a newer checkpoint is damaged and was left out: {damage}")
            done = self._ranks.together(lambda: load_checkpoint(checkpoint, parts.updater))
            parts.engine.load_weights(parts.policy)
            state = self._ranks.together(lambda: read_run_state(checkpoint))
            if self._ranks.index < len(state.random_states):
                restore_random_state(state.random_states[self._ranks.index])
            tell(f"resumed after step {done} from {checkpoint.folder}")
            if state.next_prompts and state.next_prompts != _next_prompts(parts, done):
                tell(
                    f"step {done + 1} has other prompts than when step {done} was saved: the data or its order has "
                    "changed, and from here on this is another run"
                )
        if so_far.steps != config.steps and config.optim.schedule != "constant":
            tell(
                f"steps was {so_far.steps}, now {config.steps}: the learning rate falls to zero over the new number "
                f"(optim.schedule={config.optim.schedule}), so it is another from here on than it would have been"
            )
        self._ranks.on_main(lambda: self._directory.go_on(config, done=done))
        return state

    def check_room(self, parts: RunParts, checkpoint: Checkpoint | None) -> None:
        """Before the first step: is there room for the next two checkpoints? Raises ConfigError."""
        path = self._directory.path

        def check() -> None:
            if checkpoint is not None and checkpoint.step == self._config.steps:
                return
            one = bytes_of(checkpoint) if checkpoint else self._expected_bytes(parts)
            check_room(path, checkpoint_bytes=one, count=self._num_to_come(), error=ConfigError)

        self._ranks.on_main(check)

    def save(self, step: int, last: Checkpoint | None, parts: RunParts, state: RunState) -> Checkpoint:
        """The last checkpoint where it is this step's, else a new one; journals that no checkpoint needs are deleted.

        Room is looked for at each save, for this checkpoint and for the next. Where there is none for this one, nothing
        is written; where there is none for the next, this one is saved and the run ends with it: nothing is lost.

        Raises:
            StorageError: it cannot be written, and the older ones are as they were; or it was, but the next one will
                find no room.
        """
        if last is not None and last.step == step:
            return last
        parts_of_ranks = self._ranks.gather([random_state()])
        self._ranks.check_equal(parts.policy.trainable_parameters())
        state = RunState(
            next_prompts=_next_prompts(parts, step),
            skipped_in_a_row=state.skipped_in_a_row,
            stuck_betas=state.stuck_betas,
            random_states=tuple(parts_of_ranks),
        )
        try:
            return self._ranks.on_main(lambda: self._save(step, last, parts, state))
        finally:
            self._announce("between")

    def _save(self, step: int, last: Checkpoint | None, parts: RunParts, state: RunState) -> Checkpoint:
        config, path = self._config, self._directory.path
        one = bytes_of(last) if last else self._expected_bytes(parts)
        check_room(path, checkpoint_bytes=one, count=1)
        checkpoint = save_checkpoint(
            path,
            parts.updater,
            step=step,
            keep=config.checkpoint.keep,
            state=state,
            expected_bytes=one,
            announce=self._announce,
        )
        # from the oldest that is kept: it may have to stand in for a newer one that turns out damaged
        self.journal.forget_through(list_checkpoints(path)[0].step)
        if step < config.steps:
            try:  # now, not before: what this save has deleted makes room, and only the disk knows how much
                check_room(path, checkpoint_bytes=bytes_of(checkpoint), count=1)
            except StorageError as exc:
                raise StorageError(f"{checkpoint.folder} was saved, but no other will be: {exc}") from exc
        return checkpoint

    def _num_to_come(self) -> int:
        """Checkpoints that the disk must hold beside those of now before one of them is deleted; two at most."""
        return 2 if len(list_checkpoints(self._directory.path)) < self._config.checkpoint.keep else 1

    def _expected_bytes(self, parts: RunParts) -> int:
        return checkpoint_bytes(
            parts.updater, vocabulary_size=len(parts.tokenizer), has_anchor=self._config.warmup is not None
        )


def _first_due(config: RunConfig) -> int:
    """The step after which a run is saved for the first time."""
    prompts, epoch_prompts = config.prompts, None
    if config.checkpoint.every_epochs is not None:
        source = open_prompts(prompts, seed=config.seed, objectives=list(config.objectives))
        epoch_prompts = source.epoch_prompts()
    is_due = partial(config.checkpoint.is_due, per_step=prompts.per_step, epoch_prompts=epoch_prompts)
    return next(step for step in count(1) if is_due(step))


def _next_prompts(parts: RunParts, done: int) -> tuple[str, ...]:
    return tuple(prompt.id for prompt in parts.prompts.batch(done + 1))


def what_is_there(run_dir: Path) -> str:
    """What a run that ended before its time left, and the command that goes on with it."""
    if not (run_dir / "config.yaml").is_file():
        return "no run directory was written"
    found = [f"its last checkpoint is of step {checkpoint.step}" for checkpoint in list_checkpoints(run_dir)]
    return f"{run_dir}: {found[-1] if found else 'no checkpoint yet'}; go on with: grpo train {run_dir} --resume"


@contextmanager
def told_what_is_left(run_dir: Path) -> Iterator[None]:
    """A run that has lost a process says where it is taken up again. Each process that is left does: the main one may
    be the one that is gone."""
    try:
        yield
    except RankLost as exc:
        if (run_dir / "config.yaml").is_file():
            exc.add_note(f"{what_is_there(run_dir)}. What was sampled and judged since is in the journal.")
        else:
            exc.add_note("No run directory was written here.")
        raise
