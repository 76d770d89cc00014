"""Measuring what SUGAR costs: time, memory, compilations."""
