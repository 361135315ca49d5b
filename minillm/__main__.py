"""`python -m minillm` is `minillm`."""

from minillm.cli import main

main()
