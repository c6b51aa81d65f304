"""Drawn images and a small pretrained ViT, with which the whole pipeline runs without a network and without data."""
