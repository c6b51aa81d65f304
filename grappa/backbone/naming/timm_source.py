"""What timm's source files declare of its models, read without loading timm or torch.

Each file of ``timm.models`` declares the weights that it knows (``default_cfgs``) and, in a function for each name, the
sizes of the architecture. To import timm takes seconds, because it loads torch; the declarations need nothing of it.
So only their statements are cut out of a file and imported, with timm's own registry, which is plain Python. A file in
which this fails, as one of another version of timm may be, has names only.
"""

from __future__ import annotations
import __future__

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.abc import InspectLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path
from types import CodeType, MappingProxyType, ModuleType
from typing import Any

_STATEMENT = re.compile(r"^(?=[A-Za-z_@])", re.MULTILINE)  # where a statement of a module begins
_DEFINED = re.compile(r"def (\w+)\(|(\w+)(?:: [^=\n]+)? = ")
_MODEL = re.compile(r"^@register_model\ndef (\w+)\(", re.MULTILINE)
_FORMER = re.compile(r"^register_model_deprecations\(__name__, (\{.*?^\})\)", re.MULTILINE | re.DOTALL)
_DECLARATIONS = "default_cfgs"
_PACKAGE = "_timm_declarations"
_HEADER = f"""\
from __future__ import annotations
import copy
from functools import partial
from {_PACKAGE}._registry import generate_default_cfgs
from {_PACKAGE}.constants import *
"""


@dataclass(frozen=True)
class Declared:
    """What timm's source says of a name; a name is an architecture, or one with the tag of weights behind a dot.

    name: with the tag of the weights that are meant. family: the file of timm that has the architecture, such as
    ``vision_transformer``. weights: what is declared of them, a ``PretrainedCfg`` of timm; None where nothing is.
    """

    name: str
    family: str
    weights: Any = None

    @property
    def has_weights(self) -> bool:
        """Tell whether there are pretrained weights of this name."""
        return self.weights is not None and bool(self.weights.has_weights)

    @property
    def hub_id(self) -> str:
        """The repository of the weights on the hub, such as ``timm/NAME``; "" where they are not there."""
        hub = self.weights.hf_hub_id if self.weights is not None else None
        return f"{hub}{self.name}" if hub == "timm/" else hub or ""


@dataclass(frozen=True)
class SourceFile:
    """A file of timm that defines models."""

    family: str
    text: str
    models: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", tuple(_MODEL.findall(self.text)))

    @cached_property
    def former(self) -> dict[str, str | None]:
        """The names that models had once, each with the present one; None: the model is gone."""
        return {old: new for text in _FORMER.findall(self.text) for old, new in ast.literal_eval(text).items()}

    @cached_property
    def weights(self) -> Mapping[str, Any]:
        """What is declared of each architecture's weights, a ``DefaultCfg`` of timm; empty where it cannot be read."""
        try:
            return MappingProxyType(_imported(self.family, self._statements))
        except Exception:  # noqa: BLE001 - of another version of timm: any statement of it may need what is not there
            return MappingProxyType({})

    @cached_property
    def _statements(self) -> list[str]:
        cuts = [match.start() for match in _STATEMENT.finditer(self.text)]
        return [self.text[start:end] for start, end in zip(cuts, [*cuts[1:], None], strict=True)]

    def arguments(self, model: str) -> dict[str, Any]:
        """Return the arguments that the function of a model gives plainly, such as ``{"patch_size": 16}``."""
        text = next((each for each in self._statements if each.startswith(f"def {model}(")), "")
        calls = [each for each in ast.walk(ast.parse(text)) if isinstance(each, ast.Call)]
        return dict(pair for call in calls for word in call.keywords for pair in _plain(word))


def _plain(word: ast.keyword) -> Iterator[tuple[str, Any]]:
    try:
        if word.arg is not None:
            yield word.arg, ast.literal_eval(word.value)
    except ValueError:
        return


# ---------------------------------------------------------------- the declarations as a module of their own


class _Cut(InspectLoader):
    """Lets Python import a text as a module."""

    def __init__(self, text: str) -> None:
        self._text = text

    def get_source(self, fullname: str) -> str:
        return self._text


def _imported(family: str, statements: list[str]) -> dict[str, Any]:
    """Import the declarations among the statements of a file, and the definitions that they use, and nothing else."""
    _prepare()
    spec = spec_from_loader(f"{_PACKAGE}.{family}", loader := _Cut(_HEADER + "".join(_needed(statements))))
    assert spec
    module = module_from_spec(spec)
    loader.exec_module(module)
    declared: dict[str, Any] = vars(module)[_DECLARATIONS]
    return declared


def _needed(statements: list[str]) -> Iterator[str]:
    """Yield the statements that declare weights, each behind the definitions that it uses."""
    found = [(_DEFINED.match(text), text) for text in statements if _DECLARATIONS not in text]
    definitions = {match[1] or match[2]: text for match, text in found if match}

    def with_definitions(text: str) -> Iterator[str]:
        for name in _names(compile(text, "timm", "exec", flags=__future__.annotations.compiler_flag)):
            if name in definitions:
                yield from with_definitions(definitions.pop(name))
        yield text

    for text in statements:
        if _DECLARATIONS in text and not text.startswith(("def ", "class ", "import ", "from ", "@")):
            yield from with_definitions(text)


def _names(code: CodeType) -> list[str]:
    inner = [name for each in code.co_consts if isinstance(each, CodeType) for name in _names(each)]
    return [*code.co_names, *inner]


def _prepare() -> None:
    """Make timm's registry and constants importable under a name of ours: by their own they would load all of timm."""
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(_timm_folder() / each) for each in ("models", "data")]
    sys.modules.setdefault(_PACKAGE, package)


def _timm_folder() -> Path:
    spec = find_spec("timm")
    return Path(spec.origin).parent if spec and spec.origin else Path("/nonexistent")


@cache
def source_files() -> tuple[SourceFile, ...]:
    """Return timm's files with models, in the order of their names; none where timm is not installed."""
    paths = sorted(_timm_folder().glob("models/[!_]*.py"))
    files = (SourceFile(path.stem, path.read_text(encoding="utf-8")) for path in paths)
    return tuple(each for each in files if each.models)


def find_file(model: str) -> SourceFile | None:
    """Return the file that has an architecture; None where timm has none of this name."""
    return next((each for each in source_files() if model in each.models), None)


def former_names() -> dict[str, str | None]:
    """Return all names that models of timm had once, each with the present one; None: the model is gone."""
    return {old: new for each in source_files() for old, new in each.former.items()}


def declared(name: str) -> Declared | None:
    """Return what timm's source says of ``name``, of an architecture alone what it says of its first weights.

    None where timm has no such architecture, or declares no weights with such a tag.
    """
    model, _, tag = name.partition(".")
    file = find_file(model)
    if file is None:
        return None
    default = file.weights.get(model)
    if default is None:
        return None if tag else Declared(name, file.family)
    tag = tag or default.tags[0]
    whole = f"{model}.{tag}" if tag else model
    return Declared(whole, file.family, default.cfgs[tag]) if tag in default.cfgs else None


def pretrained_names() -> list[str]:
    """Return the names of all pretrained weights, each with its tag, as ``timm.list_pretrained()`` does."""
    found = [
        f"{model}.{tag}" if tag else model
        for file in source_files()
        for model in file.models
        if (default := file.weights.get(model))
        for tag, weights in default.cfgs.items()
        if weights.has_weights
    ]
    return sorted(found, key=_natural)


def _natural(name: str) -> list[tuple[bool, int | str]]:
    """Order names as readers do: vit_base_patch8 before vit_base_patch16."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name)]
