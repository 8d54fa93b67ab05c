"""What a person sees of a run: on a terminal (recorded, and read off its screen), through a pipe, and when quiet."""

from __future__ import annotations

import codecs
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console

from latency.paired import Reading
from search import display, live
from search.cli import main
from search.display import Display, Pace
from search.live import SearchView
from search.numbers import metric_name
from search.settings import settings_from
from search.strategies import make_sampler
from search.study import open_study, search
from search.table import summary_table
from search.verbs.latency import reading_table, short
from tests.synthetic import concave

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT = 100, 40
OWN = """
import torch
from torch import nn

def net():
    conv = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
    body = conv(3, 24), conv(24, 24), conv(24, 24)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 2))

def data():
    make = lambda n: [(9 * torch.randn(3, 8, 8) + i % 2, i % 2) for i in range(n)]
    return {"train": make(256), "val": make(64), "test": make(64)}
"""
QUICK = ["--budget", "flops=0.5,params=0.9", "--trials", "7", "--score-steps", "6", "--finetune-epochs", "3"]
QUICK += ["--strategy", "random"]


@pytest.fixture
def own(tmp_path, monkeypatch) -> list[str]:
    """A folder with a model and data of one's own, and the words that search it; latency is measured for a moment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return ["--model", "own.py:net", "--data", "own.py:data", *QUICK]


def recorded(words: list[str], **environment: str) -> str:
    """All that a program writes to a terminal of WIDTH by HEIGHT, which is both its outputs."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    known = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "search.py"), *words],
        stdin=follower, stdout=follower, stderr=follower,
        env={**known, "TERM": "xterm-256color", "PYTHONUTF8": "1", **environment},
    )  # fmt: skip
    os.close(follower)
    decode, written = codecs.getincrementaldecoder("utf-8")(), ""
    try:
        while part := os.read(leader, 65536):
            written += decode.decode(part)
    except OSError:  # the last one who had the terminal open has closed it
        pass
    os.close(leader)
    assert process.wait() == 0, written
    return written


def screen(written: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    pyte = pytest.importorskip("pyte", reason="needs pyte, to read a terminal's screen")
    shown = pyte.Screen(WIDTH, HEIGHT)
    pyte.Stream(shown).feed(written)
    return [line.rstrip() for line in shown.display if line.strip()]


def test_a_terminal_shows_the_best_trials_as_they_come_and_a_summary_that_fits(own):
    written = recorded(own)
    counts = [int(count) for count in re.findall(r"(\d)/7", written)]
    assert counts == sorted(counts), "the count goes up in place"
    assert (counts[0], counts[-1]) == (0, 7)
    assert "\x1b[" in written
    lines = screen(written)
    warning = next(i for i, line in enumerate(lines) if line.startswith("WARNING: the final fine-tune is short"))
    assert lines[warning + 1] == "--finetune-epochs or lower --finetune-batch", "broken between words"
    text = "\n".join(lines)
    assert max(map(len, lines)) <= WIDTH
    assert text.count("searching with random") == 1, "drawn again in one place"
    assert "quick fine-tune" not in text, "nothing of a trial that ended stays"
    top = lines.index(next(line for line in lines if line.startswith("best trials")))
    header = " ".join(lines[top].split())
    assert "best trials accuracy soft accuracy flops, of dense params, of dense keep ratio, input" in header
    rows = [line.split() for line in lines[top + 1 : top + 6]]
    scores = [float(row[2]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(1 <= int(row[0]) <= 7 and float(row[3]) <= 0.5 and len(row[5]) == 3 for row in rows)
    result = json.loads(next(Path("runs").glob("*/result.json")).read_text())
    for model in ("dense", "best", "uniform"):
        assert f"{result[model]['test_accuracy']:.4f}" in text
        assert f"{result[model]['flops']:,}" in text
    assert lines[-1].endswith("policy.json, model.safetensors, model.onnx, report.html")


def test_a_view_shows_what_is_being_scored_until_the_trial_ends(clock):
    def drawn() -> str:
        console = Console(file=io.StringIO(), width=WIDTH)
        console.print(view)
        return console.file.getvalue()

    view = view_of([], trials=2, time_limit=None)
    view.step("quick fine-tune", 3, 30)
    assert "0/2" in drawn()
    assert drawn().splitlines()[-1].rstrip() == "trial 1: quick fine-tune, step 3 of 30"
    feed(view, clock, trials=1, seconds=1)
    assert "1/2" in drawn()
    assert "best trials" in drawn()
    assert "quick fine-tune" not in drawn(), "nothing of a trial that ended stays"


def test_no_color_means_no_colour_on_a_terminal(monkeypatch):
    def drawn() -> list[int]:
        console = Console(file=io.StringIO(), force_terminal=True, width=WIDTH, color_system="truecolor")
        view = view_of([], trials=9, time_limit=None)
        view.know(told_study(view.problem, 9))
        console.print(view)
        codes = re.findall(r"\x1b\[([\d;]*)m", console.file.getvalue())
        return [int(code) for part in codes for code in part.split(";") if code]

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert any(30 <= code <= 49 for code in drawn())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not any(30 <= code <= 49 or 90 <= code <= 107 for code in drawn())


def test_a_pipe_gets_plain_lines_that_fit_and_the_result_alone_on_standard_output(own, capsys, monkeypatch):
    monkeypatch.setattr(display, "EVERY", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # some CI services set it; cursor movements in a log help nobody
    assert main([*own, "--out", "run"]) == 0
    printed = capsys.readouterr()
    plain = re.sub(r"\x1b\[[\d;]*m", "", printed.err + printed.out)
    assert "\x1b" not in plain
    assert "\r" not in plain
    lines = [line for line in printed.err.splitlines() if line.startswith("searching with random: ")]
    assert re.fullmatch(r"searching with random: 7/7, best soft accuracy 0\.\d{4}; .*", lines[-1])
    assert any("trial 3: quick fine-tune, step" in line for line in lines)
    assert "fine-tuning the best policy: " in printed.err
    out = re.sub(r"\x1b\[[\d;]*m", "", printed.out).splitlines()
    assert max(map(len, out)) <= WIDTH
    assert "accuracy (test split)" in "".join(out)
    assert "searching" not in printed.out
    assert "best (" not in printed.err


def test_verbose_says_every_trial(own, capsys):
    assert main([*own, "--out", "a", "--verbose"]) == 0
    said = re.findall(r"^trial (\d): accuracy \d", capsys.readouterr().err, re.MULTILINE)
    assert said == list("1234567")


def test_json_leaves_one_object_on_standard_output_and_no_progress(own, capsys):
    assert main([*own, "--finetune-epochs", "0", "--out", "c", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = json.loads(printed.out)
    assert (found["search"]["trials"], found["search"]["metric"]) == (7, "accuracy")


class Clock:
    """Time that passes when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(display.time, "monotonic", clock)
    return clock


def view_of(said: list[str], *, trials: int | None, time_limit: float | None, **settings) -> SearchView:
    problem, _ = concave(6)
    shown = Display(verbose=True)
    shown.say = shown.progress = said.append
    chosen = settings_from(
        {"budget": "flops=0.5", "trials": trials, "time_limit": time_limit, "score_steps": 30, **settings}
    )
    return SearchView(shown, problem, chosen, "iou", trials, time_limit, examples=1280)


def told_study(problem, trials: int):
    """A study that holds so many trials."""
    study = open_study(None, "s", make_sampler("random", problem, trials=trials, seed=0))
    search(problem, study, trials=trials, seed=0)
    return study


def feed(view: SearchView, clock: Clock, *, trials: int, seconds: float) -> None:
    """Trials of the view's own problem, each of which takes so long."""

    def on_trial(progress) -> None:
        clock.now += seconds
        view.trial(progress)

    sampler = make_sampler("random", view.problem, trials=trials, seed=0)
    search(view.problem, open_study(None, "s", sampler), trials=trials, seed=0, on_trial=on_trial)


def test_a_long_run_says_so_first_and_how_to_shorten_it(clock):
    said: list[str] = []
    view = view_of(said, trials=200, time_limit=None)
    feed(view, clock, trials=3, seconds=12)
    notices = [line for line in said if "takes a while" in line]
    # 199 more at 12 s; 2 fine-tunings of 10 epochs of 10 steps, a step at 12 s / 30.
    assert notices == [
        "this takes a while: about 39 min 48 s of search to go, at 12 s a trial, then about 1 min 20 s of fine-tuning. "
        "Shorter: --trials 50, --time-limit 5m, --score-steps 15, --finetune-epochs 2. Ctrl-C stops it; "
        "--resume goes on."
    ]
    assert said[0].startswith("trial 1: iou ")
    assert said[1] == notices[0]


@pytest.mark.parametrize(
    ("trials", "time_limit", "says"),
    [(10, None, None), (None, 120.0, None), (200, 120.0, None), (None, 3600.0, "about 59 min 48 s of search")],
)
def test_the_notice_knows_both_limits(clock, trials, time_limit, says):
    said: list[str] = []
    feed(view_of(said, trials=trials, time_limit=time_limit), clock, trials=2, seconds=12)
    notices = [line for line in said if "takes a while" in line]
    assert len(notices) == (says is not None)
    assert (says or "") in "".join(notices)


def test_a_view_of_a_resumed_run_knows_what_was_found_before(clock):
    said: list[str] = []
    view = view_of(said, trials=30, time_limit=None)
    study = told_study(view.problem, 9)
    view.know(study)
    assert view.done == 9
    assert view.top[0][1].reward == study.best_value
    assert len(view.top) == live.TOP
    assert 1 <= min(number for number, _ in view.top) <= max(number for number, _ in view.top) <= 9


def test_lines_come_less_often_as_time_passes(clock):
    pace, due = Pace(), []
    for second in range(3600):
        clock.now = 1001.0 + second
        if pace.due():
            due.append(second)
    assert due[:3] == [9, 19, 29]
    assert due[-1] - due[-2] == 60


def test_many_groups_keep_to_the_width():
    problem, _ = concave(100)
    view = SearchView(Display(quiet=True), problem, settings_from({}), "accuracy", 5, None)
    outcome = problem.evaluate(problem.budget.project(problem.budget.dense))
    assert 0 < len(view.keep(outcome)) <= live.MOST_BARS


def test_a_summary_fits_a_hundred_columns_whatever_is_in_it():
    huge = {
        "accuracy": 0.98765, "test_accuracy": 0.98765, "flops": 123_456_789_012, "params": 1_234_567_890,
        "size": 12_345_678_901, "latency_ms": 12345.678, "speedup": 11.23, "speedup_ci95": [10.01, 12.34],
    }  # fmt: skip
    half = {name: value * 0.5 for name, value in huge.items() if name != "speedup_ci95"}
    limits = [
        {"cost": name, "limit": 1e9, "fraction": 0.512, "achieved": 9e8, "met": True}
        for name in ("flops", "params", "latency", "size")
    ]
    best = {**half, "source": "uniform", "speedup_ci95": [10.01, 12.34]}
    found = {"budget": limits, "dense": huge, "best": best, "uniform": best, "search": {"metric": "iou[bold]"}}
    console = Console(width=100, file=io.StringIO())
    console.print(summary_table(found))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "iou[bold] (search split)" in text
    assert "61,728,394,506 (0.500)" in text


def test_a_metric_is_called_by_its_own_name():
    class Worth:
        def __call__(self, model) -> float:
            return 0.0

    def iou(model, threshold=0.5) -> float:
        return 0.0

    from functools import partial

    named = [metric_name(metric) for metric in (None, iou, partial(iou, threshold=0.3), Worth(), lambda model: 0.0)]
    assert named == ["accuracy", "iou", "iou", "Worth", "metric"]


def test_files_are_compared_by_the_ends_of_their_names_that_tell_them_apart():
    reading = Reading(0.1, 0.1, 0.2, 0.1, 1.0, (0.9, 1.1), 10, 0.0)
    files = ["a/long/way/from/home/one/dense.onnx", "a/long/way/from/home/two/dense.onnx"]
    console = Console(width=100, file=io.StringIO())
    console.print(reading_table(dict.fromkeys(files, reading), files[0], "local"))
    shown = console.file.getvalue()
    assert "home" not in shown
    assert "one/dense.onnx" in shown
    assert "two/dense.onnx" in shown
    assert short(["x/a.onnx", "y/b.onnx"]) == {"x/a.onnx": "a.onnx", "y/b.onnx": "b.onnx"}
