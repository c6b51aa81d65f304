"""A Grounding DINO of a few thousand random parameters with its processor, in a folder as such models come."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from grappa.backbone.weights import import_timm

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers (extra objects) is not installed"
)
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] . ? an object bird plane".split()
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
LAYERS = {"encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2}


def write_detector(folder: Path) -> Path:
    """Write the model (d_model must be a multiple of its 32 groups, two decoder layers must share a head)."""
    import_timm()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(**SWIN, window_size=2, out_indices=[2, 3, 4]),
        text_config=transformers.BertConfig(**BERT, vocab_size=len(WORDS), pad_token_id=0),
        d_model=32,
        num_queries=12,
        max_text_len=32,
        decoder_layers=2,
        decoder_ffn_dim=16,
        decoder_attention_heads=2,
        **LAYERS,
    )
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt"))
    images = transformers.GroundingDinoImageProcessor(size={"shortest_edge": 128, "longest_edge": 256})
    transformers.GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    return folder
