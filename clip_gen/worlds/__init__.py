"""Procedural worlds: endless pictures, the recipe of a model of them, and a judge that grades it."""
