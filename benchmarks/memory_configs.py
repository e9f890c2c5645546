"""How much memory does a configuration take, and does `grpo plan` say so beforehand?

    python benchmarks/memory_configs.py --json memory_cpu.json --plot memory_cpu.png

The same as `grpo bench memory`, which has the cases and the method: models with random weights go through the stages
of a run, each case in a process of its own; the peak of each stage is read and set beside the plan's. `--quick` takes
three of the cases, `--device cuda` measures a card.
"""

from __future__ import annotations

import sys

from grpo.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "memory"]
    main()
