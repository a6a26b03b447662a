"""Text to typed tree: the grammar, the syntax tree, the checker and the formatter of `.attn` files."""
