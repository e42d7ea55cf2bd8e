"""How the weights came about: both stages, and the small CLIP of the demo world. The only door to Lightning."""
