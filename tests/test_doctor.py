"""`amc doctor` says what works and what does not; `amc completion` knows what the parsers know."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from amc.errors import UsageError
from search import completion
from search.cli import VERBS
from search.strategies import STRATEGIES
from search.verbs import doctor

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def found() -> dict:
    return doctor.examine()


def test_the_cpu_works_in_torch_and_in_onnxruntime(found):
    assert found["torch"]["cpu"] == "works"
    assert found["onnxruntime"]["CPUExecutionProvider"] == "works"
    assert list(found["cache"].values()) == ["works"]
    assert float(found["training"]["--precision bfloat16"].split()[0]) > 0
    assert not [problem for problem in found["problems"] if "not installed" not in problem]


def test_versions_are_those_that_are_installed(found):
    for name, package in (found["packages"] | found["optional"]).items():
        if package["version"] is not None:
            assert package["version"] == importlib.metadata.version(name)


def test_it_is_one_json_value_and_a_page_of_100_columns(found, capsys):
    arguments = argparse.Namespace(quiet=False, json=False)
    assert json.loads(json.dumps(doctor.execute(arguments), allow_nan=False)).keys() == found.keys()
    printed = capsys.readouterr().out
    assert "CPUExecutionProvider" in printed
    assert max(map(len, printed.splitlines()[1:])) <= 100
    arguments.json = True
    doctor.execute(arguments)
    assert capsys.readouterr().out == ""


def test_a_missing_package_and_a_broken_torch_are_problems_and_no_exceptions(monkeypatch):
    monkeypatch.setattr(doctor, "requirements", lambda: iter([("no-such-package", ">=2")]))
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises
    found = doctor.examine()
    assert "error" in found["torch"]
    said = "\n".join(found["problems"])
    assert "pip install 'no-such-package>=2'" in said
    assert "torch does not work" in said


def test_a_provider_that_raises_is_named_with_its_reason(monkeypatch):
    import latency.session

    def broken(*_, **__):
        raise RuntimeError("no such device\nmore")

    monkeypatch.setattr(latency.session, "open_session", broken)
    assert doctor.providers()["CPUExecutionProvider"] == "RuntimeError: no such device"


def test_requirements_are_the_cores_and_not_the_extras(monkeypatch):
    lines = ["torch<2.14,>=2.9", "optuna<6,>=5", 'mypy>=1.15; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert dict(doctor.requirements()) == {"torch": "<2.14,>=2.9", "optuna": "<6,>=5"}


def test_every_extra_that_is_recommended_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for _, install in doctor.OPTIONAL.values():
        for named in re.findall(r"amc-pruning-search\[(\w+)\]", install):
            assert named in extras


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_scripts_name_every_verb_option_and_strategy(shell):
    text = completion.script(shell)
    for word in (*VERBS, *STRATEGIES, "budget", "finetune-epochs"):
        assert word in text


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "completed"),
    [(["la"], "latency"), (["search", "--strategy", "dd"], "ddpg"), (["apply", "--forc"], "--force")],
)
def test_bash_completes(words, completed, tmp_path):
    script = tmp_path / "completion"
    script.write_text(completion.script("bash"))
    line = " ".join(["amc", *words])
    code = (
        f"source '{script}'; COMP_WORDS=({line}); COMP_CWORD={len(words)}; "
        f"COMP_LINE='{line}'; COMP_POINT={len(line)}; _shtab_amc; echo \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [completed]


def test_without_shtab_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(UsageError, match=r"pip install 'amc-pruning-search\[completion\]'"):
        completion.script("bash")
