"""The vocabulary every other part speaks. Imports torch and nothing else."""
