"""File formats, one module each; ``opening`` chooses."""
