"""Data: captioned pictures from files, tables and scenes, checked, cropped and served by row."""
