"""The seam: layers whole and by name, read from any checkpoint and written as any."""
