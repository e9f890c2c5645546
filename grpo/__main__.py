"""`python -m grpo` is the command `grpo`."""

from grpo.cli import main

main()
