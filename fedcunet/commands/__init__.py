"""The commands of the console script, one group a file."""
