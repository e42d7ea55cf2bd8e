"""The procedural demo world: endless pictures of plain shapes, their captions, and a judge that grades them.

Reading order: scenes (what may stand in a picture), rendering (scene -> pixels), captions (scene -> words),
fitting (a blob's pixels -> its shape), judge (pixels -> scene), pairs (what CLIP is trained on), spoiling (pictures
gone wrong), folder (pictures on disk).
"""
