"""The configuration as YAML: reading with errors of one sentence, presets and ``--set``, writing with comments."""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grappa.core.home import expanded
from grappa.core.printing import sentence, shown
from grappa.pipeline.config.schema import Config
from grappa.pipeline.config.section import Place, Section

HEADER = """\
# The resolved configuration of this run, every value with its meaning. Edit it, or change values by
# `grappa init RUN --set section.key=value`; `grappa status RUN` then says what became stale and why.
"""
PRESETS = Path(__file__).parent / "presets"
LINE_LENGTH = 120
MAX_BYTES = 2**20  # of a YAML file

Settings = dict[str, dict[str, Any]]
FORMER: Settings = {  # defaults that were others when runs were made
    "images": {"cache_size": 256, "cache": "raw"},
    "features": {"whitening_power": 0.0},
    "clusters": {"max_clusters": None, "two_level_above": None},
    "neighbors": {"engine": "exact"},
    "selection": {"sets": "all"},
    "student": {"whitening_power": 0.0},
    "views": {"num_judged": None},
    "evaluation": {"max_queries": None},
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one sentence for the user, on one printable line."""

    def __init__(self, text: str) -> None:
        super().__init__(sentence(text, limit=1200))


def load_config(path: Path) -> Config:
    """Return the configuration in the YAML file of a run; a field that it lacks has its default, or its former one."""
    return parse_settings(merged(FORMER, read_settings(path)), str(path))


def parse_settings(settings: Mapping[str, Any], where: str) -> Config:
    """Check nested settings; ``where`` says where they come from, for the error.

    Raises ConfigError that names the first wrong field, its value and the values that are expected.
    """
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{where}: {validation_sentence(error, _unknown, hint=_default_hint)}") from None
    _refuse_truth_values(settings, config, where)
    return config


def read_settings(path: Path) -> Settings:
    """Return the sections in a YAML file; an empty section has no fields."""
    return _sections(read_yaml(path), str(path))


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file: texts, numbers, truth values, lists, and mappings whose keys are texts.

    ConfigError when it is no such file, is larger than a megabyte, or has a key twice.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
        found = f"{status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "no regular file"
        raise ConfigError(f"{path}: found {found}, expected a YAML text file of at most {MAX_BYTES} bytes")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: found bytes that are not UTF-8, expected a YAML text file") from None
    return _parsed(text, f"{path}: not valid YAML", "correct it or restore the file")


def _parsed(text: str, where: str, advice: str) -> Any:
    """Return the value that a YAML text stands for; ConfigError with ``where`` and ``advice`` around the reason."""
    from grappa.pipeline.config.yaml_text import parsed_yaml

    try:
        return parsed_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{where} ({error}); {advice}") from None


def preset_path(name_or_file: str) -> Path:
    """Return the file that ``--config`` names: a preset of the package, or a file of the user."""
    return shipped_or_file(name_or_file, PRESETS, f"--config {name_or_file}", "preset")


def shipped_or_file(name_or_file: str, folder: Path, where: str, kind: str) -> Path:
    """Return the YAML file of this name in ``folder``, a folder of the package, or the user's file of this path.

    ConfigError, with the known names, when there is neither. ``where`` and ``kind`` are words for this error.
    """
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name_or_file in names:
        return folder / f"{name_or_file}.yaml"
    if Path(expanded(name_or_file)).is_file():
        return Path(expanded(name_or_file))
    raise ConfigError(f"{where}: no such file, and no {kind} of that name ({', '.join(names)})")


def merged(base: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Return ``base``, in which the fields of ``changes`` replace those of the same name."""
    sections = [*base, *(name for name in changes if name not in base)]
    return {name: {**base.get(name, {}), **changes.get(name, {})} for name in sections}


def parse_assignments(assignments: Iterable[str]) -> Settings:
    """Return the settings of ``section.key=value`` texts; a value is read as YAML, except for fields that hold text."""
    settings: Settings = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        section, dot, field = name.strip().partition(".")
        if not (equals and dot and section and field):
            asked = sentence(f"--set {assignment}", limit=100)
            raise ConfigError(f"{asked}: expected section.key=value, such as clusters.num_iterations=50")
        settings.setdefault(section, {})[field] = _assigned_value(section, field, text)
    return settings


def dump_config(config: Config) -> str:
    """Return all fields as YAML with their descriptions as comments; ``load_config`` returns an equal configuration."""
    return HEADER + "".join(_section_text(name, getattr(config, name)) for name in Config.model_fields)


def field_names() -> list[str]:
    """Return all names ``section.key``, in the order of the file."""
    return [f"{name}.{field}" for name, section in Config().__dict__.items() for field in type(section).model_fields]


def _sections(found: Any, where: str) -> Settings:
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: found {shown(found)}, expected sections such as `clusters:` with fields below")
    for name, fields in found.items():
        if not isinstance(fields, dict | None):
            raise ConfigError(f"{where}: found {shown(fields)} for `{name}`, expected a section with fields below")
    return {name: fields or {} for name, fields in found.items()}


def _assigned_value(section: str, field: str, text: str) -> Any:
    if _holds_text(section, field):
        return None if text in ("null", "~", "") else text
    asked = sentence(f"--set {section}.{field}={text}", limit=100)
    return _parsed(text, f"{asked}: the value is not valid YAML", "give another value")


def _holds_text(section: str, field: str) -> bool:
    """Tell whether a field takes any text; YAML could read a path as something else."""
    model = getattr(Config(), section, None)
    if not isinstance(model, Section) or field not in type(model).model_fields:
        return False
    return type(model).model_fields[field].annotation in (str, str | None, Place | None)


def _section_text(name: str, section: Section) -> str:
    doc = type(section).__dict__.get("__doc__")
    heading = f"# {doc.splitlines()[0]}\n" if doc and type(section).__name__ == name.capitalize() else ""
    fields = type(section).model_fields
    dumped = section.to_json()
    return f"\n{heading}{name}:\n" + "".join(
        _field_text(field, dumped[field], fields[field].description or "") for field in dumped
    )


def _field_text(name: str, value: Any, description: str) -> str:
    if isinstance(value, list) and value and all(isinstance(item, str) and "/" in item for item in value):
        items = "".join(f"    - {flow(item)}\n" for item in value)
        return f"  {name}:  # {description}\n{items}"
    line = f"  {name}: {flow(value)}"
    trailing = f"{line}  # {description}\n"
    return trailing if len(trailing) <= LINE_LENGTH else f"  # {description}\n{line}\n"


def flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    from grappa.pipeline.config.yaml_text import on_one_line

    return on_one_line(value)


def validation_sentence(
    error: ValidationError,
    unknown: Callable[[str], str],
    *,
    where: str = "",
    hint: Callable[[str], str] = lambda name: "",
) -> str:
    """Return a sentence with the first wrong key of a file, its value and the values that are expected.

    ``unknown`` returns the sentence for an unknown key, ``hint`` the text after the expected values; ``where`` is put
    before the key.
    """
    problems = error.errors(include_url=False)
    first = problems[0]
    name = where + ".".join(part for part in first["loc"][:2] if isinstance(part, str))
    if first["type"] == "extra_forbidden":
        return unknown(name)
    if first["type"] == "value_error":  # a contradiction between sections has no name of a key
        return ": ".join(part for part in (name, str(first["ctx"]["error"])) if part)
    same = [problem for problem in problems if problem["loc"][:2] == first["loc"][:2]]
    expected = " or ".join(dict.fromkeys(_expected(str(problem["msg"])) for problem in same))
    return f"{name}: found {shown(same[-1]['input'])}, expected {expected}{hint(name)}"


def _default_hint(name: str) -> str:
    return f" (such as the default, {_default(name)})"


def _unknown(name: str) -> str:
    section, _, field = name.partition(".")
    siblings = [known.partition(".")[2] for known in field_names() if known.startswith(f"{section}.")]
    near = _near(section, field, siblings)
    if near:
        return f"unknown key {name}: did you mean {near[0]}?"
    return f"unknown key {name}: expected one of {', '.join(siblings if field else list(Config.model_fields))}"


def _near(section: str, field: str, siblings: list[str]) -> list[str]:
    """Return known names like an unknown name: its field in another section, or a field of its section, which may be
    meant by its initials (``lr``)."""
    if not field:
        return difflib.get_close_matches(section, list(Config.model_fields))
    elsewhere = [known for known in field_names() if known.partition(".")[2] == field]
    short = [each for each in siblings if "".join(word[0] for word in each.split("_")) == field]
    return elsewhere or [f"{section}.{near}" for near in difflib.get_close_matches(field, siblings) or short]


def _expected(message: str) -> str:
    """Turn "Input should be a valid integer, unable to ..." into "a valid integer", and a tuple into a list of YAML."""
    text = message.removeprefix("Input should be ").split(", unable")[0].split(", got")[0]
    text = text.replace("a valid tuple", "a list in brackets")
    return text[:1].lower() + text[1:] if text[:2] != text[:2].upper() else text


def _default(name: str) -> str:
    section, _, field = name.partition(".")
    model = getattr(Config(), section)
    return flow(model.to_json()[field]) if field else f"{section}: {{...}}"


def _refuse_truth_values(settings: Mapping[str, Any], config: Config, where: str) -> None:
    """Refuse ``true`` where a number is expected: YAML's ``yes`` and ``on`` would silently become 1."""
    for section, fields in settings.items():
        for field, value in (fields or {}).items():
            taken = getattr(getattr(config, section), field)
            if isinstance(value, bool) and not isinstance(taken, bool):
                name = f"{section}.{field}"
                raise ConfigError(
                    f"{where}: {name}: found {value}, expected a number (the default is {_default(name)})"
                )
