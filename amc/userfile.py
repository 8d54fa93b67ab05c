"""Code that the user names on the command line: `FILE.py:NAME` or `PACKAGE.MODULE:NAME`.

A file is loaded under a private module name, and its folder is appended to the search path, never put first: a user's
`search/` or `queue.py` must not take the place of ours or of Python's.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from amc.errors import AmcError
from amc.registry import suggest
from amc.seeding import seeded

PRIVATE = "_amc_user_"
"""How the names begin under which files are loaded as modules."""
_FOLDERS: list[str] = []
"""Folders of users' files that were put on the search path, the latest first."""


def load_attribute(spec: str, error: type[AmcError]) -> Any:
    """The object that `FILE.py:NAME` or `PACKAGE.MODULE:NAME` names.

    Raises:
        error: the file, module or name is missing, or the code raises while it is loaded.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise error(f"{spec!r} names nothing; write FILE.py:NAME or PACKAGE.MODULE:NAME")
    try:
        module = _load_file(Path(source)) if source.endswith(".py") else _imported(source)
    except FileNotFoundError as missing:
        if Path(source).exists():
            raise error(f"{source} raised while it was loaded: FileNotFoundError: {missing}") from missing
        raise error(f"{spec!r}: there is no file {source}") from None
    except (Exception, SystemExit) as problem:
        if isinstance(problem, ModuleNotFoundError) and problem.name == source.split(".")[0]:
            raise error(f"{spec!r}: there is no module {source}; a file is written as FILE.py:{name}") from None
        raise error(f"{source} raised while it was loaded: {describe(problem)}") from problem
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [known for known in vars(module) if not known.startswith("_")]
            raise error(f"{source} has no {name!r}; {suggest(name, public)}")
        found = getattr(found, part)
    return found


def call_factory(spec: str, error: type[AmcError], *seed: int | str) -> Any:
    """What the factory named by `spec` returns, called without arguments under the seed.

    Raises:
        error: it can't be loaded, can't be called without arguments, or raises.
    """
    with seeded(*seed):
        factory = load_attribute(spec, error)
    if not callable(factory):
        raise error(f"{spec} is a {type(factory).__name__}, not a function; name a function without arguments")
    try:
        with seeded(*seed):  # again, since loading may have drawn numbers, but only the first time
            return factory()
    except AmcError:
        raise
    except (Exception, SystemExit) as problem:
        raise error(f"the factory {spec} raised {describe(problem)}") from problem


def describe(problem: BaseException) -> str:
    """`ValueError: the first line of its message`."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0][:500]}" if lines else type(problem).__name__


def _imported(name: str) -> ModuleType:
    """A module, from the current folder too: an installed command does not have it on its search path."""
    _look_in(os.getcwd())
    return importlib.import_module(name)


def _look_in(folder: str) -> None:
    """Modules are looked for there, too: after everywhere else, but before the folders of files that came earlier.

    What was imported from these under a name that this folder has as well is forgotten, so that two files with a
    `utils.py` each get their own.
    """
    if folder in sys.path and folder not in _FOLDERS:
        return
    earlier = [other for other in _FOLDERS if other != folder]
    tops = {name for name, module in list(sys.modules.items()) if "." not in name and _home(module) in earlier}
    taken = {name for name in tops if Path(folder, name).is_dir() or Path(folder, f"{name}.py").exists()}
    for name in [name for name in sys.modules if name.partition(".")[0] in taken]:
        del sys.modules[name]
    sys.path[:] = [other for other in sys.path if other not in _FOLDERS] + [folder, *earlier]
    _FOLDERS[:] = [folder, *earlier]
    importlib.invalidate_caches()


def _home(module: ModuleType) -> str | None:
    """The folder in which a top-level module or package was found."""
    places = [*getattr(module, "__path__", ())] or [getattr(module, "__file__", None)]
    return os.path.dirname(places[0]) if isinstance(places[0], str) else None


def _load_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    content = path.read_bytes()
    # The name says where the code is from and what it says: loaded twice it is one module, edited it is a new one.
    name = f"{PRIVATE}{hashlib.sha256(str(path).encode() + content).hexdigest()[:16]}"
    _look_in(str(path.parent))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not Python source")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
