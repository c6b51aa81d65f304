"""Built-in images and a small pretrained ViT: the whole pipeline runs without a network and without data at hand."""
