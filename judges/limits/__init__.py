"""What bounds the calls to one endpoint. Each limit takes a clock in seconds; none knows HTTP, prompts or verdicts."""
