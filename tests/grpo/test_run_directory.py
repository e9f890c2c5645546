"""The folder of a run is never overwritten, and its lines stay whole."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from kill_harness.file_faults import failing
from kill_harness.file_operations import Operation

from grpo.config import RunConfig
from grpo.errors import ConfigError, InputError
from grpo.metrics import read_metrics
from grpo.recipe_loader import load_run_config, parse_recipe
from grpo.run_directory import RunDirectory


def make_config(run_dir: Path, **changes: Any) -> RunConfig:
    values = {
        "model": "m",
        "steps": 2,
        "output_dir": str(run_dir),
        "prompts": {"type": "file", "path": "/data/d.jsonl"},
        "objectives": {
            "brevity": {"rewards": [{"name": "length"}], "beta": {"type": "band", "low": 0.01, "high": 0.1}}
        },
        "optim": {"learning_rate": 1e-4},
    }
    return parse_recipe({**values, **changes}, base_dir=Path("/recipes"), source="r.yaml")


def make_run(folder: Path) -> RunDirectory:
    run = RunDirectory(folder / "run")
    run.create(make_config(run.path))
    return run


def append_steps(run: RunDirectory, last: int) -> None:
    for step in range(1, last + 1):
        rows = [{"step": step, "index": index, "completion": f"a\u2028b é {step}"} for index in range(2)]
        run.append({"step": step, "grad_norm": step / 3, "kl/brevity": None}, rows)


def lines_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


# --- a new run


def test_a_kill_while_the_folder_is_made_leaves_none_or_one_with_its_config(tmp_path: Path) -> None:
    def kill(operation: Operation, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        raise KeyboardInterrupt

    seen: list[bool] = []
    for number in count(1):
        folder = tmp_path / str(number)
        with failing(folder, number, kill) as met, suppress(KeyboardInterrupt):
            make_run(folder)
        seen.append((folder / "run").exists())
        assert seen[-1] == (folder / "run" / "config.yaml").exists()
        if not met:
            break
    assert seen == sorted(seen)
    assert seen.count(False) > 5


def test_an_existing_directory_is_refused_and_both_ways_out_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        run.check_new()
    assert str(caught.value) == (
        f"output_dir {run.path} exists already. Continue that run with --resume, or give another name with "
        f"output_dir={run.path}-2."
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_anything_at_the_place_is_refused_a_file_or_a_dangling_link_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(ConfigError, match="exists already"):
            RunDirectory(tmp_path / name).check_new()


def test_a_place_that_cannot_be_a_folder_is_refused_and_the_obstacle_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        RunDirectory(tmp_path / "file" / "deep" / "run").check_new()
    assert str(caught.value) == (
        f"output_dir {tmp_path / 'file' / 'deep' / 'run'} cannot be made: {tmp_path / 'file'} is no folder that can be "
        "written to."
    )


def test_a_folder_that_could_not_be_made_after_all_is_bad_input_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"output_dir .*/file/run cannot be written: "):
        RunDirectory(tmp_path / "file" / "run").create(make_config(tmp_path / "run"))


def test_the_check_makes_nothing_and_create_makes_the_parents_too(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a" / "b" / "run")
    run.check_new()
    assert list(tmp_path.iterdir()) == []
    run.create(make_config(run.path))
    assert load_run_config(run.path) == make_config(run.path)


def test_create_never_takes_over_a_directory_that_appeared_meanwhile(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    saved = (run.path / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="cannot be written"):
        run.create(make_config(run.path, steps=99))
    assert (run.path / "config.yaml").read_bytes() == saved


# --- resuming


def test_the_same_recipe_may_resume_and_may_ask_for_more_steps_checkpoints_and_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.check_resumable(make_config(run.path))
    run.check_resumable(make_config(run.path, steps=9, checkpoint={"every": 1}, eval={"num_prompts": 3}))


def test_a_changed_recipe_is_refused_and_every_changed_key_is_named_with_both_values(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    changed = make_config(
        run.path, seed=1, rollout={"group_size": 4}, optim={"learning_rate": 1e-3}, trainable={"type": "full"}
    )
    with pytest.raises(ConfigError) as caught:
        run.check_resumable(changed)
    message = str(caught.value)
    assert message.startswith(f"{run.path} was started with another recipe: seed was 0, now 1; ")
    assert "rollout.group_size was 8, now 4" in message
    assert "optim.learning_rate was 0.0001, now 0.001" in message
    assert "trainable.type was 'lora', now 'full'" in message
    assert "top_p" not in message  # what stayed is not told
    assert "or start a new run under another output_dir" in message


def test_an_objective_more_is_a_change_that_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    one = {"rewards": [{"name": "length"}], "beta": {"type": "fixed"}}
    objectives = dict.fromkeys(("brevity", "clarity"), one)
    with pytest.raises(ConfigError, match=r"objectives\.clarity was None, now \{"):
        run.check_resumable(make_config(run.path, objectives=objectives))


def test_there_is_nothing_to_resume_in_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run directory: it has no config\.yaml"):
        RunDirectory(tmp_path / "run").check_resumable(make_config(tmp_path / "run"))


def test_forgetting_drops_the_lines_of_later_steps_and_changes_no_other(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    append_steps(run, 4)
    kept = {name: lines_of(run.path / f"{name}.jsonl") for name in ("metrics", "completions")}
    run.forget_after(2)
    assert lines_of(run.path / "metrics.jsonl") == kept["metrics"][:2]
    assert lines_of(run.path / "completions.jsonl") == kept["completions"][:4]  # two a step
    run.forget_after(9)
    assert lines_of(run.path / "metrics.jsonl") == kept["metrics"][:2]


def test_forgetting_drops_a_line_that_a_kill_tore_and_the_next_step_starts_a_line_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    append_steps(run, 2)
    for name in ("metrics", "completions"):
        with (run.path / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 3, "grad_')
    run.forget_after(2)
    run.append({"step": 3, "grad_norm": 1.0}, [{"step": 3, "completion": "x"}])
    assert [row["step"] for row in lines_of(run.path / "metrics.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in lines_of(run.path / "completions.jsonl")] == [1, 1, 2, 2, 3]


def test_forgetting_in_a_run_without_a_step_does_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.forget_after(0)
    assert [path.name for path in run.path.iterdir()] == ["config.yaml"]


def test_forgetting_reads_a_file_line_by_line(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.append({"step": 1}, [{"step": 1, "completion": "x" * 1000} for _ in range(5000)])  # 5 MB
    tracemalloc.start()
    run.forget_after(1)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 500_000
    assert len(lines_of(run.path / "completions.jsonl")) == 5000


def test_forgetting_keeps_what_the_judges_were_asked(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.audit_path.write_text('{"request": 1}\n')
    run.forget_after(0)
    assert run.audit_path.read_text() == '{"request": 1}\n'


def test_going_on_writes_what_may_change_into_the_config(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    changed = make_config(run.path, steps=9, checkpoint={"every": 1}, eval={"num_prompts": 3})
    assert run.check_resumable(changed) == make_config(run.path)
    run.go_on(changed, done=1)
    assert load_run_config(run.path) == changed
    assert [path.name for path in run.path.iterdir()] == ["config.yaml"]  # no temporary file stays


def test_going_on_with_a_finished_run_keeps_its_results_and_with_a_longer_one_drops_them(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    answers = {"before": [{"id": "a"}], "after": [{"id": "a"}]}
    whole = {"before": {"b": 1}, "after": {"b": 2}, "difference": {"b": 1}, "examples": [], "answers": answers}
    run.write_eval(whole)
    run.go_on(make_config(run.path, steps=2), done=2)
    assert run.read_eval() == whole
    run.go_on(make_config(run.path, steps=3), done=2)
    assert run.read_eval() == {"before": {"b": 1}, "answers": {"before": [{"id": "a"}]}}


def test_a_damaged_line_in_the_middle_is_not_dropped_silently(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2"):
        run.forget_after(1)
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": \n{"step": 3}\n'
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "metrics.jsonl"]  # no half-written file


# --- one process at a time


def test_a_lock_keeps_others_out_until_it_is_given_up(tmp_path: Path) -> None:
    run, other = make_run(tmp_path), RunDirectory(tmp_path / "run")
    run.lock()
    with pytest.raises(ConfigError, match="another process is running in"):
        other.lock()
    run.unlock()
    run.unlock()  # a second time does nothing
    other.lock()
    other.unlock()


def test_a_lock_ends_with_its_process_even_one_that_is_killed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; from grpo.run_directory import RunDirectory\n"
        "RunDirectory(Path(sys.argv[1])).lock(); print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match="another process is running in"):
            run.lock()
        holder.kill()
    run.lock()
    run.unlock()


def test_a_folder_that_cannot_be_locked_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"output_dir .*gone cannot be written: "):
        RunDirectory(tmp_path / "gone").lock()


# --- lines


def test_each_step_adds_one_line_of_metrics_and_one_line_a_completion(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    append_steps(run, 3)
    assert [row["grad_norm"] for row in read_metrics(run.path / "metrics.jsonl")] == [1 / 3, 2 / 3, 1.0]
    assert [(row["step"], row["index"]) for row in lines_of(run.path / "completions.jsonl")] == [
        (step, index) for step in (1, 2, 3) for index in (0, 1)
    ]
    assert lines_of(run.path / "completions.jsonl")[0]["completion"] == "a\u2028b é 1"


def test_a_missing_figure_is_null_and_never_a_number(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    append_steps(run, 1)
    assert lines_of(run.path / "metrics.jsonl")[0]["kl/brevity"] is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.append({"step": 2}, [{"step": 2, "advantage": float("nan")}])


def test_an_evaluation_reads_back_as_it_was_written_and_is_empty_before(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert run.read_eval() == {}
    run.write_eval({"before": {"brevity": {"mean": 0.25}}})
    assert run.read_eval() == {"before": {"brevity": {"mean": 0.25}}}
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "eval.json"]  # no temporary file stays
