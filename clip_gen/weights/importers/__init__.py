"""Converts published weights to model folders: HFAiLab's CLIP-GEN, taming's VQGANs, OpenAI's CLIP and LPIPS."""
