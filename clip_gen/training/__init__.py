"""Training of both stages with Lightning, from images to a model folder."""
