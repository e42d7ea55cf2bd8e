"""The networks: CLIP, the VQGAN, the transformer and what joins them. Plain modules, without files or training."""
