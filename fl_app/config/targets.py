"""Classes by their dotted names, and objects of them: the mechanism behind `_target_`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from clients.places import FolderOrHub, absolute
from fl_app.config.faults import ConfigError, Fault, nearest
from fl_app.config.nodes import TargetNode
from fl_app.config.parameters import Parameter, convert, marked, parameters_of, plain


class TargetError(ValueError):
    """A dotted name that no class stands behind; the message says why, as a clause."""


def locate(target: str) -> type:
    """The class that a dotted name stands for; imports its module.

    Raises:
        TargetError: there is no such module or class, or the module cannot be imported.
    """
    module_name, _, name = target.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in target.split(".")):
        raise TargetError("must be a class by its dotted name, as in package.module.Class")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise TargetError(
                f"cannot be imported: there is no module {error.name}; "
                "it must lie in the working directory or on PYTHONPATH"
            ) from error
        raise TargetError(f"cannot be imported: {module_name} needs {error.name}") from error
    except Exception as error:  # whatever a module of the user's own raises is the reason to show
        raise TargetError(f"cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        guess = nearest(name, [item for item in vars(module) if not item.startswith("_")])
        hint = f"; did you mean {module_name}.{guess}?" if guess else ""
        raise TargetError(f"{module_name} has no {name}{hint}")
    if not isinstance(found, type):
        raise TargetError(f"must be a class; this is a {type(found).__name__}")
    return found


def build(node: TargetNode, *, directory: Path | None = None, **offered: Any) -> Any:
    """An object of the node's class.

    Args:
        node: from a composed configuration.
        directory: where relative paths among the settings count from; the working directory by default.
        offered: what the application has to give. Each is handed over where the constructor has a parameter of that
            name, to nodes within the node too, and left out elsewhere: a model of the user's own need not know them.

    Raises:
        ConfigError: the constructor refuses the settings as they are together.
    """
    constructor = locate(node.target)
    parameters, others = parameters_of(constructor)
    arguments = {
        name: _revived(
            parameters.get(name, Parameter(name)), value, directory or Path.cwd(), offered
        )
        for name, value in node.arguments.items()
    }
    arguments |= {name: value for name, value in offered.items() if others or name in parameters}
    try:
        return constructor(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([Fault(node.path, f"{constructor.__qualname__}: {error}")]) from error


def _revived(parameter: Parameter, value: Any, directory: Path, offered: dict[str, Any]) -> Any:
    if isinstance(value, TargetNode):
        return build(value, directory=directory, **offered)
    if isinstance(value, list) and any(isinstance(item, TargetNode) for item in value):
        return [_revived(Parameter(parameter.name), item, directory, offered) for item in value]
    # A default may be what no user could write (an infinity, say): it is given back as it is.
    revived = (
        parameter.default
        if plain(parameter.default) == value
        else convert(parameter.annotation, value)
    )
    if isinstance(revived, Path):
        return directory / revived.expanduser()
    if isinstance(revived, str) and marked(parameter.annotation, FolderOrHub):
        return absolute(revived, directory)
    return revived
