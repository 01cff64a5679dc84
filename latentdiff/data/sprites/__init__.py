"""Scenes composed of sprites: pictures with names and styles, on backgrounds, with captions that say what is there."""
