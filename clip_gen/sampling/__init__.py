"""Embeddings to tokens: sampling, batches that several requests share, and the fast steps of a GPU."""
