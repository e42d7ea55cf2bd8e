"""The discriminator that a published VQGAN comes with: kept beside the model under taming's names, for fine-tuning."""

from __future__ import annotations

from torch import Tensor

from clip_gen.networks.discriminator import build_discriminator, discriminator_layers
from clip_gen.weights.importers.state_dict import Foreign, Source, planned


def convert_discriminator(found: Foreign, body: str, head: str | None = None) -> dict[str, Tensor]:
    """Its tensors as `main.<i>...`, or none where the checkpoint has none.

    body: what they call the list of layers. head: their name for the last layer, where it is not in that list.
    """
    if not found.tensors:
        return {}
    layers = discriminator_layers(found.tensors)
    channels = found.size(f"{body}0.weight")
    network = planned(lambda: build_discriminator(channels, layers), found.path)
    last = f"main.{3 * layers + 2}."
    sources = {}
    for name in network.state_dict():
        theirs = head + name.removeprefix(last) if head and name.startswith(last) else body + name.removeprefix("main.")
        sources[name] = Source(theirs)
    return found.converted(network, sources)
