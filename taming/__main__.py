"""`python -m taming`, so that `accelerate launch -m taming vq train ...` works."""

from taming.cli import main

main()
