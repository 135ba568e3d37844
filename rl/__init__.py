"""Teach: a probe on a frozen copy rewards the shrunk model. Not built yet."""
