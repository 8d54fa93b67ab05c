"""What README and docs show is true: commands run, snippets run, links lead somewhere.

Each page is walked as a reader would, in a folder of its own that holds `net.py`, `net.safetensors` and `photos`:
commands and Python snippets in the order of the page, one using what another left. Where a step would take long, small
settings take its place, and that is all that is replaced:

- searches score 2 trials with 1 step each and are not fine-tuned (`QUICK`);
- latency is measured for a hundredth of a second a model, and a latency table of 24 policies is enough;
- the dense ONNX file of weights that were exported before is written again, not exported again;
- an agent's `learn` stops after 12 steps.

Not run, but read by the real parser: what needs a machine, a database or data that isn't here (`NEEDS_MORE`). Of `pip
install` the extras are checked; other programs (`pytest`, `optuna-dashboard`) are not run; the examples are, in
`test_examples.py`. Inline commands with real values are read by the real parser too.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from amc.budget import parse_budget
from amc.export import export_onnx
from amc.weights import save_weights, structure_sha256, weights_sha256
from search.cli import VERBS, given_settings, parser_of
from search.settings import settings_from

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
QUICK = ["--trials", "2", "--score-steps", "1", "--finetune-epochs", "0", "--time-limit", "1h"]
NEEDS_MORE = ("ssh://", "postgresql://", "cifar", "torchvision:", "timm:", "hf:", "resnet20.pt")
NOT_OURS = (
    "pip ",
    "pytest",
    "git ",
    "cd ",
    "pre-commit ",
    "optuna-dashboard ",
    "tensorboard ",
    "mkdocs ",
    "ruff ",
    "mypy",
    "python -m ",
)


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """A page's blocks in order: (language, content). An indented one that begins with no command is output."""
    pattern = r"^```(\w*)[^\n]*\n(.*?)^```|((?:^ {4}\S[^\n]*\n)+)"
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        if match[3]:
            content = re.sub(r"^ {4}", "", match[3], flags=re.MULTILINE)
            yield ("sh" if content.startswith(("amc ", "python ", *NOT_OURS)) else "text"), content
        else:
            yield match[1], match[2]


def commands(block: str) -> list[str]:
    """The commands of a shell block; lines that end in a backslash go on, `&&` parts."""
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if part.strip() and not line.startswith("#")]


def words_of(command: str) -> list[str] | None:
    """The arguments of one of our commands, the verb first; None of another program's."""
    for start in ("amc ", "python search.py "):
        if command.startswith(start):
            words = shlex.split(command.removeprefix(start))
            return words if words[0] in VERBS or not words[0].startswith("-") else ["search", *words]
    return None


def inline_commands(text: str) -> Iterator[str]:
    """`amc …` within a sentence, where it has no placeholder."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for found in re.findall(r"`((?:amc|python search\.py) [^`]+)`", prose):
        flat = " ".join(found.split())
        if not re.search(r"\b[A-Z]{2,}|…|--help", flat):
            yield flat


ALL = [(page, c) for page in PAGES for lang, block in blocks(page.read_text()) if lang == "sh" for c in commands(block)]


def test_pages_have_commands_and_every_verb_is_shown():
    shown = {words[0] for _, command in ALL if (words := words_of(command))}
    assert shown >= set(VERBS)


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{page.stem}: {command[:60]}" for page, command in ALL])
def test_commands_are_read_by_the_real_parser(page, command):
    words = words_of(command)
    if words is None:
        assert command.startswith((*NOT_OURS, "python examples/", "python benchmarks/")), f"what is {command!r}?"
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for named in re.findall(r"\[([\w,]+)\]", command if command.startswith("pip") else ""):
            assert set(named.split(",")) <= set(extras)
        for script in re.findall(r"(?:examples|benchmarks)/\w+\.py", command):
            assert (ROOT / script).is_file()
        return
    given = given_settings(parser_of(words[0]).parse_args(words[1:]))
    settings = settings_from(given)
    parse_budget(settings.budget)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_inline_commands_and_options_exist(page):
    text = page.read_text()
    for command in inline_commands(text):
        words = words_of(command)
        if len(words) > 1:
            parser_of(words[0]).parse_args(words[1:])
        assert words[0] in VERBS
    known = {"--help", "--version", "--strict", "--check", "--hypothesis-profile"}
    known |= {flag for verb in VERBS for action in parser_of(verb)._actions for flag in action.option_strings}
    prose = re.sub(r"```.*?```|^ {4}.*$", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = [
        span for span in re.findall(r"`([^`\n]+)`", prose) if not re.match(r"python |pip |(?!search)\w+\.py ", span)
    ]
    for span in inline:
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span):
            assert flag in known, f"{page.name} speaks of {flag} in `{span}`"


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder as the pages presume it, and small settings in place of long ones."""
    from stable_baselines3 import DDPG

    from latency.sampling import build_table
    from search import compose, job

    own = (ROOT / "docs" / "own-model.md").read_text()
    for title in ("net.py", "data.py"):
        source = re.search(rf'title="{title}"\n(.*?)^```', own, re.DOTALL | re.MULTILINE)[1]
        (tmp_path / title).write_text(source)
    namespace: dict = {}
    exec((tmp_path / "net.py").read_text(), namespace)
    torch.manual_seed(0)
    save_weights(namespace["build"](), tmp_path / "net.safetensors")
    make_photos(tmp_path / "photos")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)

    learn = DDPG.learn
    monkeypatch.setattr(
        "search.bench.build_table", lambda *a, **o: build_table(*a, **{**o, "samples": 24, "held_out": 4})
    )
    monkeypatch.setattr(DDPG, "learn", lambda self, steps, **options: learn(self, min(steps, 12), **options))
    monkeypatch.setattr("search.start.export_onnx", export_once)
    for module, name in ((job, "run"), (compose, "build")):
        original, extra = getattr(module, name), {"score_steps": 1}
        extra |= {"finetune_epochs": 0} if name == "run" else {}
        monkeypatch.setattr(module, name, quick(original, extra, trials=name == "run"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


EXPORTED: dict[str, bytes] = {}


def export_once(model, inputs, path: Path) -> None:
    key = weights_sha256(model) + structure_sha256(model)
    if key not in EXPORTED:
        export_onnx(model, inputs, path)
        EXPORTED[key] = path.read_bytes()
    path.write_bytes(EXPORTED[key])


def quick(function, extra: dict, *, trials: bool):
    def shortened(**keywords):
        return function(**{**keywords, **extra, **({"trials": 2} if trials else {})})

    return shortened


def make_photos(folder: Path) -> None:
    from PIL import Image

    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        for index, name in enumerate(("ash", "birch", "cedar")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                colour = tuple(60 * (index == axis) + 20 * i for axis in range(3))
                Image.new("RGB", (32, 32), colour).save(folder / split / name / f"{i}.png")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, reader, capsys):
    from search.cli import main

    namespace = names_of(page, reader)
    for language, block in blocks(page.read_text()):
        if language == "python":
            exec(compile(block, page.name, "exec"), namespace)
        for command in commands(block) if language == "sh" else ():
            words = words_of(command)
            if words is None or any(mark in command for mark in NEEDS_MORE):
                continue
            resumed = "--resume" in words
            more = (["--quiet"] if resumed else [*QUICK, "--quiet"]) if words[0] == "search" else []
            if resumed and "--trials" in words:
                more += ["--trials", "3"]
            status = main([*words, *more])
            assert status == 0, f"{command}: {capsys.readouterr().err}"


def names_of(page: Path, folder: Path) -> dict:
    """Names that the README's snippets leave to the reader; pages of the docs make their own."""
    module = types.ModuleType("snippets")
    if page.name == "README.md":
        space: dict = {}
        exec((folder / "net.py").read_text() + (folder / "data.py").read_text(), space)
        splits = space["splits"]()
        module.__dict__.update(net=space["build"](), **splits)
    return module.__dict__


def test_the_site_builds_with_strict_links(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "", "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"},
    )
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "site" / "index.html").read_text()
    assert "fonts.googleapis" not in index
    reference = (tmp_path / "site" / "reference" / "amc" / "index.html").read_text()
    assert "amc.problem.Problem.evaluate" in reference


def test_the_picture_is_valid_and_says_what_it_shows():
    from xml.etree import ElementTree

    svg = ElementTree.parse(ROOT / "docs" / "images" / "flow.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert len(svg.findtext(f"{space}desc", "")) > 100
    assert svg.get("role") == "img"


def test_the_table_of_differences_and_its_page_name_each_other():
    assert "## Differences from AMC" in (ROOT / "README.md").read_text()
    assert "README" in (ROOT / "docs" / "differences.md").read_text()
