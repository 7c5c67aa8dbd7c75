"""Trained heads that draft: their parts, what they read, and the trees that grow from them."""
