"""`python -m triplane`, and so `torchrun -m triplane`: the same command line as `triplane`."""

from triplane.launcher.cli import main

main()
