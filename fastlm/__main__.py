"""python -m fastlm."""

from .cli import main

main()
