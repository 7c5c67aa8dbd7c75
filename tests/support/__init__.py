"""Tiny random models of every family, prompts for them, and an independent reference."""
