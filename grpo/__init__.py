"""GRPO fine-tuning of language models against several objectives."""
