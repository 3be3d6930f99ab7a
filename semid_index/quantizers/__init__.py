"""Built-in quantizers, each registered through the same hook as a plugin's."""
