"""GPT-NeoX's vocabulary: aliases, conversions, keys without effect, refused keys."""
