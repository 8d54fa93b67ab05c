"""The arrows between the packages, held in place: `amc` knows nothing of its users, and help costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"amc", "latency", "envs", "search"}
MAY_IMPORT = {"amc": set(), "latency": {"amc"}, "envs": {"amc"}, "search": {"amc", "latency", "envs"}}
NEVER_IN_AMC = {"onnxruntime", "stable_baselines3", "gymnasium", "optuna"}


def imports(path: Path) -> Iterator[str]:
    """The top-level packages that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_import_only_what_the_layout_allows(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        found = set(imports(path))
        forbidden = (found & PACKAGES) - MAY_IMPORT[package] - {package}
        if package == "amc":
            forbidden |= found & NEVER_IN_AMC
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_no_module_bears_the_name_of_a_public_function(package):
    code = f"import {package}; print(*getattr({package}, '__all__', ()))"
    public = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = {path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(public.stdout.split())


@pytest.mark.parametrize("package", ["amc", "latency", "search"])
def test_importing_a_package_imports_no_torch(package):
    code = f"import sys, {package}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
