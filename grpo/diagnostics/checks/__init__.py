"""The checks of `grpo verify`: each takes the subject, a real model with a real batch, and gives findings."""
