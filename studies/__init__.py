"""Experiments on the planner itself: each is a module to run, and prints the figures that the code cites."""
