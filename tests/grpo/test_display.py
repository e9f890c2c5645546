"""Claims about what a run prints, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from grpo.diagnostics.display import Display, LiveDisplay, PlainDisplay, band_position, make_display
from grpo.diagnostics.printable import printable

BANDS = {"fairness": (0.02, 0.06), "grounding": (0.02, 0.06)}
OBSERVED = {"fairness": "kl/fairness/penalty", "grounding": "kl/grounding"}
ROW: Mapping[str, Any] = {
    "step": 12,
    "reward/fairness/mean": 0.5123,
    "kl/fairness": 0.5,
    "kl/fairness/penalty": 0.031,
    "beta/fairness": 0.021,
    "completion/fairness/length_mean": 45.2,
    "reward/grounding/mean": -0.25,
    "reward/grounding/unscored_frac": 0.125,
    "kl/grounding": 0.01,
    "beta/grounding": 0.02,
    "completion/grounding/length_mean": 1450.0,
    "tokens/completion": 12000,
    "time/step_s": 9.6,
    "grad_norm": 0.5123,
}
EVAL = {
    "before": {
        "fairness": {"mean": 0.4, "low": 0.3, "high": 0.5, "n": 64, "kinds": {"ambiguous": 0.25, "clear": 0.55}}
    },
    "after": {"fairness": {"mean": 0.7, "low": 0.6, "high": 0.8, "n": 64, "kinds": {"ambiguous": 0.75}}},
    "difference": {"fairness": {"mean": 0.3, "low": 0.2, "high": 0.4}},
}
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Screen:
    """A console in memory and the display on it."""

    def __init__(self, *, is_terminal: bool, width: int = 160, bands: Mapping[str, Any] = BANDS) -> None:
        self.file = io.StringIO()
        environment = {"TERM": "xterm-256color"} if is_terminal else {}
        console = Console(file=self.file, force_terminal=is_terminal, width=width, height=50, _environ=environment)
        self.display: Display = make_display(bands, OBSERVED, console)

    @property
    def raw(self) -> str:
        return self.file.getvalue()

    @property
    def text(self) -> str:
        return ANSI.sub("", self.raw)

    def row_of(self, first: str) -> list[str]:
        """Cells of the last line that starts with the word."""
        line = [line for line in self.text.splitlines() if line.strip().startswith(first)][-1]
        return re.split(r"\s{2,}", line.strip())


def test_plain_step_is_one_line_of_columns_that_fits_a_log() -> None:
    screen = Screen(is_terminal=False)
    screen.display.step(ROW, total_steps=30, seconds_left=250.0)
    assert screen.raw == (
        "step=12/30 left=4m10s "
        " | fairness reward=0.512  kl=0.0310:in beta=0.0210 len=45  "
        " | grounding reward=-0.250 kl=0.0100:lo beta=0.0200 len=1450"
        " | tok/s=1250  grad=0.51\n"  # 12000 tokens / 9.6 s
    )
    assert len(screen.raw) <= 166


def test_held_out_means_are_shown_behind_the_step_that_was_evaluated_and_stay_in_the_live_table() -> None:
    evaluated = {**ROW, "eval/fairness/mean": 0.75, "eval/grounding/mean": 0.5}
    plain, live = Screen(is_terminal=False), Screen(is_terminal=True)
    for screen in (plain, live):
        screen.display.step(evaluated, total_steps=30, seconds_left=250.0)
        screen.display.step({**ROW, "step": 13}, total_steps=30, seconds_left=250.0)
    first, second = plain.raw.splitlines()
    assert first.endswith("grad=0.51 | held out fairness=0.750 grounding=0.500")
    assert second.endswith("grad=0.51")
    assert "held out" in live.row_of("objective")
    assert live.row_of("fairness")[-1] == "0.750"


def test_plain_columns_stay_in_place_from_step_to_step_and_missing_is_a_dash() -> None:
    screen = Screen(is_terminal=False)
    screen.display.step(ROW, total_steps=30, seconds_left=250.0)
    screen.display.step({"step": 3}, total_steps=30, seconds_left=None)
    full, empty = screen.raw.splitlines()
    assert [m.start() for m in re.finditer(r"[a-z/]+=", full)] == [m.start() for m in re.finditer(r"[a-z/]+=", empty)]
    assert set(re.findall(r"=(\S+)", empty)) == {"3/30", "-"}  # never 0


def test_plain_output_has_no_control_characters_whatever_the_model_wrote() -> None:
    screen = Screen(is_terminal=False)
    attack = "a\x1b[2J\rb\x07\x9bc\u202ed"
    with screen.display as display:
        display.start([("model", attack)])
        display.step(ROW, total_steps=30, seconds_left=0)
        display.note(attack)
        display.warn(attack)
        display.finish(EVAL, [{"prompt": attack, "before": attack, "after": attack}], [("report", attack)])
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", screen.raw)
    assert screen.raw.count(r"a\x1b[2J\rb\x07\x9bc\u202ed") == 7


def test_model_output_on_a_terminal_is_neither_markup_nor_escape_sequence() -> None:
    screen = Screen(is_terminal=True)
    screen.display.finish(None, [{"prompt": "q", "before": "[bold]x[/bold]\x1b[2J", "after": ":smile:"}], [])
    assert r"[bold]x[/bold]\x1b[2J" in screen.text
    assert ":smile:" in screen.text
    assert "\x1b[2J" not in screen.raw


def test_printable_keeps_every_script_and_escapes_what_acts() -> None:
    kept = "café\u00a0日本 👩\u200d🔬\tx\ny"
    assert printable(kept) == kept
    assert printable("\x1b]0;title\x07") == r"\x1b]0;title\x07"
    assert printable("half \ud83d") == r"half \ud83d"
    assert printable("β 😀", "ascii") == r"\u03b2 \U0001f600"


def test_an_ascii_terminal_prints_every_table_instead_of_raising() -> None:
    code = (
        "from grpo.diagnostics.display import make_display\n"
        "with make_display({'β': (0.1, 0.2)}, {}) as display:\n"
        "    display.start([('modèle', '😀')])\n"
        "    display.step({'step': 1}, total_steps=1, seconds_left=0)\n"
        "    display.finish({'after': {'β': {'mean': 0.5}}}, [{'prompt': '😀', 'after': '日本'}], [('é', 'ü')])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, env={"PYTHONIOENCODING": "ascii"}, text=True
    )
    assert result.returncode == 0, result.stderr
    assert r"\u65e5\u672c" in result.stdout


def test_output_decides_the_display_and_a_dumb_terminal_gets_plain_lines() -> None:
    assert isinstance(Screen(is_terminal=True).display, LiveDisplay)
    assert isinstance(Screen(is_terminal=False).display, PlainDisplay)
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(make_display(BANDS, OBSERVED, dumb), PlainDisplay)


def test_live_table_shows_each_objectives_observed_kl_against_its_band() -> None:
    screen = Screen(is_terminal=True)
    with screen.display as display:
        display.step(ROW, total_steps=30, seconds_left=3700)
    assert screen.row_of("fairness") == ["fairness", "0.512", "0.0310 inside", "0.02 to 0.06", "0.0210", "45", "-"]
    assert screen.row_of("grounding")[2] == "0.0100 below"
    assert screen.row_of("grounding")[-1] == "12%"
    assert "step 12/30" in screen.text
    assert "1h01m left" in screen.text
    assert "1,250 tokens/s" in screen.text
    assert "grad norm 0.512" in screen.text


def test_live_table_of_an_objective_without_band_or_values_shows_dashes() -> None:
    screen = Screen(is_terminal=True, bands={"fairness": None})
    with screen.display as display:
        display.step({"step": 1, "kl/fairness/penalty": 0.5, "grad_norm": None}, total_steps=2, seconds_left=None)
    assert screen.row_of("fairness") == ["fairness", "-", "0.5000", "-", "-", "-", "-"]


@pytest.mark.parametrize(
    ("kl", "position"), [(0.019, "lo"), (0.02, "in"), (0.06, "in"), (0.061, "hi"), (None, None), (float("nan"), None)]
)
def test_band_edges_belong_to_the_band_and_missing_has_no_position(kl: float | None, position: str | None) -> None:
    assert band_position(kl, (0.02, 0.06)) == position


def test_an_exception_gives_the_terminal_back() -> None:
    screen = Screen(is_terminal=True)

    def run() -> None:
        with screen.display as display:
            display.start([("model", "m")])
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run()
    assert screen.raw.count("\x1b[?25l") == 1  # cursor hidden
    assert screen.raw.count("\x1b[?25h") == 1  # and shown again


def test_live_display_starts_no_thread_and_finish_stops_it_before_the_tables() -> None:
    screen = Screen(is_terminal=True)
    threads = threading.active_count()
    with screen.display as display:
        display.step(ROW, total_steps=30, seconds_left=1)
        assert threading.active_count() == threads
        display.finish(EVAL, None, [])
        assert screen.raw.index("\x1b[?25h") < screen.raw.index("Held-out")
        display.step(ROW, total_steps=30, seconds_left=1)  # a second stage may follow
    assert screen.raw.count("\x1b[?25h") == 2


@pytest.mark.parametrize("is_terminal", [True, False])
def test_finish_prints_before_after_difference_with_intervals_and_by_kind(is_terminal: bool) -> None:
    screen = Screen(is_terminal=is_terminal)
    screen.display.finish(EVAL, None, [("report", "/runs/a/report.html")])
    assert screen.row_of("fairness") == [
        "fairness",
        "64",
        "0.400 [0.300, 0.500]",
        "0.700 [0.600, 0.800]",
        "+0.300 [+0.200, +0.400]",
    ]
    assert screen.row_of("ambiguous") == ["ambiguous", "0.250", "0.750", "+0.500"]
    assert screen.row_of("clear") == ["clear", "0.550", "-", "-"]  # not scored after: no difference, not -0.55
    assert screen.text.endswith("report: /runs/a/report.html\n")


def test_finish_of_an_evaluation_without_training_has_no_difference_column() -> None:
    screen = Screen(is_terminal=False)
    screen.display.finish({"before": EVAL["before"]}, [{"prompt": "q", "before": "answer"}], [])
    assert "difference" not in screen.raw
    assert "after" not in screen.raw
    assert screen.row_of("fairness") == ["fairness", "64", "0.400 [0.300, 0.500]"]
    assert screen.row_of("q") == ["q", "answer"]


def test_finish_shows_three_examples_side_by_side_and_no_fourth() -> None:
    screen = Screen(is_terminal=False)
    examples = [{"prompt": f"q{i}", "reference": "r", "before": f"old{i}", "after": f"new{i}"} for i in range(4)]
    screen.display.finish(EVAL, examples, [])
    for i in range(3):
        assert screen.row_of(f"q{i}") == [f"q{i}", f"old{i}", f"new{i}"]
    assert "q3" not in screen.raw


def test_finish_without_an_evaluation_prints_the_paths_unbroken() -> None:
    screen = Screen(is_terminal=False, width=40)
    path = "/a/very/long/" + "x" * 200
    screen.display.finish(None, None, [("run", path)])
    assert screen.raw == f"run: {path}\n"


def test_a_target_has_no_inside_and_is_shown_as_a_target() -> None:
    for is_terminal in (True, False):
        screen = Screen(is_terminal=is_terminal, bands={"fairness": (0.05, 0.05)})
        with screen.display as display:
            display.step(ROW, total_steps=30, seconds_left=1)
        if is_terminal:
            assert screen.row_of("fairness")[2:4] == ["0.0310", "target 0.05"]
        else:
            assert "kl=0.0310 " in screen.text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_skipped_step_without_gradient_and_kl_shows_dashes(is_terminal: bool) -> None:
    screen = Screen(is_terminal=is_terminal)
    row = {name: value for name, value in ROW.items() if not name.startswith("kl/")}
    with screen.display as display:
        display.step({**row, "grad_norm": None, "update/skipped": 1}, total_steps=30, seconds_left=1)
        display.warn("step 12 was skipped")
    assert "warning: step 12 was skipped" in screen.text
    if is_terminal:
        assert screen.row_of("fairness")[2] == "-"
        assert "grad norm -" in screen.text
    else:
        assert "kl=- " in screen.text
        assert screen.text.splitlines()[0].endswith("grad=-")
