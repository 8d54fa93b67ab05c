"""JSON documents with a schema: read strictly, or refused in one message that says which file and what is wrong."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from amc.errors import AmcError
from amc.files import read_json

Document = TypeVar("Document", bound=BaseModel)
SHOWN = 3
"""Problems that a message names."""


def read_document(path: str | os.PathLike[str], schema: type[Document], what: str, error: type[AmcError]) -> Document:
    """The document in a file. A schema with a `format` has a `version`, and reads no other.

    what: the kind of file, in messages.

    Raises:
        error: it can't be read, or holds anything that the schema doesn't define.
    """
    path = os.fspath(path)
    try:
        content = read_json(path)
    except OSError as reason:
        raise error(f"the {what} {path} can't be read: {reason.strerror or reason}") from None
    except ValueError as reason:
        raise error(f"the {what} {path} is not whole, valid JSON: {reason}") from None
    marks = {name: schema.model_fields[name].default for name in ("format", "version") if name in schema.model_fields}
    if "format" in marks:
        given = content if isinstance(content, dict) else {}
        if given.get("format") != marks["format"]:
            raise error(f'{path} is not a {what}: it lacks `"format": "{marks["format"]}"`')
        version = given.get("version")
        if version != marks["version"] or isinstance(version, bool):
            raise error(f"{path} has version {version!r} of the format; this program reads version {marks['version']}")
    try:
        return schema.model_validate(content)
    except ValidationError as reason:
        raise error(f"the {what} {path} is invalid: {explained(reason)}") from None


def explained(error: ValidationError) -> str:
    """The first few problems, a clause each."""
    problems: list[Any] = error.errors(include_url=False, include_input=False)
    clauses = []
    for problem in problems[:SHOWN]:
        where = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            clauses.append(f"`{where}` is not known")
        else:
            clauses.append(f"`{where}`: {message}" if where else message)
    return "; ".join(clauses) + (" …" if len(problems) > SHOWN else "")
