"""Other people's weights, converted once into our model folder: HFAiLab's CLIP-GEN, taming's VQGANs, OpenAI's CLIP,
and LPIPS."""
