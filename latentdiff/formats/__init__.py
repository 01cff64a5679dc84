"""How models and adapters lie on a disk, and which files are refused."""
