"""Blind pairwise votes on the pictures of two models, and what follows from them."""
