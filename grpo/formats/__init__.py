"""Public datasets in the form in which their authors publish them -> prompts."""
