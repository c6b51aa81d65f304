"""Grappa: adapt one pretrained vision model to several retrieval domains at once, without labels."""
