"""A pattern called token by token: caches, turns and their launches."""
