"""Weights on disk and from elsewhere: model folders, tars, downloads, and other people's checkpoints."""
