"""The table of tests/library/backbone/README.md, measured: `python -m tests.helpers.family_table` (minutes).

`python -m tests.helpers.family_table walk` builds all architectures that have pretrained weights instead, by shapes
alone, and prints the share of names that is accepted and what is refused; half an hour.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from grappa.backbone.frozen import build_backbone
from grappa.backbone.naming.catalog import list_backbones
from grappa.backbone.spec import BackboneSpec
from grappa.backbone.weights import BackboneError, import_timm
from tests.helpers import families
from tests.helpers.families import FAMILIES, TOLERANCE, Family
from tests.helpers.tiny import HALF

TEXT = Path(__file__).parents[1] / "library" / "backbone" / "README.md"
TITLE = "| family of timm | names | example | frozen equals timm | units | in-context | trained and exported |"


def names_by_module() -> Counter[str]:
    """Return how many pretrained names each module of timm's models has."""
    timm = import_timm()
    names = (name.partition(".")[0] for name in timm.list_models(pretrained=True))
    return Counter(timm.models.model_entrypoint(name).__module__.removeprefix("timm.models.") for name in names)


def row(family: Family, number: int) -> str:
    """Return the line of a family; an error where a promise is broken."""
    backbone, images = families.noisy(family), families.images_of(family.size)
    with torch.no_grad():
        apart = families.difference(backbone(images), families.timms_own(backbone, images))
    assert apart < TOLERANCE
    assert not families.without_gradients(backbone, images)
    with TemporaryDirectory() as folder:
        made, opened = families.reopened(backbone, Path(folder))
        assert torch.equal(made(images), opened(images))
    places = len(families.adaptors_for(backbone).in_context)
    sizes = f"{family.size}, {family.further} px" if family.further else f"{family.size} px"
    return (
        f"| {family.module} | {number} | `{family.name}` at {sizes} | {apart:.0e} | {len(backbone.units)} | "
        f"{f'{places} places' if places else 'no'} | same bits |"
    )


def write_table() -> None:
    """Write the table into the text."""
    numbers = names_by_module()
    with families.any_option():
        rows = [row(family, numbers[family.module]) for family in FAMILIES]
    table = "\n".join([TITLE, "|---|---|---|---|---|---|---|", *rows])
    text = TEXT.read_text(encoding="utf-8")
    TEXT.write_text(re.sub(r"\| family of timm .*\n(\|.*\n)*", lambda found: f"{table}\n", text), encoding="utf-8")


def walk() -> Iterator[tuple[str, int, str]]:
    """Yield each architecture with pretrained weights, how many names it has, and why it is refused, or ""."""
    timm = import_timm()
    numbers = Counter(name.partition(".")[0] for name in timm.list_models(pretrained=True))
    for name, number in sorted(numbers.items()):
        size = timm.get_pretrained_cfg(name).input_size[-1]
        try:
            with torch.device("meta"):
                backbone = build_backbone(BackboneSpec(name, size, 1.0, HALF, HALF))
                assert backbone.units and backbone.embedding_dim
        except BackboneError as error:
            yield name, number, str(error)
        else:
            yield name, number, ""


def accepted_share() -> float:
    """Return the share of timm's pretrained names that the catalog has no reason to refuse; the walk confirms it."""
    entries = list_backbones()
    return sum(not each.refused for each in entries) / len(entries)


def print_walk() -> None:
    """Print what is refused, and the share of names that is accepted."""
    found = list(walk())
    for name, _, reason in found:
        if reason:
            print(f"{name}: {reason}")
    accepted, every = (sum(number for _, number, why in found if not (lost and why)) for lost in (True, False))
    print(f"{accepted} of {every} names ({accepted / every:.1%}) are accepted")


if __name__ == "__main__":
    print_walk() if sys.argv[1:] == ["walk"] else write_table()
