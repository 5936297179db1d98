"""Run folders, manifests, publishing, finding, safe reading."""
