"""Endless pictures of plain shapes, their captions, and a judge that grades generated ones.

Start with scenes; rendering makes pixels of a scene, captions makes words, and judge reads a scene from pixels.
"""
