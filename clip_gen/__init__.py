"""CLIP-GEN."""
