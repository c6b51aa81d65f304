"""Finding a published artifact, or saying which command makes it."""

from __future__ import annotations

from pathlib import Path

from pipeline.artifacts import Manifest, RunFolder, quoted


def published(folder: RunFolder, stage: str, instance: str | None = None) -> Path:
    """Return the folder of a published artifact; ValueError naming the command when it is missing."""
    artifact = folder.artifact(stage, instance)
    if artifact.manifest() is None:
        command = f"grappa run {quoted(folder.root)} --until {stage}"
        raise ValueError(f"{artifact.name} is missing in {folder.root}; run `{command}`")
    return artifact.home


def check_same_origin(folder: RunFolder, *names: str) -> None:
    """Refuse artifacts of different generations: each input digest that two of them share must be the same.

    ``names`` are artifact names such as ``model`` or ``clusters/k00256``; what one of them has as an input and another
    one *is* must agree too. ValueError naming the command that mends it.
    """
    seen: dict[tuple[str, str], str] = {}
    for name in names:
        stage, _, instance = name.partition("/")
        manifest = folder.artifact(stage, instance or None).manifest()
        for place, digest in _digests(name, manifest).items() if manifest else ():
            if seen.setdefault(place, digest) != digest:
                raise ValueError(
                    f"{', '.join(names)} in {folder.root} do not belong together: {place[0]} was made again in "
                    f"between; run `grappa run {quoted(folder.root)}`"
                )


def _digests(name: str, manifest: Manifest) -> dict[tuple[str, str], str]:
    inputs = {
        (each, file): digest for each, files in manifest.recipe["inputs"].items() for file, digest in files.items()
    }
    return inputs | {(name, file): str(entry["sha256"]) for file, entry in manifest.outputs.items()}
