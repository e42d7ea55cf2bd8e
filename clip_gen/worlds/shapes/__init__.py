"""Pictures of plain shapes: scenes, their captions and renders, and a judge that reads a scene from pixels."""
