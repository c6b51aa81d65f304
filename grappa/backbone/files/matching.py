"""Finding a model's weights among all tensors of a file: under which prefix, in which layout, and what is left over.

An attempt is a prefix and a layout. Its tensors are renamed, given to timm's own conversion, and compared with the
names and shapes that the model wants. The best attempt decides; nothing is loaded here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from grappa.backbone.files.layouts import RENAMED, Layout, has_lost_keys, is_unneeded, joined, unchunked, unwrapped
from grappa.backbone.library import Conversion, State, architecture_of, conversion_of, import_timm

MOST_PREFIXES = 8
# Which one is taken where a file holds the model several times; a word that is not listed ranks as the empty one.
PREFERRED = (
    ("teacher", "ema", "model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "target_encoder"),
    ("", "base_encoder", "encoder_q", "online_network"),
    ("student", "momentum_encoder", "encoder_k", "target_network"),
)
_FOREIGN = re.compile(r"^(visual|radio_model|beit3|preprocessor|vision_encoder|image_encoder|vision_tower|vision)\.")
_RESAMPLED = re.compile(r"pos_?embed|position|patch|conv1\.weight")
_CONFUSED = (LookupError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError)
_LARGEST_RESAMPLED = 50_000_000  # numbers in a tensor; larger ones keep the type that they are stored in


class _Traced(Tensor):
    """A tensor that knows from which tensors of a file it was computed."""

    sources: frozenset[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        sources = frozenset().union(*_sources((args, kwargs or {})))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, _Traced):
                each.sources = sources
        return out


def _sources(value: Any) -> Iterable[frozenset[str]]:
    if isinstance(value, _Traced):
        yield getattr(value, "sources", frozenset())
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _sources(each)
    elif isinstance(value, dict):
        yield from _sources(list(value.values()))


@dataclass(frozen=True)
class Match:
    """What an attempt gave.

    prefix: where the model's tensors are in the file, "" or ending in a dot. layout: how their names are called, "" for
    timm's. state: the tensors under the model's names. missing, unknown, wrong: names that the model wants and the
    file has not, that only the file has, and of other shapes. ignored: names in the file that no features need.
    others: further prefixes under which the file holds the model. rivals: those of them that nothing ranks lower and
    that hold other values.
    """

    prefix: str
    layout: str
    state: State
    missing: list[str]
    unknown: list[str]
    wrong: list[str]
    ignored: list[str]
    others: list[str] = field(default_factory=list)
    rivals: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unknown or self.wrong)

    @property
    def misfits(self) -> int:
        return len(self.missing) + len(self.unknown) + len(self.wrong)


def find_match(model: nn.Module, tensors: Mapping[str, Tensor]) -> Match:
    """Return the first attempt that fits, in the order of `_attempts`, else the one with the fewest misfits."""
    search = _Search(model, tensors)
    best: Match | None = None
    for prefix, layout in search.attempts():
        for match in search.matches(prefix, layout):
            if match.fits:
                return replace(match, rivals=search.rivals(match))
            if best is None or match.misfits < best.misfits:
                best = match
    assert best is not None, "the file as a whole is always an attempt"
    return best


class _Search:
    """All that the attempts on one file share."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self.model = model
        self.wanted: dict[str, Tensor] = model.state_dict()
        self.counters = {name for name, value in self.wanted.items() if not value.is_floating_point()}
        self.tensors = self._plainly_named(tensors)
        self.hits, self.foreign = self._counted()
        self._conversion: list[Conversion | None] = []

    def _plainly_named(self, tensors: Mapping[str, Tensor]) -> State:
        """Return the tensors without wrappers and chunks in their names, where no two get one name by that."""
        names = {name: unwrapped(name) for name in tensors}
        if len(set(names.values())) < len(names):
            names = {name: name for name in tensors}
        chunks = {name: unchunked(plain) for name, plain in names.items()}
        if len(set(chunks.values())) == len(names) and all(unchunked(name) == name for name in self.wanted):
            names = chunks
        return {names[name]: value for name, value in tensors.items()}

    def _counted(self) -> tuple[Counter[tuple[str, Layout | None]], set[str]]:
        """Return how many wanted names each prefix has in each layout, and the prefixes of what timm converts."""
        hits: Counter[tuple[str, Layout | None]] = Counter()
        signed: set[tuple[str, Layout | None]] = set()
        foreign: set[str] = set()
        for name in self.tensors:
            for prefix, rest in _splits(name):
                if _FOREIGN.match(rest):
                    foreign.add(prefix)
                hits[prefix, None] += rest in self.wanted
                for layout in RENAMED:
                    hits[prefix, layout] += layout.renamed(rest) in self.wanted
                    if layout.sign.search(rest):
                        signed.add((prefix, layout))
        found = {each: number for each, number in hits.items() if number and (each[1] is None or each in signed)}
        return Counter(found), foreign

    def attempts(self) -> list[tuple[str, Layout | None]]:
        """Return (prefix, layout) with the most names in common first, of equal ones as ``PREFERRED`` has it."""
        hits = self.hits
        ranked = sorted(hits, key=lambda each: (-hits[each], *rank(each[0]), each[1] is not None))
        first = [each for each in ranked[: 4 * MOST_PREFIXES] if each[1] is None or hits[each] > hits[each[0], None]]
        parents = [(prefix, None) for each in first[:2] for prefix, _ in _splits(each[0].removesuffix("."))]
        more = [(prefix, None) for prefix in sorted(self.foreign, key=rank)[:MOST_PREFIXES]]
        return list(dict.fromkeys([*first[:MOST_PREFIXES], *more, *parents, ("", None)]))

    def matches(self, prefix: str, layout: Layout | None) -> Iterable[Match]:
        """Yield what the tensors under a prefix give: as they are, then after timm's conversion."""
        inside = {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}
        renamed = inside if layout is None else {layout.renamed(name): value for name, value in inside.items()}
        if len(renamed) < len(inside):  # two tensors of one name: it is another layout
            return
        state = joined(renamed, self.wanted)
        yield self._compared(prefix, layout, state, [])
        yield self._converted(prefix, layout, state)

    def _converted(self, prefix: str, layout: Layout | None, state: State) -> Match:
        if not self._conversion:
            self._conversion.append(conversion_of(self.model))
        conversion = self._conversion[0]
        if conversion is None:
            return self._compared(prefix, layout, self._resampled(state), [])
        traced = {name: _traced(name, value) for name, value in state.items()}
        try:
            given = conversion(traced, self.model)
        except _CONFUSED:  # timm's conversions rely on their own layout
            return self._compared(prefix, layout, self._resampled(state), [])
        used = frozenset().union(*(getattr(value, "sources", frozenset()) for value in given.values()))
        dropped = [name for name in state if name not in used]
        inner = _common_prefix(used)
        plain = self._resampled({name: self._own_patches(name, value, state) for name, value in given.items()})
        outside = [name for name in dropped if not name.startswith(inner)]
        inside = [name for name in dropped if name.startswith(inner)]
        lost = [name for name in inside if not (is_unneeded(name.removeprefix(inner)) or _is_void(name, state[name]))]
        lost += [name for name in state if has_lost_keys(name, state[name], self.wanted)]
        return self._compared(prefix, layout, plain, [*outside, *(name for name in inside if name not in lost)], lost)

    def _compared(
        self, prefix: str, layout: Layout | None, state: State, dropped: list[str], lost: Iterable[str] = ()
    ) -> Match:
        given = {name: value for name, value in state.items() if name in self.wanted}
        for name in self.counters & set(given):
            if given[name].shape != self.wanted[name].shape:
                del given[name]
        rest = [name for name in state if name not in self.wanted]
        unneeded = [name for name in rest if self._is_head(name) or is_unneeded(name) or _is_void(name, state[name])]
        return Match(
            prefix=prefix,
            layout="" if layout is None else layout.label,
            state=given,
            missing=sorted(set(self.wanted) - set(given) - self.counters),
            unknown=sorted({*rest, *lost} - set(unneeded)),
            wrong=[name for name in self.wanted if name in given and not _alike(given[name], self.wanted[name])],
            ignored=[*(name for name in self.tensors if not name.startswith(prefix)), *unneeded, *dropped],
            others=self._others(prefix, layout),
        )

    def _others(self, prefix: str, layout: Layout | None) -> list[str]:
        """Return the other prefixes under which the file has as many of the wanted names."""
        here = self.hits[prefix, layout]
        found = [each for each, kind in self.hits if kind == layout and self.hits[each, kind] == here]
        return sorted(set(found) - {prefix})

    def rivals(self, match: Match) -> list[str]:
        """Return the other prefixes of the same rank that hold other values."""
        same = [each for each in match.others if rank(each)[0] == rank(match.prefix)[0]]
        return [each for each in same if self._differ(match.prefix, each)]

    def _differ(self, prefix: str, other: str) -> bool:
        names = [name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix)]
        pairs = [
            (self.tensors[prefix + name], self.tensors[other + name]) for name in names if other + name in self.tensors
        ]
        return any(not torch.equal(one, another) for one, another in pairs)

    def _is_head(self, name: str) -> bool:
        record: Any = getattr(self.model, "pretrained_cfg", None) or {}
        heads = record.get("classifier") if isinstance(record, dict) else getattr(record, "classifier", None)
        names = (heads,) if isinstance(heads, str) else tuple(heads or ())
        return any(name in (f"{head}.weight", f"{head}.bias") for head in names)

    def _own_patches(self, name: str, value: Tensor, state: State) -> Tensor:
        """Return a converted tensor; patches of another size as they are in the file, where timm would resample them.

        Only FlexiViT is trained for patches of several sizes: of any other model it would be another model.
        """
        sources = [state[each] for each in getattr(value, "sources", ()) if each.endswith("proj.weight")]
        resampled = [each for each in sources if each.ndim == value.ndim == 4 and each.shape[2:] != value.shape[2:]]
        if resampled and "patch_embed" in name and not architecture_of(self.model).startswith("flexivit"):
            return resampled[0]
        return value.as_subclass(Tensor)

    def _resampled(self, state: State) -> State:
        """Return the state with positions of another image size resampled, where timm's conversion has not done so."""
        positions, wanted = state.get("pos_embed"), self.wanted.get("pos_embed")
        grid = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        if positions is None or wanted is None or grid is None or positions.ndim != 3 or wanted.ndim != 3:
            return state
        prefix = wanted.shape[1] - grid[0] * grid[1]
        side = (positions.shape[1] - prefix) ** 0.5 if positions.shape[1] > prefix else 0.5
        if positions.shape == wanted.shape or prefix < 0 or side != int(side) or positions.shape[2] != wanted.shape[2]:
            return state
        resample = import_timm().layers.resample_abs_pos_embed
        return {**state, "pos_embed": resample(positions.float(), new_size=list(grid), num_prefix_tokens=prefix)}


def _traced(name: str, value: Tensor) -> Tensor:
    if _RESAMPLED.search(name) and value.is_floating_point() and value.numel() <= _LARGEST_RESAMPLED:
        value = value.float()
    out = value.as_subclass(_Traced)
    out.sources = frozenset({name})
    return out


def _splits(name: str) -> Iterable[tuple[str, str]]:
    """Yield ("", "a.b.c"), ("a.", "b.c"), ("a.b.", "c")."""
    yield "", name
    for found in re.finditer(r"\.", name):
        yield name[: found.end()], name[found.end() :]


def rank(prefix: str) -> tuple[int, int, str]:
    words = [word for word in prefix.split(".") if word]
    ranks = [rank for rank, names in enumerate(PREFERRED) for word in words if word in names]
    return (max(ranks) if 2 in ranks else min(ranks, default=1), len(words), prefix)


def _common_prefix(names: Iterable[str]) -> str:
    """Return the longest prefix, "" or ending in a dot, that all names have."""
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return "".join(f"{part}." for part in common)


def _is_void(name: str, value: Tensor) -> bool:
    """Tell whether a tensor changes nothing: a bias of zeros."""
    return name.endswith("bias") and not bool(value.as_subclass(Tensor).any())


def _alike(given: Tensor, wanted: Tensor) -> bool:
    numbers = given.is_floating_point() == wanted.is_floating_point() and given.dtype.itemsize > 1
    return given.shape == wanted.shape and (numbers or not wanted.is_floating_point())
