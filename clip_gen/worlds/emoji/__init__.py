"""The emoji world: scenes of named things drawn by several artists, with captions, and a judge."""
