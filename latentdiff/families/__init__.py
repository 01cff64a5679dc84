"""Kinds of models: which parts go together, how a model is read from a folder and written to one."""
