"""What timm's source files say of a model's name: unknown and unsuitable backbones are found without loading torch."""

from __future__ import annotations

import difflib
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_REGISTERED = re.compile(r"@register_model\s+def (\w+)\(")


def name_problem(name: str) -> str:
    """Return a sentence where ``name`` can be no backbone; "" where nothing speaks against it.

    Refused are names that timm does not register, and tags of weights that no model of the family has. What else makes
    a model unsuitable is found when it is built.
    """
    base, _, tag = name.partition(".")
    files = _files_of_models()
    if not files:
        return ""
    if base not in files and not any(f"'{base}'" in text for text in files.values()):
        close = difflib.get_close_matches(base, [each for each in files if "vit" in each], n=1)
        hint = f"did you mean {close[0]}?" if close else "see timm.list_models()"
        return f"timm has no model called {name!r}; {hint}"
    text = files.get(base, "")
    if tag and base in files and not re.search(rf"\.{re.escape(tag)}['\"]", text):
        tags = sorted(set(re.findall(rf"['\"]{re.escape(base)}\.([\w.]+)['\"]", text)))
        known = f"there are {', '.join(tags)}" if tags else "leave out what follows the dot"
        return f"timm has no weights called {name!r}; {known}"
    return ""


@cache
def _files_of_models() -> dict[str, str]:
    """Return the text of the source file that registers each model; empty where timm is not installed."""
    spec = find_spec("timm")
    if spec is None or not spec.origin:
        return {}
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(spec.origin).parent.glob("models/*.py"))]
    return {name: text for text in texts for name in _REGISTERED.findall(text)}
