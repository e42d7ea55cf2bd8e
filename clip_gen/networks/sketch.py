"""A first idea of a picture, from its condition alone: features for every position of the grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.config import GPTConfig

HIDDEN, CODE, CELL, TONE, FEATURES = 1024, 512, 32, 32, 96  # widths


class Sketch(nn.Module):
    """What is drawn, and where: each of a few drawings is a square of cells, laid at all places of a map.

    Both come from the condition, so what is learnt about a drawing holds wherever it lies. A tone of the whole picture
    then modulates the features, for what does not depend on the place, as feature-wise modulation, arXiv 1709.07871.
    The squares are convolved with the maps, as in dynamic filter networks, arXiv 1605.09673.

    A transformer learns slowly what a condition means: most of a token can be told from those before it. The sketch
    sees no tokens, and takes a small fraction of the transformer's time, so it can see each picture many times.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.drawings, self.cells, positions = config.sketch_drawings, config.sketch_cells, config.block_size
        self.hidden = nn.Linear(config.n_embd, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.codes = nn.Linear(HIDDEN, self.drawings * CODE)
        self.squares = nn.Linear(CODE, self.cells**2 * CELL)
        self.maps = nn.Linear(HIDDEN, self.drawings * positions)
        self.tone = nn.Linear(HIDDEN, TONE)
        self.modulation = nn.Linear(TONE, 2 * FEATURES)
        self.position = nn.Parameter(torch.zeros(positions, CELL))
        self.mix = nn.Linear(CELL, FEATURES)
        self.head = nn.Linear(FEATURES, config.codebook_size)
        self.register_buffer("origins", square_origins(math.isqrt(positions), self.cells), persistent=False)

    def init_weights(self) -> None:
        for linear in (self.hidden, self.codes, self.squares, self.mix):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for linear in (self.maps, self.tone, self.modulation):
            nn.init.normal_(linear.weight, std=0.5 * linear.in_features**-0.5)
        nn.init.constant_(self.maps.bias, -3.0)  # nearly empty
        nn.init.normal_(self.head.weight, std=0.1)

    def forward(self, condition: Tensor, positions: Tensor | None = None) -> Tensor:
        """Features (B, K, FEATURES) of positions (B, K), or of all T, for conditions (B, n_embd)."""
        batch = len(condition)
        hidden = self.norm(F.gelu(self.hidden(condition)))
        codes = F.gelu(self.codes(hidden)).view(batch, self.drawings, CODE)
        squares = self.squares(codes).view(batch, self.drawings * self.cells**2, CELL)
        maps = F.pad(self.maps(hidden).view(batch, self.drawings, -1).sigmoid(), (0, 1))  # the last: outside the grid
        origins = self.origins.expand(batch, -1, -1) if positions is None else self.origins[positions]
        count = origins.shape[1]
        present = maps.gather(2, origins.reshape(batch, 1, -1).expand(-1, self.drawings, -1))
        present = present.view(batch, self.drawings, count, -1).transpose(1, 2).reshape(batch, count, -1)
        drawn = present @ squares.to(present.dtype) + (self.position if positions is None else self.position[positions])
        scale, shift = self.modulation(F.gelu(self.tone(hidden)))[:, None].chunk(2, dim=2)
        return F.gelu(self.mix(drawn) * (1 + scale) + shift)


def square_origins(side: int, cells: int) -> Tensor:
    """The position of a square's upper left cell if a given cell of it lies at a position, (side², cells²).

    side² if that is outside the grid.
    """
    position, cell = torch.arange(side**2)[:, None], torch.arange(cells**2)
    row, column = position // side - cell // cells, position % side - cell % cells
    return torch.where((row >= 0) & (column >= 0), row * side + column, side**2)
