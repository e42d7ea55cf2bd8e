"""Model folders, weights tars, downloads, and imports of published checkpoints."""
