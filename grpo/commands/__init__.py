"""The commands of the command line that have options of their own: parse, check, import late, call."""
