"""Errors, commands and signals, progress, files, untrusted input, devices."""
