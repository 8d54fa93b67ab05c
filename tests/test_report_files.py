"""A report of files that are broken, missing or a stranger's: what can be read is shown, and nothing becomes code."""

from __future__ import annotations

import json

import pytest

from amc.errors import RunError
from search.cli import main
from search.finished import read_run, read_trials
from search.report import write_report
from tests.finished_run import Page, change

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>{{{ 7*7 }}\ud800\n& "\'$\\frac{}$'
FILES = ("study.db", "policy.json", "settings.json", "sensitivity.json")


def test_texts_of_a_stranger_stay_texts(run):
    change(run, "result.json", lambda r: r["settings"].update(model=HOSTILE, exclude=[HOSTILE], unknown=HOSTILE))
    change(run, "result.json", lambda r: r["search"].update(strategy=HOSTILE))
    change(run, "settings.json", lambda d: d["resolved"].update(frozen=[{"name": HOSTILE, "reason": HOSTILE}]))
    change(run, "settings.json", lambda d: d.update(versions={HOSTILE: HOSTILE}, machine={"cpu": HOSTILE}))
    renamed = "layer00" + HOSTILE.replace("\ud800", "")
    change(run, "policy.json", lambda d: d["groups"][0].update(name=renamed))
    for model in ("best", "uniform"):
        change(run, "result.json", lambda r, m=model: r[m]["widths"].update({renamed: 7}))
    write_report(run)
    page = Page(run / "report.html")
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "foreignobject"}
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert "alert(1)" in page.text
    assert "{{{ 7*7 }}" in page.text
    assert "default-src 'none'" in (run / "report.html").read_text()


def test_the_page_needs_no_network_and_no_script(finished):
    text = (finished / "report.html").read_text()
    page = Page(finished / "report.html")
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    fetched = [
        v for _, attributes in page.tags for name, v in attributes.items() if name in ("src", "href", "xlink:href")
    ]
    assert all(value.startswith("#") for value in fetched)
    assert "url(http" not in text
    assert "@import" not in text


def test_a_report_changes_nothing_else_in_the_directory(run):
    def files():
        return {path.name: path.read_bytes() for path in run.iterdir() if path.name != "report.html"}

    before = files()
    write_report(run)
    assert files() == before


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"no such thing", b'{"settings": [1]}', bytes(range(256)) * 64])
def test_a_broken_file_is_named(run, name, content):
    (run / name).write_bytes(content)
    (note,) = read_run(run).notes
    assert str(run / name) in note


@pytest.mark.parametrize("name", FILES)
def test_without_a_broken_file_the_rest_is_shown(run, name):
    (run / name).write_text("[]")
    write_report(run)
    page = Page(run / "report.html")
    assert f"{run / name} " in page.text
    assert (None, "best.test_accuracy", "0.95", "95.00 %") in page.numbers
    assert ("best-by-trial" in page.figures()) == (name != "study.db")
    assert ("keep-ratios" in page.figures()) == (name != "policy.json")


def test_a_damaged_page_of_the_study_is_an_error_with_a_message(run):
    content = bytearray((run / "study.db").read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    (run / "study.db").write_bytes(content)
    with pytest.raises(RunError, match=r"study\.db can't be read as a study: "):
        read_trials(run / "study.db")


@pytest.mark.parametrize("name", ["study.db", "policy.json", "settings.json"])
def test_a_missing_file_is_named(run, name):
    (run / name).unlink()
    assert read_run(run).notes == (f"{run / name} is missing or not a file",)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.pop("dense"), "`dense`: Field required"),
        (lambda r: r["best"].update(accuracy="high"), "`best.accuracy"),
        (lambda r: r["budget"][0].update(limit=0), "`budget.0.limit"),
        (lambda r: r.update(schema_version=2), "`schema_version`"),
    ],
)
def test_a_result_that_is_not_ours_is_refused(run, edit, message):
    change(run, "result.json", edit)
    with pytest.raises(RunError, match=message):
        write_report(run)


def test_the_verb_refuses_what_is_no_finished_run(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "is no run directory" in capsys.readouterr().err
    (tmp_path / "settings.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert f"`amc search --resume --out {tmp_path}` goes on with it" in capsys.readouterr().err


def test_the_verb_writes_the_page_again(run, capsys):
    (run / "report.html").unlink()
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(run / "report.html"), "left_out": []}
    assert (run / "report.html").is_file()
