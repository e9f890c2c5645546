"""`grpo bench memory`: memory configurations run for their peaks, each in a process, beside what the plan says."""
