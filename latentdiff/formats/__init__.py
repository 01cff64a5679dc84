"""The files and folders of models and adapters: their layouts, their hashes, and which files are refused."""
