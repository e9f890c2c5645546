"""Recipes that ship with the toolkit, found by name: `grpo train quickstart`."""
