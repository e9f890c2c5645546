"""What is wrong with a machine or a recipe, found in seconds and before any weights are read."""
