"""Sampling completions: the engines and the processors that shape what they sample."""
