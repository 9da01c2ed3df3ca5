"""Guests of run.py: what no number depends on (resume, board), and what other names need."""
