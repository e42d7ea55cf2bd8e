"""Shares with confidence intervals, under the name by which the worlds import them."""

from clip_gen.metrics.intervals import Share

__all__ = ["Share"]
