"""Trained models in use: load, predict, evaluate, export, and a list of runs."""
