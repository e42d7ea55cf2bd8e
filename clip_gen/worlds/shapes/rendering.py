"""Renders scenes, anti-aliased with 4 x 4 samples per pixel."""

from __future__ import annotations

import numpy as np

from clip_gen.worlds.shapes.scenes import BACKGROUNDS, COLOURS, Scene

SAMPLES = 4  # per pixel and axis


def _is_inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points are inside a shape whose bounding square goes from -1 to 1; y points down."""
    match shape:
        case "circle":
            return x * x + y * y <= 1
        case "ring":
            distance = x * x + y * y
            return (distance <= 1) & (distance >= 0.55**2)
        case "square":
            return np.maximum(abs(x), abs(y)) <= 0.88
        case "diamond":
            return abs(x) / 0.8 + abs(y) <= 1
        case "cross":
            return (np.minimum(abs(x), abs(y)) <= 0.32) & (np.maximum(abs(x), abs(y)) <= 1)
        case "triangle":  # apex (0, -0.95), base from (-1, 0.85) to (1, 0.85)
            return (y <= 0.85) & (abs(x) <= (y + 0.95) / 1.8)
        case "star":
            return _is_inside_star(x, y)
        case "heart":  # (u² + v² - 1)³ <= u² v³, scaled into the bounding square
            u, v = x * 1.14, 0.12 - y * 1.12
            inner = u * u + v * v - 1
            return inner * inner * inner <= u * u * v * v * v
    raise ValueError(f"no shape is called {shape}")


def _is_inside_star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points, one up. By symmetry all points fall into half of one tip; then test the side of its edge."""
    angle = abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(x, y)
    tip, notch, half = 1.0, 0.45, np.pi / 5
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    notch_x, notch_y = notch * np.cos(half), notch * np.sin(half)
    return (notch_y * (along - tip) - (notch_x - tip) * across) <= 0


def coverage(shape: str, x: float, y: float, radius: float, resolution: int) -> np.ndarray:
    """The share of each pixel that the shape covers: (resolution, resolution) float32 in [0, 1]."""
    covered = np.zeros((resolution, resolution), np.float32)
    left, top = (max(0, int(np.floor((c - radius) * resolution))) for c in (x, y))
    right, bottom = (min(resolution, int(np.ceil((c + radius) * resolution)) + 1) for c in (x, y))
    if left >= right or top >= bottom:
        return covered
    steps = (np.arange(SAMPLES) + 0.5) / SAMPLES
    columns = ((np.arange(left, right)[:, None] + steps).ravel() / resolution - x) / radius
    rows = ((np.arange(top, bottom)[:, None] + steps).ravel() / resolution - y) / radius
    inside = _is_inside(shape, columns[None, :], rows[:, None])
    cells = inside.reshape(bottom - top, SAMPLES, right - left, SAMPLES)
    covered[top:bottom, left:right] = cells.mean(axis=(1, 3))
    return covered


def render(scene: Scene, resolution: int = 64) -> np.ndarray:
    """The scene as (resolution, resolution, 3) uint8 RGB."""
    picture = np.empty((resolution, resolution, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for item in scene.items:
        alpha = coverage(item.shape, item.x, item.y, item.radius, resolution)[..., None]
        picture += alpha * (np.float32(COLOURS[item.colour]) - picture)
    return (picture + 0.5).astype(np.uint8)
