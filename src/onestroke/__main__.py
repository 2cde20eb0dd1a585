"""`python -m onestroke`, for torchrun."""

from onestroke.cli import main

main()
