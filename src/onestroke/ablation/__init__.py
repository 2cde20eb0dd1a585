"""Runs that differ in one thing and get the same number of pictures, side by side in one table."""
