"""Shared by every room: errors, arrays, pictures as arrays and as files, writing, the user's cache."""
