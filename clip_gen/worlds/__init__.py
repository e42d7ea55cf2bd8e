"""Procedural worlds of endless pictures, each with the recipe of a model trained on it and a judge that grades it."""
