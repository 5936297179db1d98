"""A trained model on its ranks: logits, scores, cached sampling."""
