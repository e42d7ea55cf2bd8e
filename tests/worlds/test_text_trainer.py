"""worlds/text_trainer.py: texts come closer to their pictures, and the image tower stays as it is."""

from __future__ import annotations

import numpy as np
import torch
from conftest import TINY
from torch.nn import functional as F

from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.worlds.text_trainer import align_texts

CAPTIONS = [("a red circle", "a red shape"), ("a blue square", "a blue shape"), ("a green star", "a star")]


def test_captions_come_close_to_their_pictures_and_the_image_tower_stays() -> None:
    torch.manual_seed(0)
    encoder = ClipEncoder(TINY.clip)
    table = encoder.clip.token_embedding.weight
    table[encoder.tokenize.encode("zebra")] = 0
    visual = {name: tensor.clone() for name, tensor in encoder.clip.visual.state_dict().items()}
    embeddings = F.normalize(torch.randn(3, TINY.clip.embed_dim), dim=1).numpy().astype(np.float16)

    def cosine() -> float:
        texts = encoder.encode_text([text for text, _ in CAPTIONS])
        return float((texts * torch.from_numpy(embeddings).float()).sum(dim=1).mean())

    before = cosine()
    record = align_texts(encoder, embeddings, CAPTIONS.__getitem__, steps=60, seed=0)
    assert cosine() > before + 0.5
    assert record["cosine"] > 0.5
    for name, tensor in encoder.clip.visual.state_dict().items():
        assert torch.equal(tensor, visual[name]), name
    assert encoder.unknown_words("a red zebra") == ["zebra"]
