"""A model folder of a stranger: whatever stands in it, the model opens and embeds, or one ModelError says why not."""

from __future__ import annotations

import copy
import json
import operator
import os
import pickle
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import grappa
from grappa.backbone import architectures
from grappa.backbone.frozen import build_backbone
from grappa.backbone.spec import BackboneSpec
from grappa.backbone.weights import import_timm
from grappa.method.adaptors import AdaptorSet
from grappa.method.fusion import Fusion
from grappa.method.head import fit_neighborhood_head
from grappa.model import ModelError, save_model
from tests.helpers.tiny import tiny_backbone, tiny_set

SECONDS, MEGABYTES = 5.0, 150  # a second on a quiet machine; the tests share theirs
HUGE = 10**30
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 10**6, 2**31, 2**63, HUGE, 0.0, -0.5, 1e-30, 1e300, 1e400, float("nan")),
    *("", "x", "vit_tiny_patch16_224", "hf-hub:a/b", "local-dir:/", "../..", "\x1b[31m", "a\nb", "\0", "\ud800"),
    *([], [[]], {}, {"a": 1}, [0.5, 0.5, 0.5], [0, 0, 0], [1e-30] * 3, ["a"], ["k00000"] * 3, ["a"] * 10_000),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    fusion = Fusion([tiny_set(i) for i in range(3)], temperature=0.5)
    fusion.start(query_std=0.3, key_std=0.3, generator=torch.Generator().manual_seed(9))
    train = F.normalize(torch.randn(40, 32, generator=torch.Generator().manual_seed(0)), dim=1).numpy()
    head = fit_neighborhood_head(train, np.arange(40, dtype=np.uint64))
    save_model(path, tiny_backbone(), {f"k0000{i}": tiny_set(i) for i in range(3)}, fusion, cache_size=40, head=head)
    grappa.load_model(path)  # imports timm, once
    return path


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    for file in made.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model folder must not lead to the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def opens_or_says_why(folder: Path) -> str:
    """Return the sentence of the refusal, "" where the model opens; fail at anything else."""
    begin, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        model = grappa.load_model(folder)
    except ModelError as error:
        said = str(error)
        assert 20 < len(said) < 1000 and said.isprintable(), repr(said)
    else:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3)).astype(np.uint8))
        assert bool(torch.isfinite(model(model.preprocess(image).unsqueeze(0))).all()), "opened, but gives no numbers"
        said = ""
    assert time.monotonic() - begin < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEGABYTES * 1024
    return said


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from _places(part, (*path, key))


def _changed(record: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    changed = copy.deepcopy(record)
    inside = changed
    for key in path[:-1]:
        inside = inside[key]
    change(inside, path[-1])
    return changed


@pytest.mark.parametrize("part", range(4))
def test_any_value_in_any_place_of_the_record_opens_or_is_refused(folder: Path, part: int) -> None:
    file = folder / "model.json"
    record = json.loads(file.read_text())
    cases = [(path, value) for path in _places(record) if path for value in VALUES]
    for path, value in cases[part::4]:
        file.write_text(
            json.dumps(_changed(record, path, lambda inside, key, to=value: operator.setitem(inside, key, to)))
        )
        opens_or_says_why(folder)
    for value in VALUES[part::4]:
        file.write_text(json.dumps(value))
        assert opens_or_says_why(folder)


def test_a_key_that_is_missing_or_new_is_refused(folder: Path) -> None:
    file = folder / "model.json"
    record = json.loads(file.read_text())
    objects = [path for path in _places(record) if not path or path[-1] in ("backbone", "options", "fusion", "head")]
    for path in [path for path in _places(record) if path and isinstance(path[-1], str)]:
        file.write_text(json.dumps(_changed(record, path, lambda inside, key: inside.pop(key))))
        assert opens_or_says_why(folder)
    for path in objects:
        file.write_text(json.dumps(_changed(record, (*path, "checkpoint_path"), lambda i, key: i.update({key: "x"}))))
        assert opens_or_says_why(folder)


@pytest.mark.parametrize(
    "options",
    [
        *({name: "local-dir:/"} for name in ("checkpoint_path", "cache_dir", "pretrained_cfg", "file", "url")),
        {"pretrained": True},
        {"pretrained_cfg": {"file": "weights.pth"}},
        {"pretrained_cfg_overlay": {"url": "http://example.org/x.pth"}},
        {"features_only": True},
        {"img_size": 64},
        {"num_classes": 1000},
        {"class_token": False},
        {"device": "meta"},
        *({"depth": value} for value in (0, -1, 10**6, HUGE, True, 2.0, "2")),
        *({"embed_dim": value} for value in (0, 10**9, HUGE)),
        *({"num_heads": value} for value in (0, 5, 10**9)),
        *({"patch_size": value} for value in (0, 10**9)),
        *({"mlp_ratio": value} for value in (0, -1, 1e9, float("inf"), float("nan"))),
        *({name: "os.system"} for name in ("norm_layer", "act_layer", "attn_layer", "block_fn", "mlp_layer")),
        {"norm_layer": "no_such_layer"},
    ],
    ids=str,
)
def test_options_that_load_reach_out_or_grow_are_refused(folder: Path, options: dict[str, Any]) -> None:
    file = folder / "model.json"
    record = json.loads(file.read_text())
    record["backbone"]["options"] |= options
    file.write_text(json.dumps(record))
    assert opens_or_says_why(folder)


class _Touch:
    """What a pickle of a stranger does when it is loaded: here it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_no_other_file_is_read_and_nothing_is_run(folder: Path, tmp_path: Path) -> None:
    other, ran = tmp_path / "other", tmp_path / "ran"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    for name in ("pytorch_model.bin", "model.pth", "weights.pth"):
        (other / name).write_bytes(pickle.dumps(_Touch(ran)))
        (folder / name).write_bytes(pickle.dumps(_Touch(ran)))
    file = folder / "model.json"
    record = json.loads(file.read_text())
    names = (f"local-dir:{other}", str(other), f"hf-hub:{other}", "hf_hub:a/b", "timm/vit_tiny_patch16_224")
    for name in names:
        file.write_text(json.dumps({**record, "backbone": {**record["backbone"], "name": name}}))
        assert opens_or_says_why(folder)
    options = {**record["backbone"]["options"], "checkpoint_path": str(other / "weights.pth")}
    file.write_text(json.dumps({**record, "backbone": {**record["backbone"], "options": options}}))
    assert opens_or_says_why(folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff\xfe{", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"NaN", b'"\\ud800"', b" " * 2_000_000],
    ids=lambda text: repr(text[:8]),
)
def test_text_that_is_no_record_is_refused(folder: Path, text: bytes) -> None:
    (folder / "model.json").write_bytes(text)
    assert opens_or_says_why(folder)


def test_a_record_is_no_larger_than_a_record_can_be(folder: Path) -> None:
    file = folder / "model.json"
    file.write_text(file.read_text() + " " * 2_000_000)
    assert "expected a file of at most 1048576 bytes" in opens_or_says_why(folder)


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
def test_what_is_no_regular_file_is_refused_at_once(folder: Path, name: str) -> None:
    file = folder / name

    def special(make: Callable[[], object]) -> None:
        file.unlink(missing_ok=True)
        make()
        assert opens_or_says_why(folder)

    special(lambda: os.mkfifo(file))
    special(lambda: file.symlink_to(file.name))
    special(lambda: file.symlink_to("/dev/zero"))
    special(lambda: file.symlink_to("nowhere"))
    special(lambda: os.truncate(os.open(file, os.O_CREAT | os.O_WRONLY), 1 << 40))  # takes no room
    special(lambda: None)
    file.mkdir()
    assert opens_or_says_why(folder)
    for odd in ("\0", "x" * 5000, f"{folder}/model.json/deeper"):
        with pytest.raises(ModelError):
            grappa.load_model(odd)


Tensors = dict[str, torch.Tensor]


def _tensor_changes() -> dict[str, Callable[[Tensors, str], object]]:
    def put(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors, str], object]:
        return lambda tensors, name: tensors.update({name: make(tensors[name]).contiguous()})

    return {
        "missing": lambda tensors, name: tensors.pop(name),
        "renamed": lambda tensors, name: tensors.update({name.replace("0", "1000000000", 1) + "x": tensors.pop(name)}),
        "of a far block": lambda tensors, name: (
            tensors.update({name.replace(".0.", ".999999999."): tensors.pop(name)})
            if ".0." in name
            else tensors.pop(name)
        ),
        "nan": put(lambda value: value * float("nan")),
        "infinite": put(lambda value: value + float("inf")),
        "half": put(lambda value: value.half()),
        "whole": put(lambda value: value.long()),
        "empty": put(lambda value: value.new_zeros((0, 10**9))),
        "flat": put(lambda value: value.flatten()[None, None, None]),
        "longer": put(lambda value: torch.cat([value, value])),
        "scalar": put(lambda value: value.flatten()[0]),
    }


@pytest.mark.parametrize("how", _tensor_changes())
def test_tensors_that_are_not_the_models_are_refused(folder: Path, how: str) -> None:
    file = folder / "weights.safetensors"
    tensors = load_file(file)
    kinds = {name.replace("1", "0").replace("2", "0"): name for name in reversed(tensors)}  # one of each kind
    for name in kinds.values():
        changed = {each: value.clone() for each, value in tensors.items()}
        _tensor_changes()[how](changed, name)
        save_file(changed, file)
        assert opens_or_says_why(folder), (how, name)


def test_damaged_bytes_are_refused_or_change_only_numbers(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, times in (("model.json", 150), ("weights.safetensors", 60)):
        file = folder / name
        whole = file.read_bytes()
        for _ in range(times):
            damaged = bytearray(whole)
            damaged[int(rng.integers(min(len(whole), 6000)))] = int(rng.integers(256))
            file.write_bytes(damaged if rng.integers(4) else damaged[: int(rng.integers(len(whole)))])
            opens_or_says_why(folder)
        file.write_bytes(whole)


def test_the_model_does_not_change_with_its_files(folder: Path) -> None:
    model, images = grappa.load_model(folder), torch.randn(2, 3, 32, 32)
    before = model(images)
    for file in folder.iterdir():
        os.truncate(file, 0)
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224", "deit_tiny_distilled_patch16_224"])
def test_what_a_user_may_configure_is_what_opens(name: str, tmp_path: Path) -> None:
    """An architecture with options of each kind is exported and opened again."""
    options = {"embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0, "qkv_bias": True, "init_values": 1e-5}
    if name == "vit_tiny_patch16_224":
        options |= {"reg_tokens": 2, "norm_layer": "layernorm", "act_layer": "gelu_tanh"}
    spec = BackboneSpec(name, 64, 0.9, (0.5,) * 3, (0.5,) * 3, options)
    backbone = build_backbone(spec)
    save_model(tmp_path, backbone, {"student": AdaptorSet([32], 4)}, None, cache_size=64)
    assert not opens_or_says_why(tmp_path)
    assert grappa.load_model(tmp_path).backbone.spec == spec


def test_every_pretrained_name_of_timm_is_allowed() -> None:
    for name in import_timm().list_models(pretrained=True):
        architectures.check_name(name)


STAGED = {"name": "swin_tiny_patch4_window7_224", "options": {"embed_dim": 8, "window_size": 4}}


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in stages, whose tables of positions and masks are computed when it is opened."""
    path = tmp_path_factory.mktemp("staged")
    backbone = build_backbone(BackboneSpec(STAGED["name"], 64, 1.0, (0.5,) * 3, (0.5,) * 3, STAGED["options"]))
    save_model(path, backbone, {"student": AdaptorSet.of(backbone, 2)}, None, cache_size=64)
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"name": "resnet18"},
        {"name": "efficientformer_l1"},
        {"name": "levit_128"},
        {"name": "vit_giant_patch14_dinov2"},
        {"image_size": 8192},
        {"options": {"embed_dim": 8, "window_size": 256}},
        {"options": {"embed_dim": 16384, "window_size": 4}},
        {"name": "efficientvit_m0", "image_size": 8192},
        {"name": "mvitv2_tiny", "image_size": 8192},
        {"name": "levit_128", "image_size": 8192},
        {"name": "efficientformerv2_s0", "image_size": 8192},
        {"name": "vit_base_patch16_rope_224", "image_size": 8192},
    ],
    ids=str,
)
def test_a_record_of_another_family_or_size_is_refused(staged: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    for file in staged.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "model.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "backbone": {**record["backbone"], **change}}))
    assert opens_or_says_why(tmp_path)


def test_a_table_of_whole_numbers_must_be_the_architectures_own(tmp_path: Path) -> None:
    backbone = build_backbone(BackboneSpec("efficientformer_l1", 224, 1.0, (0.5,) * 3, (0.5,) * 3))
    save_model(tmp_path, backbone, {}, None, cache_size=224)
    file = tmp_path / "weights.safetensors"
    tensors = load_file(file)
    (table,) = [name for name in tensors if name.endswith("attention_bias_idxs")]
    tensors[table][0, 0] = 10**6
    save_file(tensors, file)
    assert "is not the table of this architecture" in opens_or_says_why(tmp_path)
