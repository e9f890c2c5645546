"""Show a running job's memory by phase, beside its plan: python scripts/check_gpu_memory.py RUN_DIRECTORY.

The same as grpo doctor --watch.
"""

import sys

from grpo.cli import main

if __name__ == "__main__":
    sys.argv = ["grpo", "doctor", "--watch", *sys.argv[1:]]
    main()
